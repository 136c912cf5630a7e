# The edge on a Jetson (Orin, JetPack 6): llama.cpp with CUDA for compute capability 8.7. Build it on the Jetson.
#   docker build -f deploy/docker/edge-jetson.Dockerfile -t duet-edge:jetson .
#   docker run --runtime nvidia -p 8080:8080 -v models:/models -e DUET_CLOUD=SERVER:50151 duet-edge:jetson
ARG JETSON_IMAGE=nvcr.io/nvidia/l4t-jetpack:r36.4.0

FROM ${JETSON_IMAGE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential cmake python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ENV CMAKE_ARGS="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=87 -DLLAVA_BUILD=OFF"
RUN python3 -m venv /duet \
 && /duet/bin/pip install --no-cache-dir --upgrade pip==25.3 \
 && /duet/bin/pip install --no-cache-dir '.[edge]'

FROM ${JETSON_IMAGE}
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 --groups video duet \
 && install -d -o duet /models
COPY --from=build /duet /duet
USER 10001
ENV PATH=/duet/bin:$PATH \
    XDG_CACHE_HOME=/models \
    DUET_GPU_LAYERS=-1
VOLUME /models
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=5m --interval=10s --timeout=3s \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=2)"]
ENTRYPOINT ["duet"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8080", "--serve-insecure"]
