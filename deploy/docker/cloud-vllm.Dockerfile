# The cloud service on a GPU: duet beside the engine of vLLM's own image.
#   docker build -f deploy/docker/cloud-vllm.Dockerfile -t duet-cloud:vllm .
#   docker run --gpus all -p 50151:50151 -v models:/models duet-cloud:vllm --model Qwen/Qwen2.5-Coder-7B-Instruct
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.33.0

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${VLLM_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --from=wheel /dist /dist
# vLLM and torch are the image's own: the constraint keeps pip from touching them.
RUN python3 -m pip freeze | grep -iE '^(vllm|torch|transformers|protobuf)==' > /dist/keep.txt \
 && python3 -m pip install --no-cache-dir --constraint /dist/keep.txt "$(ls /dist/*.whl)[vllm]" \
 && rm -rf /dist \
 && useradd --create-home --uid 10001 duet \
 && install -d -o duet /models
USER 10001
ENV HF_HOME=/models/hub \
    XDG_CACHE_HOME=/models \
    DUET_CLOUD_TARGET=vllm \
    DUET_CLOUD_LISTEN=0.0.0.0:50151 \
    DUET_CLOUD_LOG_FORMAT=json
VOLUME /models
EXPOSE 50151
STOPSIGNAL SIGTERM
# A large model loads for minutes; the probe goes to the standard gRPC health service.
HEALTHCHECK --start-period=10m --interval=10s --timeout=3s CMD ["duet-cloud", "health"]
ENTRYPOINT ["duet-cloud", "serve"]
