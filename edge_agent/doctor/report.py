"""The doctor's findings for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text as RichText

from edge_agent.doctor.checks import Finding, Status

_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def print_report(findings: list[Finding], outlook: list[str]) -> None:
    """A line for each finding, what to do below it, and what `auto` will do at the end."""
    console = Console(highlight=False, soft_wrap=True)
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        line = RichText(f"{finding.status.value:<4}", _STYLES[finding.status])
        console.print(line.append(f"  {finding.check:<{width}}  {finding.found}", "default"))
        if finding.do:
            console.print(RichText(f"{'':<{width + 8}}to do: {finding.do}"))
    console.print()
    for said in outlook:
        console.print(RichText(said))


def report_json(findings: list[Finding], outlook: list[str], measured: Mapping[str, object]) -> str:
    """One line: findings as {check, status, found, do}, the outlook, and the figures that were measured."""
    fields = [dataclasses.asdict(finding) | {"status": finding.status.value} for finding in findings]
    return json.dumps({"findings": fields, "auto": outlook, "measured": measured}, ensure_ascii=False)
