#!/usr/bin/env bash
# Makes two pools on GKE that grow from nothing: on demand, and spot. GKE taints GPU nodes with nvidia.com/gpu, installs the driver, and
# labels them with cloud.google.com/gke-accelerator; spot nodes also with cloud.google.com/gke-spot=true.
set -euo pipefail

: "${CLUSTER:?name of the cluster}" "${LOCATION:?its zone or region}"
gpu="${GPU:-nvidia-l4}" machine="${MACHINE:-g2-standard-8}" most="${MOST:-2}"

create() { # NAME OPTION...
  gcloud container node-pools create "$1" --cluster "$CLUSTER" --location "$LOCATION" --machine-type "$machine" \
    --accelerator "type=$gpu,count=1,gpu-driver-version=default" --disk-size 100 --num-nodes 0 \
    --enable-autoscaling --min-nodes 0 --max-nodes "$most" --node-labels "graftwork/pool=$1" \
    --workload-metadata GKE_METADATA --enable-autoupgrade "${@:2}"
}

create gpu
create gpu-spot --spot
