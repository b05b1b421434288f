#!/usr/bin/env bash
# Installs what runs need into the cluster of KUBECONFIG: Kubeflow Pipelines, the tracking server, Kueue, and our own part. Safe to repeat.
#   infra/install.sh [--dry-run] --secrets FOLDER [--overlay standalone|kind|gke|eks|aks] [--mlflow OVERLAY] [--without kfp,mlflow,kueue]
# --overlay: of infra/graftwork, by where volumes come from; eks wants FILE_SYSTEM_ID in the environment.   --mlflow: of mlflow/kustomize, a folder.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

secrets="" overlay=standalone mlflow="" without=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry=yes ;;
    --secrets) secrets="${2:?--secrets: give a folder}"; shift ;;
    --overlay) overlay="${2:?--overlay: give a name}"; shift ;;
    --mlflow) mlflow="${2:?--mlflow: give a folder}"; shift ;;
    --without) without="${2:?--without: give names}"; shift ;;
    *) die "$1: no such option; see the head of infra/install.sh" ;;
  esac
  shift
done
[ -d "$here/graftwork/$overlay" ] || die "--overlay $overlay: there is none in infra/graftwork; choose of standalone, kind, gke, eks, aks"
[ -n "$secrets" ] || die "--secrets: give the folder of NAMESPACE/NAME.env files (infra/secrets.sh --generate makes one to try things on)"
[ -d "$secrets" ] || die "--secrets $secrets: no such folder"
mlflow="${mlflow:-$root/mlflow/kustomize}"
[ "$overlay" != eks ] || [ -n "${FILE_SYSTEM_ID:-}" ] || die "--overlay eks: set FILE_SYSTEM_ID to the EFS file system's (aws efs describe-file-systems)"
[ -n "$dry" ] || reachable

with() { [[ ",$without," != *",$1,"* ]]; }

if with kfp; then
  say "Kubeflow Pipelines 2.17.0"
  run kubectl apply --server-side --force-conflicts -k "$here/kfp/cluster-scoped"
  run kubectl wait --for=condition=established --timeout=60s crd/applications.app.k8s.io
fi
say "Secrets"
run "$here/secrets.sh" "$secrets"
if with kfp; then
  run kubectl apply --server-side --force-conflicts -k "$here/kfp"
  # Its parts wait for each other and crash a few times meanwhile.
  run kubectl wait --namespace kubeflow --for=condition=Available --timeout=900s deployment --all
fi
if with mlflow; then
  say "The tracking server"
  run kubectl apply --server-side --force-conflicts -k "$mlflow"
  run kubectl rollout status --namespace mlflow --timeout=600s deployment/mlflow
fi
say "Graftwork's own part"
if [ "$overlay" = eks ]; then
  kubectl kustomize "$here/graftwork/eks" | sed "s/FILE_SYSTEM_ID/$FILE_SYSTEM_ID/" | run kubectl apply --server-side --force-conflicts -f -
else
  run kubectl apply --server-side --force-conflicts -k "$here/graftwork/$overlay"
fi
if with kueue; then
  say "Kueue 0.19.2"
  run kubectl apply --server-side --force-conflicts -k "$here/kueue/controller"
  run kubectl rollout status --namespace kueue-system --timeout=300s deployment/kueue-controller-manager
  run kubectl apply --server-side --force-conflicts -k "$here/kueue"
fi
say "Done; infra/test-cluster.sh tries it"
