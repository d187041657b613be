"""Use an attack of your own in a plan, beside the ones of calipers.

    python own_attack.py

A tool is a frozen dataclass with capabilities. It only proposes: the referee runs every candidate
again and measures its distance, so a tool cannot claim what is not so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

import calipers
from calipers import Capabilities, Plan, Problem, Stage
from calipers.attacks import PGD
from calipers.problem.protocols import Attempt


@dataclass(frozen=True)
class Blend:
    """Moves each point towards the mean of every other class, as far as the ball lets."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "example within the radius", "moves towards the mean of a class", needs="scores"
    )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the candidate with the least margin for each point."""
        best = problem.x
        least = torch.full((len(best),), torch.inf)
        means = [problem.x[problem.y == k].mean(0) for k in problem.y.unique()]
        for mean in means:
            steepest = problem.region.support(mean - problem.x).point
            moved = problem.region.snap(steepest)  # inside the ball to the last bit
            worst = problem.goal.worst(problem.margins(problem.classifier.logits(moved)))
            better = (worst < least).view(-1, *[1] * (moved.dim() - 1))
            best, least = torch.where(better, moved, best), torch.minimum(least, worst)
        spent = torch.full((len(best),), len(means))
        yield Attempt(torch.arange(len(best)), best, spent, torch.zeros_like(spent))


x, y = calipers.load_data(None, points=100)
model, threat = calipers.load("mnist-plain"), calipers.Ball("linf", 0.1)
plan = Plan("mine", (Stage(Blend(), "attack"), Stage(PGD(steps=20, restarts=1), "attack")))
result = calipers.measure(model, x, y, threat, plan=plan)
print(result)
print({count.name: count.points for count in result.summary.broken_by})

found = calipers.attack(model, x, y, threat, Blend())  # or alone
print(f"alone: {found}")
