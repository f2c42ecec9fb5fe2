#!/usr/bin/env bash
# Follows the log and the metrics of runs/RUN on the first worker: tpu_scripts/watch.sh [--dry-run] RUN
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
go gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=0 --command "cd arrol && tail -F train.log runs/${1:?give the run}/metrics.jsonl"
