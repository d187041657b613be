"""Polish: nearer adversarial points beside one that was found.

The linearised boundary at the point shows where to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.attacks.engine.batches import BATCH, backwards_of, in_flight, per_job
from calipers.attacks.engine.batches import input_gradient as gradient_of
from calipers.attacks.engine.losses import toward
from calipers.problem.goals import Untargeted, is_adversarial
from calipers.problem.problem import Problem
from calipers.random_streams import Streams
from calipers.threats.ball import Region

# how far past the tangent a trial goes in each round, as a share of the gain, so that it counts
_BEYOND = (
    0.01,
    0.003,
    0.001,
    0.0003,
    0.0001,
    0.0001,
)
_OTHERS = 4  # other classes than these of lowest margin at the point are hardly nearer
# false-position steps for two tangents; in l1 the nearest point jumps with the share, and five are
# too few
_MIXES, _MIXES_SPARSE = 5, 8
_GAIN = 5e-4  # a smaller promised relative gain ends the walk
_STARTS = 8
# share of the gain lacking in the farthest corner: more than rounding, so the hyperplane does not
# meet the box
_SHORT = 1e-4
_WORTH = 0.999  # of the distance: another class is tried if its tangent is nearer

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Tangent:
    """The hyperplane <slope, delta> = gain that replaces a boundary.

    Seen from x: `slope (M, *D)`, `gain (M,)`; beyond it the linear model is adversarial.
    """

    slope: Tensor
    gain: Tensor

    def where(self, chosen: Tensor, other: Tangent) -> Tangent:
        """Return this tangent for the chosen jobs (M,), the other for the rest."""
        return Tangent(
            torch.where(per_job(chosen, self.slope), self.slope, other.slope),
            torch.where(chosen, self.gain, other.gain),
        )

    def take(self, index: Tensor) -> Tangent:
        """Return the tangents of the chosen jobs."""
        return Tangent(self.slope[index], self.gain[index])

    def mix(self, other: Tangent, share: Tensor) -> Tangent:
        """Return a convex combination of two tangents.

        `share (M,)` of this tangent and the rest of the other: the intersection of the two half
        spaces lies beyond it.
        """
        slope = (
            per_job(share, self.slope) * self.slope + per_job(1 - share, self.slope) * other.slope
        )
        return Tangent(slope, share * self.gain + (1 - share) * other.gain)

    def missed(self, delta: Tensor) -> Tensor:
        """Return how much gain perturbations (M, *D) still lack, (M,)."""
        return self.gain - (self.slope * delta).flatten(1).sum(1)


class _Nearest(NamedTuple):
    """The nearest adversarial points that walks have passed.

    `distance (M,)` is that of `points (M, *D)`, infinite where none is found yet; `tangent` is the
    linearised boundary there, or at the start of the walk.
    """

    points: Tensor
    distance: Tensor
    tangent: Tangent


@dataclass(frozen=True, eq=False)
class _Held:
    """Some of the points that are being polished.

    They are the places `index` of `points`, which is written to as soon as a nearer one is known.
    """

    points: Tensor
    index: Tensor

    def now(self) -> Tensor:
        """Return the points as they are."""
        return self.points[self.index]

    def take(self, rows: Tensor) -> _Held:
        """Return some of these."""
        return _Held(self.points, self.index[rows])

    def put(self, rows: Tensor, points: Tensor) -> None:
        """Replace some of these."""
        self.points[self.index[rows]] = points


def polish(problem: Problem, points: Tensor, streams: Streams) -> None:
    """Move adversarial points (M, *D), in place, nearer to x.

    On a linear model they go to the nearest point of all, up to rounding. An interrupt leaves what
    it has reached.

    Each round replaces the decision boundary at the current point by its tangent hyperplane, and
    goes to the point of that hyperplane inside the box that is nearest to x. Where this lands
    before the true boundary, the tangent there is added, and the next trial is the nearest point
    beyond both: so points where two linear pieces of the boundary meet are reached, too. Classes
    are looked at one by one: the one that wins at the point found, and the one whose tangent is
    nearest to x. Points that are not adversarial, for instance because no gradient led anywhere
    from x, get random starts at several distances, drawn from `streams`; they are returned as they
    are if none helps.

    Cost: at most 2 x 6 forward and backward passes, 6 forwards, and up to 4 backward passes for the
    ranking; for a point not found 8 x 6 more of both.
    """
    net = problem.classifier.step()
    for part in torch.arange(len(points), device=points.device).split(in_flight(problem, BATCH)):
        if len(part):
            _polish(problem.take(part), net, _Held(points, part), streams.take(part))


def _polish(problem: Problem, net: Network, held: _Held, streams: Streams) -> None:
    with problem.classifier.frozen():
        missed = torch.nonzero(~_wins(problem, net, held.now())).flatten()
        if len(missed):
            _rescue(problem.take(missed), net, held.take(missed), streams.take(missed))
        hit = (
            torch.nonzero(_wins(problem, net, held.now())).flatten()
            if len(missed)
            else torch.arange(len(problem), device=missed.device)
        )
        if len(hit):
            part, known = problem.take(hit), held.take(hit)
            for index, column in _columns(part, net, known.now()):
                some = known.take(index)
                _descend(part.take(index), net, some, some.now(), column)


def _rescue(problem: Problem, net: Network, held: _Held, streams: Streams) -> None:
    """Keep the nearest points that descents from random starts find.

    The starts go from far to near.
    """
    region = problem.region
    size = region.center.flatten(1).abs().amax(1, keepdim=True)
    # without a box, x's own size is the unit
    own = _length(
        region, torch.where(size > 0, size, 1.0).expand_as(region.low).reshape(region.center.shape)
    )
    for k in range(_STARTS):
        start = region.at(torch.minimum(region.radius, 4 * own) / 2**k).sample(streams.fork(k))
        _descend(problem, net, held, start, None)


def _columns(
    problem: Problem, net: Network, points: Tensor
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield jobs: indices of points, and the margin columns they are about.

    The column is None where all classes have to be beaten at once: then the worst margin decides.
    """
    every = torch.arange(len(points), device=points.device)
    if not isinstance(problem.goal, Untargeted):
        yield every, None
        return
    x, region = points.clone().requires_grad_(), problem.region
    margins = _margins(problem, net, x, backwards=min(_OTHERS, problem.classes - 1))
    first = margins.detach().argsort(dim=1, stable=True)[:, :_OTHERS]
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
        promising = torch.nonzero(
            distance < _WORTH * torch.minimum(ahead[0], region.distance(points))
        ).flatten()
        if len(promising):
            yield promising, first[promising, 1 + rank[promising]]


