"""What does the queue cost? One step of PGD as calipers runs it, against a bare loop of forward
pass and input gradient.

The bare loop keeps nothing, moves nothing and looks at nothing: it is the least that any gradient
attack must do. The radius is so small that no point breaks, so both sides run every step on every
point in batches of the same size; seconds are divided by the passes made (the queue makes one more,
to look at the last iterate). Capture plays no part here.

    PYTHONPATH=src python benchmarks/step.py [--points 500] [--steps 100] [--rounds 7]
"""

from __future__ import annotations

import argparse
from statistics import median

import common
import torch
from torch import Tensor, nn
from torch.nn import functional

from calipers.attacks.engine.batches import BATCH
from calipers.attacks.pgd import PGD
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

NETWORKS = ("mnist-plain", "mnist-robust", "mnist_wk17a")
RADIUS = 1e-6


def bare(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Forward, loss, input gradient; nothing else."""
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        points = images.clone().requires_grad_()
        for _ in range(steps):
            loss = functional.cross_entropy(model(points), labels, reduction="sum")
            torch.autograd.grad(loss, points)


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in (("--points", 500), ("--steps", 100), ("--rounds", 7)):
        parser.add_argument(option, type=int, default=default)
    options = parser.parse_args()
    common.start(f"The queue against a bare loop: {options.steps} steps, linf, batch {BATCH}")
    for name in NETWORKS:
        model = common.network(name)
        if model is None:
            continue
        x, y = common.right(model, *common.digits(options.points))
        problem = Problem.pose(model, x, y, Ball("linf", RADIUS))
        passes = int(sum(attempt.forwards.sum() for attempt in PGD(options.steps)(problem)))
        sides = {
            "bare loop": lambda model=model, x=x, y=y: bare(model, x, y, options.steps),
            "queue, loss margin": lambda problem=problem: list(PGD(options.steps)(problem)),
            "queue, loss cross_entropy": lambda problem=problem: list(
                PGD(options.steps, loss="cross_entropy")(problem)
            ),
        }
        seconds = common.alternate(sides, options.rounds)
        bare_passes = len(x) * options.steps
        each = {
            side: [
                s / (passes if side.startswith("queue") else bare_passes) * bare_passes
                for s in measured
            ]
            for side, measured in seconds.items()
        }
        notes = {
            side: f"{median(measured) / bare_passes * 1e6:.1f} us a point-step"
            for side, measured in each.items()
        }
        print(f"\n{name}: {len(x)} points that all resist, seconds for {bare_passes} point-steps")
        common.table(each, notes)


if __name__ == "__main__":
    main()
