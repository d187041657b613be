"""How many points does the standard plan leave standing, and how long does it take? Against
AutoAttack's standard version, on the same points.

Each side answers one question: how many points are classified correctly and stand the attacks.
calipers runs the plan's stages (certificates of points are part of it: a certified point is not
attacked again, and its proof counts in the time); AutoAttack runs APGD-CE, APGD-T, FAB-T and Square
with its own defaults on batches of 250. AutoAttack's examples pass the same judge: moved by the few
roundings that exact membership asks for, then run again in float64.

    PYTHONPATH=src python benchmarks/cascade.py [--points 500] [--only mnist_madry_tiny] \\
        [--plan standard] [--rounds 1]
"""

from __future__ import annotations

import argparse
import math
from types import ModuleType
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn

import calipers
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball


class Row(NamedTuple):
    network: str
    norm: str
    radius: float
    points: int = 500


ROWS = (
    Row("mnist_rsl18a", "linf", 0.1), Row("mnist_wk17a", "linf", 0.1),
    Row("mnist_madry_tiny", "linf", 0.3),
    Row("cifar_cnn_a_adv4", "linf", 2 / 255, 200),
    Row("mnist-plain", "linf", 0.1), Row("mnist-plain", "l2", 1.0), Row("mnist-plain", "l1", 6.0),
    Row("mnist-robust", "linf", 0.2), Row("mnist-robust", "l2", 1.5),
    Row("mnist-robust", "l1", 10.0),
)  # fmt: skip
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def theirs(library: ModuleType, model: nn.Module, x: Tensor, y: Tensor, row: Row) -> Tensor:
    """Return AutoAttack's candidates."""
    attack = library.AutoAttack(
        model,
        norm=NORMS[row.norm],
        eps=row.radius,
        version="standard",
        device="cpu",
        verbose=False,
        seed=0,
    )
    candidates: Tensor = attack.run_standard_evaluation(x.clone(), y.clone(), bs=250)
    return candidates.detach()


def standing(problem: Problem, candidates: Tensor) -> int:
    """Return how many points no admissible candidate breaks; a float64 copy of the model
    decides.
    """
    snapped = problem.region.snap(candidates)
    broken = problem.region.contains(snapped) & is_adversarial(
        problem.goal.worst(problem.margins(problem.classifier.logits64(snapped)))
    )
    return int((~broken).sum())


def compare(row: Row, library: ModuleType | None, options: argparse.Namespace) -> float | None:
    """Print one row, and return how many times our time AutoAttack takes."""
    model = common.network(row.network)
    if model is None:
        return None
    total = min(row.points, options.points)
    x, y = common.cifar(total) if row.network.startswith("cifar") else common.digits(total)
    threat = Ball(row.norm, row.radius)
    results = []
    seconds = [
        common.clock(
            lambda: results.append(calipers.measure(model, x, y, threat, plan=options.plan))
        )
        for _ in range(options.rounds)
    ]
    robust = results[-1].robust_accuracy
    line = (
        f"{row.network:18} {row.norm:4} {row.radius:6.4g}  calipers {robust.attacked.share:6.1%} "
        f"(certified {robust.certified.share:6.1%})"
    )
    line += f" in {min(seconds):6.1f} s"
    if library is None:
        print(line)
        return None
    kept_x, kept_y = common.right(model, x, y)
    problem = Problem.pose(model, kept_x, kept_y, threat)
    found: list[Tensor] = []
    taken = common.clock(lambda: found.append(theirs(library, model, kept_x, kept_y, row)))
    left = standing(problem, found[0]) / total
    print(
        f"{line}   AutoAttack {left:6.1%} in {taken:6.1f} s   ratio {taken / min(seconds):5.1f}",
        flush=True,
    )
    return taken / min(seconds)


def main() -> None:
    """Print a row for each question, and the mean ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--plan", default="standard")
    parser.add_argument("--only", help="rows whose network has this in its name")
    options = parser.parse_args()
    library = common.start(f"The {options.plan} plan against AutoAttack", ["autoattack"]).get(
        "autoattack"
    )
    torch.manual_seed(0)
    ratios = [
        compare(row, library, options)
        for row in ROWS
        if options.only is None or options.only in row.network
    ]
    known = [r for r in ratios if r is not None]
    if known:
        print(
            f"geometric mean of the ratios {math.exp(sum(map(math.log, known)) / len(known)):.1f}, "
            f"worst {min(known):.1f}"
        )


if __name__ == "__main__":
    main()
