#!/usr/bin/env bash
# Tries Graftwork on the cluster of KUBECONFIG: kind, minikube or a real one. It says what it finds missing, and leaves that part out.
#   infra/test-cluster.sh [--dry-run] [--image IMAGE] [--gpu-pool PRESET] [--gpu KIND] [--namespace NAMESPACE] [--keep]
# What it does, each part by itself, with "ok", "skipped" and why, or "FAILED" and why, and a list at the end:
#   cluster      a server answers; its nodes, GPUs and volumes are looked at
#   components   every component of the compiled pipeline as a pod of its own, in a namespace of its own that enforces Pod Security restricted
#   pipeline     the whole pipeline through KFP, on scikit-learn's digits, with weights that the image brings
#   resume       while it trains, the pod is deleted; the step must be tried again and go on
#   placement    steps that take a GPU ran on nodes with one, and no other did
#   mlflow       the tree of runs, metrics once each, one registered version, which is champion
# At the end, also after a failure or Ctrl-C, it removes what it made; --keep leaves it. Exit status 0: nothing failed (read what was skipped),
# 1: something did, 2: it could not begin. --dry-run prints the plan and touches nothing.
set -euo pipefail
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

version="$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")"
image="ghcr.io/graftwork/graftwork-python:$version" pool="" gpu="" kfp=kubeflow keep=""
python="${PYTHON:-$root/.venv/bin/python}" graftwork="${GRAFTWORK:-$root/.venv/bin/graftwork}"
name="graftwork-test-$(date -u +%m%d%H%M%S)" # of the namespace, the run and the model: all that is made carries it
parts=(cluster components pipeline resume placement mlflow)
# Small, of data and a network that need no download; in the pipeline long enough in training to be interrupted.
settings=(data=digits backbone=tf_efficientnet_lite0 image_size=64 train_per_class=40 test_per_class=30 reference=none)
long=(epochs=60 patience=60 checkpoint_seconds=1)

declare -A result=()
work="" forward="" host="" run_id="" gpus=() class="" has_kfp="" has_mlflow="" has_volume=""

main() {
  options "$@"
  if [ -n "$dry" ]; then
    plan
    return
  fi
  reachable
  [ -x "$python" ] || die "$python: no such program; run 'make install', or set PYTHON"
  [ -x "$graftwork" ] || die "$graftwork: no such program; run 'make install', or set GRAFTWORK"
  work="$(mktemp -d)"
  trap clean_up EXIT
  trap 'exit 130' INT TERM
  for part in "${parts[@]}"; do
    say "== $part"
    : >"$work/why"
    if "test_$part"; then
      result[$part]="ok"
    elif [ -s "$work/skipped" ]; then
      result[$part]="skipped: $(cat "$work/skipped")"
      rm "$work/skipped"
    else
      result[$part]="FAILED: $(tail -n 1 "$work/why" | head -c 400)"
    fi
    say "   ${result[$part]}"
  done
  report
}

options() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --dry-run) dry=yes ;;
      --keep) keep=yes ;;
      --image | --gpu-pool | --gpu | --namespace)
        [ -n "${2:-}" ] || die "$1: give a value"
        case "$1" in --image) image="$2" ;; --gpu-pool) pool="$2" ;; --gpu) gpu="$2" ;; *) kfp="$2" ;; esac
        shift
        ;;
      *) die "$1: no such option; see the head of infra/test-cluster.sh" ;;
    esac
    shift
  done
  case "$pool" in "" | none | gke | eks | aks | gpu-operator) ;; *) die "--gpu-pool $pool: choose one of none, gke, eks, aks, gpu-operator" ;; esac
}

skip() { # REASON: ends a part
  printf '%s' "$*" >"$work/skipped"
  return 1
}

failed() { # REASON
  printf '%s\n' "$*" >"$work/why"
  return 1
}

report() {
  local part worst=0
  say "" "" "$name, image $image"
  for part in "${parts[@]}"; do
    printf '  %-12s %s\n' "$part" "${result[$part]}"
    [[ "${result[$part]}" != FAILED* ]] || worst=1
  done
  return "$worst"
}

