"""DeepFool: steps to the boundary of the linearised model, in every norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.boundary_refinement import across
from calipers.attacks.engine.minimum_norm import FromTheCentre, check_between, seek
from calipers.attacks.engine.queue import Look, Memory
from calipers.attacks.engine.targets import target_count
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt


@dataclass(frozen=True)
class DeepFool:
    """DeepFool (Moosavi-Dezfooli et al. 2016), in every norm.

    Each step replaces the model by its linearisation and goes directly to the decision boundary of
    that, a share `overshoot` beyond.

    Differs from the paper: the paper chooses the target class anew at each step, here each target
    class has a search of its own; the paper stops at the first success, here the remaining steps go
    to the point nearest to x on the linearised boundary at the success, which is nearer still; and
    the step to the boundary is the shortest one inside the box, not clipped afterwards.

    Cost: (steps + 1) x max(targets, 1) forward and backward passes, one backward pass per class for
    the ranking, and about 10 forwards at the end.

    Args:
        steps: Linearisations of each search.
        targets: Number of other classes, nearest first, each of which gets a search of its own; 0
            follows the worst margin instead.
        overshoot: How far each step goes beyond the linearised boundary, as a share of the step.

    Raises:
        BadInput: A setting is out of its range.
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
        """Yield the nearest candidates as points are decided.

        The search itself is deterministic; `seed` draws the random starts of the final polish where
        the search found nothing.
        """
        return seek(
            problem,
            _DeepFoolState(
                steps=self.steps,
                targets=target_count(problem, self.targets),
                overshoot=self.overshoot,
            ),
            seed,
        )


@dataclass(frozen=True, kw_only=True)
class _DeepFoolState(FromTheCentre):
    overshoot: float

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        region, far = look.region, 1 + self.overshoot
        # From an adversarial iterate, the distance to the linearised boundary is measured from x:
        # <g, z - x> = margin + <g, iterate - x>.
        origin = torch.where(per_job(is_adversarial(look.worst), look.x), region.center, look.x)
        gain = -look.loss + (look.gradient * (look.x - origin)).flatten(1).sum(1)
        return region.project(origin + far * across(region, origin, look.gradient, gain)), memory
