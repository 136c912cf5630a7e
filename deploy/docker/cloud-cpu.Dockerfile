# The cloud service without a GPU: the target runs on llama.cpp.
#   docker build -f deploy/docker/cloud-cpu.Dockerfile -t duet-cloud:cpu .
#   docker run -p 50151:50151 -v models:/models duet-cloud:cpu
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential cmake \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# One image for all x86-64 servers with AVX2. AMX kernels fault in llama-cpp-python 0.3.36: not native.
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAVA_BUILD=OFF"
RUN python -m venv /duet \
 && /duet/bin/pip install --no-cache-dir --constraint ci/constraints-py311.txt '.[cloud]'

FROM ${PYTHON_IMAGE}
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 duet \
 && install -d -o duet /models
COPY --from=build /duet /duet
USER 10001
ENV PATH=/duet/bin:$PATH \
    XDG_CACHE_HOME=/models \
    DUET_CLOUD_LISTEN=0.0.0.0:50151 \
    DUET_CLOUD_LOG_FORMAT=json
VOLUME /models
EXPOSE 50151
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=5m --interval=10s --timeout=3s CMD ["duet-cloud", "health"]
ENTRYPOINT ["duet-cloud", "serve"]
