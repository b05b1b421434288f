#!/usr/bin/env bash
# Makes two pools on AKS that grow from nothing: on demand, and spot. AKS sets no taint for GPUs, so the customary one is given here; the
# taint of spot nodes it sets itself. The device plugin comes with the GPU operator (infra/gpu-pools/gpu-operator).
set -euo pipefail

: "${RESOURCE_GROUP:?the resource group}" "${CLUSTER:?name of the cluster}"
size="${SIZE:-Standard_NC4as_T4_v3}" most="${MOST:-2}"

create() { # NAME POOL OPTION...
  az aks nodepool add --resource-group "$RESOURCE_GROUP" --cluster-name "$CLUSTER" --name "$1" --node-vm-size "$size" \
    --enable-cluster-autoscaler --node-count 0 --min-count 0 --max-count "$most" --node-taints sku=gpu:NoSchedule \
    --labels "graftwork/pool=$2" "${@:3}"
}

create gpu gpu
create gpuspot gpu-spot --priority Spot --eviction-policy Delete --spot-max-price -1 # names of AKS pools have no hyphens
