"""Pictures of evaluation results: arrays in, a matplotlib figure out. Nothing is computed here but positions.

Figures are drawn small, so that their text stays readable when a phone shows them at their own size. Colours
are named by role: `COLOURS` on paper and in PNG, `DARK` on a page where the reader's screen is dark. The hues
follow Okabe and Ito (colour-blind safe), darkened where text or thin lines need it.
"""

from __future__ import annotations

import functools
import html
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from numpy.typing import NDArray

from edge_agent.evaluation.metrics import Bins, Floats
from shared.bootstrap import Estimate

COLOURS = {
    "paper": "#fefefe",
    "ink": "#1d2329",
    "muted": "#68717a",
    "line": "#c3c9cf",
    "grid": "#e9ecef",
    "c0": "#0070b0",
    "c1": "#d05800",
    "c2": "#008a66",
    "c3": "#a8488a",
    "c4": "#b58600",
    "c5": "#4aa3dc",
}
DARK = {
    "paper": "#14181c",
    "ink": "#e6eaee",
    "muted": "#9aa4ae",
    "line": "#4a545e",
    "grid": "#262d34",
    "c0": "#4fb0ec",
    "c1": "#ff8a3c",
    "c2": "#2cc79b",
    "c3": "#e392c8",
    "c4": "#e6b83c",
    "c5": "#9fd4f7",
}
SERIES = ("c0", "c1", "c2", "c3", "c4", "c5")
"""Roles of runs, policies and settings, in their order."""
EDGE, CLOUD = COLOURS["c0"], COLOURS["c1"]

_INK, _MUTED, _LINE = COLOURS["ink"], COLOURS["muted"], COLOURS["line"]
_WIDTH = 4.8
"""Inches; a figure's own width on a page is 72 px times this."""
_STYLE: Any = {
    "figure.facecolor": COLOURS["paper"],
    "axes.facecolor": COLOURS["paper"],
    "savefig.facecolor": COLOURS["paper"],
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,  # laid out as it is saved: text is not as wide at every resolution
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.2,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "duet",
}
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
_MANY_POINTS = 3000
"""Above it the points of a scatter plot are one picture inside the SVG."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A router's line: what comes out when a share of the questions goes to the cloud."""

    label: str
    share: Floats
    """[num_points], ascending from 0 to 1."""
    quality: Floats
    """[num_points], accuracy there, or the share of the gap recovered."""
    role: str
    """A key of `_ROLES`, or one of `SERIES`."""


_ROLES: dict[str, dict[str, Any]] = {
    "blend": {"color": COLOURS["c2"], "linewidth": 2.2, "zorder": 3},
    "probe": {"color": COLOURS["c3"], "linewidth": 1.4},
    "length": {"color": COLOURS["c4"], "linewidth": 1.4, "linestyle": (0, (5, 1.5))},
    "random": {"color": _MUTED, "linewidth": 1.2, "linestyle": (0, (1, 1.5))},
    "oracle": {"color": _INK, "linewidth": 1.0, "linestyle": (0, (6, 1.5, 1, 1.5))},
}


@dataclass(frozen=True, slots=True)
class Group:
    """A subject's bars; what is not known is NaN."""

    name: str
    num_questions: int
    edge: float
    cloud: float
    sent: float


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of speculation as a point."""

    label: str
    policy: str
    cost: float
    """Target passes per committed token."""
    quality: float


_P = ParamSpec("_P")
_Outside = Literal["outside lower center", "outside upper center", "outside upper left"]


def _styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with mpl.rc_context(_STYLE):
            figure = draw(*args, **kwargs)
            # Laid out once: PNG and SVG show the same, and neither pays for it again.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure

    return drawn


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """A file of its own, in the colours of paper."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Elsewhere than here the font may be missing; Verdana is its twin in width.
    return buffer.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, system-ui, sans-serif")


