"""What guidance saves and costs: right answers and target tokens by its length.

Input: runs of `duet eval guide` over the same data and models; each may have other lengths.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness import machine_of, save
from edge_agent.evaluation.runs import read_run
from edge_agent.evaluation.summary import summarise_guide
from shared.bootstrap import Estimate


def percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of `duet eval guide`")
    arguments = parser.parse_args()
    rows, models = [], {}
    for folder in arguments.runs:
        manifest, made = read_run(folder)
        identity = manifest["identity"]
        models[f"{identity['edge']['model']} after {identity['cloud']}, {identity['data']}"] = None
        rows += [made]
        ran_on = machine_of(manifest["about"])
    by_setting = {}
    for summaries in map(summarise_guide, rows):
        for summary in summaries:
            most = by_setting.get(summary.setting)
            if most is None or summary.num_questions > most.num_questions:
                by_setting[summary.setting] = summary
    order = {"edge": -1, "cloud": 1 << 30}
    save(
        "guidance",
        command=f"python -m benchmarks.guidance {' '.join(run.name for run in arguments.runs)}",
        title="Guidance: right answers and target tokens by its length",
        notes=f"{', '.join(models)}; greedy, by `duet eval guide`. Against the target's own answers to the"
        " same questions; 95% bootstrap intervals over questions. Aim (GKT): >= 95% of the cloud's right at"
        " <= 52% of its target tokens.",
        columns=[
            "tokens of guidance",
            "questions",
            "target tokens, of the cloud's",
            "right",
            "of the cloud's right",
        ],
        rows=[
            [
                x.setting,
                str(x.num_questions),
                percent(x.target_tokens),
                percent(x.accuracy),
                percent(x.of_cloud),
            ]
            for x in sorted(by_setting.values(), key=lambda x: order.get(x.setting) or int(x.setting))
        ],
        ran_on=ran_on,
    )


if __name__ == "__main__":
    main()
