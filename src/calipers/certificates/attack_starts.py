"""Start points for attacks, read off linear lower bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.bounds.backward import margin_lines, relax
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import SEARCH
from calipers.certificates.crown import batches
from calipers.errors import BadInput
from calipers.graph.capture import graph_of
from calipers.problem.problem import Problem

_Slope = Callable[[Tensor, Tensor], Tensor]


def _parallel(lower: Tensor, upper: Tensor) -> Tensor:
    return (upper.clamp(min=0) / (upper - lower).clamp_min(torch.finfo(lower.dtype).tiny)).clamp(
        0, 1
    )


def _random(lower: Tensor, upper: Tensor) -> Tensor:
    """Return one random number for each element, the same for every point.

    So a point's starts do not depend on which points are beside it.
    """
    generator = torch.Generator().manual_seed(lower[0].numel())
    return torch.rand(lower.shape[1:], generator=generator).to(lower).expand_as(lower)


_SLOPES: tuple[_Slope | None, ...] = (
    # both lines of a ReLU have one slope: the bound is the network with each unstable neuron
    # replaced by its chord
    _parallel,
    None,  # the bound's own guess
    lambda lower, upper: torch.ones_like(lower),
    lambda lower, upper: torch.zeros_like(lower),
    _random,
)


@dataclass(frozen=True)
class RelaxationMinimizers:
    """Start points for attacks: where linear lower bounds are smallest.

    For each margin and each choice of relaxation slopes, the minimiser of the margin's linear lower
    bound over the region. There the relaxed network is nearest to failing. Unlike a gradient the
    bound takes account of the whole region, and does not vanish where the network is locally flat.
    Intermediate values are bounded by intervals. Nothing is proved here.

    Cost: two forward passes, and for each of the `slopes` choices one row of backward propagation
    for each margin.

    Args:
        slopes: How many choices of relaxation slopes, 1 to 5: parallel lines, CROWN's adaptive
            slopes, lower slopes 1, lower slopes 0, random ones, in this order.

    Raises:
        BadInput: If `slopes` is not between 1 and 5.
    """

    slopes: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.slopes <= len(_SLOPES):
            raise BadInput(
                f"RelaxationMinimizers takes 1 to {len(_SLOPES)} slopes, got {self.slopes}"
            )

    def __call__(self, problem: Problem, columns: Tensor | None = None) -> Tensor:
        """Return starts (N, slopes, S, *D), one for each slope and margin.

        Args:
            problem: The problem whose regions are searched.
            columns: Places (N, S) of the margins wanted; None: all of them, in the order of the
                problem's margins.

        Returns:
            The starts, in the dtype of the points.

        Raises:
            CalipersError: As the capture of a graph does, for models that have none.
        """
        with torch.no_grad():
            return torch.cat(
                [
                    self._starts(problem.take(part), None if columns is None else columns[part])
                    for part in batches(problem)
                ]
            )

    def _starts(self, problem: Problem, columns: Tensor | None) -> Tensor:
        graph = graph_of(problem.classifier, problem.x).to(SEARCH.dtype)
        region = problem.threat.region(problem.x.to(SEARCH.dtype))
        state, rows = (
            relax(graph, region, SEARCH, refine=False),
            problem.goal.rows(problem.y, problem.classes),
        )
        rows = (
            rows
            if columns is None
            else rows[torch.arange(len(rows), device=rows.device)[:, None], columns]
        )
        states: list[Relaxed] = [
            state if slope is None else state.sloped(slope) for slope in _SLOPES[: self.slopes]
        ]
        lines = torch.stack([margin_lines(s, rows) for s in states], 1)  # (N, slopes, targets, *D)
        count = lines.shape[1] * lines.shape[2]
        every = region.take(
            torch.arange(len(problem), device=problem.x.device).repeat_interleave(count)
        )
        down = -lines.flatten(0, 2).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return every.support(down).point.view(lines.shape).to(problem.x.dtype)
