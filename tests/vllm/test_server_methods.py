"""Medusa heads, trained here and served by vLLM: what it accepts is what they draft."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.medusa_heads import Heads, answers, measure, read, train, write
from benchmarks.server_methods import Engine, Job
from tests.tiny_pair import END_OF_TEXT_ID, IM_END_ID, NUM_PLAIN_TOKENS, TinyPair

pytestmark = pytest.mark.vllm

NUM_HEADS = 3
NUM_TOKENS = 24
ENGINE = '{"dtype": "float32", "block_size": 32, "enforce_eager": true, "kv_cache_memory_bytes": 50000000}'


def greedy(model: torch.nn.Module, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Whatever ends there are."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def replayed(drafts: Sequence[Sequence[int]], text: Sequence[int], num_tokens: int) -> list[int]:
    """How many tokens of each draft stand.

    Args:
        drafts: for each token of the text, what the heads expect behind it.
        num_tokens: where the answer ends; the text goes on.
    """
    accepted, committed = [], 1
    while committed < num_tokens:
        pairs = zip(drafts[committed - 1], text[committed:], strict=False)
        stands = next((i for i, (drafted, wanted) in enumerate(pairs) if drafted != wanted), NUM_HEADS)
        accepted.append(stands)
        committed += stands + 1
    return accepted


def test_answers_are_read_with_any_separators_in_them(tiny_pair: TinyPair, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.target_hf)
    rows = [{"question": f"{n}\u2028?", "text": f"{n}\x85."} for n in range(2)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "answers.jsonl").write_text("".join(lines), "utf-8")
    found = [tokenizer.decode(answer) for _, answer in answers(tmp_path / "answers.jsonl", tokenizer)]
    assert found == [row["text"] for row in rows]


def test_vllm_accepts_what_the_heads_draft(tiny_pair: TinyPair, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.target_hf, dtype=torch.float32).eval()
    model.requires_grad_(False)
    head = model.lm_head.weight
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, NUM_PLAIN_TOKENS, rng.integers(5, 40)).tolist() for _ in range(6)]
    texts = [greedy(model, prompt, NUM_TOKENS + NUM_HEADS) for prompt in prompts]
    each = [read(model, [(prompt, text)], NUM_HEADS) for prompt, text in zip(prompts, texts, strict=True)]
    # Two answers are not learnt, so that some drafts fail.
    together = read(model, list(zip(prompts, texts, strict=True))[2:], NUM_HEADS)

    untrained = measure(head, Heads(head.shape[1], NUM_HEADS), together, 256)
    heads, _ = train(head, together, NUM_HEADS, 256, 3.0)
    trained = measure(head, heads, together, 256)
    print(f"right by head {untrained.by_head} to {trained.by_head}")
    assert np.mean(trained.by_head) > np.mean(untrained.by_head) + 0.2

    write(tmp_path / "heads", head, heads, {})
    arguments = Namespace(
        target=tiny_pair.target_hf,
        heads=tmp_path / "heads",
        draft=None,
        draft_tokens=NUM_HEADS,
        engine=ENGINE,
    )
    engine = Engine("medusa", arguments, prompts)
    found = engine.run(Job(list(range(len(prompts))), 4, NUM_TOKENS))
    engine.close()

    expected: list[int] = []
    for number, (text, positions) in enumerate(zip(texts, each, strict=True)):
        ends = (i + 1 for i, token in enumerate(text) if token in (IM_END_ID, END_OF_TEXT_ID))
        num_tokens = min(NUM_TOKENS, next(ends, NUM_TOKENS))
        assert found.answers[number].token_ids == text[:num_tokens]
        with torch.no_grad():
            drafts = [heads(positions.hidden, k) @ head.T for k in range(NUM_HEADS)]
        accepted = replayed(torch.stack(drafts, 1).argmax(-1).tolist(), text, num_tokens)
        assert found.answers[number].passes == 1 + len(accepted)
        expected += accepted
    print(f"accepted {expected}")
    assert len(set(expected)) > 1
    assert found.drafts == len(expected)
    assert found.accepted == sum(expected)
    by_position = [sum(stands > k for stands in expected) for k in range(NUM_HEADS)]
    assert found.accepted_by_position == by_position
