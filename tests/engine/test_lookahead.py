"""Lookahead decoding on the tiny draft model: its drafts are the model's own, in fewer passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from benchmarks.lookahead import LookaheadDrafter, Shape, TreeContext
from shared.llama import LlamaContext, LlamaModel
from tests.tiny_pair import TinyPair

pytestmark = pytest.mark.engine

PROMPT = "<|im_start|>user\nTell me a story of the sea.<|im_end|>\n<|im_start|>assistant\n"
NUM_TOKENS = 120
SHAPE = Shape(window=6, ngram=4, guesses=6)


@pytest.fixture(scope="module")
def model(tiny_pair: TinyPair) -> Iterator[LlamaModel]:
    with closing(LlamaModel(tiny_pair.draft_gguf, "tiny-draft")) as model:
        yield model


def plain(model: LlamaModel, text: list[int], num_tokens: int) -> list[int]:
    """Greedy, a pass for each token."""
    with LlamaContext(
        model, num_sequences=1, context_tokens=1024, rollback_tokens=0, threads=1, cache_type="f32"
    ) as context:
        said: list[int] = []
        pending = text
        while len(said) < num_tokens:
            pending = [int(np.argmax(context.extend(0, pending, 1)[0]))]
            said += pending
    return said


@pytest.mark.parametrize("draft_tokens", [1, 6, 16])
def test_drafts_are_the_greedy_ones_also_after_rejections(model, draft_tokens):
    text = model.tokenize(PROMPT)
    with TreeContext(model, SHAPE, context_tokens=1024, threads=1, cache_type="f32") as context:
        drafter = LookaheadDrafter(context, SHAPE)
        for num_accepted in (0, draft_tokens, 1, draft_tokens, draft_tokens // 2):
            drafted = drafter.propose(text, draft_tokens, ())
            assert drafted == plain(model, text, draft_tokens)
            text += [*drafted[:num_accepted], 65 + num_accepted]  # closed by the target


def test_a_text_that_is_accepted_takes_fewer_passes_than_tokens(model):
    text = model.tokenize(PROMPT)
    wanted = plain(model, text, NUM_TOKENS)
    with TreeContext(model, SHAPE, context_tokens=1024, threads=1, cache_type="f32") as context:
        drafter = LookaheadDrafter(context, SHAPE)
        said: list[int] = []
        while len(said) < NUM_TOKENS:
            said += drafter.propose([*text, *said], 8, ())
    assert said[:NUM_TOKENS] == wanted
    assert drafter.num_passes < NUM_TOKENS


def test_a_draft_ends_with_the_text(model):
    text = model.tokenize(PROMPT)
    wanted = plain(model, text, 12)
    end = wanted[5]
    with TreeContext(model, SHAPE, context_tokens=1024, threads=1, cache_type="f32") as context:
        drafted = LookaheadDrafter(context, SHAPE).propose(text, 12, {end})
    assert drafted == wanted[: wanted.index(end) + 1]
