#!/usr/bin/env bash
# Sends SIGTERM to the training processes, which save and end, as a preemption does: tpu_scripts/stop.sh [--dry-run]
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
on_worker all 'xargs kill -TERM < arrol/train.pid'
