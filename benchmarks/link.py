"""Every way to get the target's own answer, over links and targets of all speeds: simulated.

Sessions and controller are the real ones, the models are recorded, and the times computed
(`benchmarks.virtual_link`). Tokens a second count whole answers, from the request to the last token, the
prompt's reading left out.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import save
from benchmarks.recorded import Answer, load
from benchmarks.virtual_link import Outcome, World, run_auto, run_fixed, run_server_side
from shared.controller import DRAFT_LENGTHS, MAX_WINDOW_TOKENS, Plan, SpeedController, Way

RTTS_MS = (0, 14, 50, 100, 200)
TARGET_STEPS = (1, 5, 30)
"""In draft steps."""
WINDOWS = (2, 3, 4, 6, 8, 12, 16)
"""In drafts; what proactive speculation is tried with."""
WARM_UP_TOKENS = 64
ORDERS = 5
"""`auto` learns as it goes, so it runs over the answers in so many random orders."""
PLOT = Path(__file__).parent.parent / "docs" / "link_speed.svg"
Answers = Sequence[Answer]


def h100_pass(t_step: float, num_tokens: int) -> float:
    """A round by requests to vLLM 0.25 on an H100: a step, 6 ms on top, and next to nothing a token.

    Measured at contexts of 256 to 4,096 with 7B, 14B and 32B: 5.2 to 9.7 ms above a decode step at K = 8,
    and 0.2 to 1.2 ms more from K = 1 to 32.
    """
    return t_step + 6e-3 + 2e-5 * num_tokens


def h100_engine_pass(t_step: float, num_tokens: int) -> float:
    """The same inside the engine, where speculation has no requests of its own."""
    return t_step + 2e-5 * num_tokens


def cpu_pass(t_step: float, num_tokens: int) -> float:
    """llama.cpp with 2 threads, 1.5B Q4_K_M: batches of 1, 4, 8 and 16 took 77, 169, 435 and 431 ms."""
    tokens = num_tokens + 1
    steps = float(np.interp(tokens, (1, 4, 8, 16), (1.0, 2.19, 5.6, 5.6)))
    return t_step * max(steps, 5.6 / 16 * tokens if tokens > 16 else 0.0)


CURVES: dict[str, tuple[Callable[[float, int], float], Callable[[float, int], float]]] = {
    "H100": (h100_pass, h100_engine_pass),
    "CPU": (cpu_pass, cpu_pass),
}
"""Over the link, and beside the target."""


@dataclass(frozen=True, slots=True)
class Result:
    """One way in one cell: an outcome for each answer, or over all answers for each order."""

    outcomes: list[Outcome]
    plan: Plan | None = None

    @property
    def total(self) -> Outcome:
        total = Outcome()
        for each in self.outcomes:
            total.add(each)
        return total

    @property
    def tokens_per_s(self) -> float:
        return self.total.tokens_per_s

    @property
    def draft_tokens(self) -> str:
        if self.plan is None or self.plan.way is Way.CLOUD:
            return ""
        window = f"/{self.plan.window_tokens}" if self.plan.way is Way.PROACTIVE else ""
        return f" ({self.plan.num_draft_tokens}{window})"


@dataclass(frozen=True, slots=True)
class Cell:
    curve: str
    target_step: int
    rtt_ms: int
    world: World
    ways: dict[str, Result]

    @property
    def best(self) -> Result:
        """The best fixed way that an edge can choose, chosen with hindsight."""
        return max((self.ways[name] for name in ("cloud", "stop and wait", "proactive")), key=_rate)

    @property
    def auto_ratios(self) -> list[float]:
        return [each.tokens_per_s / self.best.tokens_per_s for each in self.ways["auto"].outcomes]


def _rate(result: Result) -> float:
    return result.tokens_per_s


def best_of(plans: Sequence[Plan], world: World, answers: Answers) -> Result:
    return max(
        (Result([run_fixed(world, each, plan) for each in answers], plan) for plan in plans), key=_rate
    )


def fixed(way: Way, num_draft_tokens: int, window_tokens: int) -> Plan:
    return Plan(way, num_draft_tokens, window_tokens, None, "fixed")


def auto(world: World, answers: Answers) -> Result:
    """Over all answers in each of several orders, after one answer to warm up with."""
    outcomes = []
    for seed in range(ORDERS):
        shuffled = random.Random(seed).sample(answers, len(answers))
        controller = SpeedController()
        run_auto(world, (list(shuffled[0]) * WARM_UP_TOKENS)[:WARM_UP_TOKENS], controller)
        outcomes.append(Result([run_auto(world, each, controller) for each in shuffled]).total)
    return Result(outcomes)


def measure(curve: str, target_step: int, rtt_ms: int, t_draft: float, answers: Answers) -> Cell:
    over_link, beside = CURVES[curve]
    t_step, rtt = target_step * t_draft, 1e-3 * rtt_ms
    world = World(t_draft, t_step, rtt, partial(over_link, t_step))
    at_cloud = World(t_draft, t_step, rtt, partial(beside, t_step))
    waiting = [fixed(Way.STOP_AND_WAIT, g, g) for g in DRAFT_LENGTHS]
    going_on = [
        fixed(Way.PROACTIVE, g, g * times)
        for g in DRAFT_LENGTHS
        for times in WINDOWS
        if g * times <= MAX_WINDOW_TOKENS
    ]
    server_side = (
        Result([run_server_side(at_cloud, each, plan.num_draft_tokens) for each in answers], plan)
        for plan in waiting
    )
    ways = {
        "cloud": best_of([fixed(Way.CLOUD, 0, 0)], world, answers),
        "server side": max(server_side, key=_rate),
        "stop and wait": best_of(waiting, world, answers),
        "proactive": best_of(going_on, world, answers),
        "auto": auto(world, answers),
    }
    cell = Cell(curve, target_step, rtt_ms, world, ways)
    print(" | ".join(speed_row(cell)), flush=True)
    return cell


def ratio(a: Result, b: Result) -> str:
    """How many times as fast a is as b, with the 95% bootstrap interval over answers."""
    times = np.array([[x.seconds, y.seconds] for x, y in zip(a.outcomes, b.outcomes, strict=True)])
    drawn = np.random.default_rng(0).integers(0, len(times), (1000, len(times)))
    sums = times[drawn].sum(axis=1)
    low, high = np.quantile(sums[:, 1] / sums[:, 0], (0.025, 0.975))
    return f"{times[:, 1].sum() / times[:, 0].sum():.2f} ({low:.2f} to {high:.2f})"


def speed_row(cell: Cell) -> list[str]:
    ratios = cell.auto_ratios
    return [
        *(cell.curve, str(cell.target_step), str(cell.rtt_ms)),
        *(f"{way.tokens_per_s:.1f}{way.draft_tokens}" for way in cell.ways.values()),
        f"{np.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        ratio(cell.ways["proactive"], cell.ways["stop and wait"]),
    ]


def cost_row(cell: Cell) -> list[str]:
    totals = [way.total for way in cell.ways.values()]
    return [
        *(cell.curve, str(cell.target_step), str(cell.rtt_ms)),
        *(f"{1e3 * t.first_token_s / t.num_answers:.0f}" for t in totals),
        *(f"{t.num_passes / t.num_tokens:.2f}" for t in totals),
        *(f"{t.num_bytes / t.num_tokens:.1f}" for t in totals),
    ]


def verdict(cells: Sequence[Cell], answers: Answers) -> list[list[str]]:
    """The figures that were asked for, and by how much each is met or missed."""
    rows = []
    for curve in CURVES:
        mine = [cell for cell in cells if cell.curve == curve]
        worst = min(mine, key=lambda cell: float(np.mean(cell.auto_ratios)))
        where = f"step {worst.target_step}, {worst.rtt_ms} ms"
        rows.append([f"{curve}: least auto / best ({where})", f"{np.mean(worst.auto_ratios):.3f}", ">= 0.98"])
        for cell in (cell for cell in mine if cell.rtt_ms == 50):
            name = f"/ stop and wait, step {cell.target_step}, 50 ms"
            waiting = cell.ways["stop and wait"]
            rows.append([f"{curve}: proactive {name}", ratio(cell.ways["proactive"], waiting), ">= 1.3"])
            rows.append([f"{curve}: ceiling {name}", ratio(ceiling(cell, answers), waiting), ""])
        [cell] = (cell for cell in mine if (cell.target_step, cell.rtt_ms) == (30, 50))
        rows += limit_rows(cell)
    return rows


def ceiling(cell: Cell, answers: Answers) -> Result:
    """What no schedule of single-path drafts can beat.

    Each rejected token must be drafted after the rollback before it, travel, be checked and come back: a run
    of N takes N t_d + t_v + RTT at least, whatever is sent when.
    """
    world = cell.world
    outcomes = []
    for answer in answers:
        runs = np.diff([0, *(i + 1 for i, each in enumerate(answer) if not each.agrees), len(answer)])
        drafting = len(answer) * world.t_draft
        waiting = int(np.count_nonzero(runs)) * (world.verify(1) + world.rtt)
        outcomes.append(Outcome(num_tokens=len(answer), seconds=world.rtt + drafting + waiting))
    return Result(outcomes)


def limit_rows(cell: Cell) -> list[list[str]]:
    """Proactive over the cloud's stream against tau / (1 + RTT / t_verify), tau of the best stop-and-wait."""
    waiting, proactive, cloud = (cell.ways[name] for name in ("stop and wait", "proactive", "cloud"))
    assert waiting.plan is not None
    tau = waiting.total.num_tokens / waiting.total.num_passes
    t_verify = cell.world.verify(waiting.plan.num_draft_tokens)
    limit = tau / (1.0 + cell.world.rtt / t_verify)
    over_cloud = ratio(proactive, cloud)
    share = proactive.tokens_per_s / cloud.tokens_per_s / limit
    name = f"{cell.curve}, step 30, 50 ms"
    return [
        [f"{name}: proactive / cloud stream (PicoSpec: 1.45 and 2.9)", over_cloud, ""],
        [f"{name}: limit at tau {tau:.2f}, t_verify {1e3 * t_verify:.0f} ms", f"{limit:.2f}", ""],
        [f"{name}: proactive over that limit", f"{share:.2f}", ">= 0.85"],
    ]


