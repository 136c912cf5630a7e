"""Examples that the help of `duet`'s commands ends in, and docs/cli.md shows."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "ask": (
        'duet ask "Name the three primary colours of light."',
        'duet ask --mode speculate --show-origin "What is a monad?"',
        'duet ask --mode guide --guidance-tokens 64 "A train goes 60 km in 40 minutes. How fast is it?"',
        "git diff | duet ask --private --mode local",
        'duet ask --json --max-tokens 64 "Tell me a story." | jq .answer',
    ),
    "chat": (
        "duet chat",
        'duet chat --mode speculate --cloud gpu-server:50151 --system "Answer in one sentence."',
        "duet chat --private",
        "duet chat --mode local < questions.txt > answers.txt",
    ),
    "route": (
        'duet route "Prove that there are infinitely many primes."',
        'duet route --all-probes --json "What is the capital of France?"',
    ),
    "calibrate": (
        "duet calibrate --results runs/mmlu --results runs/gsm8k --cloud-share 0.4",
        "duet calibrate --results results.jsonl --quality 0.95 --no-shape",
    ),
    "bench": ("duet bench", "duet bench --local", "duet bench --cloud gpu-server:50151 --json"),
    "doctor": ("duet doctor", "duet doctor --mode speculate --cloud gpu-server:50151", "duet doctor --json"),
    "serve": ("duet serve", "duet serve --port 8000 --cloud gpu-server:50151"),
    "models list": ("duet models list",),
    "models pull": ("duet models pull qwen2.5-coder-0.5b",),
    "models path": ('duet ask --model "$(duet models path qwen2.5-coder-0.5b)" "Hello"',),
    "models rm": ("duet models rm qwen2.5-coder-1.5b",),
    "store add": ("duet store add README.md docs/*.md",),
    "store list": ("duet store list",),
    "store clear": ("duet store clear --model qwen2.5-coder-0.5b",),
    "eval routing": (
        "duet eval routing --out runs/builtin",
        "duet eval routing --out runs/gsm8k --data gsm8k --limit 200 --cloud gpu-server:50151",
    ),
    "eval length": ("duet eval length --out runs/length --temperature 0",),
    "eval speculation": (
        "duet eval speculation --out runs/speculation --cloud gpu-server:50151 --draft-tokens 4",
    ),
    "eval answers": ("duet eval answers runs/gsm8k --data gsm8k --out answers.jsonl",),
    "eval guide": (
        "duet eval guide --out runs/guide --data gsm8k --limit 100 --cloud gpu-server:50151",
        "duet eval guide --out runs/guide --data gsm8k --answers runs/pair-gsm8k --guidance-tokens 64",
    ),
    "eval pair": ("duet eval pair runs/edge runs/cloud --out runs/pair",),
    "eval sweep": ("duet eval sweep runs/mmlu --draws 400",),
    "eval report": ("duet eval report runs/mmlu runs/gsm8k --out report",),
    "config show": ("duet config show", "DUET_MODE=local duet config show"),
}