plan() {
  work="$(mktemp -d)"
  trap 'rm -rf "$work"' EXIT
  write_profile
  if command -v kubectl >/dev/null; then
    say "namespace $name, Pod Security restricted: $(kubectl kustomize "$work/profile" | sed -n 's/^kind: //p' | sort | paste -sd ' ')"
  else
    say "namespace $name, Pod Security restricted: infra/graftwork/profile"
  fi
  say "components: $image, one pod each, in this order:"
  if [ -x "$python" ] && [ -x "$graftwork" ]; then
    compile && "$python" "$here/component_step.py" "$work/pipeline.yaml" | sed 's/^/  /'
  else
    say "  (not known: there is no $graftwork)"
  fi
  say "the pod of a component:"
  pod_manifest "$name" STEP work /work plan "python3 /plan/component_step.py /plan/pipeline.yaml /work STEP ${settings[*]}" "GRAFTWORK_PIPELINE_RUN=$name" |
    sed 's/^/  /'
  say "pipeline: graftwork submit --name $name to service/ml-pipeline in $kfp${pool:+, --gpu-pool $pool}${gpu:+ --gpu $gpu}; ${settings[*]} ${long[*]}"
  say "resume: deletes the pod of fine-tune once it has a checkpoint, and waits for the next"
  say "placement, mlflow: looks at the pods' nodes, at the runs and at the model $name"
  say "clean up: the namespace, the run of KFP, its runs in MLflow and the model${keep:+ (left, by --keep)}"
}

compile() {
  "$graftwork" compile --output "$work/pipeline.yaml" --image "$image" >"$work/compile.log" 2>&1 || failed "graftwork compile: $(tail -n 1 "$work/compile.log")"
}

# Writes the namespace as a profile gets it, under another name. The claim for checkpoints needs a class that several nodes can mount: left out.
write_profile() {
  mkdir "$work/profile"
  cp -r "$here/graftwork" "$work/profile/graftwork"
  cat >"$work/profile/kustomization.yaml" <<Y
resources: [graftwork/profile]
namespace: $name
patches:
  - target: {kind: PersistentVolumeClaim}
    patch: '{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "x"}, "\$patch": "delete"}'
Y
}

facts() { "$python" "$here/cluster_facts.py" "$@"; }

# ---- the parts -----------------------------------------------------------------------------------------------------------------

test_cluster() {
  local nodes
  say "   $(kubectl version 2>/dev/null | grep -i server || true)"
  nodes="$(kubectl get nodes -o json)" || { failed "nodes cannot be listed: this account may not"; return; }
  mapfile -t gpus < <(facts gpu-nodes <<<"$nodes" | grep . || true)
  class="$(kubectl get storageclass -o json | facts class)"
  kubectl get deployment ml-pipeline --namespace "$kfp" >/dev/null 2>&1 && has_kfp=yes
  kubectl get secret graftwork-mlflow --namespace "$kfp" >/dev/null 2>&1 && has_mlflow=yes
  kubectl get persistentvolumeclaim graftwork-checkpoints --namespace "$kfp" >/dev/null 2>&1 && has_volume=yes
  say "   nodes with GPUs: ${gpus[*]:-none: GPU placement cannot be tried}"
  say "   default class of volumes: ${class:-none: components cannot be tried, for their artifacts have no place}"
  say "   KFP in $kfp: ${has_kfp:-no: the pipeline cannot be tried (infra/install.sh)}"
  say "   Secret $kfp/graftwork-mlflow: ${has_mlflow:-no: runs are not tracked (infra/secrets.sh)}"
  say "   claim $kfp/graftwork-checkpoints: ${has_volume:-no: nothing resumes (kubectl apply -k infra/graftwork/standalone)}"
}

test_components() {
  [ -n "$class" ] || { skip "there is no default class of volumes"; return; }
  compile || return
  write_profile
  kubectl apply -k "$work/profile" >"$work/why" 2>&1 || return
  kubectl create configmap plan --namespace "$name" --from-file="$work/pipeline.yaml" --from-file="$here/component_step.py" >"$work/why" 2>&1 || return
  kubectl apply -f - >"$work/why" 2>&1 <<Y || return
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: work, namespace: $name}
spec:
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 5Gi}}
Y
  # The volume that the compiled pipeline mounts is not here: its folders lie beside the artifacts.
  local step environment="MLFLOW_TRACKING_URI=sqlite:////work/mlflow.db GRAFTWORK_PIPELINE_RUN=$name"
  environment+=" GRAFTWORK_CHECKPOINTS=/work/jobs GRAFTWORK_STORE=/work/packs GRAFTWORK_KEPT_JOURNALS=/work/journals"
  "$python" "$here/component_step.py" "$work/pipeline.yaml" >"$work/steps"
  while IFS= read -r step; do
    pod "$name" "$step" work /work plan "python3 /plan/component_step.py /plan/pipeline.yaml /work $step ${settings[*]} epochs=2 plan_seconds=0" \
      "$environment" || return
    say "   $step: ok"
  done <"$work/steps"
}

