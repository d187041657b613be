"""How far is the boundary of the linearised model, again and again? DeepFool, in every norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.batches import per_job
from calipers.attacks.minimum import FromTheCentre, check_between, seek
from calipers.attacks.polish import across
from calipers.attacks.rivals import rivals
from calipers.attacks.search import Look, Memory
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.tools import Attempt


@dataclass(frozen=True)
class DeepFool:
    """DeepFool (Moosavi-Dezfooli et al. 2016) in every norm: replace the model by its tangent and
    go straight to that boundary, a share `overshoot` beyond.

    Each of the `targets` rivals, nearest first, has a search of its own; 0 follows the worst margin
    instead. Differs from the paper: it chooses the rival anew at each step; it stops at the first
    success, here the remaining steps go to the point nearest to x on the tangent boundary at the
    success, which is nearer still; the step to the boundary is the shortest one inside the box, not
    clipped afterwards. Cost: (steps + 1) x max(targets, 1) forward and backward passes, one
    backward pass a class for the ranking, and about 10 forwards at the end.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "nearest example", "steps to the linearised boundary"
    )

    steps: int = 20
    targets: int = 3
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        check_between(self, steps=(1, 10**9), targets=(0, 10**9), overshoot=(0, 10))

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the nearest candidates as points are decided; the seed is not used."""
        return seek(
            problem,
            _Search(
                steps=self.steps, targets=rivals(problem, self.targets), overshoot=self.overshoot
            ),
            seed,
        )


@dataclass(frozen=True, kw_only=True)
class _Search(FromTheCentre):
    overshoot: float

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        region, far = look.region, 1 + self.overshoot
        # From an adversarial iterate the tangent is looked at from x itself: <g, z - x> = margin +
        # <g, iterate - x>.
        origin = torch.where(per_job(is_adversarial(look.worst), look.x), region.center, look.x)
        gain = -look.loss + (look.gradient * (look.x - origin)).flatten(1).sum(1)
        return region.project(origin + far * across(region, origin, look.gradient, gain)), memory
