"""What the report shows of each experiment: which tables and plots, in which words. Makes no number."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.evaluation import plots
from edge_agent.evaluation.markdown import show
from edge_agent.evaluation.metrics import Bins
from edge_agent.evaluation.page import Part, Picture, Section, Table
from edge_agent.evaluation.plots import Curve, Group, Setting
from edge_agent.evaluation.runs import Row, read_run
from edge_agent.evaluation.summary import (
    GuidanceSummary,
    LengthSummary,
    Reliability,
    Router,
    RoutingSummary,
    SettingSummary,
    SpeculationSummary,
    summarise_guide,
    summarise_length,
    summarise_routing,
    summarise_speculation,
)
from shared.bootstrap import Estimate
from shared.errors import InvalidRequest

INTERVALS = "In brackets: 95% interval, percentile bootstrap over questions."
_SHORT_HASH = 12


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it was read."""

    label: str
    name: str
    """For files and anchors."""
    manifest: Mapping[str, Any]
    rows: Sequence[Row]


def sections(run_dirs: Sequence[Path]) -> list[Section]:
    """A section for each experiment that the runs belong to.

    Raises:
        InvalidRequest: a folder holds no run, or one of an experiment that is not known.
    """
    runs: dict[str, list[tuple[Path, dict[str, Any], list[Row]]]] = {}
    for folder in dict.fromkeys(run_dirs):
        manifest, rows = read_run(folder)
        experiment = manifest.get("identity", {}).get("experiment")
        if experiment not in _SECTIONS:
            raise InvalidRequest(
                f"{folder} is a run of {experiment!r}, which has no report; there are {', '.join(_SECTIONS)}"
            )
        runs.setdefault(experiment, []).append((folder, manifest, rows))
    return [make(_named(runs[experiment])) for experiment, make in _SECTIONS.items() if experiment in runs]


def _named(found: Sequence[tuple[Path, dict[str, Any], list[Row]]]) -> list[Run]:
    """Runs under the shortest names that tell them apart."""
    labels = [_label(manifest) for _, manifest, _ in found]
    runs = []
    for number, ((folder, manifest, rows), label) in enumerate(zip(found, labels, strict=True), start=1):
        if labels.count(label) > 1:
            label = f"{label} ({folder.name})"
        runs.append(Run(label, f"{number}-{_slug(folder.name)}", manifest, rows))
    return runs


def _label(manifest: Mapping[str, Any]) -> str:
    identity = manifest["identity"]
    models = [_model(identity[role]) for role in _ROLES if identity.get(role)]
    return f"{Path(str(identity.get('data', '?'))).stem}: {' → '.join(models)}"


_ROLES = ("edge", "cloud", "draft", "target")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _model(entry: Any) -> str:
    return str(entry.get("model", "?")) if isinstance(entry, Mapping) else str(entry)


# --- routing ---------------------------------------------------------------------------------------------

_PAIRS = {"own": "this run's pair", "routellm": "RouteLLM's labels"}


@dataclass(frozen=True, slots=True)
class _View:
    """A run under one kind of labels."""

    label: str
    name: str
    summary: RoutingSummary


def _routing(runs: Sequence[Run]) -> Section:
    views = []
    missing = []
    for run in runs:
        summaries = summarise_routing(run.rows)
        if not summaries:
            missing.append(f"{run.label}: no question has been answered or labelled yet")
        for s in summaries:
            several = len(summaries) > 1
            label = f"{run.label}, {_PAIRS[s.pair]}" if several else run.label
            views.append(_View(label, f"routing-{run.name}-{s.pair}", s))
    together = Part(
        tables=[_about(runs), *([_routing_headline(views)] if views else [])],
        pictures=_routing_together(views) if len(views) > 1 else (),
        missing=missing,
    )
    return Section(
        name="routing",
        title="Routing",
        lead="Which questions go to the cloud, and what that buys. Hard: the edge is wrong. Need: the edge"
        " is wrong and the cloud is right. In RouteLLM's labels the edge is Mixtral-8x7B, the cloud GPT-4.",
        parts=[together, *(_routing_view(view) for view in views)],
    )