test_pipeline() {
  [ -n "$has_kfp" ] || { skip "there is no KFP in namespace $kfp"; return; }
  port_forward "$kfp" service/ml-pipeline 8888 || return
  local placed=() assigned=() setting volume=(--volume "${has_volume:+graftwork-checkpoints}")
  if [ ${#gpus[@]} -gt 0 ] && [ "${pool:-gpu-operator}" != none ]; then
    placed=(--gpu-pool "${pool:-gpu-operator}")
    [ -z "$gpu" ] || placed+=(--gpu "$gpu")
  fi
  for setting in "${settings[@]}" "${long[@]}"; do assigned+=(--set "$setting"); done
  "$graftwork" submit --host "$host" --name "$name" --experiment graftwork-test --register-as "$name" --image "$image" \
    --run-as graftwork-runner "${volume[@]}" "${placed[@]}" "${assigned[@]}" \
    >"$work/submit" 2>"$work/why" || return
  run_id="$(sed -n 's/^Run: .*(\([0-9a-f-]\{36\}\))$/\1/p' "$work/submit")"
  [ -n "$run_id" ] || { failed "graftwork submit printed no id of the run: $(tail -n 1 "$work/submit")"; return; }
  say "   run $run_id"
  # Interrupted here, since it must still train; judged in the next part.
  [ -z "$has_volume" ] || interrupt >"$work/interrupted" 2>&1 || true
  local state=""
  for _ in $(seq 360); do
    state="$(facts run-state "$host" "$run_id" 2>"$work/why" || true)"
    case "$state" in
      SUCCEEDED) return 0 ;;
      FAILED | CANCELED | CANCELING)
        "$graftwork" status "$run_id" --host "$host" >"$work/status" 2>&1 || true
        sed 's/^/   /' "$work/status"
        failed "the run is $state; $(grep -iE 'fail|error|cannot' "$work/status" | head -n 1)"
        return
        ;;
    esac
    sleep 10
  done
  "$graftwork" status "$run_id" --host "$host" | sed 's/^/   /' || true
  failed "the run is ${state:-of unknown state} after an hour"
}

run_pods() { kubectl get pods --namespace "$kfp" --selector "pipeline/runid=$run_id" -o json; }

interrupt() { # deletes the pod of fine-tune once it has a checkpoint; prints the pod's name
  local victim=""
  for _ in $(seq 360); do
    victim="$(run_pods | facts tries fine-tune | sed -n 's/ Running$//p' | tail -n 1)"
    # shellcheck disable=SC2016  # expanded in the pod
    if [ -n "$victim" ] && kubectl exec --namespace "$kfp" "$victim" --container main -- \
      sh -c 'ls "${GRAFTWORK_CHECKPOINTS:-/checkpoints/jobs}"/fine-tune-*/*.safetensors' >/dev/null 2>&1; then
      kubectl delete pod --namespace "$kfp" "$victim" --grace-period=5 --wait=false >/dev/null
      printf 'deleted %s\n' "$victim"
      return 0
    fi
    case "$(facts run-state "$host" "$run_id" 2>/dev/null || true)" in SUCCEEDED | FAILED | CANCELED) return 1 ;; esac
    sleep 5
  done
  return 1
}

test_resume() {
  [ -n "$run_id" ] || { skip "no run"; return; }
  [ -n "$has_volume" ] || { skip "there is no claim graftwork-checkpoints in $kfp"; return; }
  grep -q '^deleted ' "$work/interrupted" || { failed "no pod could be deleted in mid-training: $(tail -n 1 "$work/interrupted")"; return; }
  run_pods | facts tries fine-tune >"$work/tries"
  sed 's/^/   /' "$work/interrupted" "$work/tries"
  grep -q ' Succeeded$' "$work/tries" || { failed "fine-tune was not tried again: look at the retry policy (infra/kfp/component/workflow-controller.yaml)"; return; }
}

