"""What a chat took: of the answer that is being made, for the status line, and in sum. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from shared.events import Answer, Event, Round, Routed, Text
from shared.routing import Decision, Link
from shared.session import Origin


@dataclass(slots=True)
class AnswerFigures:
    """Of one answer; exact at its end, and before that as far as events tell."""

    mode: str | None = None
    """How it is made; None before that is decided."""
    decision: Decision | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    tokens_per_s: float | None = None
    """From the first token to the last one."""
    _first_at: float | None = None
    _num_seen: int = 0

    def take(self, event: Event, now: float) -> None:
        """Note an event that came at `now`, s."""
        if isinstance(event, Routed):
            self.mode, self.decision = event.mode, event.decision
        elif isinstance(event, Round):
            self.num_drafted += event.num_drafted
            self.num_accepted += event.num_accepted
        elif isinstance(event, Text):
            self._count(now)
        elif isinstance(event, Answer):
            self.mode = event.mode
            self.tokens_per_s = 1e3 / event.tpot_ms if event.tpot_ms else None

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted"""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    def _count(self, now: float) -> None:
        """A run of text is a token, but for characters that take several."""
        if self._first_at is None:
            self._first_at = now
            return
        self._num_seen += 1
        if now > self._first_at:
            self.tokens_per_s = self._num_seen / (now - self._first_at)


@dataclass(slots=True)
class ChatFigures:
    """Of all whole answers so far."""

    num_answers: int = 0
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_rounds: int = 0
    target_passes: int = 0
    origins: Counter[Origin] = field(default_factory=Counter)
    last: Answer | None = None

    def add(self, answer: Answer) -> None:
        self.num_answers += 1
        self.num_tokens += answer.completion_tokens
        self.num_drafted += answer.drafted_tokens
        self.num_accepted += answer.accepted_tokens
        self.num_rounds += answer.rounds
        self.target_passes += answer.target_passes
        self.origins.update(token.origin for token in answer.tokens)
        self.last = answer


def status_line(mode: str, answer: AnswerFigures, link: Link | None) -> str:
    """Mode, speed, acceptance and link, as far as they are known.

    Args:
        mode: as set.
        link: None where the cloud is not asked.

    >>> status_line("auto", AnswerFigures(mode="local", tokens_per_s=21.04), None)
    'auto: local · 21.0 tokens/s · no cloud in use'
    """
    made = f"{mode}: {answer.mode}" if answer.mode and answer.mode != mode else mode
    parts = [made]
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.acceptance_rate is not None:
        parts.append(f"{answer.acceptance_rate:.0%} accepted")
    parts.append(link_text(link))
    return " · ".join(parts)


def link_text(link: Link | None) -> str:
    if link is None:
        return "no cloud in use"
    if not link.up:
        return "link down"
    return "link" if link.rtt_s is None else f"link {1e3 * link.rtt_s:.0f} ms"


def stats_lines(figures: ChatFigures) -> list[str]:
    """What `/stats` says."""
    if figures.last is None:
        return ["no answers yet"]
    last = figures.last
    plural = "" if figures.num_answers == 1 else "s"
    lines = [f"{figures.num_answers} answer{plural}, {figures.num_tokens} tokens"]
    lines += [f"  {origin.value}: {count}" for origin, count in figures.origins.most_common()]
    if figures.num_drafted:
        lines.append(
            f"drafts: {figures.num_accepted} of {figures.num_drafted} tokens accepted"
            f" ({figures.num_accepted / figures.num_drafted:.0%}), {figures.num_rounds} rounds,"
            f" {figures.target_passes} passes of the target"
        )
    timing = [f"{last.prompt_tokens} tokens of prompt", f"{last.completion_tokens} of completion"]
    if last.ttft_ms is not None:
        timing.append(f"first after {last.ttft_ms:.0f} ms")
    if last.tpot_ms is not None:
        timing.append(f"then {last.tpot_ms:.0f} ms a token")
    lines.append(f"last answer: {', '.join(timing)}")
    return lines
