"""What all exact searches for one point share: two bounds on its distance.

`lower` is proved, `met.nearest` is the distance of an example; the first never exceeds the second.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from calipers.bounds.rounding import plain_sums
from calipers.errors import Contradiction
from calipers.problem.interrupts import give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim, Startable

_TOLD = 0.2  # seconds between two calls of `watch`


class Settings(Protocol):
    """What a tool sets for its searches."""

    @property
    def seconds(self) -> float:
        """Time for one point, in seconds."""

    @property
    def steps(self) -> int:
        """Steps of ascent on margins, for each number of substitutions."""

    @property
    def intermediate(self) -> int:
        """Steps of ascent on the bounds of intermediate values."""

    @property
    def look(self) -> int:
        """Number of likely choices compared before one is made.

        They are choices of the network, and as many symbols.
        """

    @property
    def lp_budget(self) -> int:
        """Number of programs solved before ascents take over."""

    @property
    def hints(self) -> str:
        """Name of the solver whose hints are taken."""

    @property
    def attack(self) -> Startable | None:
        """Attack that finds a first example."""

    @property
    def progress(self) -> Callable[[str, float, float], None] | None:
        """Function that is told both bounds as they change."""


class Met(Protocol):
    """The examples found during a search."""

    nearest: float

    def propose(self, point: Tensor) -> object:
        """Keep a point (1, *D) found elsewhere, if it is an adversarial example."""


class PointSearch(ABC):
    """The search for one point, at `index (1,)` of the whole problem.

    `begun` and `ended` say how far it is. What is known in between can be asked for after an
    interrupt.
    """

    def __init__(self, tool: Settings, problem: Problem, index: Tensor, met: Met) -> None:
        self.tool, self.problem, self.index, self.met = tool, problem, index, met
        self.lower, self.rows, self.told = 0.0, 0, 0.0
        self.begun, self.ended = False, False

    @abstractmethod
    def climb(self, ends: float) -> None:
        """Raise `lower` until it meets the example, or the search must end.

        It ends when the time `ends` has come, or that of a limit of the caller.
        """

    @abstractmethod
    def results(self) -> Iterator[Attempt | Claim]:
        """Yield the examples found and the claim."""

    def run(self) -> list[Attempt | Claim]:
        """Search until both bounds meet or the time is up; return the results.

        Raises `Contradiction` if the proved bound is not below the distance of an example, and
        `OutOfTime` where a limit of the caller ended the search.
        """
        self._search()
        give_way()
        self.ended = True
        return list(self.results())

    def _search(self) -> None:
        self.begun, ends = True, time.monotonic() + self.tool.seconds
        with torch.no_grad(), plain_sums():
            if not bool(
                self.problem.goal.worst(
                    self.problem.margins(self.problem.classifier.logits64(self.problem.x))
                )
                > 0
            ):
                return  # the model is wrong at the point itself
            if self.tool.attack is not None:
                for attempt in self.tool.attack(self.problem):
                    self.met.propose(attempt.candidate)
            self.climb(ends)
        if self.lower >= self.met.nearest:
            raise Contradiction(
                f"point {self.problem.names[0]}: linear programs prove that nothing lies within "
                f"{self.lower:.9g}, but an example stands at {self.met.nearest:.9g}. One of the "
                "two is wrong; nothing of this point was claimed. Please report it with the model."
            )

    def tell(self) -> None:
        """Call `watch`, at most every 0.2 seconds."""
        if self.tool.progress is not None and time.monotonic() > self.told + _TOLD:
            self.told = time.monotonic()
            self.tool.progress(self.problem.names[0], self.lower, self.met.nearest)

    def attempt(self, point: Tensor) -> Attempt:
        """Return an example (1, *D) as an attempt, whose cost the claim states."""
        none = torch.zeros_like(self.index)
        return Attempt(self.index, point, none, none)

    def claim(self, forwards: int, backwards: int) -> Claim:
        """Return the claim of what is proved."""
        index = self.index
        radius = torch.tensor([self.lower], dtype=torch.float64, device=index.device)
        margin = torch.full_like(
            radius, torch.finfo(radius.dtype).tiny if self.lower > 0 else -torch.inf
        )
        return Claim(
            index,
            radius,
            margin,
            "float64-checked",
            torch.full_like(index, forwards),
            torch.full_like(index, backwards),
        )