def _routing_headline(views: Sequence[_View]) -> Table:
    def of(role: str, metric: Callable[[Router], Estimate | None]) -> list[str]:
        routers = [_best(view.summary, role) for view in views]
        return [show(metric(router) if router else None) for router in routers]

    def calibrated(metric: Callable[[Reliability], Estimate]) -> list[str]:
        return [show(metric(s.reliability) if s.reliability else None) for s in summaries]

    summaries = [view.summary for view in views]
    rows = [
        ["questions", *(f"{s.num_questions:,}" for s in summaries)],
        ["accuracy of the edge", *(_share(s.edge) for s in summaries)],
        ["accuracy of the cloud", *(_share(s.cloud) for s in summaries)],
        ["APGR of the blend", *of("blend", lambda r: r.apgr)],
        ["APGR of the best probe", *of("probe", lambda r: r.apgr)],
        ["APGR of prompt length", *of("length", lambda r: r.apgr)],
        ["APGR of the oracle", *of("oracle", lambda r: r.apgr)],
        ["CPT(50%) of the blend", *of("blend", lambda r: r.cpt50)],
        ["CPT(80%) of the blend", *of("blend", lambda r: r.cpt80)],
        ["APGR of the blend minus that of prompt length", *map(_length_difference, summaries)],
        ["AUROC of the blend, hard", *of("blend", lambda r: r.auroc_hard)],
        ["AUROC of the blend, need", *of("blend", lambda r: r.auroc_need)],
        ["ECE of the blend", *calibrated(lambda r: r.ece)],
        ["ECE of a perfect predictor, up to", *calibrated(lambda r: Estimate(r.ece_ceiling))],
        ["Brier score of the blend", *calibrated(lambda r: r.brier)],
        ["Brier skill of the blend", *calibrated(lambda r: r.brier_skill)],
    ]
    return Table(
        title="Headline figures",
        columns=["", *(view.label for view in views)],
        rows=rows,
        note=f"{INTERVALS} The blend is cross-fitted: no question is scored by a fit that saw it. The best"
        " probe is the best on these very questions, so its figure flatters it. APGR and CPT as RouteLLM"
        " (arXiv 2406.18665) defines them; random has an APGR of .5. A difference is unresolved unless its"
        " interval, from a paired bootstrap, excludes 0. A perfect predictor has a"
        " smaller ECE 19 times in 20.",
    )


def _length_difference(s: RoutingSummary) -> str:
    if s.blend_minus_length is None:
        return "–"
    return f"{show(s.blend_minus_length)}: {s.verdict}"


def _routing_together(views: Sequence[_View]) -> list[Picture]:
    pictures = []
    curves = [
        Curve(_with(view.label, blend.apgr), blend.share, blend.gap, role)
        for view, role in zip(views, plots.SERIES * len(views), strict=False)
        if (blend := _best(view.summary, "blend")) and blend.share is not None and blend.gap is not None
    ]
    if len(curves) > 1:
        pictures.append(
            Picture(
                name="routing-gap-recovered",
                title="The blends side by side",
                caption="Share of the gap between each run's edge and cloud that its blend recovers, against"
                " the share of the questions that it sends; APGR in brackets."
                f" {_counts(views)}.",
                figure=plots.gap_recovered([*curves, _RANDOM]),
            )
        )
    pictures += _probe_dots("routing-probes", views)
    return pictures


_RANDOM = Curve("random (.500)", np.array([0.0, 1.0]), np.array([0.0, 1.0]), "random")


