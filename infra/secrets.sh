#!/usr/bin/env bash
# Makes the Secrets that the manifests name, from files that stay out of the repository: FOLDER/NAMESPACE/NAME.env, a KEY=VALUE a line.
#   infra/secrets.sh FOLDER             apply them to the cluster of KUBECONFIG
#   infra/secrets.sh --generate FOLDER  write files with random values where there are none, for a cluster to try things on
#   infra/secrets.sh --list FOLDER      name them, without values
# No value is on a command line or printed. docs/cluster.md says what each is for.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

random() { # LENGTH
  LC_ALL=C tr -dc 'a-zA-Z0-9' </dev/urandom | head -c "$1" || true
}

write() { # FILE LINE...; a file that is there is kept
  [ ! -e "$1" ] || return 0
  mkdir -p "$(dirname "$1")"
  printf '%s\n' "${@:2}" >"$1" # printf is the shell's own: the values are on no command line
  say "wrote $1"
}

generate() { # FOLDER
  umask 077
  local key secret password
  # One login a thing, the same in each file that needs it. What is there decides, so that a second call changes nothing.
  key="$(value "$1/kubeflow/mlpipeline-minio-artifact.env" accesskey || random 20)"
  secret="$(value "$1/kubeflow/mlpipeline-minio-artifact.env" secretkey || random 40)"
  password="$(value "$1/mlflow/mlflow-server.env" MLFLOW_AUTH_ADMIN_PASSWORD || random 32)"
  # Runs log in as the administrator here; on a cluster that lasts, make them a user of their own (docs/tracking-server.md).
  write "$1/kubeflow/mlpipeline-minio-artifact.env" "accesskey=$key" "secretkey=$secret"
  write "$1/kubeflow/graftwork-mlflow.env" "MLFLOW_TRACKING_URI=http://mlflow.mlflow.svc:5000" \
    "MLFLOW_TRACKING_USERNAME=admin" "MLFLOW_TRACKING_PASSWORD=$password"
  write "$1/kubeflow/kfp-mlflow-credentials.env" "MLFLOW_TRACKING_USERNAME=admin" "MLFLOW_TRACKING_PASSWORD=$password"
  write "$1/kubeflow/graftwork-s3.env" "AWS_ACCESS_KEY_ID=$key" "AWS_SECRET_ACCESS_KEY=$secret" \
    "AWS_ENDPOINT_URL=http://seaweedfs.kubeflow.svc:9000" "AWS_DEFAULT_REGION=us-east-1"
  write "$1/mlflow/mlflow-server.env" "MLFLOW_AUTH_ADMIN_USERNAME=admin" "MLFLOW_AUTH_ADMIN_PASSWORD=$password" \
    "MLFLOW_FLASK_SERVER_SECRET_KEY=$(random 64)"
  write "$1/mlflow/mlflow-s3.env" "AWS_ACCESS_KEY_ID=$key" "AWS_SECRET_ACCESS_KEY=$secret" \
    "AWS_ENDPOINT_URL=http://seaweedfs.kubeflow.svc:9000" "AWS_DEFAULT_REGION=us-east-1"
  write "$1/mlflow/mlflow-postgres.env" "POSTGRES_PASSWORD=$(random 40)"
}

value() { # FILE KEY: prints the value, or fails
  [ -e "$1" ] && sed -n "s/^$2=//p" "$1" | grep . | head -n 1
}

there() { # FOLDER
  [ -d "$1" ] || die "$1: no such folder; make it with --generate, or write NAMESPACE/NAME.env files into it"
}

files() { # FOLDER
  find "$1" -mindepth 2 -maxdepth 2 -name '*.env' | sort
}

apply() { # FOLDER
  local file namespace name found=""
  there "$1"
  reachable
  while IFS= read -r file; do
    found=yes
    namespace="$(basename "$(dirname "$file")")" name="$(basename "$file" .env)"
    grep -q '^[A-Za-z_][A-Za-z0-9_]*=.' "$file" || die "$file: holds no KEY=VALUE"
    kubectl get namespace "$namespace" >/dev/null 2>&1 || kubectl create namespace "$namespace"
    # Server-side: a client-side apply would keep the values once more in an annotation.
    kubectl create secret generic "$name" --namespace "$namespace" --from-env-file "$file" --dry-run=client -o yaml |
      kubectl apply --server-side --field-manager=graftwork --force-conflicts -f -
  done < <(files "$1")
  [ -n "$found" ] || die "$1: holds no NAMESPACE/NAME.env; make them with --generate"
}

case "${1:-}" in
  --generate) generate "${2:?give a folder}" ;;
  --list) there "${2:?give a folder}" && files "${2:?give a folder}" | sed -E 's|.*/([^/]+)/([^/]+)\.env$|\1/\2|' ;;
  "" | -*) die "give a folder; see the head of infra/secrets.sh" ;;
  *) apply "$1" ;;
esac
