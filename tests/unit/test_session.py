"""What each end of a stream does with one message, legal or not."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import FutureEpoch, InvalidDraft, UnexpectedMessage
from shared.messages import Draft, FinishReason, Opened, Policy, Verdict
from shared.sampling import Sampling
from shared.session import Admission, CloudSession, CloudState, EdgeSession, EdgeState, Origin

END = 99


def cloud(
    committed=(), max_tokens=100, max_draft_tokens=8, policy=Policy.LOSSLESS, rollback_threshold=None
) -> CloudSession:
    return CloudSession(
        committed=committed,
        max_tokens=max_tokens,
        max_draft_tokens=max_draft_tokens,
        end_token_ids=frozenset({END}),
        legal_token_ids=range(100),
        policy=policy,
        rollback_threshold=rollback_threshold,
    )


def edge(committed=(), max_tokens=100) -> EdgeSession:
    session = EdgeSession(committed)
    session.send_open()
    session.receive_opened(
        Opened(
            model="m",
            prompt_token_ids=(1,),
            end_token_ids=frozenset({END}),
            sampling=Sampling(),
            max_tokens=max_tokens,
            max_draft_tokens=8,
            vocabulary_sha256="",
        )
    )
    return session


def test_a_whole_draft_earns_a_bonus_token():
    session = cloud()
    session.receive(Draft(0, 0, (1, 2), more=False))
    round_ = session.next_round()
    assert (round_.token_ids, round_.num_positions) == ((1, 2), 3)
    assert session.judge(round_, [1, 2, 3]) == Verdict(0, 0, 2, 2, 3)
    assert session.committed == [1, 2, 3]


def test_a_draft_that_promises_more_earns_no_bonus():
    session = cloud()
    session.receive(Draft(0, 0, (1, 2), more=True))
    round_ = session.next_round()
    assert round_.num_positions == 2
    assert session.judge(round_, [1, 2]) == Verdict(0, 0, 2, 2, None)


def test_a_rejection_raises_the_epoch_and_voids_what_waits_and_what_is_in_flight():
    session = cloud()
    session.receive(Draft(0, 0, (1, 2), more=True))
    round_ = session.next_round()
    session.receive(Draft(0, 2, (3,), more=True))
    assert session.judge(round_, [1, 9]) == Verdict(1, 0, 2, 1, 9)
    assert session.state is CloudState.LISTENING
    assert session.receive(Draft(0, 3, (4,), more=False)) is Admission.VOID
    assert session.receive(Draft(1, 2, (4,), more=False)) is Admission.ADMITTED


def test_drafts_that_wait_together_are_scored_in_one_round_and_answered_by_one_verdict():
    session = cloud()
    session.receive(Draft(0, 0, (1, 2), more=True))
    session.receive(Draft(0, 2, (3,), more=True))
    session.receive(Draft(0, 3, (), more=False))
    round_ = session.next_round()
    assert (round_.token_ids, round_.num_positions) == ((1, 2, 3), 4)
    assert session.judge(round_, [1, 2, 3, 4]) == Verdict(0, 0, 3, 3, 4)


def test_an_empty_draft_asks_for_the_targets_token():
    session = cloud()
    session.receive(Draft(0, 0, (), more=False))
    assert session.judge(session.next_round(), [5]) == Verdict(0, 0, 0, 0, 5)


@pytest.mark.parametrize(
    ("drafts", "error"),
    [
        pytest.param([Draft(0, 1, (1,), False)], InvalidDraft, id="a start that leaves a gap"),
        pytest.param([Draft(1, 0, (1,), False)], FutureEpoch, id="an epoch nobody announced"),
        pytest.param([Draft(0, 0, (100,), False)], InvalidDraft, id="a token outside the vocabulary"),
        pytest.param([Draft(0, 0, (1,) * 9, False)], InvalidDraft, id="more tokens than the limit"),
        pytest.param([Draft(0, 0, (), True)], InvalidDraft, id="an empty draft that promises more"),
        pytest.param(
            [Draft(0, 0, (1,), False), Draft(0, 1, (2,), False)],
            InvalidDraft,
            id="a draft after the last one",
        ),
        pytest.param(
            [Draft(0, 0, (1,), True), Draft(0, 0, (2,), True)], InvalidDraft, id="two drafts for one position"
        ),
    ],
)
def test_an_illegal_draft_is_refused(drafts, error):
    session = cloud()
    *legal, illegal = drafts
    for draft in legal:
        session.receive(draft)
    with pytest.raises(error):
        session.receive(illegal)


def test_a_promise_holds_while_the_last_draft_is_being_scored():
    session = cloud()
    session.receive(Draft(0, 0, (1,), more=False))
    session.next_round()
    with pytest.raises(InvalidDraft):
        session.receive(Draft(0, 1, (2,), more=False))


def test_an_exact_repeat_is_ignored_at_any_time_in_its_epoch():
    session = cloud()
    draft = Draft(0, 0, (1,), more=False)
    session.receive(draft)
    assert session.receive(draft) is Admission.REPEATED
    session.judge(session.next_round(), [1, 2])
    assert session.receive(draft) is Admission.REPEATED
    assert session.next_round() is None


def test_an_accepted_end_token_finishes_and_what_follows_it_is_not_scored():
    session = cloud()
    session.receive(Draft(0, 0, (1, END, 5), more=False))
    round_ = session.next_round()
    assert (round_.token_ids, round_.num_positions) == ((1, END), 2)
    assert session.judge(round_, [1, END]) == Verdict(0, 0, 3, 2, None)
    assert (session.state, session.finish_reason) == (CloudState.DONE, FinishReason.STOP)


def test_max_tokens_counts_what_a_resume_brought_along():
    session = cloud(committed=(1, 2), max_tokens=4)
    session.receive(Draft(0, 2, (3, 4, 5), more=False))
    verdict = session.judge(session.next_round(), [3, 4])
    assert verdict == Verdict(0, 2, 3, 2, None)
    assert session.finish_reason is FinishReason.LENGTH


def test_a_resume_of_a_whole_answer_is_done_at_once():
    assert cloud(committed=(1, END)).finish_reason is FinishReason.STOP
    assert cloud(committed=(1, 2), max_tokens=2).finish_reason is FinishReason.LENGTH


# Policy bild


def test_a_token_that_the_target_finds_likely_enough_stands_and_the_bonus_follows_it():
    session = cloud(policy=Policy.BILD, rollback_threshold=3.0)
    assert session.needs_logprobs
    session.receive(Draft(0, 0, (1, 2), more=False))
    verdict = session.judge(session.next_round(), [1, 9, 3], logprobs=np.array([-0.1, -2.9]))
    assert verdict == Verdict(0, 0, 2, 2, 3)
    assert session.committed == [1, 2, 3]


def test_a_token_too_far_from_the_target_is_rolled_back_to_the_targets_own():
    session = cloud(policy=Policy.BILD, rollback_threshold=3.0)
    session.receive(Draft(0, 0, (1, 2, 3), more=False))
    verdict = session.judge(session.next_round(), [8, 9, 3, 4], logprobs=np.array([-2.0, -3.1, -0.1]))
    assert verdict == Verdict(1, 0, 3, 1, 9)
    assert session.committed == [1, 9]


def test_drafts_in_flight_behind_a_tolerated_one_are_judged_together_and_voided_by_a_rollback():
    session = cloud(policy=Policy.BILD, rollback_threshold=3.0)
    session.receive(Draft(0, 0, (1, 2), more=True))
    first = session.next_round()
    session.receive(Draft(0, 2, (3,), more=True))
    session.receive(Draft(0, 3, (4, 5), more=True))
    assert session.judge(first, [1, 9], logprobs=np.array([-0.1, -1.0])) == Verdict(0, 0, 2, 2, None)
    both = session.next_round()
    assert both.token_ids == (3, 4, 5)
    session.receive(Draft(0, 5, (6,), more=False))
    verdict = session.judge(both, [9, 8, 7], logprobs=np.array([-2.0, -4.0, -0.1]))
    assert verdict == Verdict(1, 2, 3, 1, 8)
    assert session.next_round() is None
    assert session.receive(Draft(0, 6, (6,), more=False)) is Admission.VOID
    assert session.receive(Draft(1, 4, (6,), more=False)) is Admission.ADMITTED
    assert session.committed == [1, 2, 3, 8]


def test_a_tolerated_end_of_text_ends_the_text():
    session = cloud(policy=Policy.BILD, rollback_threshold=3.0)
    session.receive(Draft(0, 0, (1, END, 5), more=False))
    verdict = session.judge(session.next_round(), [1, 2], logprobs=np.array([-0.1, -2.0]))
    assert verdict == Verdict(0, 0, 3, 2, None)
    assert session.finish_reason is FinishReason.STOP


def test_a_lossless_session_asks_for_no_probabilities_and_no_judgements():
    assert not cloud().needs_logprobs
    assert not cloud().needs_judgements


# Policy judge


def test_a_token_that_the_judge_refuses_and_the_target_would_not_say_is_corrected():
    session = cloud(policy=Policy.JUDGE)
    session.receive(Draft(0, 0, (1, 2, 3), more=False))
    verdict = session.judge(session.next_round(), [8, 9, 3, 4], acceptable=np.array([True, False, True]))
    assert verdict == Verdict(1, 0, 3, 1, 9)


def test_what_the_judge_lets_stand_gets_the_bonus_behind_it():
    session = cloud(policy=Policy.JUDGE)
    session.receive(Draft(0, 0, (1, 2), more=False))
    verdict = session.judge(session.next_round(), [8, 2, 4], acceptable=np.array([True, False]))
    assert verdict == Verdict(0, 0, 2, 2, 4)


def test_without_a_bonus_the_row_behind_the_last_judged_token_is_not_used():
    session = cloud(policy=Policy.JUDGE)
    session.receive(Draft(0, 0, (1, 2), more=True))
    verdict = session.judge(session.next_round(), [8, 2, 4], acceptable=np.array([True, True]))
    assert verdict == Verdict(0, 0, 2, 2, None)


def test_the_judge_alone_never_ends_a_text():
    session = cloud(policy=Policy.JUDGE)
    session.receive(Draft(0, 0, (1, END), more=False))
    verdict = session.judge(session.next_round(), [1, 7], acceptable=np.array([True, True]))
    assert verdict == Verdict(1, 0, 2, 1, 7)
    assert session.finish_reason is None


def test_the_target_alone_stops_at_its_end_of_text_or_the_limit():
    session = cloud(max_tokens=3)
    assert session.append([1]) == (1,)
    assert session.append([2, 3, 4]) == (2, 3)
    assert session.finish_reason is FinishReason.LENGTH


def test_the_edge_must_wait_after_its_last_draft():
    session = edge()
    session.send_draft([1], more=False)
    assert session.state is EdgeState.WAITING
    with pytest.raises(UnexpectedMessage):
        session.send_draft([2], more=False)


def test_the_edge_commits_accepted_tokens_and_the_correction_and_forgets_the_rest():
    session = edge()
    session.send_draft([1, 2, 3], more=True)
    session.send_draft([4], more=True)
    commit = session.receive_verdict(Verdict(1, 0, 3, 1, 9))
    assert (commit.token_ids, commit.origins) == ((1, 9), (Origin.ACCEPTED, Origin.CORRECTION))
    assert (session.epoch, session.position, session.num_in_flight) == (1, 2, 0)


def test_a_verdict_for_the_first_of_two_drafts_leaves_the_second_in_flight():
    session = edge()
    session.send_draft([1, 2], more=True)
    session.send_draft([3], more=False)
    session.receive_verdict(Verdict(0, 0, 2, 2, None))
    assert (session.state, session.num_in_flight) == (EdgeState.WAITING, 1)


def test_a_repeated_verdict_adds_nothing():
    session = edge()
    session.send_draft([1, 2], more=False)
    verdict = Verdict(0, 0, 2, 2, 3)
    session.receive_verdict(verdict)
    assert session.receive_verdict(verdict).token_ids == ()
    assert session.committed == [1, 2, 3]


@pytest.mark.parametrize(
    "verdict",
    [
        pytest.param(Verdict(0, 1, 2, 2, 3), id="for a position that was never reached"),
        pytest.param(Verdict(0, 0, 1, 1, None), id="for half a draft"),
        pytest.param(Verdict(0, 0, 2, 3, None), id="that accepts more than it scored"),
        pytest.param(Verdict(1, 0, 2, 2, 3), id="that raises the epoch without a rejection"),
        pytest.param(Verdict(0, 0, 2, 1, 3), id="that rejects without raising the epoch"),
        pytest.param(Verdict(0, 0, 9, 9, 3), id="for more than was sent"),
    ],
)
def test_the_edge_refuses_a_verdict(verdict):
    session = edge()
    session.send_draft([1, 2], more=False)
    with pytest.raises(UnexpectedMessage):
        session.receive_verdict(verdict)
    assert session.committed == []


def test_the_edge_does_not_draft_past_an_end_of_text():
    session = edge()
    session.send_draft([1], more=False)
    session.receive_verdict(Verdict(0, 0, 1, 1, END))
    assert session.state is EdgeState.FINISHING
    with pytest.raises(UnexpectedMessage):
        session.send_draft([2], more=False)
