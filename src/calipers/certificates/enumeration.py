"""Exhaustive evaluation of all substitutions, where they are few."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.errors import BadInput, UnsupportedOp
from calipers.problem.capabilities import Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.threats.neighbours import enumerate_substitutions
from calipers.threats.substitution_region import SubstitutionRegion

_POINTS = 64  # points worked on together; their neighbours fill the batches
_ROWS = 4096  # neighbours in one forward pass
_WAYS = 512  # substitutions evaluated on every point before points that failed are dropped


@dataclass(frozen=True)
class Enumeration:
    """Evaluation of every neighbour under a `Substitutions` threat.

    Neighbours are evaluated by their number of substitutions, fewest first. The claim is the
    largest number of substitutions within which all neighbours keep the decision.

    Exact, but for the allowance for rounding: the float64 copy of the model must keep a margin
    above 16 roundings of the largest logit in the model's own precision, and never less than in
    float32: millions of times what float64 itself can have lost. Guarantee: float64-checked.

    Nothing is claimed where numeric columns can move, which is in infinitely many ways.

    Cost: one float64 forward pass a neighbour; a point that fails stops at the first number of
    substitutions that shows it.

    Args:
        limit: Largest neighbourhood that is begun, in points; nothing is claimed for a larger one.
            It holds sum over i <= k of C(n, i) (K - 1)^i points for n positions of K symbols and at
            most k substitutions.

    Raises:
        BadInput: If `limit` < 1; when called, if the threat is a `Ball`.
        UnsupportedOp: When called, if the model answers at random.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "decision at the radius",
        "every admissible way of replacing symbols evaluated",
        norms=(),
        substitutions=True,
        needs="scores",
    )

    limit: int = 100_000

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise BadInput(
                f"Enumeration takes a limit >= 1 on the neighbours of a point, got {self.limit}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        """Yield a claim for every point, a block of points at a time."""
        region = problem.region
        if not isinstance(region, SubstitutionRegion):
            raise BadInput(
                "Enumeration answers a Substitutions threat: a Ball holds infinitely many points. "
                "For a Ball use linear bounds."
            )
        if problem.classifier.samples:
            raise UnsupportedOp(
                "Enumeration proves what holds for one function, but this model answers at random: "
                "attack it, or measure it without chance"
            )
        for block in torch.arange(len(problem), device=problem.x.device).split(_POINTS):
            yield _Roll(problem.take(block), region.take(block)).claim(block, self.limit)


class _Roll:
    """The state of one block of points.

    The number of substitutions within which all neighbours resist so far, and the smallest margin
    among these.
    """

    def __init__(self, problem: Problem, region: SubstitutionRegion) -> None:
        self.problem, self.region = problem, region
        n, device = len(problem), problem.x.device
        self.substitutions, self.forwards = (
            torch.zeros(n, dtype=torch.long, device=device) for _ in range(2)
        )
        # smallest margin of all neighbours seen
        self.lowest = torch.full((n,), torch.inf, dtype=torch.float64, device=device)
        self.held = torch.full_like(self.lowest, -torch.inf)  # within `substitutions`

    def claim(self, block: Tensor, limit: int) -> Claim:
        """Evaluate the neighbourhoods of at most `limit` points each.

        Points with equally many choices share the enumeration.
        """
        small = [self.region.continuous is None and size <= limit for size in self.region.sizes()]
        rows = torch.nonzero(torch.tensor(small, device=block.device)).flatten()
        kinds = torch.cat([self.region.budget[rows, None], self.region.options[rows].sum(2)], 1)
        unique, kind = kinds.unique(dim=0, return_inverse=True)
        for i in range(len(unique)):
            self._evaluate_all(rows[kind == i], int(unique[i, 0]), unique[i, 1:])
        resisted = self.substitutions > 0
        failed = torch.where(self.lowest < torch.inf, self.lowest, -torch.inf)
        return Claim(
            block,
            self.substitutions.double(),
            torch.where(resisted, self.held, failed),
            "float64-checked",
            self.forwards,
            torch.zeros_like(self.forwards),
        )

    def _evaluate_all(self, rows: Tensor, k: int, counts: Tensor) -> None:
        """Evaluate all substitutions of at most k groups.

        The groups have `counts (G,)` alternatives, the same at all points `rows`.
        """
        complete = 0
        for substitutions in enumerate_substitutions(counts, k, _WAYS):
            if substitutions.shape[1] > complete:
                self._settle(rows, complete)
                complete = substitutions.shape[1]
            margins = self._margins(rows, substitutions)
            # A NaN is not a margin: it becomes the lowest of all.
            self.lowest[rows] = torch.minimum(
                self.lowest[rows], margins.nan_to_num(nan=-torch.inf).amin(1)
            )
            rows = rows[self.lowest[rows] > 0]
            if not len(rows):
                return
        self._settle(rows, k)

    def _settle(self, rows: Tensor, substitutions: int) -> None:
        """Record that all neighbours within so many substitutions resist."""
        self.substitutions[rows], self.held[rows] = substitutions, self.lowest[rows]

    def _margins(self, rows: Tensor, substitutions: Tensor) -> Tensor:
        """Return the worst margins of substitutions (T, i, 2) at the points.

        (P, T) float64, the allowance for rounding subtracted.
        """
        ways = len(substitutions)
        owner = rows.repeat_interleave(ways)
        moves = self.region.numbered(owner, substitutions.repeat(len(rows), 1, 1))
        self.forwards[rows] += ways
        parts = zip(owner.split(_ROWS), moves.split(_ROWS), strict=True)
        return torch.cat(
            [cleared(self.problem, o, self.region.substituted(o, m)) for o, m in parts]
        ).view(len(rows), ways)


def cleared(problem: Problem, rows: Tensor, points: Tensor) -> Tensor:
    """Return the worst margins of points (P, *D), (P,) float64.

    The points belong to `rows (P,)` of the problem; the allowance for rounding is subtracted.
    """
    goal = problem.goal.take(rows)
    logits = problem.classifier.logits64(points)
    size = problem.size[rows]
    slack = torch.maximum(
        problem.allowance(logits, size), problem.allowance(logits, size, torch.float32)
    )
    return goal.worst(goal.margins(logits, problem.y[rows])) - slack
