"""Exact distances of examples in the point's own linear region.

A complete certifier is asked within their distance, where other regions reach into the ball.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch

from calipers.bounds.rounding import CHECKED, plain_sums
from calipers.certificates.cost import sweeps_forecast
from calipers.certificates.crown import batches
from calipers.certificates.linear_region import Guess, examples, is_piecewise_linear
from calipers.errors import BadInput, UnsupportedOp
from calipers.graph.capture import graph_of
from calipers.problem.capabilities import Capabilities
from calipers.problem.interrupts import give_way, relayed
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Certifier, Claim

_ROOM = 1 + 1e-3  # times the example's distance: a ball that just holds the example


@runtime_checkable
class Complete(Certifier, Protocol):
    """A certifier that decides every point, given time."""

    @property
    def seconds(self) -> float:
        """The time limit for each point."""


@dataclass(frozen=True)
class OwnPiece:
    """Exact distance of points with an example in their linear region.

    `LinearRegion` finds such an example, and proves its distance where no operation leaves its
    linear piece within the ball. Elsewhere the complete certifier is asked within a ball that just
    holds the example: a small one, with few unstable neurons. Claims are the complete certifier's,
    with its guarantee; the problem's radii play no part.

    Nothing is claimed about points without such an example, networks that the complete certifier
    does not take, and points whose plain bounds are forecast to take longer than its `seconds`: a
    complete search begins with better ones.

    Cost: a row of backward propagation for each margin, 16 at most, and the complete certifier's
    for each point with an example.

    Args:
        complete: A complete certifier with a time limit `seconds`, such as `MILP(seconds=10)`.

    Raises:
        UnsupportedOp: At the call, for a model with an operation that cannot be bounded.
        CaptureError: At the call, for a model that cannot be traced.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "exact distance",
        "a complete tool asked where the nearest example lies in the point's own piece",
        inner=("complete",),
        needs="operations",
    )

    complete: Complete

    @property
    def seconds(self) -> float:
        """The time limit for each point."""
        return self.complete.seconds

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim | Attempt]:
        """Yield examples, the complete certifier's claims, and empty ones.

        An empty claim (radius 0) is yielded about all points that it was not asked about.
        """
        graph = graph_of(problem.classifier, problem.x)
        for index in batches(problem):
            give_way()
            part, found, claimed = problem.take(index), list[Attempt](), list[int]()
            if is_piecewise_linear(graph):
                with torch.no_grad(), plain_sums():
                    guess = Guess.at(part)
                    left = guess.is_piecewise_linear()
                    found = examples(guess, left[guess.distance[left].isfinite()])
            for attempt in found:
                yield replace(attempt, index=index[attempt.index])
            asked = found[0].index if found else index[:0]
            for i in asked.tolist():
                around = part.take([i]).at(guess.distance[[i]] * _ROOM)
                with contextlib.suppress(BadInput, UnsupportedOp):
                    if sweeps_forecast(around, CHECKED, refine=True).seconds <= self.seconds:
                        yield from self._decided(around, index[[i]], seed)
                        claimed.append(i)
            others = index[[i for i in range(len(part)) if i not in claimed]]
            none = torch.zeros_like(others)
            yield Claim(
                others,
                none.double(),
                none.double() - torch.inf,
                "float64-checked",
                none,
                none.clone(),
            )

    def _decided(
        self, problem: Problem, index: torch.Tensor, seed: int
    ) -> Iterator[Claim | Attempt]:
        answers = self.complete(problem, seed=seed)
        return relayed(answers, lambda answer: replace(answer, index=index[answer.index]))
