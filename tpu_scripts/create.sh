#!/usr/bin/env bash
# Asks for a slice and waits till it is there: TYPE=v5litepod-256 tpu_scripts/create.sh [--dry-run] [--spot | --reserved]
set -euo pipefail
# shellcheck source=tpu_scripts/common.sh
source "$(dirname "$0")/common.sh"
case "${TYPE:?set TYPE, such as v5litepod-256, v6e-256 or v5p-128}" in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=${RUNTIME:?for this TYPE set RUNTIME, the software version of its machines} ;;
esac
go gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" --accelerator-type="$TYPE" \
  --runtime-version="${RUNTIME:-$runtime}" "$@"
state=(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" "--format=value(state.state)")
go "${state[@]}"
until [ -n "$dry" ] || [ "${now:=}" = ACTIVE ]; do
  sleep 30
  now=$("${state[@]}")
  echo "$(date +%T) $now"
  case "$now" in FAILED | SUSPENDED | SUSPENDING) exit 1 ;; esac
done
