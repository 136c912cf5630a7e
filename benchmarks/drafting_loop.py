"""The drafting loop against a bare llama.cpp decode loop on the same model, in turn in one process."""

from __future__ import annotations

import argparse
import asyncio
import ctypes

import llama_cpp
import numpy as np

from benchmarks.harness import paired_ratios, save, seconds
from edge_agent.drafting.llama import LlamaDrafter
from edge_agent.edge_model import EdgeModel
from shared.config import DEFAULT_DRAFT, EdgeConfig
from shared.messages import Message
from shared.models import Registry, resolve
from shared.sampling import Sampling

PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."


class BareLoop:
    """llama_decode one token at a time, greedy: the fastest that Python can drive llama.cpp."""

    def __init__(self, edge: EdgeModel, context_tokens: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_threads = params.n_threads_batch = edge.context.num_threads
        params.no_perf = True
        self._handle = llama_cpp.llama_init_from_model(edge.model.handle, params)
        self._vocab_size = edge.model.vocab_size
        self._token = (ctypes.c_int32 * 1)()

    def generate(self, prompt: list[int], num_tokens: int) -> float:
        """Seconds for `num_tokens` after the prompt is in."""
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self._handle), 0, -1, -1)
        tokens = (ctypes.c_int32 * len(prompt))(*prompt)
        llama_cpp.llama_decode(self._handle, llama_cpp.llama_batch_get_one(tokens, len(prompt)))
        return seconds(lambda: self._loop(num_tokens))

    def _loop(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            logits = llama_cpp.llama_get_logits_ith(self._handle, -1)
            row = np.ctypeslib.as_array(logits, shape=(self._vocab_size,))
            self._token[0] = int(row.argmax())
            llama_cpp.llama_decode(self._handle, llama_cpp.llama_batch_get_one(self._token, 1))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_DRAFT)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    config = EdgeConfig(mode="speculate", context_tokens=1024)
    resolved = resolve(arguments.model, Registry.load())
    edge = await EdgeModel.load(resolved.path, resolved.name, config)
    prompt = edge.model.render_chat([Message("user", PROMPT)])
    bare = BareLoop(edge, config.context_tokens)
    drafter = LlamaDrafter(edge)
    work_loop = asyncio.new_event_loop()

    def ours(chunk: int) -> float:
        async def draft() -> None:
            text = list(prompt)
            while len(text) < len(prompt) + arguments.tokens:
                drafted = await drafter.propose(
                    text,
                    min(chunk, len(prompt) + arguments.tokens - len(text)),
                    sampling=Sampling(),
                    seed=0,
                    start=len(text) - len(prompt),
                    end_token_ids=frozenset(),
                )
                text += [proposal.token_id for proposal in drafted]

        edge.context.align(0, [])
        edge.context.extend(0, prompt[:-1], 0)
        return seconds(lambda: work_loop.run_until_complete(draft()))

    rows = []
    for label, chunk in (("drafts of 8 tokens", 8), ("mode local (1 token a call)", 1)):
        a, b, ratio = await asyncio.to_thread(
            paired_ratios,
            lambda: arguments.tokens / ours(chunk),  # noqa: B023
            lambda: arguments.tokens / bare.generate(prompt, arguments.tokens),
            repeats=arguments.repeats,
        )
        rows.append([label, a.show("{:.1f}"), b.show("{:.1f}"), ratio.show("{:.3f}")])
    await edge.close()
    save(
        "drafting_loop",
        command=f"python -m benchmarks.drafting_loop --model {arguments.model}",
        title="Drafting loop against a bare llama.cpp loop",
        notes=f"{resolved.name}, {arguments.tokens} greedy tokens, {arguments.repeats} pairs in turn; tokens"
        " per second as median (interval), and the ratio pair by pair. Aim: >= 0.97.",
        columns=["loop", "duet, tok/s", "bare, tok/s", "ratio"],
        rows=rows,
    )


if __name__ == "__main__":
    asyncio.run(main())
