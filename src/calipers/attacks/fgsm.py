"""Fast gradient method: one steepest step, in every norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from calipers.attacks.engine.losses import margin
from calipers.attacks.engine.queue import Look, Memory, Queue, SearchOptions
from calipers.attacks.engine.targets import target_count
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region


@dataclass(frozen=True)
class FGSM:
    """One steepest step, as in the fast gradient method.

    The step goes to the maximiser of <gradient, x'> over the intersection of ball and box: FGSM
    (Goodfellow et al. 2015) for linf, the normalised gradient for l2, the largest features for l1.
    On a linear model it is therefore the strongest attack there is.

    Cost: 2 forward passes and 1 backward pass for each target, and one backward pass per class for
    the ranking.

    Args:
        targets: Number of other classes to attack one by one, nearest first; 0 climbs the worst
            margin only.

    Raises:
        BadInput: `targets` is negative.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "one step of steepest ascent (FGSM)",
        substitutions=True,
    )

    targets: int = 0

    def __post_init__(self) -> None:
        if self.targets < 0:
            raise BadInput(
                "targets must be 0 (the worst margin) or the number of target classes to try, got "
                f"{self.targets}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield candidates; the seed is not used."""
        recipe = _OneStep(targets=target_count(problem, self.targets))
        return Queue(problem, recipe, SearchOptions(seed)).run()


@dataclass(frozen=True)
class _OneStep:
    targets: int
    steps: int = 1
    restarts: int = 1
    nearest: bool = False

    def memory(self, region: Region, x: Tensor) -> Memory:
        return {}

    def start(self, region: Region, streams: Streams, restart: Tensor) -> Tensor:
        return region.center

    def loss(self, margins: Tensor, problem: Problem, restart: Tensor) -> Tensor:
        return margin(margins, problem.goal)

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        return look.region.support(look.gradient).point, memory
