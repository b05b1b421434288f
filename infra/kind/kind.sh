#!/usr/bin/env bash
# A cluster on this machine, with a node that looks like a GPU pool.   infra/kind/kind.sh up|down   (make kind-up, make kind-down)
# Wants Docker, about 8 GB of memory and 20 GB of disk. Images of ours are built here and loaded into the nodes.
set -euo pipefail
# shellcheck source=../lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

name=graftwork checkpoints=/tmp/graftwork-kind/checkpoints # as in cluster.yaml
secrets="${XDG_STATE_HOME:-$HOME/.local/state}/graftwork-kind"
version="$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")"
[ "${2:-}" != --dry-run ] || dry=yes

tools() {
  [ -z "$dry" ] || return 0
  need docker "install Docker"
  need kind "see kind.sigs.k8s.io (0.30 or newer)"
  need kubectl "see kubernetes.io/docs/tasks/tools"
  docker info >/dev/null 2>&1 || die "Docker's engine does not answer; start it, or let this user talk to it"
}

image() { # NAME DOCKERFILE FOLDER OPTION...
  if [ -n "$dry" ] || ! docker image inspect "$1" >/dev/null 2>&1; then
    run docker build --tag "$1" --file "$2" "${@:4}" "$3"
  fi
  run kind load docker-image "$1" --name "$name"
}

up() {
  tools
  if [ -n "$dry" ] || ! kind get clusters 2>/dev/null | grep -qx "$name"; then
    run mkdir -p "$checkpoints"
    run kind create cluster --config "$here/kind/cluster.yaml" --wait 180s
  fi
  run kubectl config use-context "kind-$name"
  # The folder of checkpoints is mounted from the machine, and belongs to root; steps are user 1000.
  run docker exec "$name-control-plane" chown 1000:1000 /var/graftwork/checkpoints
  # A capacity that nothing stands behind: the scheduler believes it, and containers get no device.
  run kubectl patch node --subresource=status --type=json \
    --patch '[{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "2"}]' "$name-worker2"
  image "ghcr.io/graftwork/graftwork-python:$version" "$root/Dockerfile" "$root" --target cpu
  image "ghcr.io/graftwork/graftwork-mlflow:$version" "$root/mlflow/Dockerfile" "$root/mlflow"
  run "$here/secrets.sh" --generate "$secrets"
  run "$here/install.sh" --secrets "$secrets" --overlay kind --mlflow "$root/mlflow/kustomize/with-postgres"
}

down() {
  tools
  run kind delete cluster --name "$name"
  # The secrets of a cluster that is gone are of no use. The checkpoints were written by user 1000, who may be another than this one.
  run rm -rf "$secrets"
  run rm -rf "$checkpoints" || say "$checkpoints: not all of it could be removed; sudo rm -r $checkpoints"
}

case "${1:-}" in
  up) up ;;
  down) down ;;
  *) die "${1:-nothing}: say up or down" ;;
esac
