"""Answers at a terminal: plain text as it is committed, or coloured by who made it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text as RichText

from shared.events import Answer, Text
from shared.session import Origin

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
