# Sourced by the others: reads NAME, ZONE, TYPE; `go` runs a command, or prints it with --dry-run.
: "${NAME:?set NAME, the slice}" "${ZONE:?set ZONE}"
DRY=""
if [ "${1:-}" = "--dry-run" ]; then DRY=1; shift; fi
go() { if [ -n "$DRY" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
on_workers() { go gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }
