"""Is there a nearer adversarial point beside the one that was found? The tangent boundary there, looked at from x, says where to look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.attacks.objectives import toward
from calipers.attacks.search import BATCH, per_job
from calipers.attacks.search import input_gradient as gradient_of
from calipers.problem.ball import Region
from calipers.problem.goals import Untargeted, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.streams import Streams

_BEYOND = (0.01, 0.003, 0.001, 0.0003, 0.0001, 0.0001)  # of the gain, by round: how far past the tangent boundary a trial goes, so that it counts
_RIVALS = 4  # a rival that is not among the first ones at the point found is hardly nearer
_HALVINGS = 14  # of the mix of two tangents
_STARTS = 8
_SHORT = 1e-4  # of the gain, lacking in the farthest corner: more than rounding, so the plane does not meet the box
_WORTH = 0.999  # of the distance: what promises less is not tried


@dataclass(frozen=True, eq=False)
class Tangent:
    """The plane <slope, delta> = gain that replaces a boundary, seen from x: `slope (M, *D)`, `gain (M,)`; beyond it the linear model is adversarial."""

    slope: Tensor
    gain: Tensor

    def where(self, chosen: Tensor, other: Tangent) -> Tangent:
        """Return this tangent for the chosen jobs (M,), the other for the rest."""
        return Tangent(torch.where(per_job(chosen, self.slope), self.slope, other.slope), torch.where(chosen, self.gain, other.gain))

    def take(self, index: Tensor) -> Tangent:
        """Return the tangents of the chosen jobs."""
        return Tangent(self.slope[index], self.gain[index])

    def mix(self, other: Tangent, share: Tensor) -> Tangent:
        """Return the sum of `share (M,)` of this tangent and the rest of the other: the half spaces' intersection lies beyond it."""
        slope = per_job(share, self.slope) * self.slope + per_job(1 - share, self.slope) * other.slope
        return Tangent(slope, share * self.gain + (1 - share) * other.gain)

    def missed(self, delta: Tensor) -> Tensor:
        """Return how much gain perturbations (M, *D) still lack, (M,)."""
        return self.gain - (self.slope * delta).flatten(1).sum(1)


def polish(problem: Problem, points: Tensor, streams: Streams) -> Tensor:
    """Return adversarial points at most as far as the given ones (M, *D) that are adversarial: on a linear model the nearest of all, to rounding.

    Each round replaces the boundary at the current point by its tangent and goes to the point of that plane, inside the box, that is nearest to x. Where
    this lands before the true boundary, the tangent there is added, and the next trial is the nearest point beyond both: so kinks are reached, too.
    Rivals are looked at one by one: the one that wins at the point found, and the one whose tangent is nearest to x. Points that are not adversarial, for
    instance because no gradient led anywhere from x, get random starts at several distances, drawn from `streams`; they are returned as they are if none helps.
    Cost: at most 2 x 6 forward and backward passes, 6 forwards, and up to 4 backward passes for the ranking; for a point not found 8 x 6 more of both.
    """
    parts = torch.arange(len(points), device=points.device).split(BATCH)
    return torch.cat([_polished(problem.take(part), points[part], streams.take(part)) for part in parts]) if len(points) else points


def _polished(problem: Problem, points: Tensor, streams: Streams) -> Tensor:
    with problem.classifier.frozen():
        missed = torch.nonzero(~_wins(problem, points)).flatten()
        best = points.index_copy(0, missed, _rescued(problem.take(missed), points[missed], streams.take(missed))) if len(missed) else points
        hit = torch.nonzero(_wins(problem, best)).flatten() if len(missed) else torch.arange(len(points), device=points.device)
        if len(hit):
            part, refined = problem.take(hit), best[hit]
            for index, column in _columns(part, refined):
                refined = refined.index_copy(0, index, _descend(part.take(index), refined[index], refined[index], column))
            best = best.index_copy(0, hit, refined)
        return best


def _rescued(problem: Problem, best: Tensor, streams: Streams) -> Tensor:
    """Return the nearest points that descents from random starts find, from far to near."""
    region = problem.region
    size = region.center.flatten(1).abs().amax(1, keepdim=True)
    own = _length(region, torch.where(size > 0, size, 1.0).expand_as(region.low).reshape(region.center.shape))  # without a box, x's own size is the unit
    for k in range(_STARTS):
        start = region.at(torch.minimum(region.radius, 4 * own) / 2**k).sample(streams.fork(k))
        best = _descend(problem, best, start, _winning(problem, start))
    return best


def _winning(problem: Problem, points: Tensor) -> Tensor | None:
    return _margins(problem, points, backwards=0).argmin(1) if isinstance(problem.goal, Untargeted) else None


