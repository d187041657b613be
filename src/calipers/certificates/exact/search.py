"""What do all exact searches for one point share? Two ends: `lower` is proved, `met.nearest` is an
example's distance; never the one above the other.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from calipers.bounds.rounding import plain_sums
from calipers.errors import Contradiction
from calipers.problem.problem import Problem
from calipers.problem.tools import Attempt, Claim, Startable

_TOLD = 0.2  # seconds between two calls of `watch`


class Settings(Protocol):
    """What the tool that asks says of how to search."""

    @property
    def seconds(self) -> float:
        """How long."""

    @property
    def steps(self) -> int:
        """Of ascent on margins, for each number of switches."""

    @property
    def sharpen(self) -> int:
        """Of ascent on boxes."""

    @property
    def look(self) -> int:
        """How many likely choices of the network, and as many letters, are compared before one is
        made.
        """

    @property
    def first(self) -> int:
        """How many programs are solved before ascents take over."""

    @property
    def hints(self) -> str:
        """Of which solver hints are taken."""

    @property
    def attack(self) -> Startable | None:
        """What finds a first example."""

    @property
    def watch(self) -> Callable[[str, float, float], None] | None:
        """Who is told both ends as they move."""


class Met(Protocol):
    """The examples met on the way."""

    nearest: float

    def propose(self, point: Tensor) -> object:
        """Take over an example found elsewhere (1, *D), if it is one."""


class PointSearch(ABC):
    """The search for one point, which a thread runs and another may stop."""

    def __init__(self, tool: Settings, problem: Problem, met: Met) -> None:
        self.tool, self.problem, self.met = tool, problem, met
        self.lower, self.rows, self.told = 0.0, 0, 0.0
        self.begun, self.stop = False, threading.Event()

    @abstractmethod
    def climb(self, ends: float) -> None:
        """Raise `lower` until both ends meet, the time `ends` has come or somebody says stop."""

    @abstractmethod
    def results(self, index: Tensor) -> Iterator[Attempt | Claim]:
        """Yield the examples found and the claim."""

    def run(self) -> None:
        """Search until both ends meet, the time is up or somebody says stop; raise `Contradiction`
        if what is proved stands above an example.
        """
        self.begun, ends = True, time.monotonic() + self.tool.seconds
        with torch.no_grad(), plain_sums():
            if not bool(
                self.problem.goal.worst(
                    self.problem.margins(self.problem.classifier.logits64(self.problem.x))
                )
                > 0
            ):
                return  # no distance to measure
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
        """Tell who watches, now and then."""
        if self.tool.watch is not None and time.monotonic() > self.told + _TOLD:
            self.told = time.monotonic()
            self.tool.watch(self.problem.names[0], self.lower, self.met.nearest)

    def claim(self, index: Tensor, forwards: int, backwards: int) -> Claim:
        """Return the claim of what is proved."""
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