def _routing_view(view: _View) -> Part:
    s = view.summary
    pictures = []
    curves = [
        Curve(_with(router.name, router.apgr), router.share, router.accuracy, role)
        for role in ("oracle", "blend", "probe", "length", "random")
        if (router := _best(s, role)) and router.share is not None and router.accuracy is not None
    ]
    n = f"n = {s.num_questions:,} questions"
    needed = "" if s.cloud is not None else " No cloud was asked: needed means that the edge is wrong."
    if curves and s.cloud is not None:
        pictures.append(
            Picture(
                name=f"{view.name}-cost-quality",
                title="Quality against cost",
                caption="Accuracy when the questions with the highest scores go to the cloud; APGR in"
                f" brackets. The probe is the best one on these questions. {n}.",
                figure=plots.cost_quality(curves, s.edge.value, s.cloud.value),
            )
        )
    if s.reliability is not None:
        r = s.reliability
        pictures.append(
            Picture(
                name=f"{view.name}-calibration",
                title="Calibration of the blend",
                caption="Cross-fitted probabilities; a dot is a bin, its size the number of questions."
                f" Dotted: perfectly calibrated. ECE {show(r.ece)}, Brier score {show(r.brier)}."
                f"{needed} {n}.",
                figure=plots.calibration(Bins(r.edges, r.predicted, r.observed, r.counts)),
            )
        )
    if s.scores:
        pictures.append(
            Picture(
                name=f"{view.name}-scores",
                title="Scores by outcome",
                caption=f"Cross-fitted scores of the blend; dashed: its median. {n}.",
                figure=plots.score_histograms(s.scores, s.threshold),
            )
        )
    if s.confusion is not None:
        pictures.append(
            Picture(
                name=f"{view.name}-confusion",
                title="Route against need",
                caption=f"The blend at its median of {s.threshold:.2f}, so that half of the questions go to"
                f" the cloud. {n}.",
                figure=plots.confusion(s.confusion),
            )
        )
    pictures += _probe_dots(f"{view.name}-probes", [view])
    if len(s.groups) > 1:
        pictures.append(
            Picture(
                name=f"{view.name}-subjects",
                title="Subjects",
                caption="Hardest for the edge first; in brackets the number of questions. A bar that rests on"
                f" few is noisy. Sent: among the half that the blend sends. {n}.",
                figure=plots.subjects(
                    [Group(g.name, g.num_questions, g.edge, g.cloud, g.sent) for g in s.groups]
                ),
            )
        )
    return Part(title=view.label, tables=[_routers(view)], pictures=pictures, missing=s.missing)


def _routers(view: _View) -> Table:
    metrics: dict[str, Callable[[Router], Estimate | None]] = {
        "AUROC (hard)": lambda r: r.auroc_hard,
        "AUROC (need)": lambda r: r.auroc_need,
        "APGR": lambda r: r.apgr,
        "CPT(50%)": lambda r: r.cpt50,
        "CPT(80%)": lambda r: r.cpt80,
    }
    unread = "".join(
        f" Not understood of {name}: {share:.1%}." for name, share in view.summary.parse_failures.items()
    )
    known = {k: metric for k, metric in metrics.items() if any(metric(r) for r in view.summary.routers)}
    return Table(
        title="Every probe",
        columns=["", *known],
        rows=[[r.name, *(show(metric(r)) for metric in known.values())] for r in view.summary.routers],
        note=f"{INTERVALS} Scores as they stand: below .5 is a score that is upside down.{unread}",
    )


def _probe_dots(name: str, views: Sequence[_View]) -> list[Picture]:
    """Every router that scores questions, best first by the first view's AUROC."""
    shown = [
        {r.name: r for r in view.summary.routers if r.role not in ("oracle", "random")} for view in views
    ]
    routers = list(dict.fromkeys(name for of_view in shown for name in of_view))
    metrics: dict[str, Callable[[Router], Estimate | None]] = {
        "AUROC (hard)": lambda r: r.auroc_hard,
        "AUROC (need)": lambda r: r.auroc_need,
        "APGR": lambda r: r.apgr,
    }
    panels = {
        metric: [[get(of_view[r]) if r in of_view else None for r in routers] for of_view in shown]
        for metric, get in metrics.items()
    }
    panels = {metric: rows for metric, rows in panels.items() if any(e for row in rows for e in row)}
    if not panels:
        return []
    first = next(iter(panels.values()))

    def best(router: int) -> float:
        return max((e.value for e in (row[router] for row in first) if e is not None), default=0.0)

    order = sorted(range(len(routers)), key=best, reverse=True)
    return [
        Picture(
            name=name,
            title="Every probe",
            caption="Dotted: chance. Whiskers: 95% interval, percentile bootstrap over questions."
            f" {_counts(views)}.",
            figure=plots.probe_dots(
                {metric: [[row[i] for i in order] for row in rows] for metric, rows in panels.items()},
                [routers[i] for i in order],
                [view.label for view in views],
            ),
        )
    ]


def _best(summary: RoutingSummary, role: str) -> Router | None:
    """The router of a role, with the highest APGR (AUROC where there is none) if there are several."""

    def goodness(router: Router) -> float:
        for estimate in (router.apgr, router.auroc_hard):
            if estimate is not None:
                return estimate.value
        return float("-inf")

    return max((r for r in summary.routers if r.role == role), key=goodness, default=None)


def _counts(views: Sequence[_View]) -> str:
    return "n = " + ", ".join(f"{view.summary.num_questions:,}" for view in views) + " questions"