def inline(svg: str, name: str, description: str) -> str:
    """The same picture for a page: ids made unique by `name`, colours as CSS variables (`--c0`, ...),
    as wide as the page lets it be, with a description for those who cannot see it."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = body.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for role, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{role})")
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    return (
        f'<svg {box[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' role="img" aria-label="{html.escape(description)}">{rest}'
    )


# --- routing ---------------------------------------------------------------------------------------------


@_styled
def cost_quality(curves: Sequence[Curve], edge: float, cloud: float) -> Figure:
    """Accuracy against the share that goes to the cloud, with both models alone as levels."""
    figure, ax = _one(4.0)
    for level, colour in ((edge, EDGE), (cloud, CLOUD)):
        ax.axhline(level, color=colour, linewidth=0.9, zorder=1.5)
    _draw_curves(ax, curves)
    ax.set_ylabel("accuracy")
    _percent(ax.yaxis)
    ax.margins(y=0.08)
    _margin_labels(ax, [(edge, f"edge alone\n{edge:.1%}", EDGE), (cloud, f"cloud alone\n{cloud:.1%}", CLOUD)])
    _legend(figure, ax)
    return figure


@_styled
def gap_recovered(curves: Sequence[Curve]) -> Figure:
    """Several runs at once: how much of the gap between its edge and its cloud each run's router recovers."""
    figure, ax = _one(4.0)
    for level in (0.0, 1.0):
        ax.axhline(level, color=_LINE, linewidth=0.9, zorder=1.5)
    _draw_curves(ax, curves)
    ax.set_ylabel("share of the gap recovered (PGR)")
    _percent(ax.yaxis)
    ax.margins(y=0.08)
    _margin_labels(ax, [(0.0, "edge alone", _MUTED), (1.0, "cloud alone", _MUTED)])
    _legend(figure, ax)
    return figure


@_styled
def calibration(bins: Bins) -> Figure:
    """Reliability diagram, and below it how many questions stand in each bin."""
    figure = Figure(figsize=(_WIDTH, 4.3))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    top.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.9, linestyle=(0, (1, 1.5)))
    filled = bins.counts > 0
    x, y, n = bins.predicted[filled], bins.observed[filled], bins.counts[filled]
    top.plot(x, y, color=COLOURS["c2"], linewidth=1.0, alpha=0.6)
    top.scatter(
        x,
        y,
        s=14 + 130 * n / n.max(),
        color=COLOURS["c2"],
        edgecolor=COLOURS["paper"],
        linewidth=0.8,
        zorder=3,
    )
    top.set(xlim=(0, 1), ylim=(-0.04, 1.04), ylabel="share that needed the cloud")
    _percent(top.yaxis)
    bars = bottom.bar(
        bins.edges[:-1],
        bins.counts,
        width=np.diff(bins.edges),
        align="edge",
        color=COLOURS["c2"],
        alpha=0.75,
        edgecolor=COLOURS["paper"],
        linewidth=0.8,
    )
    bottom.bar_label(
        bars, [str(c) if c else "" for c in bins.counts], padding=1.5, fontsize=6.5, color=_MUTED
    )
    bottom.set(xlabel="predicted probability that the cloud is needed", ylabel="questions")
    bottom.set_ylim(0, n.max() * 1.35)
    bottom.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    _percent(bottom.xaxis)
    bottom.grid(visible=False, axis="x")
    return figure


