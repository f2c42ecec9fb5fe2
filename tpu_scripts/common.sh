# Sourced by the others: reads NAME, ZONE (and PROJECT); `go` runs a command, or with --dry-run prints it.
# shellcheck shell=bash
: "${NAME:?set NAME, the slice}" "${ZONE:?set ZONE, such as us-west4-a}"
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
go() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
on_worker() { go gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"; }