# --- length ----------------------------------------------------------------------------------------------


def _length(runs: Sequence[Run]) -> Section:
    found = [(run, summarise_length(run.rows)) for run in runs]
    shown = [(run, summary) for run, summary in found if summary is not None]
    return Section(
        name="length",
        title="Answer length",
        lead="How long the edge's own answers are, and how well that is foreseen. Error: mean distance"
        " between predicted and actual tokens. Acc-50, Acc-100: share within so many tokens"
        " (arXiv 2305.13144).",
        parts=[
            Part(
                tables=[_about(runs), *([_length_errors(shown)] if len(shown) > 1 else [])],
                missing=[f"{run.label}: no answer yet" for run, summary in found if summary is None],
            ),
            *(_length_run(run, summary) for run, summary in shown),
        ],
    )


def _length_errors(shown: Sequence[tuple[Run, LengthSummary]]) -> Table:
    columns = [{p.name: show(p.error, 1) for p in summary.predictors} for _, summary in shown]
    names = dict.fromkeys(name for column in columns for name in column)
    return Table(
        title="Error (tokens) of each predictor",
        columns=["", *(run.label for run, _ in shown)],
        rows=[[name, *(column.get(name, "–") for column in columns)] for name in names],
        note=INTERVALS,
    )


def _length_run(run: Run, s: LengthSummary) -> Part:
    predictors = Table(
        title="Predictors",
        columns=[
            "",
            "answers",
            "Error (tokens)",
            "of the best constant's",
            "Acc-50",
            "Acc-100",
            "not understood",
        ],
        rows=[
            [
                p.name,
                f"{len(p.actual):,}",
                show(p.error, 1),
                show(p.over_constant, 2),
                _share(p.within_50),
                _share(p.within_100),
                "–" if p.parse_failures is None else f"{p.parse_failures:.1%}",
            ]
            for p in s.predictors
        ],
        note=f"{INTERVALS} Censored answers (cut off at the limit) are left out of the figures."
        " Regressions, blend and boosting are cross-fitted by question."
        + ("" if s.blend_minus_length is None else f" {_length_verdict(s)}")
        + "".join(
            f" Two answers to one question at temperature {f.temperature:g} differ by"
            f" {show(f.pair_difference, 1)} tokens; no predictor's error is below half of that."
            for f in s.floors
        ),
    )
    conditions = Table(
        title="What the prompt and the temperature do to the answers",
        columns=["", "answers", "tokens", "accuracy", "censored"],
        rows=[
            [
                f"{c.prompt}, temperature {c.temperature:g}",
                f"{c.num_answers:,}",
                show(c.tokens, 1),
                _share(c.accuracy),
                f"{c.censored:.1%}",
            ]
            for c in s.conditions
        ],
        note=f"{INTERVALS} Tokens: mean of the answers that ended by themselves."
        + ("" if s.tokens_per_word is None else f" Tokens per word: {show(s.tokens_per_word, 2)}."),
    )
    effects = Table(
        title="The same question, temperature and seed: difference to the plain prompt",
        columns=["", "tokens", "accuracy"],
        rows=[
            [f"{e.prompt}, temperature {e.temperature:g}", show(e.tokens, 1), _share(e.accuracy)]
            for e in s.effects
        ],
        note=INTERVALS,
    )
    pictures = [
        Picture(
            name=f"length-{run.name}-{_slug(p.name)}",
            title=f"Predicted against actual: {p.name}",
            caption=f"Both axes logarithmic; dotted: as predicted. n = {len(p.actual):,} answers to"
            f" {s.num_questions:,} questions.",
            figure=plots.lengths(p.predicted, p.actual, p.censored),
        )
        for p in s.predictors
        if len(p.predicted) and np.ptp(p.predicted) > 0
    ]
    tables = [predictors, conditions, *([effects] if s.effects else [])]
    return Part(title=run.label, tables=tables, pictures=pictures, missing=s.missing)


def _length_verdict(s: LengthSummary) -> str:
    return f"Blend minus prompt length: {show(s.blend_minus_length, 1)} tokens: {s.verdict}."


# --- speculation -----------------------------------------------------------------------------------------


