#!/usr/bin/env bash
# Trains on every worker, detached: tpu_scripts/run.sh [--dry-run] --config=configs/NAME.py [--workdir=runs/NAME] ...
# The same command after a preemption or a stop goes on from the last checkpoint.
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
[ $# -gt 0 ] || { echo "error: give train.py's arguments, such as --config=configs/qwen3_1b7.py" >&2; exit 2; }
command="nohup .venv/bin/python -m arrol_jax.train$(printf ' %q' "$@")"
on_worker all "cd arrol && { $command > train.log 2>&1 < /dev/null & echo \$! > train.pid; }"
