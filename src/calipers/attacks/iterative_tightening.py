"""Minimum-norm attack, then verdicts just below the best distance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from calipers.attacks.radius_bisection import BisectionState
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt


@dataclass(frozen=True)
class IterativeTightening:
    """The nearest of what a minimum-norm attack and repeated attacks find.

    `attack`, a minimum-norm attack, gives a first distance; then `refine` is run `rounds` times at
    `fraction` of the nearest distance so far.

    A descent ends in the nearest local minimum; an attack at a fixed radius starts anywhere in the
    ball, and the ball is smaller the nearer we are. Each success is polished, which leads farther
    down than the share, and where a round fails the next one draws other starts. A point that
    `attack` did not break is attacked at the problem's radius, then at twice that.

    On digits of known distance, the 95 % quantile of the excess over that distance was, for FMN and
    then guided APGD of 20 steps, 2.5 % and 3.0 % in linf on two networks and 0.2 % in l1; for
    bisection by guided APGD of 50 steps 1.5 %, 3.7 % and 0.4 %, in about three times the time.

    Cost: that of `attack`, `rounds` times that of `refine`, and for each success about 12 forward
    and backward passes, and 10 forwards in float64.

    Args:
        attack: Minimum-norm attack that is run on all points.
        refine: Attack that is run at the smaller radii.
        rounds: Runs of `refine`.
        fraction: Radius of each run as a share of the nearest distance so far, between 0 and 1.

    Raises:
        BadInput: A setting is out of its range.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "nearest example",
        "an attack asked again just below the nearest example so far",
        needs="as its attacks",
        inner=("attack", "refine"),
    )

    attack: Attack
    refine: Attack
    rounds: int = 3
    fraction: float = 0.97

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.fraction < 1:
            raise BadInput(
                "IterativeTightening takes rounds >= 1 (usually 3) and a fraction between 0 and 1 "
                f"(usually 0.97), got {self.rounds}, {self.fraction}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the nearest candidates, all at once.

        An interrupt yields what is found so far, and is passed on.
        """
        search = BisectionState(problem)
        try:
            for k, attack in enumerate([self.attack, *[self.refine] * self.rounds]):
                active = torch.nonzero(search.far > 0).flatten()
                if not len(active):
                    break
                search.next = torch.where(
                    search.far.isinf(), search.next, self.fraction * search.far
                )
                search.ask(attack, active, seed + k)
        except KeyboardInterrupt:
            yield search.attempt()
            raise
        yield search.attempt()
