#!/usr/bin/env bash
# Copies this checkout's HEAD to every worker and installs it: [BUCKET=name] tpu_scripts/setup.sh [--dry-run]
# With BUCKET, arrol/runs is that bucket on every worker: checkpoints of several hosts need one folder that all see.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.."
archive=$(mktemp -u --suffix=.tar.gz arrol_jax.XXXXXX)
trap 'rm -f "$archive"' EXIT
go git archive --format=tar.gz --output="$archive" HEAD
go gcloud compute tpus tpu-vm scp "$archive" "$NAME:arrol_jax.tar.gz" "${where[@]}" --worker=all
on_worker all 'mkdir -p arrol && tar xzf arrol_jax.tar.gz -C arrol && cd arrol && python3 -m venv .venv &&
  .venv/bin/pip install -q -r requirements.txt "jax[tpu]>=0.10.2,<0.12"'
if [ -n "${BUCKET:-}" ]; then
  on_worker all "mkdir -p arrol/runs && (mountpoint -q arrol/runs || gcsfuse --implicit-dirs $(printf %q "$BUCKET") arrol/runs)"
fi