def _speculation(runs: Sequence[Run]) -> Section:
    found = [(run, summarise_speculation(run.rows)) for run in runs]
    shown = [(run, summary) for run, summary in found if summary.settings]
    return Section(
        name="speculation",
        title="Speculation",
        lead="What the drafts of the edge save the target, and what lenient policies cost. Acceptance length:"
        " committed tokens per round, the target's own token included (block efficiency).",
        parts=[
            Part(
                tables=[_about(runs), *(_speculation_together(shown) if len(shown) > 1 else [])],
                missing=[f"{run.label}: no answer yet" for run, summary in found if not summary.settings],
            ),
            *(_speculation_run(run, summary) for run, summary in shown),
        ],
    )


def _speculation_together(shown: Sequence[tuple[Run, SpeculationSummary]]) -> list[Table]:
    by_run = [{x.setting: x for x in summary.settings} for _, summary in shown]
    settings = list(dict.fromkeys(name for of_run in by_run for name in of_run))

    def table(title: str, get: Callable[[SettingSummary], str]) -> Table:
        return Table(
            title=title,
            columns=["", *(run.label for run, _ in shown)],
            rows=[[x, *(get(of_run[x]) if x in of_run else "–" for of_run in by_run)] for x in settings],
            note=INTERVALS,
        )

    return [
        table("Acceptance length of each setting", lambda x: show(x.acceptance_length, 2)),
        table("Target passes per committed token", lambda x: show(x.passes_per_token)),
        table("Agreement with the lossless answer", lambda x: _share(x.agreement)),
    ]


_QUALITIES: tuple[tuple[str, str, Callable[[SettingSummary], Estimate | None]], ...] = (
    ("agreement with the lossless answer", "Agreement against cost", lambda x: x.agreement),
    ("accuracy", "Accuracy against cost", lambda x: x.accuracy),
)


def _speculation_run(run: Run, s: SpeculationSummary) -> Part:
    table = Table(
        title="Settings",
        columns=[
            "",
            "questions",
            "acceptance length",
            "acceptance rate",
            "α̂",
            "target passes per token",
            "seconds per token",
            "agreement",
            "accuracy",
        ],
        rows=[
            [
                x.setting,
                f"{x.num_questions:,}",
                show(x.acceptance_length, 2),
                _share(x.acceptance_rate),
                show(x.alpha_hat, 2),
                show(x.passes_per_token, 3),
                show(x.seconds_per_token, 3),
                _share(x.agreement),
                _share(x.accuracy),
            ]
            for x in s.settings
        ],
        note=f"{INTERVALS} Acceptance rate: accepted / drafted. α̂: accepted / (accepted + rounds that end in"
        " a rejection). Agreement: share of positions equal to the lossless answer's.",
    )
    most = max(x.num_questions for x in s.settings)
    pictures = []
    for quality, title, get in _QUALITIES:
        points = [
            Setting(x.setting, x.policy, x.passes_per_token.value, value.value)
            for x in s.settings
            if (value := get(x)) is not None
        ]
        if len(points) > 1:
            pictures.append(
                Picture(
                    name=f"speculation-{run.name}-pareto-{_slug(quality)}",
                    title=title,
                    caption="Large and joined: no other setting is as cheap and better."
                    f" n = {most:,} questions.",
                    figure=plots.pareto(points, quality),
                )
            )
    by_policy: dict[str, list[SettingSummary]] = {}
    for x in s.settings:
        by_policy.setdefault(x.policy, []).append(x)
    longest = [max(of_policy, key=lambda x: x.max_draft_tokens) for of_policy in by_policy.values()]
    gammas = {x.max_draft_tokens for x in longest}
    pictures.append(
        Picture(
            name=f"speculation-{run.name}-categories",
            title="Acceptance length by category",
            caption="Each policy at its longest draft. Dotted: 1, where no draft token is accepted, and the"
            " most that a round can give where the policies share it. Lines: 95% interval."
            f" n = {most:,} questions.",
            figure=plots.acceptance_by_category(
                {x.setting: x.by_category for x in longest}, gammas.pop() + 1.0 if len(gammas) == 1 else None
            ),
        )
    )
    lines = {
        policy: sorted(((x.max_draft_tokens, x.acceptance_length) for x in found), key=lambda point: point[0])
        for policy, found in by_policy.items()
        if len({x.max_draft_tokens for x in found}) > 1
    }
    missing = list(s.missing)
    if lines:
        pictures.append(
            Picture(
                name=f"speculation-{run.name}-draft-length",
                title="Acceptance length against draft length",
                caption=f"Band: 95% interval. Dotted: every draft token accepted. n = {most:,} questions.",
                figure=plots.acceptance_by_draft_length(lines),
            )
        )
    else:
        missing.append("acceptance length against draft length: every setting has the same draft length")
    return Part(title=run.label, tables=[table], pictures=pictures, missing=missing)


