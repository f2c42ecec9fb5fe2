#!/usr/bin/env bash
# Copies this checkout to every worker and installs it: tpu_scripts/setup.sh [--dry-run]
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.."
go git archive --format=tar.gz -o arrol_jax.tar.gz HEAD
go gcloud compute tpus tpu-vm scp arrol_jax.tar.gz "$NAME": --zone "$ZONE" --worker=all
on_workers 'mkdir -p arrol && tar xzf arrol_jax.tar.gz -C arrol && cd arrol && python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt "jax[tpu]>=0.10.2,<0.12"'