test_placement() {
  [ -n "$run_id" ] || { skip "no run"; return; }
  [ ${#gpus[@]} -gt 0 ] || { skip "no node has a GPU"; return; }
  [ "${pool:-gpu-operator}" != none ] || { skip "--gpu-pool none"; return; }
  run_pods | facts placement "${gpus[@]}" 2>"$work/why" | sed 's/^/   /'
}

test_mlflow() {
  [ -n "$run_id" ] || { skip "no run"; return; }
  [ -n "$has_mlflow" ] || { skip "there is no Secret graftwork-mlflow in $kfp"; return; }
  kubectl create configmap "$name" --namespace "$kfp" --from-file="$here/mlflow_check.py" >"$work/why" 2>&1 || return
  pod "$kfp" "$name-check" "${has_volume:+graftwork-checkpoints}" /checkpoints "$name" \
    "python3 /plan/mlflow_check.py check $run_id $name" "" graftwork-mlflow
}

# ---- means ---------------------------------------------------------------------------------------------------------------------

# Runs a pod to its end under the restricted profile; fails with the reason why it does not start, or with its last line.
pod() { # NAMESPACE NAME CLAIM MOUNT CONFIGMAP COMMAND ENVIRONMENT [SECRET]
  local namespace="$1" pod="$2" state began=$SECONDS
  pod_manifest "$@" >"$work/pod.yaml"
  kubectl apply -f "$work/pod.yaml" >"$work/why" 2>&1 || return
  while true; do
    state="$(kubectl get pod "$pod" --namespace "$namespace" -o json | facts pod)"
    case "$state" in
      Succeeded*)
        kubectl logs "$pod" --namespace "$namespace" >"$work/log" 2>&1 || true
        [ -z "${8:-}" ] || sed 's/^/   /' "$work/log"
        return 0
        ;;
      Failed*)
        kubectl logs "$pod" --namespace "$namespace" >"$work/log" 2>&1 || true
        tail -n 20 "$work/log" | sed 's/^/   | /'
        failed "$pod: $(grep -v '^\s*$' "$work/log" | tail -n 1)"
        return
        ;;
    esac
    # What waits for an image or a node rarely gets it later; an autoscaler's node takes some minutes.
    if [[ "$state" == Pending?* ]] && [ $((SECONDS - began)) -gt 600 ]; then failed "$pod: $state"; return; fi
    if [[ "$state" == *ErrImage* || "$state" == *ImagePullBackOff* ]] && [ $((SECONDS - began)) -gt 120 ]; then failed "$pod: $state"; return; fi
    if [ $((SECONDS - began)) -gt 1800 ]; then failed "$pod: $state after half an hour"; return; fi
    sleep 3
  done
}

pod_manifest() { # as pod
  local variable environment="" kind="emptyDir: {}" secret=""
  for variable in ${7:-}; do environment+="{name: ${variable%%=*}, value: \"${variable#*=}\"}, "; done
  [ -z "$3" ] || kind="persistentVolumeClaim: {claimName: $3}"
  [ -z "${8:-}" ] || secret="secretRef: {name: $8}"
  [ -z "$secret" ] || secret="{$secret}"
  cat <<Y
apiVersion: v1
kind: Pod
metadata:
  name: $2
  namespace: $1
  labels: {graftwork/test: $name}
spec:
  restartPolicy: Never
  serviceAccountName: graftwork-runner
  automountServiceAccountToken: false
  securityContext:
    {runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: main
      image: $image
      command: [sh, -c, "exec $6"]
      workingDir: $4 # MLflow's artifacts lie there where its database is a file
      env: [${environment}{name: HOME, value: /tmp}, {name: GRAFTWORK_IMAGE, value: "$image"}]
      envFrom: [$secret]
      resources: {requests: {cpu: 500m, memory: 1Gi}, limits: {memory: 4Gi}}
      securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
      volumeMounts:
        - {name: work, mountPath: $4}
        - {name: plan, mountPath: /plan}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - {name: work, $kind}
    - {name: plan, configMap: {name: $5}}
    - {name: tmp, emptyDir: {sizeLimit: 4Gi}}
Y
}

port_forward() { # NAMESPACE WHAT PORT: sets host
  kubectl port-forward --namespace "$1" "$2" ":$3" >"$work/forward" 2>&1 &
  forward=$!
  local port=""
  for _ in $(seq 30); do
    port="$(sed -n 's/^Forwarding from 127.0.0.1:\([0-9]*\) .*/\1/p' "$work/forward" | head -n 1)"
    [ -z "$port" ] || break
    kill -0 "$forward" 2>/dev/null || break
    sleep 1
  done
  [ -n "$port" ] || { failed "port-forward to $2 in $1: $(tail -n 1 "$work/forward")"; return; }
  host="http://127.0.0.1:$port"
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM
  set +e
  if [ -n "$keep" ]; then
    say "kept: namespace $name, run ${run_id:-none}"
  else
    say "== clean up"
    if [ -n "$run_id" ]; then
      case "$(facts run-state "$host" "$run_id" 2>/dev/null)" in PENDING | RUNNING) "$graftwork" cancel "$run_id" --host "$host" ;; esac
      if [ -n "$has_mlflow" ] && kubectl get configmap "$name" --namespace "$kfp" >/dev/null 2>&1; then
        pod "$kfp" "$name-delete" "" /work "$name" "python3 /plan/mlflow_check.py delete $run_id $name" "" graftwork-mlflow
      fi
      facts delete-run "$host" "$run_id" >/dev/null 2>&1 || say "   run $run_id could not be deleted"
    fi
    kubectl delete pod,configmap --namespace "$kfp" --selector "graftwork/test=$name" --ignore-not-found --wait=false >/dev/null 2>&1
    kubectl delete configmap "$name" --namespace "$kfp" --ignore-not-found >/dev/null 2>&1
    kubectl delete namespace "$name" --ignore-not-found --wait=false
  fi
  [ -z "$forward" ] || kill "$forward" 2>/dev/null
  rm -rf "$work"
  exit "$status"
}

main "$@"
