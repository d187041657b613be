"""What does an attack gain from the other jaw? Starts that a lower bound points at, handed over by value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from calipers.errors import CaptureError, UnsupportedOp
from calipers.problem.problem import Problem
from calipers.problem.tools import Attempt, Startable


class Guide(Protocol):
    """Names points worth starting from."""

    def __call__(self, problem: Problem) -> Tensor:
        """Return starts (N, R, S, *D): R for each of the S margins' rivals. Raises `UnsupportedOp` or `CaptureError` where the model has no graph."""


@dataclass(frozen=True)
class Guided:
    """An attack that starts where lower bounds of the margins are lowest, instead of at random: the relaxed network's own adversarial examples.

    A linear lower bound looks at the whole region at once, so its minimiser lies in the right corner also where gradients at the point say nothing. On
    a model that cannot be captured the attack starts as it does alone. Cost: the attack's, and the guide's.
    """

    attack: Startable
    guide: Guide

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the attack's candidates."""
        try:
            starts: Tensor | None = self.guide(problem)
        except (UnsupportedOp, CaptureError):
            starts = None
        yield from self.attack(problem, seed=seed, starts=starts)
