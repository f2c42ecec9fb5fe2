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
# uv brings a Python of its own: the machines' (Ubuntu 22.04: 3.10) is too old for JAX.
on_worker all 'mkdir -p arrol && tar xzf arrol_jax.tar.gz -C arrol && cd arrol && python3 -m pip install -q --user uv &&
  python3 -m uv venv -q --allow-existing --python 3.11 .venv &&
  python3 -m uv pip install -q --python .venv/bin/python -r requirements.txt "jax[tpu]>=0.10.2,<0.12"'
if [ -n "${BUCKET:-}" ]; then
  # A whole checkpoint is a folder renamed, which gcsfuse refuses without a limit.
  mount="gcsfuse --implicit-dirs --rename-dir-limit=200000 $(printf %q "$BUCKET") arrol/runs"
  on_worker all "command -v gcsfuse > /dev/null || { echo error: install gcsfuse on the workers >&2; exit 1; }
    mkdir -p arrol/runs && (mountpoint -q arrol/runs || $mount)"
fi
