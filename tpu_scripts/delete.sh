#!/usr/bin/env bash
# Gives the slice back, and the request for it: tpu_scripts/delete.sh [--dry-run]
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
go gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
