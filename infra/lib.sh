# shellcheck shell=bash
# What the scripts of infra/ share. With dry=yes, run() prints what it would do.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck disable=SC2034  # for those that read this file
root="$(dirname "$here")"
dry="${dry:-}"

say() { printf '%s\n' "$*"; }

die() { # one line, and exit status 2: a mistake in what was asked, or something is missing
  printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2
  exit 2
}

need() { # TOOL WHERE-IT-COMES-FROM
  command -v "$1" >/dev/null || die "$1 is not on the PATH; $2"
}

run() {
  printf '  + %s\n' "$*"
  [ -n "$dry" ] || "$@"
}

reachable() { # a cluster, within ten seconds
  need kubectl "see kubernetes.io/docs/tasks/tools"
  kubectl version --request-timeout=10s >/dev/null 2>&1 || {
    local server
    server="$(kubectl config view --minify -o jsonpath='{.clusters[0].cluster.server}' 2>/dev/null || true)"
    die "${server:+$server: }no cluster answers${server:+ there}; set KUBECONFIG, or make one with 'make kind-up'"
  }
}
