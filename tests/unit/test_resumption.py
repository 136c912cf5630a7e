"""Whether a stream that broke may go on, and where."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shared.errors import (
    TABLE,
    CloudError,
    CloudFailed,
    CloudOverloaded,
    CloudUnavailable,
    QuotaExceeded,
    StreamExpired,
    VerifyTimeout,
)
from shared.messages import Message, Open, Opened, Policy
from shared.resumption import carries_on, is_resumable, shows_absence, to_resume
from shared.sampling import Sampling

OPENED = Opened(
    model="large",
    prompt_token_ids=(1, 2, 3),
    end_token_ids=frozenset({9}),
    sampling=Sampling(temperature=0.5),
    max_tokens=40,
    max_draft_tokens=32,
    vocabulary_sha256="v",
)
RESUMABLE = {
    CloudUnavailable,
    CloudOverloaded,
    CloudFailed,
    VerifyTimeout,
    QuotaExceeded,
    StreamExpired,
}


def test_only_what_may_be_better_later_or_elsewhere_is_tried_again():
    assert {leaf for leaf in TABLE if is_resumable(leaf("m"))} == RESUMABLE


def test_a_replica_without_room_is_not_an_absent_one():
    absent = {leaf for leaf in TABLE if issubclass(leaf, CloudError) and shows_absence(leaf("m"))}
    assert absent == {CloudUnavailable, VerifyTimeout}


def test_a_resume_asks_for_what_was_in_force_and_keeps_the_prompt_and_the_seed():
    asked = Open(prompt=(Message("user", "hi"),), sampling=Sampling(), seed=7, policy=Policy.BILD)
    resumed = to_resume(asked, OPENED, (5, 6))
    assert (resumed.prompt, resumed.seed, resumed.committed) == (asked.prompt, 7, (5, 6))
    assert (resumed.sampling, resumed.policy, resumed.max_tokens) == (
        OPENED.sampling,
        Policy.LOSSLESS,
        40,
    )


def test_a_replica_that_takes_shorter_drafts_writes_the_same_text():
    assert carries_on(OPENED, replace(OPENED, max_draft_tokens=8))


@pytest.mark.parametrize(
    "difference",
    [
        pytest.param({"model": "other"}, id="another model"),
        pytest.param({"prompt_token_ids": (1, 2)}, id="another reading of the prompt"),
        pytest.param({"max_tokens": 30}, id="less room"),
        pytest.param({"end_token_ids": frozenset({8})}, id="other ends"),
        pytest.param({"policy": Policy.BILD}, id="another policy"),
        pytest.param({"vocabulary_sha256": "w"}, id="another vocabulary"),
    ],
)
def test_a_replica_that_would_write_another_text_is_refused(difference):
    assert not carries_on(OPENED, replace(OPENED, **difference))
