"""Adversarial examples rounded to a grid, such as 8-bit images.

Rounding an example usually makes it fail. So what an attack proposes is rounded inside its ball and
box, and moved on, feature by feature, until the model is wrong again or nothing is left to move.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.threats.ball import Ball
from calipers.threats.region import levels, on_level

_ROWS = 64  # points of one call


def on_grid(problem: Problem, attempt: Attempt) -> Attempt:
    """Return the attempt with its candidates on the threat's grid.

    Without a grid the attempt itself. Cost: three forward and one backward pass a point, and up to
    log2(d) + 1 forward passes more where rounding makes the example fail; they are counted for the
    attempt.
    """
    if not isinstance(problem.threat, Ball) or problem.threat.grid is None:
        return attempt
    parts = [
        _moved(problem.take(attempt.index[rows]), attempt.candidate[rows])
        for rows in torch.arange(len(attempt.index), device=attempt.index.device).split(_ROWS)
    ]
    if not parts:
        return attempt
    points, forwards, backwards = (torch.cat(column) for column in zip(*parts, strict=True))
    return dataclasses.replace(
        attempt,
        candidate=points.to(attempt.candidate),
        forwards=attempt.forwards + forwards.to(attempt.forwards),
        backwards=attempt.backwards + backwards.to(attempt.backwards),
    )


def _moved(part: Problem, candidate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the candidates on the grid, and the passes spent on each."""
    ball, count = part.threat, len(part)
    assert isinstance(ball, Ball) and ball.grid is not None
    forwards = torch.zeros(count, dtype=torch.long, device=part.x.device)
    backwards = torch.zeros_like(forwards)
    search = _GridSearch(part, candidate.to(part.x), ball.grid)
    best = search.rounded(inward=False)
    wrong = search.fools(best)
    inward = search.rounded(inward=True)
    again = ~wrong & search.fools(inward)
    best = torch.where(_wide(again, best), inward, best)
    left = torch.nonzero(~wrong & ~again).flatten()
    forwards += 2
    if len(left):
        pushed, fooled, asked = search.pushed(best, left)
        best = best.index_copy(0, left[fooled], pushed[fooled])
        forwards[left] += asked
        backwards[left] += 1
    return best, forwards, backwards


class _GridSearch:
    """The grid points near the candidates of one batch.

    Inside box and mask, and no farther than the candidate or the radius, whichever is farther.
    """

    def __init__(self, part: Problem, candidate: Tensor, step: float) -> None:
        self.part, self.step, self.region = part, step, part.region
        self.home = levels(part.x, step)
        self.wanted = torch.nan_to_num(candidate.double()) / step
        reached = self.region.distance(candidate)
        asked = part.threat.radii(len(part)).to(reached)
        # an attack that seeks the nearest example may end beyond the radius, and may move on
        self.reach = torch.where(reached <= asked, asked, torch.inf)
        self.still = ((self.region.low == 0) & (self.region.high == 0)).view_as(part.x)

    def rounded(self, *, inward: bool) -> Tensor:
        """Return the nearest grid points, (M, *D).

        For points that would thereby go too far, and with `inward` for all, the neighbouring grid
        points on the side of the center.
        """
        toward = self.home + (self.wanted - self.home).trunc()
        chosen = toward if inward else self.wanted.round()
        return self._within(self._values(chosen), self._values(toward))

    def _values(self, level: Tensor) -> Tensor:
        """Return the points at these levels; features that are fixed stay."""
        return torch.where(self.still, self.part.x, on_level(level, self.step, self.part.x.dtype))

    def _within(self, points: Tensor, otherwise: Tensor) -> Tensor:
        """Return the points, with others in features that would leave box or ball."""
        points = torch.where(self.region.inside_box(points), points, otherwise)
        reach = _wide(self.reach, points)
        alone = (points.double() - self.part.x.double()).abs()
        if self.region.weight is not None:
            alone = alone * self.region.weight.double().view(1, *points.shape[1:])
        if self.region.norm.is_box:
            points = torch.where(alone <= reach, points, otherwise)
        far = self.region.distance(points) > self.reach
        return torch.where(_wide(far, points), otherwise, points)

    def fools(self, points: Tensor) -> Tensor:
        """Return whether the model is wrong at each of these, (M,)."""
        return is_adversarial(self.part.clearance(points))

    def pushed(self, points: Tensor, left: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return moved grid points that fool the model, for the points `left`.

        1, 2, 4, ... of their features move by one step down the slope of the margin, until the
        model is fooled. Also returns which points fool it, and how many forward passes each took.
        """
        part, base = self.part.take(left), points[left]
        small = _GridSearch(part, base, self.step)
        small.reach = self.reach[left]
        slope = _slope(part, base)
        steps = torch.where(small.still, 0.0, -slope.sign())
        if small.region.norm.is_count:  # only features that differ already may change further
            steps = torch.where(base == part.x, 0.0, steps)
        order = torch.where(steps == 0, -1.0, slope.abs()).flatten(1).argsort(1, descending=True)
        rank = order.argsort(1).view_as(base)
        found, fooled, level = (
            base,
            torch.zeros(len(left), dtype=torch.bool),
            levels(base, self.step),
        )
        fooled, count, asked = fooled.to(base.device), 1, 0
        features = rank[0].numel()
        while True:
            tried = small._within(small._values(level + steps * (rank < count)), base)
            new = small.fools(tried) & ~fooled
            found, fooled, asked = (
                torch.where(_wide(new, tried), tried, found),
                fooled | new,
                asked + 1,
            )
            if count >= features or bool(fooled.all()):
                return found, fooled, asked
            count *= 2


def _slope(part: Problem, points: Tensor) -> Tensor:
    """Return the gradient of the worst margin, (M, *D); 0 if there is none."""
    classifier = part.classifier
    if classifier.no_gradient:
        return torch.zeros_like(points)
    with classifier.frozen():
        x = points.clone().requires_grad_()
        worst = part.goal.worst(part.margins(classifier.network(x)))
        (slope,) = torch.autograd.grad(worst.sum(), x)
    return slope.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _wide(row: Tensor, like: Tensor) -> Tensor:
    """Return a row (M,) in a shape that broadcasts with the points."""
    return row.view(-1, *[1] * (like.dim() - 1))
