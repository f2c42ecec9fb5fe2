#!/usr/bin/env bash
# Brings a run's folder and the first worker's log into runs/RUN here: tpu_scripts/sync.sh [--dry-run] RUN
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
run=${1:?give the run, the folder under runs/}
cd "$(dirname "$0")/.."
go mkdir -p "runs/$run"
go gcloud compute tpus tpu-vm scp --recurse "$NAME:arrol/runs/$run" runs "${where[@]}" --worker=0
go gcloud compute tpus tpu-vm scp "$NAME:arrol/train.log" "runs/$run/train.log" "${where[@]}" --worker=0