@_styled
def score_histograms(scores: Mapping[str, Floats], threshold: float | None) -> Figure:
    """Scores of the questions by outcome, a panel each, over the same bins.

    Args:
        scores: outcome in words -> [num_questions], probabilities in [0, 1]; an outcome may be empty.
        threshold: from which on the cloud is asked.
    """
    figure = Figure(figsize=(_WIDTH, 0.6 + 1.2 * len(scores)))
    axes = figure.subplots(len(scores), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    beside = "right" if threshold is not None and threshold < 0.4 else "left"
    for ax, (outcome, values), role in zip(axes, scores.items(), ("c0", "c1", "c3"), strict=False):
        ax.hist(
            values,
            bins=list(np.linspace(0.0, 1.0, 26)),
            color=COLOURS[role],
            edgecolor=COLOURS["paper"],
            linewidth=0.5,
        )
        ax.set_title(f"{outcome}: n = {len(values)}", color=COLOURS[role], loc=beside)
        ax.set_xlim(0, 1)
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.grid(visible=False, axis="x")
        if threshold is not None:
            ax.axvline(threshold, color=_INK, linewidth=0.9, linestyle=(0, (3, 2)))
    axes[0].set_ylim(bottom=0)  # now that every panel has its bars: it ends their common scaling
    if threshold is not None:
        left = threshold > 0.7
        axes[0].annotate(
            "cloud →",
            (threshold, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if left else 4, -1),
            textcoords="offset points",
            va="bottom",
            ha="right" if left else "left",
            fontsize=7.5,
        )
    axes[-1].set_xlabel("score: probability that the cloud is needed")
    _percent(axes[-1].xaxis)
    figure.supylabel("questions", fontsize=8.5)
    return figure


@_styled
def confusion(counts: NDArray[np.int64]) -> Figure:
    """Route against need.

    Args:
        counts: [2, 2], questions; rows: not needed, needed; columns: kept on the edge, sent to the cloud.
    """
    figure, ax = _one(2.6)
    words = (("rightly kept", "sent for nothing"), ("missed", "rightly sent"))
    total = max(1, int(counts.sum()))
    for row in range(2):
        for column in range(2):
            count = int(counts[row, column])
            ax.add_patch(
                Rectangle(
                    (column, row),
                    1,
                    1,
                    facecolor=COLOURS["c2"] if row == column else COLOURS["c1"],
                    alpha=0.08 + 0.5 * count / total,
                    linewidth=0,
                )
            )
            ax.text(column + 0.5, row + 0.42, f"{count:,}", ha="center", va="center", fontsize=14)
            ax.text(
                column + 0.5,
                row + 0.72,
                f"{words[row][column]}, {count / total:.1%}",
                ha="center",
                va="center",
                fontsize=8,
            )
    ax.set(xlim=(0, 2), ylim=(2, 0), xticks=[0.5, 1.5], yticks=[0.5, 1.5])
    ax.set_xticklabels(["kept on the edge", "sent to the cloud"], color=_INK)
    ax.set_yticklabels(["cloud not\nneeded", "cloud\nneeded"], color=_INK)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.axhline(1, color=COLOURS["paper"], linewidth=2)
    ax.axvline(1, color=COLOURS["paper"], linewidth=2)
    ax.grid(visible=False)
    return figure


@_styled
def subjects(groups: Sequence[Group]) -> Figure:
    """Accuracy of both models and the share sent, a line for each subject, in the order given."""
    at = np.arange(len(groups))
    cloud = np.array([group.cloud for group in groups])
    sent = np.array([group.sent for group in groups])
    figure = Figure(figsize=(_WIDTH, 1.0 + 0.19 * max(4, len(groups))))
    if np.isnan(sent).all():
        left = figure.subplots()
    else:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[2.4, 1])
        right.barh(at, sent, height=0.6, color=_MUTED, linewidth=0)
        right.set(xlim=(0, 1), xlabel="sent to the cloud")
        right.xaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
        right.xaxis.set_major_formatter(FixedFormatter(["0", "50", "100%"]))
        right.tick_params(axis="y", length=0)
        right.grid(visible=False, axis="y")
    left.barh(
        at, [group.edge for group in groups], height=0.36, color=EDGE, label="edge", linewidth=0, zorder=2
    )
    if not np.isnan(cloud).all():
        left.barh(at, cloud, height=0.78, color=CLOUD, alpha=0.4, label="cloud", linewidth=0, zorder=1)
    left.set_yticks(at, [f"{_shortened(group.name, 36)} ({group.num_questions})" for group in groups])
    left.tick_params(axis="y", labelsize=7, labelcolor=_INK)
    left.set(ylim=(len(groups) - 0.4, -0.6), xlim=(0, 1), xlabel="accuracy")
    left.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1.0]))
    left.xaxis.set_major_formatter(FixedFormatter(["0", "25", "50", "75", "100%"]))
    left.grid(visible=False, axis="y")
    _legend(figure, left, where="outside upper center")
    return figure