# --- parts -----------------------------------------------------------------------------------------------


# --- guide -----------------------------------------------------------------------------------------------


def _guide(runs: Sequence[Run]) -> Section:
    found = [(run, summarise_guide(run.rows)) for run in runs]
    return Section(
        name="guide",
        title="Guide",
        lead="The target begins each answer and the edge finishes it (GKT, arXiv 2405.19635): right answers"
        " and target tokens, against edge and cloud alone.",
        parts=[
            Part(
                tables=[_about(runs)],
                missing=[f"{run.label}: no answer yet" for run, summary in found if not summary],
            ),
            *(_guide_run(run, summary) for run, summary in found if summary),
        ],
    )


def _guide_run(run: Run, summary: Sequence[GuidanceSummary]) -> Part:
    table = Table(
        title="By length of guidance",
        columns=[
            "tokens of guidance",
            "questions",
            "target tokens, of the cloud's",
            "accuracy",
            "of the cloud's",
        ],
        rows=[
            [
                x.setting,
                f"{x.num_questions:,}",
                _share(x.target_tokens),
                _share(x.accuracy),
                _share(x.of_cloud),
            ]
            for x in summary
        ],
        note=INTERVALS,
    )
    points = [(x.setting, x.target_tokens.value, x.accuracy) for x in summary if x.accuracy is not None]
    pictures = []
    if len(points) > 1:
        pictures.append(
            Picture(
                name=f"guide-{run.name}",
                title="Accuracy by what the target writes",
                caption="From the edge alone to the cloud alone. Lines: 95% interval."
                f" n = {max(x.num_questions for x in summary):,} questions.",
                figure=plots.accuracy_by_guidance(points),
            )
        )
    return Part(title=run.label, tables=[table], pictures=pictures)


def _about(runs: Sequence[Run]) -> Table:
    """What the manifests say: the same facts for every run, then whatever else makes it what it is."""
    columns = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for facts in columns for name in facts))
    return Table(
        title="Runs",
        columns=["", *(run.label for run in runs)],
        rows=[[name, *(facts.get(name, "–") for facts in columns)] for name in names],
        look="about",
    )


def _facts(run: Run) -> dict[str, str]:
    identity, about = dict(run.manifest["identity"]), dict(run.manifest.get("about", {}))
    identity.pop("experiment", None)
    versions = about.pop("versions", {})
    data, data_hash = identity.pop("data", "?"), str(identity.pop("items_sha256", "?"))
    facts = {"data": f"{data} (sha256 {data_hash[:_SHORT_HASH]})", "rows": f"{len(run.rows):,}"}
    for role in _ROLES:
        entry = identity.pop(role, None)
        if isinstance(entry, Mapping):
            facts[role] = f"{_model(entry)} (sha256 {str(entry.get('sha256', '?'))[:_SHORT_HASH]})"
        elif entry is not None:
            facts[role] = str(entry)
    hashes = {key: str(identity.pop(key))[:_SHORT_HASH] for key in sorted(identity) if key.endswith("sha256")}
    if settings := {**identity, **hashes}:
        facts["settings"] = "; ".join(f"{key} {_plain(value)}" for key, value in settings.items())
    facts["started"] = str(about.pop("started", "–"))
    facts["hardware"] = ", ".join(
        _plain(about[key]) + (" cores" if key == "cores" else "")
        for key in ("cpu", "cores", "system")
        if about.get(key)
    )
    facts["versions"] = ", ".join(
        f"{name} {number}" for name, number in {"python": about.get("python"), **versions}.items() if number
    )
    facts["command"] = str(about.get("command", "–"))
    return facts


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    text = f"{estimate.value:.1%}"
    return f"{text} [{estimate.low:.1%}, {estimate.high:.1%}]" if np.isfinite(estimate.low) else text


def _with(name: str, apgr: Estimate | None) -> str:
    return name if apgr is None else f"{name} ({apgr.value:.3f})"


_SECTIONS = {"routing": _routing, "length": _length, "speculation": _speculation, "guide": _guide}