def _descend(
    problem: Problem, net: Network, held: _Held, here: Tensor, column: Tensor | None
) -> None:
    """Keep the nearest adversarial points that a walk from `here` passes.

    A held point stays where the walk passes no nearer one. The walk is about the margins' `column
    (M,)`; where None is given, about the one that is lowest at its start, or about the goal's own
    worst.
    """
    best, rows = held.now(), torch.arange(len(here), device=here.device)
    distance = torch.where(_wins(problem, net, best), problem.region.distance(best), torch.inf)
    home: Tangent | None = None  # at the nearest adversarial point so far
    for beyond in _BEYOND:
        region, x = problem.region, here.clone().requires_grad_()
        margins = _margins(problem, net, x, backwards=1)
        worst = problem.goal.worst(margins)
        if column is None and isinstance(problem.goal, Untargeted):
            column = margins.argmin(1)
        value = worst if column is None else margins.gather(1, column[:, None])[:, 0]
        found = _tangent(region, here, gradient_of(-value, x), value.detach())
        far = region.distance(here)
        nearer = is_adversarial(worst.detach()) & (far <= distance)
        best, distance = (
            torch.where(per_job(nearer, best), here, best),
            torch.where(nearer, far, distance),
        )
        held.put(rows, best)  # at once, so that an interrupt does not lose it
        home = found if home is None else found.where(nearer | distance.isinf(), home)
        here, settled = _next(region, _Nearest(best, distance, home), found, nearer, 1 + beyond)
        if bool(settled.any()):
            on = torch.nonzero(~settled).flatten()
            if not len(on):
                return
            problem, rows, best, here, distance, home = (
                problem.take(on),
                rows[on],
                best[on],
                here[on],
                distance[on],
                home.take(on),
            )
            column = None if column is None else column[on]
    final = _wins(problem, net, here) & (problem.region.distance(here) < distance)
    held.put(rows, torch.where(per_job(final, best), here, best))


