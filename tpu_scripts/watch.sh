#!/usr/bin/env bash
# Follows a worker's log (the first's, or WORKER's) and, where RUN is given, the metrics: tpu_scripts/watch.sh [--dry-run] [RUN]
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
metrics=${1:+runs/$1/metrics.jsonl}
on_worker "${WORKER:-0}" "cd arrol && tail -n 20 -F train.log ${metrics:+$(printf %q "$metrics")}"
