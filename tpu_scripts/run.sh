#!/usr/bin/env bash
# Trains on every worker, detached: tpu_scripts/run.sh [--dry-run] --config=configs/NAME.py ...
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
on_workers "cd arrol && nohup .venv/bin/python -m arrol_jax.train $* > train.log 2>&1 &"