@_styled
def probe_dots(
    panels: Mapping[str, Sequence[Sequence[Estimate | None]]],
    probes: Sequence[str],
    runs: Sequence[str],
    chance: float = 0.5,
) -> Figure:
    """How good each probe is, as dots with whiskers.

    Args:
        panels: metric in words -> [num_runs][num_probes]; None where a run lacks the probe.
        probes: labels from top to bottom.
        runs: labels, named in a legend where there are several.
        chance: drawn as a line.
    """
    figure = Figure(figsize=(_WIDTH, 0.9 + (0.2 + 0.06 * (len(runs) - 1)) * max(3, len(probes))))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    offsets = np.linspace(-0.25, 0.25, len(runs)) if len(runs) > 1 else np.zeros(1)
    for ax, (metric, estimates) in zip(axes, panels.items(), strict=True):
        ax.axvline(chance, color=_MUTED, linewidth=1.0, linestyle=(0, (1, 1.5)))
        for series, (offset, column) in enumerate(zip(offsets, estimates, strict=True)):
            _whiskers(ax, column, offset, COLOURS[SERIES[series % len(SERIES)]], runs[series])
        ax.set_xlabel(metric)
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(_PLAIN)
        ax.grid(visible=False, axis="y")
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(probes)), [_shortened(probe, 26) for probe in probes])
    axes[0].tick_params(axis="y", labelsize=7.5, labelcolor=_INK)
    axes[0].set_ylim(len(probes) - 0.4, -0.6)
    if len(runs) > 1:
        _legend(figure, *axes, where="outside upper left")
    return figure


# --- length ----------------------------------------------------------------------------------------------


