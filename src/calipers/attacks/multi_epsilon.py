"""Auto-PGD in a wider ball first, then in balls that shrink to the radius."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.apgd import Climb
from calipers.attacks.engine.batches import BATCH, backwards_of, in_flight
from calipers.attacks.engine.losses import LossName, check_loss
from calipers.attacks.engine.queue import Queue, SearchOptions, WarmStart
from calipers.attacks.engine.targets import looked_at, rank_targets, target_count
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import endless
from calipers.problem.interrupts import relayed
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt

_PARTS = (0.3, 0.3, 0.4)  # shares of the steps: widest ball, ball halfway, ball asked for


@dataclass(frozen=True)
class MultiEpsilon:
    """Auto-PGD in balls that shrink to the radius: the multi-epsilon scheme.

    The first search runs at `widest` times the radius, the second halfway between, the third at the
    radius itself; each begins at the projections of the best iterates of the one before (Croce and
    Hein 2021, arXiv 2103.01208, section 4).

    In l1 above all, a search that begins inside the ball ends at the corner next to which it began;
    in a wider ball adversarial examples are common. There the ascent does not end at the decision
    boundary: what lies deep inside another class is still near its boundary after the projection.

    Differs from the paper: made for every norm, and for target classes.

    Cost for a point that resists: steps x restarts x max(targets, 1) forward and backward passes,
    of which six in ten are spent on every point.

    Args:
        steps: Gradient steps of all three searches together, at least 3.
        restarts: Starts for each point and target class.
        loss: What untargeted searches climb: "cross_entropy", "margin", "dlr", "scaled" or
            "alternate".
        targets: Number of other classes to attack one by one, nearest first; 0 climbs the `loss`,
            and may then follow a class that is near in the wide ball only.
        widest: First radius as a multiple of the radius asked for, at least 1.

    Raises:
        BadInput: A setting is out of its range.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack", "example within the radius", "ascent that comes in from wider balls"
    )

    steps: int = 100
    restarts: int = 1
    loss: LossName = "cross_entropy"
    targets: int = 5
    widest: float = 2.0

    def __post_init__(self) -> None:
        if (
            self.steps < len(_PARTS)
            or self.restarts < 1
            or self.targets < 0
            or not 1 <= self.widest < float("inf")
        ):
            got = f"{self.steps}, {self.restarts}, {self.targets}, {self.widest}"
            raise BadInput(
                f"MultiEpsilon takes steps >= {len(_PARTS)}, restarts >= 1, targets >= 0 and a "
                f"finite widest >= 1 (usually 1.5 to 3), got {got}"
            )
        check_loss(self.loss)

    def __call__(
        self, problem: Problem, *, seed: int = 0, batch: int | None = None
    ) -> Iterator[Attempt]:
        """Yield candidates as points are decided.

        `batch` is the number of points in flight; it does not change the result.
        """
        # the best iterates of all searches of a block are held in memory at once
        for places in torch.arange(len(problem), device=problem.x.device).split(
            in_flight(problem, BATCH)
        ):
            yield from relayed(
                self._block(problem.take(places), SearchOptions(seed, batch=batch)),
                partial(Attempt.at_places, places=places),
            )

    def _block(self, problem: Problem, options: SearchOptions) -> Iterator[Attempt]:
        targets = target_count(problem, self.targets)
        ranked = rank_targets(problem, targets, options.in_flight) if targets else None
        begin: Tensor | None = None
        radius = problem.threat.radii(len(problem))
        forwards = torch.full(
            (len(problem),), int(targets > 0), dtype=torch.long, device=problem.x.device
        )
        backwards = forwards * looked_at(problem, targets) * backwards_of(problem)
        for number, part in enumerate(_PARTS):
            last = number + 1 == len(_PARTS)
            factor = self.widest + (1 - self.widest) * number / (len(_PARTS) - 1)
            posed = replace(
                problem.at(radius * factor), goal=problem.goal if last else endless(problem.goal)
            )
            recipe = Climb(max(1, round(part * self.steps)), self.restarts, targets, self.loss)
            queue = Queue(
                posed,
                recipe,
                options._replace(seed=options.seed + number),
                WarmStart(begin, ranked),
                keep_all=not last,
            )

            def noted(attempt: Attempt, last: bool = last) -> Attempt | None:
                forwards[attempt.index] += attempt.forwards
                backwards[attempt.index] += attempt.backwards
                return (
                    replace(
                        attempt,
                        forwards=forwards[attempt.index],
                        backwards=backwards[attempt.index],
                    )
                    if last
                    else None
                )

            yield from relayed(queue.run(), noted)
            begin = queue.all_best
