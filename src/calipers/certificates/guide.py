"""Where would a linear model of the network be weakest? Points for an attack to start from, read
off the lower bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.bounds.linear import margin_lines, relax
from calipers.bounds.relaxed import Relaxed
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
    """One random number for each element, the same for every point: a point's starts do not depend
    on its neighbours.
    """
    generator = torch.Generator().manual_seed(lower[0].numel())
    return torch.rand(lower.shape[1:], generator=generator).to(lower).expand_as(lower)


_SLOPES: tuple[_Slope | None, ...] = (
    # both lines of a ReLU have one slope: the line is the network with each bending neuron replaced
    # by its chord
    _parallel,
    None,  # the bound's own guess
    lambda lower, upper: torch.ones_like(lower),
    lambda lower, upper: torch.zeros_like(lower),
    _random,
)


@dataclass(frozen=True)
class Minimisers:
    """The minimisers, over each region, of the linear lower bounds of every margin: one start for
    each rival and choice of relaxation slopes.

    A bound's minimiser is where the relaxed network is nearest to failing. Unlike a gradient it
    looks at the whole region: it does not vanish where the network is locally flat. Intermediate
    values are bounded by intervals. Nothing is proved here. Cost: two forward passes and, for each
    of `slopes` (at most 5) choices, one row of a backward sweep a rival.
    """

    slopes: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.slopes <= len(_SLOPES):
            raise BadInput(f"Minimisers takes 1 to {len(_SLOPES)} slopes, got {self.slopes}")

    def __call__(self, problem: Problem, columns: Tensor | None = None) -> Tensor:
        """Return starts (N, slopes, rivals, *D), rivals in the order of the problem's margins, or
        of `columns` (N, rivals) of these.

        Raises as capture does for models without a graph.
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
        lines = torch.stack([margin_lines(s, rows) for s in states], 1)  # (N, slopes, rivals, *D)
        count = lines.shape[1] * lines.shape[2]
        every = region.take(
            torch.arange(len(problem), device=problem.x.device).repeat_interleave(count)
        )
        down = -lines.flatten(0, 2).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return every.support(down).point.view(lines.shape).to(problem.x.dtype)
