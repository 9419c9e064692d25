#!/usr/bin/env bash
# One worker on each host of a Cloud TPU slice, such as a v5e-64 with 16 hosts of 4 chips:
#   tpu-vm.sh setup NAME ZONE
#   tpu-vm.sh run NAME ZONE gs://BUCKET/run.acts.zarr --model MODEL --documents DOCUMENTS ...
# Which worker a host is, its metadata server says. Preempted: make the slice again, setup, run.
#   gcloud compute tpus tpu-vm create NAME --zone ZONE --spot \
#       --accelerator-type v5litepod-64 --version v2-alpha-tpuv5-lite
set -euo pipefail
what=$1 name=$2 zone=$3
shift 3

on_all() {
    gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

case $what in
    setup) on_all "python3 -m venv .venv && .venv/bin/pip install 'actstore[extract,metrics]' 'jax[tpu]'" ;;
    run) on_all "exec .venv/bin/actstore extract $(printf '%q ' "$@")" ;;
    *) echo "give setup or run, found $what" >&2; exit 2 ;;
esac