@_styled
def lengths(predicted: Floats, actual: Floats, censored: NDArray[np.bool_]) -> Figure:
    """Predicted against actual answer length, in tokens (below 1 shown at 1); censored: at least so long."""
    figure, ax = _one(4.2)
    predicted, actual = np.maximum(predicted, 1.0), np.maximum(actual, 1.0)
    low = min(predicted.min(), actual.min()) / 1.25
    high = max(predicted.max(), actual.max()) * 1.25
    ax.plot([low, high], [low, high], color=_MUTED, linewidth=0.9, linestyle=(0, (1, 1.5)))
    for mask, colour, marker, label in (
        (~censored, COLOURS["c0"], "o", "ended by itself"),
        (censored, COLOURS["c1"], "^", "cut off at the limit: longer than shown"),
    ):
        if mask.any():
            ax.scatter(
                predicted[mask],
                actual[mask],
                s=13 if mask.sum() < 500 else 6,
                color=colour,
                marker=marker,
                alpha=max(0.25, min(0.8, 20 / np.sqrt(mask.sum()))),
                linewidth=0,
                label=f"{label} (n = {int(mask.sum()):,})",
                rasterized=bool(mask.sum() > _MANY_POINTS),
            )
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    ax.set(xlabel="predicted length (tokens)", ylabel="actual length (tokens)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
        axis.set_major_formatter(_PLAIN)
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(FixedLocator([]))
    _legend(figure, ax)
    return figure


# --- speculation -----------------------------------------------------------------------------------------


@_styled
def pareto(settings: Sequence[Setting], quality: str) -> Figure:
    """Settings of speculation by what they cost the target and what they keep of its answer.

    Args:
        settings: those that no other beats in both are joined and named; a policy has one colour.
        quality: what the y axis shows, in words.
    """
    figure, ax = _one(4.0)
    front = _front(settings)
    ax.plot(
        [s.cost for s in front],
        [s.quality for s in front],
        color=_LINE,
        linewidth=1.2,
        drawstyle="steps-post",
        zorder=1.5,
    )
    for policy, colour in _colours_of(s.policy for s in settings).items():
        of_policy = [s for s in settings if s.policy == policy]
        ax.scatter(
            [s.cost for s in of_policy],
            [s.quality for s in of_policy],
            s=[34 if s in front else 18 for s in of_policy],
            color=colour,
            alpha=0.9,
            edgecolor=COLOURS["paper"],
            linewidth=0.7,
            zorder=3,
            label=policy,
        )
    ax.set(xlabel="target passes per committed token (fewer is cheaper)", ylabel=quality)
    _percent(ax.yaxis)
    ax.margins(x=0.12, y=0.12)
    _name_points(ax, [(s.cost, s.quality, s.label) for s in front])
    _legend(figure, ax)
    return figure


@_styled
def acceptance_by_category(lengths_of: Mapping[str, Mapping[str, Estimate]], ceiling: float | None) -> Figure:
    """Acceptance length by category, bars side by side for several settings.

    Args:
        lengths_of: setting -> category -> committed tokens per round. Categories in the order of the first.
        ceiling: the most that a round can give, drawn as a line; None where the settings differ in it.
    """
    categories = list(dict.fromkeys(name for by in lengths_of.values() for name in by))
    rows = len(categories) * (len(lengths_of) + 0.6)
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.17 * max(5.0, rows)))
    ax = figure.subplots()
    height = 0.8 / len(lengths_of)
    for series, (setting, by) in enumerate(lengths_of.items()):
        at = np.arange(len(categories)) + (series - (len(lengths_of) - 1) / 2) * height
        found = [by.get(category, Estimate(float("nan"))) for category in categories]
        values = np.array([e.value for e in found])
        ax.barh(
            at,
            values,
            height=height * 0.92,
            color=COLOURS[SERIES[series % len(SERIES)]],
            label=setting,
            alpha=0.85,
        )
        for y, estimate in zip(at, found, strict=True):
            if np.isfinite(estimate.low):
                ax.plot([estimate.low, estimate.high], [y, y], color=_INK, linewidth=0.9)
            if np.isfinite(estimate.value):
                end = np.nanmax([estimate.value, estimate.high])
                ax.annotate(
                    f"{estimate.value:.2f}",
                    (end, y),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
    ax.set_yticks(range(len(categories)), [_shortened(c, 26) for c in categories])
    ax.tick_params(axis="y", labelcolor=_INK)
    ax.set(ylim=(len(categories) - 0.4, -0.6), xlabel="acceptance length (committed tokens per round)")
    ax.axvline(1.0, color=_MUTED, linewidth=1.0, linestyle=(0, (1, 1.5)))
    if ceiling is not None:
        ax.axvline(ceiling, color=_MUTED, linewidth=1.0, linestyle=(0, (1, 1.5)))
    ax.set_xlim(0, ax.get_xlim()[1] * 1.08)
    ax.grid(visible=False, axis="y")
    if len(lengths_of) > 1:
        _legend(figure, ax)
    return figure


@_styled
def acceptance_by_draft_length(lines: Mapping[str, Sequence[tuple[int, Estimate]]]) -> Figure:
    """Acceptance length against the longest draft, a line for each policy, under the most that is possible.

    Args:
        lines: policy -> (draft tokens per round, committed tokens per round), ascending.
    """
    figure, ax = _one(3.8)
    longest = max(gamma for points in lines.values() for gamma, _ in points)
    highest = max(np.nanmax([e.value, e.high]) for points in lines.values() for _, e in points)
    ax.plot([0, longest], [1, longest + 1], color=_MUTED, linewidth=1.0, linestyle=(0, (1, 1.5)))
    ax.set_ylim(0.8, 1 + (highest - 1) * 1.3 + 0.2)
    for (policy, points), role in zip(lines.items(), SERIES * len(lines), strict=False):
        x = np.array([gamma for gamma, _ in points])
        estimates = [estimate for _, estimate in points]
        ax.plot(x, [e.value for e in estimates], color=COLOURS[role], marker="o", markersize=4, label=policy)
        ax.fill_between(
            x,
            [e.low for e in estimates],
            [e.high for e in estimates],
            color=COLOURS[role],
            alpha=0.15,
            linewidth=0,
        )
    ax.set(xlabel="draft tokens per round, at most", ylabel="acceptance length\n(committed tokens per round)")
    ax.set_xlim(0, longest * 1.04 + 0.2)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    top = ax.get_ylim()[1]
    ax.annotate(
        "every draft token accepted",
        (top - 1, top),
        xytext=(5, -3),
        textcoords="offset points",
        va="top",
        fontsize=7.5,
        color=_MUTED,
    )
    _legend(figure, ax)
    return figure


# --- parts -----------------------------------------------------------------------------------------------


@_styled
def accuracy_by_guidance(points: Sequence[tuple[str, float, Estimate]]) -> Figure:
    """Accuracy against the share of the target's tokens.

    Args:
        points: name, share of the target tokens of its own answers, accuracy.
    """
    figure, ax = _one(3.4)
    points = sorted(points, key=lambda point: point[1])
    ax.plot([x for _, x, _ in points], [y.value for _, _, y in points], color=COLOURS["c0"], marker="o")
    for _, x, accuracy in points:
        if np.isfinite(accuracy.low):
            ax.plot([x, x], [accuracy.low, accuracy.high], color=_INK, linewidth=0.9)
    ax.set(xlabel="target tokens, of the cloud's own answers", ylabel="accuracy", xlim=(-0.05, 1.05))
    _percent(ax.xaxis)
    _percent(ax.yaxis)
    ax.margins(y=0.12)
    _name_points(ax, [(x, y.value, name) for name, x, y in points])
    return figure


def _one(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.subplots()


def _percent(axis: Axis) -> None:
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_curves(ax: Axes, curves: Sequence[Curve]) -> None:
    for curve in curves:
        look = _ROLES.get(curve.role) or {"color": COLOURS[curve.role], "linewidth": 1.8}
        ax.plot(curve.share, curve.quality, label=curve.label, **look)
    ax.set(xlim=(0, 1), xlabel="share of the questions sent to the cloud")
    _percent(ax.xaxis)


def _legend(figure: Figure, *axes: Axes, where: _Outside = "outside lower center") -> None:
    entries = {
        label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    labels = [textwrap.fill(label, 66) for label in entries]
    ncols = 2 if max(map(len, labels)) <= 24 else 1
    figure.legend(list(entries.values()), labels, loc=where, ncols=ncols)


def _margin_labels(ax: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Name levels to the right of the axes, pushed apart where they would touch."""
    low, high = ax.get_ylim()
    height = 0.11 * (high - low)
    ordered = sorted(labels)
    at = [level for level, _, _ in ordered]
    if at[1] - at[0] < height:
        middle = (at[0] + at[1]) / 2
        at = [middle - height / 2, middle + height / 2]
    for y, (_, text, colour) in zip(at, ordered, strict=True):
        ax.annotate(
            text,
            (1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8,
            annotation_clip=False,
        )


def _name_points(ax: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Labels above and below in turn, so that neighbours on the front keep apart."""
    middle = sum(ax.get_xlim()) / 2
    for number, (x, y, text) in enumerate(points):
        right = x <= middle
        ax.annotate(
            _shortened(text, 26),
            (x, y),
            xytext=(4 if right else -4, 6 if number % 2 == 0 else -6),
            textcoords="offset points",
            ha="left" if right else "right",
            va="bottom" if number % 2 == 0 else "top",
            fontsize=7,
        )


def _front(settings: Sequence[Setting]) -> list[Setting]:
    """Those that are better than every cheaper one, cheapest first."""
    front: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.cost, -s.quality)):
        if not front or setting.quality > front[-1].quality:
            front.append(setting)
    return front


def _whiskers(ax: Axes, column: Sequence[Estimate | None], offset: float, colour: str, label: str) -> None:
    for row, estimate in enumerate(column):
        if estimate is not None and np.isfinite(estimate.low):
            ax.plot([estimate.low, estimate.high], [row + offset] * 2, color=colour, linewidth=1.2)
    known = [(row + offset, e.value) for row, e in enumerate(column) if e is not None]
    if known:
        ax.scatter(
            [value for _, value in known],
            [row for row, _ in known],
            s=20,
            color=colour,
            edgecolor=COLOURS["paper"],
            linewidth=0.6,
            zorder=3,
            label=label,
        )


def _colours_of(names: Iterable[str]) -> dict[str, str]:
    return {name: COLOURS[SERIES[i % len(SERIES)]] for i, name in enumerate(dict.fromkeys(names))}


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade within the limits."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [t * 10.0**d for d in decades for t in (1, 2, 5) if low <= t * 10.0**d <= high]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
