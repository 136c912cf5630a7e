# The edge on an x86-64 machine: the page and the OpenAI-compatible server on port 8080.
#   docker build -f deploy/docker/edge.Dockerfile -t duet-edge .
#   docker run -p 8080:8080 -v models:/models -e DUET_CLOUD=SERVER:50151 duet-edge
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential cmake \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ENV CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAVA_BUILD=OFF"
RUN python -m venv /duet \
 && /duet/bin/pip install --no-cache-dir --constraint ci/constraints-py311.txt '.[edge]'

FROM ${PYTHON_IMAGE}
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 duet \
 && install -d -o duet /models
COPY --from=build /duet /duet
USER 10001
ENV PATH=/duet/bin:$PATH \
    XDG_CACHE_HOME=/models
VOLUME /models
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=5m --interval=10s --timeout=3s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=2)"]
ENTRYPOINT ["duet"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8080", "--serve-insecure"]