def plot(cells: Sequence[Cell]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "duet", "font.size": 9})
    figure, axes = plt.subplots(
        len(CURVES), len(TARGET_STEPS), figsize=(10, 5.5), sharex=True, layout="constrained"
    )
    for row, curve in zip(axes, CURVES, strict=True):
        for axis, step in zip(row, TARGET_STEPS, strict=True):
            line = [cell for cell in cells if (cell.curve, cell.target_step) == (curve, step)]
            for name in line[0].ways:
                rates = [cell.ways[name].tokens_per_s / cell.ways["cloud"].tokens_per_s for cell in line]
                style = {"linestyle": "--", "color": "grey"} if name == "server side" else {}
                axis.plot([cell.rtt_ms for cell in line], rates, marker=".", label=name, **style)
            axis.set_title(f"{curve}, target step {step} draft steps")
            axis.set_ylim(bottom=0)
    figure.supxlabel("round trip, ms")
    figure.supylabel("tokens/s over the cloud's stream (simulated)")
    axes[0][0].legend()
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft-ms", type=float, default=5.0, help="a draft step at the edge")
    parser.add_argument("--processes", type=int, default=2, help="cells that are simulated at once")
    arguments = parser.parse_args()
    recorded = load()
    answers = recorded.answers
    where = list(itertools.product(CURVES, TARGET_STEPS, RTTS_MS))
    with ProcessPoolExecutor(max_workers=arguments.processes) as pool:
        one = partial(measure, t_draft=1e-3 * arguments.draft_ms, answers=answers)
        cells = list(pool.map(one, *zip(*where, strict=True)))
    command = f"python -m benchmarks.link --draft-ms {arguments.draft_ms:g}"
    setting = (
        f"**Simulated** on a virtual clock: real session state machines and controller,"
        f" {recorded.draft} and {recorded.target} as recorded on {len(answers)} prompts of"
        f" {recorded.data} ({recorded.num_tokens} tokens, greedy, {recorded.agreement:.2f} agree),"
        f" a draft step of {arguments.draft_ms:g} ms, the prompt's reading left out. A pass of K draft tokens"
        " costs, H100 (vLLM, measured with other models): a target step + 6 ms + 0.02 ms a token; CPU"
        " (llama.cpp, 2 threads, measured): 1, 2.19, 5.6, 5.6 steps for 1, 4, 8, 16 tokens. Server side:"
        " drafts at the same speed beside the target, no 6 ms. What is drafted after a wrong draft token is"
        " not recorded, and void in any case; drafts restart after a rejection."
    )
    at = ["pass cost", "target step", "RTT, ms"]
    names = list(cells[0].ways)
    save(
        "link_speed",
        command=command,
        title="Ways to the target's own answer over a link (simulated)",
        notes=f"{setting} Tokens/s, the best draft length (and window) in brackets, found with hindsight."
        " Best: of cloud, stop and wait, proactive. auto after one answer of 64 tokens, mean and range of"
        f" {ORDERS} orders of the answers; proactive / stop and wait with a bootstrap interval over answers."
        f"\n\n![speed over the cloud's stream]({PLOT.name})",
        columns=[*at, *names, "auto / best", "proactive / stop and wait"],
        rows=[speed_row(cell) for cell in cells],
    )
    save(
        "link_speed_costs",
        command=command,
        title="What each way costs over a link (simulated)",
        notes=f"{setting} Bytes are serialised Drafts, Verdicts and Tokens, both directions.",
        columns=[
            *at,
            *(f"{what}, {name}" for what in ("TTFT ms", "passes/token", "bytes/token") for name in names),
        ],
        rows=[cost_row(cell) for cell in cells],
    )
    save(
        "link_speed_figures",
        command=command,
        title="Speed over a link against what was aimed at (simulated)",
        notes=f"{setting} The limit is tau / (1 + RTT / t_verify), with tau (tokens a round) and t_verify of"
        " the best stop and wait. Ceiling: a run of N tokens to the next rejection takes N t_d + t_v + RTT at"
        " least, however drafts are scheduled on a single path.",
        columns=["figure", "found", "aim"],
        rows=verdict(cells, answers),
    )
    plot(cells)


if __name__ == "__main__":
    main()
