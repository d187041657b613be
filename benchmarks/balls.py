"""How much does the box add? Certified radii in l2 and l1 by CROWN with the ball cut by [0, 1],
against auto_LiRPA's CROWN, which takes the whole ball.

Pixels of an image cannot leave [0, 1]; a bound that knows it proves more. Both sides bisect each
point's radius for so many rounds; ours is what is claimed (checked float64).

    PYTHONPATH=src python benchmarks/balls.py [--points 30] [--rounds 10] [--only mnist_wk17a]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType

import common
import torch
from torch import Tensor

from calipers.bounds.rounding import CHECKED
from calipers.certificates.crown import CROWN, batches
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

# largest radii looked at, l2 and l1
QUESTIONS = ("mnist_wk17a", 1.0, 10.0), ("mnist_fc_3layer", 1.0, 12.0), ("mnist-plain", 0.5, 5.0)


def ours(problem: Problem, box: tuple[float, float] | None) -> Callable[[Tensor], Tensor]:
    """Return radii (N,) -> which of them are proved."""

    def proved(radius: Tensor) -> Tensor:
        question = Problem.pose(
            problem.classifier.network, problem.x, problem.y, Ball(problem.threat.norm, radius, box)
        )
        return (
            torch.cat(
                [CROWN().bound(question.take(index), CHECKED).worst for index in batches(question)]
            )
            > 0
        )

    return proved


def theirs(library: ModuleType, problem: Problem, norm: float) -> Callable[[Tensor], Tensor]:
    """Return the same by auto_LiRPA."""
    from auto_LiRPA.perturbations import PerturbationLpNorm

    module = library.BoundedModule(
        problem.classifier.network, problem.x[:1], bound_opts={"conv_mode": "patches"}, device="cpu"
    )
    rows = problem.goal.rows(problem.y, problem.classes)

    def proved(radius: Tensor) -> Tensor:
        found = []
        with torch.no_grad():
            for x, c, r in zip(problem.x.split(1), rows.split(1), radius.tolist(), strict=True):
                ball = PerturbationLpNorm(norm=norm, eps=r)
                lower, _ = module.compute_bounds(
                    x=(library.BoundedTensor(x, ball),), C=c, method="CROWN", bound_upper=False
                )
                found.append(lower.amin(1) > 0)
        return torch.cat(found)

    return proved


def largest(proved: Callable[[Tensor], Tensor], count: int, most: float, rounds: int) -> Tensor:
    """Return the largest radius that bisection finds proved, (N,)."""
    low, high = (
        torch.zeros(count, dtype=torch.float64),
        torch.full((count,), most, dtype=torch.float64),
    )
    for _ in range(rounds):
        middle = (low + high) / 2
        yes = proved(middle)
        low, high = torch.where(yes, middle, low), torch.where(yes, high, middle)
    return low


def main() -> None:
    """Print a line for each network and norm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only")
    options = parser.parse_args()
    library = common.start("Certified radii with and without the box", ["auto_LiRPA"]).get(
        "auto_LiRPA"
    )
    print(
        "| network | norm | median radius, box | without | auto_LiRPA | box over auto_LiRPA: "
        "median, least, most |\n|---|---|---|---|---|---|"
    )
    for name, *most in QUESTIONS:
        model = common.network(name) if options.only in (None, name) else None
        if model is None:
            continue
        x, y = common.right(model, *common.digits(options.points))
        for norm, p, limit in (("l2", 2.0, most[0]), ("l1", 1.0, most[1])):
            problem = Problem.pose(model, x, y, Ball(norm, limit))
            boxed, free = (
                largest(ours(problem, box), len(x), limit, options.rounds)
                for box in ((0.0, 1.0), None)
            )
            line = f"| {name} | {norm} | {float(boxed.median()):.4f} | {float(free.median()):.4f} |"
            if library is not None:
                there = largest(theirs(library, problem, p), len(x), limit, options.rounds)
                ratio = boxed / there
                line += (
                    f" {float(there.median()):.4f} | {float(ratio.median()):.3f}, "
                    f"{float(ratio.min()):.3f}, {float(ratio.max()):.3f} |"
                )
            print(line, flush=True)


if __name__ == "__main__":
    main()
