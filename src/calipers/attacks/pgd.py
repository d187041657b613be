"""Projected gradient ascent with restarts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from calipers.attacks.engine.losses import LossName, check_loss, climbed
from calipers.attacks.engine.queue import Look, Memory, Queue, SearchOptions, WarmStart
from calipers.attacks.engine.targets import target_count
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

_USUAL_TRAVEL = 2.5  # all steps together can cross the ball 2.5 times (Madry et al. 2018)


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent (PGD; Madry et al. 2018) in every norm.

    A point is stopped as soon as an adversarial example is found for it. The first restart begins
    at the point itself, later ones at random points of the region.

    Differs from the paper: the steps are steepest ascent of the norm, the projection onto the
    intersection of ball and box is exact, and the iterate of smallest margin is returned, not the
    last.

    Cost for a point that resists: steps x restarts x max(targets, 1) forward and backward passes.

    Args:
        steps: Gradient steps of each restart.
        restarts: Starts for each point (and for each target class, where `targets` > 0).
        step: Length of a step as a share of the radius, above 0 and at most 2. Default: 2.5 /
            steps, so that all steps together can cross the ball 2.5 times.
        loss: What is climbed: "cross_entropy", "margin", "dlr", "scaled", or "alternate", which
            takes cross-entropy in the first restart, the margin in the second, and so on. "dlr" and
            "scaled" do not change when all logits are multiplied by a number.
        targets: Number of other classes to attack one by one, nearest first, instead of climbing
            the `loss`; 0 attacks untargeted.
        precision: "model" searches in the model's own dtype. "bfloat16" searches in half precision,
            faster for large networks where the hardware supports it; the end of each search is
            judged in the model's own dtype.

    Raises:
        BadInput: A setting is out of its range.

    Example:
        >>> import torch, calipers
        >>> from calipers.attacks import PGD
        >>> x, y = torch.tensor([[0.6, 0.2]]), torch.tensor([0])
        >>> ball = calipers.Ball("linf", 0.25)
        >>> calipers.attack(torch.nn.Identity(), x, y, ball, PGD(steps=10)).success
        tensor([True])
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "example within the radius", "projected gradient ascent with restarts"
    )

    steps: int = 40
    restarts: int = 1
    step: float | None = None
    loss: LossName = "alternate"
    targets: int = 0
    precision: Literal["model", "bfloat16"] = "model"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.restarts < 1 or self.targets < 0:
            raise BadInput(
                f"PGD takes steps >= 1, restarts >= 1 and targets >= 0, got {self.steps}, "
                f"{self.restarts}, {self.targets}"
            )
        if self.step is not None and not 0 < self.step <= 2:
            raise BadInput(
                "step is a share of the radius, above 0 and at most 2 (usually 0.01 to 0.25), got "
                f"{self.step}"
            )
        if self.precision not in ("model", "bfloat16"):
            raise BadInput(f"precision is 'model' or 'bfloat16', got {self.precision!r}")
        check_loss(self.loss)

    def __call__(
        self,
        problem: Problem,
        *,
        seed: int = 0,
        batch: int | None = None,
        warm: Tensor | None = None,
    ) -> Iterator[Attempt]:
        """Yield candidates as points are decided.

        Args:
            problem: The points to attack, with their model, labels and threat model.
            seed: Seed of the random starts.
            batch: Points in flight; does not change the result.
            warm: First starts (N, *D), in place of the points themselves.
        """
        share = _USUAL_TRAVEL / self.steps if self.step is None else self.step
        recipe = _Ascent(
            self.steps,
            self.restarts,
            target_count(problem, self.targets),
            min(share, 2.0),
            self.loss,
        )
        dtype = torch.bfloat16 if self.precision == "bfloat16" else None
        begin = WarmStart(None if warm is None else warm[:, None])
        return Queue(problem, recipe, SearchOptions(seed, dtype, batch), begin).run()


@dataclass(frozen=True)
class _Ascent:
    steps: int
    restarts: int
    targets: int
    share: float
    loss_name: LossName
    nearest: bool = False

    def memory(self, region: Region, x: Tensor) -> Memory:
        return {}

    def start(self, region: Region, streams: Streams, restart: Tensor) -> Tensor:
        later = torch.nonzero(restart).flatten()
        return region.center.index_copy(0, later, region.take(later).sample(streams.take(later)))

    def loss(self, margins: Tensor, problem: Problem, restart: Tensor) -> Tensor:
        return climbed(self.loss_name, margins, problem.goal, restart)

    def move(self, look: Look, memory: Memory) -> tuple[Tensor, Memory]:
        return look.region.project(look.region.step(look.x, look.gradient, self.share)), memory
