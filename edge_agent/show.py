"""Answers as people and programs read them: plain text, text coloured by who made it, JSON."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from shared.events import Answer, Text
from shared.session import Origin

if TYPE_CHECKING:
    from edge_agent.bench import BenchReport, LinkSpeed
    from shared.routing import Decision

STYLES = {
    Origin.ACCEPTED: "green",
    Origin.CORRECTION: "bold red",
    Origin.BONUS: "blue",
    Origin.CLOUD: "cyan",
    Origin.LOCAL: "yellow",
}
MARKS = {
    Origin.ACCEPTED: "edge, accepted",
    Origin.CORRECTION: "cloud, correction",
    Origin.BONUS: "cloud, bonus",
    Origin.CLOUD: "cloud",
    Origin.LOCAL: "edge",
}


class PlainWriter:
    """Text on standard output, flushed as it comes."""

    def write(self, event: Text) -> None:
        sys.stdout.write(event.text)
        sys.stdout.flush()

    def finish(self, answer: Answer) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()


class OriginWriter:
    """The same text in colours, and below it the legend with counts."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)

    def write(self, event: Text) -> None:
        self._console.print(RichText(event.text, STYLES[event.origin]), end="")

    def finish(self, answer: Answer) -> None:
        self._console.print()
        counts = {
            origin: n for origin in Origin if (n := sum(token.origin is origin for token in answer.tokens))
        }
        legend = RichText(" · ").join(
            RichText(f"{MARKS[origin]} {n}", STYLES[origin]) for origin, n in counts.items()
        )
        self._console.print(legend)


def answer_fields(answer: Answer) -> dict[str, Any]:
    """For JSON; tokens as {id, text, origin, source}, their text as far as it is whole characters."""
    fields = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
    fields["decision"] = None if answer.decision is None else dataclasses.asdict(answer.decision)
    fields["speed"] = None if answer.speed is None else dataclasses.asdict(answer.speed)
    fields["finish_reason"] = answer.finish_reason.value
    fields["tokens"] = [
        {
            "id": t.id,
            "text": t.piece.decode("utf-8", "replace"),
            "origin": t.origin.value,
            "source": t.source and t.source.value,
        }
        for t in answer.tokens
    ]
    return fields


def explanation(answer: Answer) -> list[str]:
    """Why an answer was made as it was: the route, the ways one after the other, and what was measured."""
    lines = []
    if answer.decision is not None:
        lines += [f"route {answer.decision.route.value}, because {why}" for why in answer.decision.reasons]
    if answer.speed is not None:
        lines += [
            f"from token {each.position} on: {each.plan} ({each.plan.why})" for each in answer.speed.ways
        ]
        lines += answer.speed.explanation
    return lines or [f"mode {answer.mode} was asked for"]


def decision_lines(decision: Decision) -> list[str]:
    """Who answers, what the router estimates, and why."""
    return [
        f"route: {decision.route.value}",
        f"probability that the cloud is needed: {decision.p_cloud:.2f}",
        f"predicted length: {decision.predicted_tokens} tokens",
        *(f"because {reason}" for reason in decision.reasons),
    ]


def print_decision(decision: Decision) -> None:
    """What `duet route` found, and why."""
    console = Console(highlight=False, soft_wrap=True)
    for line in decision_lines(decision):
        console.print(line, markup=False)
    table = Table("probe", "value", "said", box=None)
    for name, reading in decision.probes.items():
        value = "not understood" if reading["value"] is None else f"{reading['value']:.2f}"
        options = reading.get("distribution", {})
        said = ", ".join(f"{option} {p:.2f}" for option, p in options.items())
        first_line = reading.get("text", "").strip().partition("\n")[0]
        table.add_row(name, value, RichText(said or repr(first_line)))
    console.print(table)


def print_bench(report: BenchReport) -> None:
    """What `duet bench` measured, and what follows from it."""
    console = Console(highlight=False, soft_wrap=True)
    draft, link = report.draft, report.link
    console.print(
        f"edge model: drafts {draft.draft_tokens_per_s:.1f} tokens/s,"
        f" reads {draft.prefill_tokens_per_s:.0f} tokens/s"
    )
    if link is None:
        return
    console.print(f"link: {1e3 * link.rtt_s:.1f} ms a round beside the target's own time")
    console.print(f"target: {1e3 * link.t_step_s:.0f} ms a token, {1 / link.t_step_s:.1f} tokens/s")
    console.print(f"\nIf {report.acceptance_rate:.0%} of draft tokens are accepted:")
    console.print(_forecast_table(report, link))
    best = max(report.forecast, key=lambda line: line.speed_up)
    if best.speed_up > 1:
        console.print(
            f"Speculate with max_draft_tokens {best.num_draft_tokens}:"
            f" {best.speed_up:.2f}x the cloud's stream; it pays up to a round trip of"
            f" {1e3 * best.break_even_rtt_s:.0f} ms."
        )
    else:
        console.print("The cloud's own stream is faster at every length: --mode cloud, if only speed counts.")


def _forecast_table(report: BenchReport, link: LinkSpeed) -> Table:
    table = Table()
    names = ("draft length", "verify, ms", "verify / step", "tokens a round", "tokens/s", "over the stream")
    for name in names:
        table.add_column(name, justify="right")
    for line in report.forecast:
        t_verify = link.t_verify_s[line.num_draft_tokens]
        table.add_row(
            str(line.num_draft_tokens),
            f"{1e3 * t_verify:.0f}",
            f"{t_verify / link.t_step_s:.2f}",
            f"{line.acceptance_length:.2f}",
            f"{line.tokens_per_s:.1f}",
            f"{line.speed_up:.2f}x",
        )
    return table
