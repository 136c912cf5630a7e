"""Examples that the help of `duet-cloud`'s commands ends in, and docs/cli.md shows."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "serve": (
        "duet-cloud serve",
        "duet-cloud serve --listen 0.0.0.0:50151 --slots 16",
        "duet-cloud serve --target vllm --slots 64 --model Qwen/Qwen3-8B --engine.tensor-parallel-size 2",
        "duet-cloud serve --target openai --upstream http://127.0.0.1:8000",
    ),
    "convert": ("duet-cloud convert qwen2.5-coder-0.5b ./qwen-0.5b-hf --dtype float32",),
    "make-draft cut": (
        "duet-cloud make-draft cut qwen2.5-coder-1.5b draft.gguf --layers 7 --adapter adapter.safetensors",
    ),
    "make-draft train": (
        "duet-cloud make-draft train qwen2.5-coder-1.5b adapter.safetensors --layers 7 --text questions.jsonl"
        " --answers 256",
    ),
    "make-draft search": (
        "duet-cloud make-draft search qwen2.5-coder-1.5b --layers 4 --layers 7 --text answers.jsonl",
    ),
    "health": ("duet-cloud health", "duet-cloud health --config /etc/duet/duet-cloud.yaml"),
    "judge collect": (
        "duet-cloud judge collect answers.jsonl --states states",
        "duet-cloud judge collect answers.jsonl --states states --model ./qwen-7b-hf",
    ),
    "judge train": ("duet-cloud judge train answers.jsonl --states states --out judge.safetensors",),
    "judge eval": ("duet-cloud judge eval answers.jsonl --states states --head judge.safetensors",),
    "plan": ("duet-cloud plan --model 7b --edges 500 --rtt 30",),
    "certs ca": ("duet-cloud certs ca /etc/duet/certs",),
    "certs server": ("duet-cloud certs server /etc/duet/certs gpu-server",),
    "certs client": ("duet-cloud certs client /etc/duet/certs laptop",),
    "tokens add": ("duet-cloud tokens add laptop",),
    "tokens list": ("duet-cloud tokens list",),
    "tokens revoke": ("duet-cloud tokens revoke ID",),
    "tokens rotate": ("duet-cloud tokens rotate ID",),
    "tenants limit": ("duet-cloud tenants limit laptop",),
    "tenants list": ("duet-cloud tenants list",),
}
