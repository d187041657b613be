"""How many points are decided within a budget? Certified, falsified and unknown on published networks, by the plan `complete`.

PYTHONPATH=src python benchmarks/complete.py [mnist_wk17a ...] [--points 500] [--seconds 10]
"""

from __future__ import annotations

import argparse
import dataclasses

import common

import calipers
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.presets import PLANS
from calipers.problem.ball import Ball

RADII = {"mnist_wk17a": 0.1, "mnist_madry_tiny": 0.3, "mnist_rsl18a": 0.1, "mnist_6x100_nat": 0.026, "cifar_cnn_a_adv4": 2 / 255}


def main() -> None:
    """Print a line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(RADII))
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0, help="of branch and bound, for each point that is still open")
    options = parser.parse_args()
    common.start(f"The plan complete, {options.seconds:g} s of branch and bound a point")
    plan = PLANS["complete"]
    stages = tuple(
        dataclasses.replace(s, tool=dataclasses.replace(s.tool, seconds=options.seconds)) if isinstance(s.tool, BranchAndBound) else s for s in plan.stages
    )
    print("| network | linf | points | certified | falsified | unknown | seconds | by |\n|---|---|---|---|---|---|---|---|")
    for name in options.networks:
        model = common.network(name)
        if model is None:
            continue
        x, y = common.cifar(min(options.points, 200)) if name.startswith("cifar") else common.digits(options.points)
        results: list[calipers.Result] = []
        run = dataclasses.replace(plan, stages=stages)
        seconds = common.clock(lambda: results.append(calipers.measure(model, x, y, Ball("linf", RADII[name]), plan=run)))  # noqa: B023
        rows = results[0].points
        count = {verdict: sum(r.verdict == verdict for r in rows) for verdict in ("robust", "broken", "unknown")}
        tools: dict[str, int] = {}
        for row in rows:
            if row.verdict != "unknown":
                short = row.tool.partition("(")[0]
                tools[short] = tools.get(short, 0) + 1
        by = ", ".join(f"{k} {v}" for k, v in sorted(tools.items(), key=lambda kv: -kv[1]))
        print(f"| {name} | {RADII[name]:.4g} | {len(rows)} | {count['robust']} | {count['broken']} | {count['unknown']} | {seconds:.1f} | {by} |", flush=True)


if __name__ == "__main__":
    main()
