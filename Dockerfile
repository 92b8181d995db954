# docker build .                 the CPU image
# docker build --target gpu .    for NVIDIA GPUs; the host needs their driver and container toolkit, torch brings CUDA
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/fptq/bin:$PATH
COPY constraints.txt .
RUN python3 -m venv /opt/fptq

FROM build AS wheel
RUN python3 -m venv --system-site-packages /opt/tools \
    && /opt/tools/bin/pip install scikit-build-core nanobind cmake ninja
COPY . .
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM build AS gpu-packages
RUN pip install torch triton
COPY --from=wheel /wheels /wheels
RUN pip install "$(echo /wheels/*.whl)[gpu,quantize]"

FROM build AS cpu-packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps --retries 1 ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY --from=wheel /wheels /wheels
RUN pip install "$(echo /wheels/*.whl)[quantize]"

FROM ${BASE_IMAGE} AS base
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 fptq \
    && install --directory --owner fptq /var/cache/fptq
ENV PATH=/opt/fptq/bin:$PATH XDG_CACHE_HOME=/var/cache
WORKDIR /home/fptq
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fptq"]

FROM base AS gpu
# Triton builds a small launcher in C for each kernel.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner fptq /var/cache/triton
COPY --from=gpu-packages /opt/fptq /opt/fptq
ENV TRITON_CACHE_DIR=/var/cache/triton NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# By number, so that Kubernetes' runAsNonRoot can tell that it is not root.
USER 1000
# Quantized while the image is made, so that a container starts at once, also as another user or read-only.
RUN fptq inspect demo > /dev/null
CMD ["serve", "demo", "--host", "0.0.0.0", "--device", "cuda"]

FROM base AS cpu
COPY --from=cpu-packages /opt/fptq /opt/fptq
USER 1000
RUN fptq inspect demo > /dev/null
CMD ["serve", "demo", "--host", "0.0.0.0"]
