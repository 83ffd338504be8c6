# Targets: server (ONNX Runtime, no torch), client (batch inference), server-torch, trainer.
# One image serves on a CPU and, under the NVIDIA container runtime, on CUDA. `--build-arg RUNTIME=cpu`
# takes the smaller CPU-only ONNX Runtime instead.
#
# The classic builder runs every stage above its target, so the light targets stand first.
ARG PYTHON_IMAGE=python:3.13-slim


# What pyproject.toml says about dependencies, and no more: its other tables change often.
FROM ${PYTHON_IMAGE} AS requirements
COPY pyproject.toml deploy/only-dependencies.py /
RUN mkdir /out && python /only-dependencies.py /pyproject.toml >/out/pyproject.toml


FROM ${PYTHON_IMAGE} AS builder
# The version that the Makefile uses.
ARG UV_VERSION=0.13.9
ENV UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 VIRTUAL_ENV=/opt/convoy
RUN python -m pip install --no-cache-dir --root-user-action=ignore --disable-pip-version-check \
      uv==${UV_VERSION} \
 && python -m venv --without-pip ${VIRTUAL_ENV}
WORKDIR /build
COPY --from=requirements /out/pyproject.toml ./
COPY requirements.lock requirements-cpu.lock ./


# Code is a layer of its own, above the dependencies: a change to it rebuilds nothing heavy.
FROM builder AS code
RUN uv pip install --constraint requirements.lock hatchling
COPY pyproject.toml README.md LICENSE ./
COPY proto/gen proto/gen
COPY server server
COPY clients clients
COPY training training
COPY export export
RUN uv pip install --no-deps --no-build-isolation --target /app .


FROM builder AS client-dependencies
RUN uv pip install --requirements pyproject.toml --extra batch --constraint requirements.lock


FROM ${PYTHON_IMAGE} AS runtime
# The interpreter's own pip serves nobody here.
RUN rm -rf "$(python -c 'import pip; print(pip.__path__[0])')" /usr/bin/pip* /usr/local/bin/pip* \
 && useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /tmp \
      --shell /usr/sbin/nologin convoy \
 && install --directory --owner convoy --group convoy /models /runs /var/cache/convoy
ENV PATH=/app/bin:/opt/convoy/bin:${PATH} \
    PYTHONPATH=/app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HOME=/tmp
WORKDIR /tmp
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="Convoy"


FROM runtime AS client
COPY --from=client-dependencies /opt/convoy /opt/convoy
COPY --from=code /app /app
ENTRYPOINT ["convoy-client"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="convoy-client" \
      org.opencontainers.image.description="Classifies images through a Convoy server" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM builder AS server-dependencies
ARG RUNTIME=server
RUN uv pip install --requirements pyproject.toml --extra ${RUNTIME} --extra cloud \
      --constraint requirements.lock --constraint requirements-cpu.lock


# Inside a container every address is the container's own; who may reach it is said where its ports
# are published.
FROM runtime AS server-runtime
ENV CONVOY_HOST=0.0.0.0 \
    CONVOY_METRICS_HOST=0.0.0.0 \
    CONVOY_REPOSITORY=/models \
    CONVOY_LOG_FORMAT=json \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8001 8002
COPY deploy/healthy /usr/local/bin/healthy
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["healthy"]
ENTRYPOINT ["convoy-server"]


FROM server-runtime AS server
COPY --from=server-dependencies /opt/convoy /opt/convoy
COPY --from=code /app /app
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="convoy-server" \
      org.opencontainers.image.description="Serves image classifiers by gRPC with dynamic batching" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM server-dependencies AS torch-dependencies
ARG RUNTIME=server
COPY deploy/cpu-only /
RUN uv pip install --requirements pyproject.toml --extra ${RUNTIME} --extra torch \
      --constraint requirements.lock --constraint requirements-cpu.lock \
 && if [ "${RUNTIME}" = cpu ]; then /cpu-only "${VIRTUAL_ENV}"; fi


FROM torch-dependencies AS trainer-dependencies
ARG RUNTIME=server
RUN uv pip install --requirements pyproject.toml --extra ${RUNTIME} --extra train --extra export \
      --constraint requirements.lock --constraint requirements-cpu.lock


FROM runtime AS trainer
COPY --from=trainer-dependencies /opt/convoy /opt/convoy
COPY --from=code /app /app
COPY deploy/train-once /usr/local/bin/train-once
CMD ["train-once"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="convoy-trainer" \
      org.opencontainers.image.description="Trains image classifiers and exports them, proved" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM server-runtime AS server-torch
COPY --from=torch-dependencies /opt/convoy /opt/convoy
COPY --from=code /app /app
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="convoy-server-torch" \
      org.opencontainers.image.description="Serves image classifiers by gRPC, TorchScript included" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
