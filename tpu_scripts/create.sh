#!/usr/bin/env bash
# Asks for a slice: TYPE=v5litepod-8 tpu_scripts/create.sh [--dry-run] [--spot]
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
: "${TYPE:?set TYPE, such as v5litepod-8}"
go gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
  --accelerator-type "$TYPE" --runtime-version "${RUNTIME:-v2-alpha-tpuv5-lite}" "$@"
go gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE"