def _columns(problem: Problem, points: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the jobs: indices of points and the margin columns that they are about; where all rivals have to be beaten at once, the one that decides."""
    every = torch.arange(len(points), device=points.device)
    if not isinstance(problem.goal, Untargeted):
        yield every, None
        return
    x, region = points.clone().requires_grad_(), problem.region
    margins = _margins(problem, x, backwards=min(_RIVALS, problem.classes - 1))
    first = margins.detach().argsort(dim=1, stable=True)[:, :_RIVALS]
    ahead = []
    for column in first.unbind(1):
        loss = toward(margins, column)
        tangent = _tangent(region, x.detach(), gradient_of(loss, x, keep=True), -loss.detach())
        way = _nearest(region, tangent)
        unreachable = tangent.missed(way) > _SHORT * tangent.gain.abs()
        ahead.append(torch.where(unreachable, torch.inf, _length(region, way)))
    yield every, first[:, 0]
    if len(ahead) > 1:
        distance, rank = torch.stack(ahead[1:], 1).min(1)
        promising = torch.nonzero(distance < _WORTH * torch.minimum(ahead[0], region.distance(points))).flatten()
        if len(promising):
            yield promising, first[promising, 1 + rank[promising]]


def _descend(problem: Problem, best: Tensor, here: Tensor, column: Tensor | None) -> Tensor:
    """Return the nearest of `best` and of the adversarial points that a walk from `here` passes."""
    region = problem.region
    distance = torch.where(_wins(problem, best), region.distance(best), torch.inf)
    home: Tangent | None = None  # at the nearest adversarial point so far
    for beyond in _BEYOND:
        x = here.clone().requires_grad_()
        margins = _margins(problem, x, backwards=1)
        worst = problem.goal.worst(margins)
        value = worst if column is None else margins.gather(1, column[:, None])[:, 0]
        found = _tangent(region, here, gradient_of(-value, x), value.detach())
        far = region.distance(here)
        nearer = is_adversarial(worst.detach()) & (far <= distance)
        best, distance = torch.where(per_job(nearer, best), here, best), torch.where(nearer, far, distance)
        home = found if home is None else found.where(nearer | distance.isinf(), home)
        here = _next(region, home, found, nearer, best, distance, 1 + beyond)
    final = _wins(problem, here) & (region.distance(here) < distance)
    return torch.where(per_job(final, best), here, best)


def _next(region: Region, home: Tangent, found: Tangent, nearer: Tensor, best: Tensor, distance: Tensor, stretch: float) -> Tensor:
    """Return the next trials: beyond the tangent at home, or beyond both where the last trial fell short; halfway back where that is farther than the best."""
    delta = _nearest(region, home, stretch)
    both = torch.nonzero(~nearer & distance.isfinite()).flatten()
    if len(both) and not region.norm.is_count:
        delta = delta.index_copy(0, both, _beyond_both(region.take(both), home.take(both), found.take(both), stretch))
    trial = region.center + delta
    closer = region.distance(trial) < distance
    return torch.where(per_job(closer, trial), trial, torch.lerp(best, region.center + _nearest(region, home), 0.5))


def _wins(problem: Problem, points: Tensor) -> Tensor:
    return is_adversarial(problem.goal.worst(_margins(problem, points, backwards=0)))


def _margins(problem: Problem, x: Tensor, backwards: int) -> Tensor:
    counter = problem.classifier.counter
    counter.forwards, counter.backwards = counter.forwards + len(x), counter.backwards + backwards * len(x)
    return problem.margins(problem.classifier.network(x))


def _tangent(region: Region, points: Tensor, climb: Tensor, margin: Tensor) -> Tangent:
    """Return the tangent at points, in units of the steepest slope: `climb` is the gradient along which the margin falls."""
    gain = margin + (climb * (points - region.center)).flatten(1).sum(1)
    unit = climb.flatten(1).abs().amax(1).clamp_min(torch.finfo(climb.dtype).tiny)
    return Tangent(climb / per_job(unit, climb), gain / unit)


def _nearest(region: Region, tangent: Tangent, stretch: float = 1.0) -> Tensor:
    """Return the shortest perturbation that reaches the tangent inside the box."""
    return across(region, region.center, tangent.slope, tangent.gain * stretch)


def _beyond_both(region: Region, one: Tangent, two: Tangent, stretch: float) -> Tensor:
    """Return the shortest perturbation beyond both tangents inside the box.

    The distance to a mix of the two is a lower bound, and largest for the right mix: bisect it by which of the two is missed. At a kink of the norm the
    nearest point jumps with the mix; the solution lies on the segment between the two sides of the jump.
    """
    one, two = Tangent(one.slope, one.gain * stretch), Tangent(two.slope, two.gain * stretch)
    low, high = torch.zeros_like(one.gain), torch.ones_like(one.gain)
    below, above = _nearest(region, two), _nearest(region, one)
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        trial = _nearest(region, one.mix(two, share))
        short = one.missed(trial) > 0
        low, high = torch.where(short, share, low), torch.where(short, high, share)
        below, above = torch.where(per_job(short, trial), trial, below), torch.where(per_job(short, above), above, trial)
    lacking, over = one.missed(below).clamp_min(0), -one.missed(above).clamp(max=0)
    share = lacking / (lacking + over).clamp_min(torch.finfo(lacking.dtype).tiny)
    return torch.lerp(below, above, per_job(share, below))


def _length(region: Region, delta: Tensor) -> Tensor:
    return region.distance(region.center + delta)


def across(region: Region, points: Tensor, g: Tensor, gain: Tensor) -> Tensor:
    """Return the shortest perturbation that takes points to the plane <g, z - point> = gain (M,) inside the box, on whichever side of it they are.

    Where the plane does not meet the box: to the corner nearest to it.
    """
    side = torch.where(gain < 0, -1.0, 1.0).to(g.dtype)
    offset = (points - region.center).flatten(1)
    low, high, flat = (region.low - offset).clamp(max=0), (region.high - offset).clamp(min=0), g.flatten(1) * side[:, None]
    if region.weight is None:
        return region.norm.reach(flat, gain.abs(), low, high).view_as(points)
    w = region.weight
    return (region.norm.reach(flat / w, gain.abs(), low * w, high * w) / w).view_as(points)
