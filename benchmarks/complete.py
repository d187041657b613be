"""How many points are decided within a budget? Certified, falsified and unknown on published
networks and trained ones, by the plan `complete`.

PYTHONPATH=src python benchmarks/complete.py [mnist_wk17a ...] [--points 500] [--seconds 10 60]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable

import common
import trained

import calipers
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.measurement.plan import Plan
from calipers.presets import plan_for
from calipers.threats.ball import Ball

RADII = {
    "mnist_wk17a": 0.1,
    "mnist_madry_tiny": 0.3,
    "mnist_rsl18a": 0.1,
    "mnist_6x100_nat": 0.026,
    "cifar_cnn_a_adv4": 2 / 255,
}
RADII |= {"residual": 0.02, "tanh": 0.02, "vit": 0.004}


def main() -> None:
    """Print a line for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(RADII))
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument(
        "--seconds",
        type=float,
        nargs="*",
        default=[10.0],
        help="of branch and bound, for each point that is still open; each a row",
    )
    options = parser.parse_args()
    common.start("The plan complete, by seconds of branch and bound a point")
    print(
        "| network | linf | budget, s | points | certified | falsified | unknown | seconds | by "
        "|\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in options.networks:
        model = trained.network(name)
        if model is None:
            continue
        x, y = (
            common.cifar(min(options.points, 200))
            if name.startswith("cifar")
            else common.digits(options.points)
        )
        for budget in options.seconds:
            row(
                name,
                budget,
                lambda plan: calipers.measure(model, x, y, Ball("linf", RADII[name]), plan=plan),
            )


def row(name: str, budget: float, run: Callable[[Plan], calipers.Result]) -> None:
    """Measure with that budget and print what was decided, and by which tool."""
    plan = plan_for(Ball("linf", 1.0), "complete")
    stages = tuple(
        dataclasses.replace(s, tool=dataclasses.replace(s.tool, seconds=budget))
        if isinstance(s.tool, BranchAndBound)
        else s
        for s in plan.stages
    )
    results: list[calipers.Result] = []
    seconds = common.clock(lambda: results.append(run(dataclasses.replace(plan, stages=stages))))
    rows = results[0].points
    count = {
        verdict: sum(r.verdict == verdict for r in rows)
        for verdict in ("robust", "broken", "unknown")
    }
    tools = Counter(r.tool.partition("(")[0] for r in rows if r.verdict != "unknown")
    by = ", ".join(f"{k or 'clean error'} {v}" for k, v in tools.most_common())
    decided = f"{count['robust']} | {count['broken']} | {count['unknown']}"
    print(
        f"| {name} | {RADII[name]:.4g} | {budget:g} | {len(rows)} | {decided} | {seconds:.1f} | "
        f"{by} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