def _next(
    region: Region, known: _Nearest, found: Tangent, nearer: Tensor, stretch: float
) -> tuple[Tensor, Tensor]:
    """Return the next trials, and where nothing more is to be gained.

    `found` are the tangents at the last trials, which were `nearer (M,)` than all before or not.

    A trial lies beyond the tangent at home, or beyond both tangents where the last trial fell
    short; halfway back where that is farther than the best.
    """
    best, distance, home = known
    delta = _nearest(region, home, stretch)
    promise = _length(region, delta) / stretch
    settled = torch.zeros_like(nearer) if region.norm.is_count else promise > distance * (1 - _GAIN)
    both = torch.nonzero(~nearer & ~settled & distance.isfinite()).flatten()
    if len(both) and not region.norm.is_count:
        delta = delta.index_copy(
            0, both, _beyond_both(region.take(both), home.take(both), found.take(both), stretch)
        )
    trial = region.center + delta
    back = torch.nonzero(~(region.distance(trial) < distance)).flatten()
    if len(back):
        halfway = torch.lerp(
            best[back], region.center[back] + _nearest(region.take(back), home.take(back)), 0.5
        )
        trial = trial.index_copy(0, back, halfway)
    return trial, settled


def _wins(problem: Problem, net: Network, points: Tensor) -> Tensor:
    return is_adversarial(problem.goal.worst(_margins(problem, net, points, backwards=0)))


def _margins(problem: Problem, net: Network, x: Tensor, backwards: int) -> Tensor:
    problem.classifier.passes.add(
        forwards=len(x), backwards=backwards * len(x) * backwards_of(problem)
    )
    return problem.margins(net(x))


def _tangent(region: Region, points: Tensor, climb: Tensor, margin: Tensor) -> Tangent:
    """Return the tangent at points, scaled to largest slope 1.

    `climb` is the gradient along which the margin falls.
    """
    gain = margin + (climb * (points - region.center)).flatten(1).sum(1)
    unit = climb.flatten(1).abs().amax(1).clamp_min(torch.finfo(climb.dtype).tiny)
    return Tangent(climb / per_job(unit, climb), gain / unit)


def _nearest(region: Region, tangent: Tangent, stretch: float = 1.0) -> Tensor:
    """Return the shortest perturbation in the box that reaches the tangent."""
    return across(region, region.center, tangent.slope, tangent.gain * stretch)


def _beyond_both(region: Region, one: Tangent, two: Tangent, stretch: float) -> Tensor:
    """Return the shortest perturbation beyond both tangents inside the box.

    The distance to a convex combination of the two is a lower bound, and largest for the right
    share, where both are touched: false position on the difference of what is missed. At a
    breakpoint of the norm the nearest point jumps with the share; the solution lies on the segment
    between the two sides of the jump.
    """
    one, two = Tangent(one.slope, one.gain * stretch), Tangent(two.slope, two.gain * stretch)
    low, high, tiny = (
        torch.zeros_like(one.gain),
        torch.ones_like(one.gain),
        torch.finfo(one.gain.dtype).tiny,
    )
    below, above = _nearest(region, two), _nearest(region, one)
    value_low, value_high = one.missed(below), -two.missed(above)
    for _ in range(_MIXES_SPARSE if region.norm.is_sparse else _MIXES):
        share = low + (high - low) * (value_low / (value_low - value_high).clamp_min(tiny)).clamp(
            0.05, 0.95
        )
        trial = _nearest(region, one.mix(two, share))
        value = one.missed(trial) - two.missed(trial)
        short = value > 0
        low, high = torch.where(short, share, low), torch.where(short, high, share)
        # the Illinois rule
        value_low, value_high = (
            torch.where(short, value, value_low / 2),
            torch.where(short, value_high / 2, value),
        )
        below, above = (
            torch.where(per_job(short, trial), trial, below),
            torch.where(per_job(short, above), above, trial),
        )
    lacking, over = one.missed(below).clamp_min(0), -one.missed(above).clamp(max=0)
    share = lacking / (lacking + over).clamp_min(torch.finfo(lacking.dtype).tiny)
    return torch.lerp(below, above, per_job(share, below))


def _length(region: Region, delta: Tensor) -> Tensor:
    return region.distance(region.center + delta)


def across(region: Region, points: Tensor, g: Tensor, gain: Tensor) -> Tensor:
    """Return the shortest perturbation that takes points to a hyperplane.

    The hyperplane is <g, z - point> = gain (M,), the perturbation stays inside the box, and points
    may be on either side. Where the hyperplane does not meet the box: to the corner nearest to it.
    """
    side = torch.where(gain < 0, -1.0, 1.0).to(g.dtype)
    offset = (points - region.center).flatten(1)
    low, high, flat = (
        (region.low - offset).clamp(max=0),
        (region.high - offset).clamp(min=0),
        g.flatten(1) * side[:, None],
    )
    if region.weight is None:
        return region.norm.reach(flat, gain.abs(), low, high).view_as(points)
    w = region.weight
    return (region.norm.reach(flat / w, gain.abs(), low * w, high * w) / w).view_as(points)
