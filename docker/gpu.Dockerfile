# From the source tree:  docker build --file docker/gpu.Dockerfile --tag fptq-serve-gpu .
# The host needs NVIDIA's driver and container toolkit; torch's own wheels bring CUDA.
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BASE_IMAGE} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/fptq/bin:$PATH
COPY constraints.txt .
RUN python3 -m venv /opt/fptq \
    && pip install torch triton \
    && python3 -m venv --system-site-packages /opt/tools \
    && /opt/tools/bin/pip install scikit-build-core nanobind cmake ninja
COPY . .
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip install "$(echo /wheels/*.whl)[gpu]"

FROM ${BASE_IMAGE}
# Triton builds a small launcher in C for each kernel.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 fptq
COPY --from=build /opt/fptq /opt/fptq
ENV PATH=/opt/fptq/bin:$PATH
RUN install --directory --owner fptq /var/cache/fptq /var/cache/triton
ENV XDG_CACHE_HOME=/var/cache TRITON_CACHE_DIR=/var/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER fptq
# Quantized while the image is made, so that a container starts at once, also as another user or read-only.
RUN fptq inspect demo > /dev/null
WORKDIR /home/fptq
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fptq"]
CMD ["serve", "demo", "--host", "0.0.0.0", "--device", "cuda"]
