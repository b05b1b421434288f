#!/usr/bin/env bash
# build.sh [cpu|cuda] [NAME]: builds the image from this checkout, as docs/image.md says. TORCH_INDEX, BASE, EXTRAS, WEIGHTS and
# DOCKER (the client) may be set.
set -euo pipefail
cd "$(dirname "$0")/../.."

target=${1:-cpu}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
suffix=""
[ "$target" = cpu ] || suffix=-$target
name=${2:-ghcr.io/graftwork/graftwork-python:$version$suffix}

# A client without buildx, as may stand first on the PATH, builds with the engine's own BuildKit only if it is an old one.
docker=${DOCKER:-docker}
if ! "$docker" buildx version >/dev/null 2>&1 && [ -x /usr/bin/docker ]; then
  docker=/usr/bin/docker
fi
export DOCKER_BUILDKIT=1

arguments=(--target "$target" --build-arg "VERSION=$version" --build-arg "COMMIT=$(git rev-parse HEAD 2>/dev/null || true)")
for argument in BASE EXTRAS WEIGHTS; do
  [ -z "${!argument:-}" ] || arguments+=(--build-arg "$argument=${!argument}")
done
if [ -z "${TORCH_INDEX:-}" ] && [ "$target" = cpu ] && command -v curl >/dev/null &&
  ! curl --silent --fail --head --max-time 20 --output /dev/null https://download.pytorch.org/whl/cpu/torch/; then
  TORCH_INDEX=https://pypi.org/simple
  echo "build: PyTorch's index is not reached: torch comes from PyPI, a CUDA build, 4.4 GB larger" >&2
fi
[ -z "${TORCH_INDEX:-}" ] || arguments+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
# This machine's pip may need a configuration and certificates; the build gets them as secrets, which stay in no layer.
[ ! -f /etc/pip.conf ] || arguments+=(--secret "id=pip,src=/etc/pip.conf")
[ ! -f /etc/ssl/certs/ca-certificates.crt ] || arguments+=(--secret "id=certificates,src=/etc/ssl/certs/ca-certificates.crt")

"$docker" build "${arguments[@]}" --tag "$name" .
"$docker" history --format '{{.Size}}	{{.CreatedBy}}' "$name" | grep -v '^0B'
