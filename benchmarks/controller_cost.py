"""What the edge computes for a round beside drafting: the controller, and the protocol with its encoding."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from benchmarks.harness import Summary, save, summarise
from benchmarks.recorded import load
from benchmarks.virtual_link import World, run_auto
from protos import wire
from protos.duet.v1 import speculation_pb2 as pb2
from shared.controller import SpeedController
from shared.messages import Opened, Verdict
from shared.sampling import Sampling
from shared.session import EdgeSession

DRAFT_TOKENS = 4
ROUNDS = 500
REPEATS = 9
DRAFT_STEPS_MS = (5.0, 42.0)
"""A fast edge, and this project's 0.5B with 2 CPU threads (`benchmarks.drafting_loop`)."""


def controller_round(controller: SpeedController) -> Callable[[int], None]:
    def one(i: int) -> None:
        controller.plan()
        for _ in range(DRAFT_TOKENS):
            controller.observe_draft(1, 5e-3)
        controller.observe_round(
            DRAFT_TOKENS,
            i % (DRAFT_TOKENS + 1),
            gave_token=True,
            verify_s=0.031,
            elapsed_s=0.1,
            round_trip_s=0.05,
        )

    return one


def protocol_round() -> Callable[[int], None]:
    session = EdgeSession()
    session.send_open()
    session.receive_opened(
        Opened(
            model="",
            prompt_token_ids=(),
            end_token_ids=frozenset(),
            sampling=Sampling(),
            max_tokens=1 << 20,
            max_draft_tokens=64,
            vocabulary_sha256="",
        )
    )

    def one(i: int) -> None:
        draft = session.send_draft([1000 + i] * DRAFT_TOKENS, more=False)
        pb2.SpeculateRequest(draft=wire.encode_draft(draft)).SerializeToString()
        accepted = i % (DRAFT_TOKENS + 1)
        epoch = session.epoch + (accepted < DRAFT_TOKENS)
        verdict = Verdict(epoch, draft.start, DRAFT_TOKENS, accepted, 7)
        sent = pb2.SpeculateResponse(verdict=wire.encode_verdict(verdict)).SerializeToString()
        session.receive_verdict(wire.decode_verdict(pb2.SpeculateResponse.FromString(sent).verdict))

    return one


def microseconds(one: Callable[[int], None]) -> Summary:
    """A round's CPU time; other work on the machine does not count."""
    numbers = itertools.count()
    found = []
    for _ in range(REPEATS):
        began = time.process_time()
        for _ in range(ROUNDS):
            one(next(numbers))
        found.append(1e6 * (time.process_time() - began) / ROUNDS)
    return summarise(found)


def main() -> None:
    answers = load().answers
    controller = SpeedController()
    for answer in answers[:5]:  # a controller that has something to predict from
        run_auto(World(5e-3, 0.025, 0.05, lambda _: 0.031), answer, controller)
    parts = {
        "controller": microseconds(controller_round(controller)),
        "protocol": microseconds(protocol_round()),
    }
    rows = [[name, part.show("{:.0f}"), *shares(part.median)] for name, part in parts.items()]
    whole = sum(part.median for part in parts.values())
    rows.append(["both", f"{whole:.0f}", *shares(whole)])
    save(
        "controller_cost",
        command="python -m benchmarks.controller_cost",
        title="CPU of controller and protocol at the edge, a round",
        notes=f"Rounds of {DRAFT_TOKENS} draft tokens, without network and gRPC: plan, observations, session,"
        f" encoding both ways. Process CPU time, median of {REPEATS} x {ROUNDS} rounds. Share of the drafting"
        " time at two draft steps. Aim: <= 3%.",
        columns=["part", "us a round", *(f"share at {step:g} ms a token" for step in DRAFT_STEPS_MS)],
        rows=rows,
    )


def shares(microseconds_a_round: float) -> list[str]:
    return [f"{microseconds_a_round / (1e3 * step * DRAFT_TOKENS):.2%}" for step in DRAFT_STEPS_MS]


if __name__ == "__main__":
    main()
