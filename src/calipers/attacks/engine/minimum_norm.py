"""Common beginning and end of minimum-norm attacks.

They know no radius but the one at which the ball contains the whole box, and what they find is
pulled back to the decision boundary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.boundary_refinement import polish
from calipers.attacks.engine.losses import margin
from calipers.attacks.engine.queue import Memory, Queue, Recipe, SearchOptions
from calipers.attacks.radius_bisection import pull_back
from calipers.errors import BadInput
from calipers.models.passes import shared_out
from calipers.problem.interrupts import remaining
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region
from calipers.threats.constraints import ConstrainedRegion

_EVERYWHERE = 1e30  # the radius without a box: finite in float32, as are its multiples
_BEYOND = 1.001  # times the distance of the farthest corner, so that rounding does not exclude it
# share of the radius: an example this near also lies within it as the referee measures, in float64
_SURELY = 1 - 1e-6
# factors by which a candidate that is adversarial only by rounding is moved outward, until exact
# arithmetic agrees
_PUSHES = 1.0, 1.001, 1.03


@dataclass(frozen=True, kw_only=True)
class FromTheCentre:
    """What the recipes of minimum-norm attacks share.

    They start at the point itself, climb minus the worst margin, and keep the nearest adversarial
    iterate.
    """

    steps: int
    targets: int = 0
    restarts: int = 1
    nearest: bool = True

    def start(self, region: Region, streams: Streams, restart: Tensor) -> Tensor:
        """Return the points themselves."""
        return region.center

    def memory(self, region: Region, x: Tensor) -> Memory:
        """Return nothing to remember."""
        return {}

    def loss(self, margins: Tensor, problem: Problem, restart: Tensor) -> Tensor:
        """Return minus the worst margin."""
        return margin(margins, problem.goal)


def seek(problem: Problem, recipe: Recipe, seed: int, inside: bool = False) -> Iterator[Attempt]:
    """Run a minimum-norm recipe on the whole box, and yield what it finds.

    What is found is pulled back to the boundary. The problem's radius plays no part, unless
    examples `inside` it are enough: then a search that has one ends, and the example stays where it
    was found. A point that is adversarial already is its own nearest example and costs one forward
    pass. `seed` draws the random starts of the final polish.
    """
    wrong = problem.clearance(problem.x) <= 0
    done, open_ = (torch.nonzero(flags).flatten() for flags in (wrong, ~wrong))
    if len(done):
        yield Attempt(done, problem.x[done], torch.ones_like(done), torch.zeros_like(done))
    if not len(open_):
        return
    part = problem.take(open_)
    wide = part.at(
        (part.threat.widest(part.x) * _BEYOND).nan_to_num(posinf=_EVERYWHERE).clamp(max=_EVERYWHERE)
    )
    enough = _SURELY * part.threat.radii(len(part)).to(part.x.device) if inside else None
    queue = Queue(wide, recipe, SearchOptions(seed), enough=enough).run()
    held = list[tuple[Attempt, Tensor]]()
    try:
        for attempt in queue:
            points = attempt.candidate.clone()
            held.append((attempt, points))
            settled = (
                _settled(wide, attempt, points, seed)
                if enough is None
                else _settled_inside(wide, enough, attempt, points, seed)
            )
            held.clear()
            yield _placed(settled, open_)
    except KeyboardInterrupt as interrupt:
        for attempt in [
            *(_unsettled(wide.take(a.index), a, p) for a, p in held),
            *remaining(queue, interrupt),
        ]:
            yield _placed(attempt, open_)
        raise


def _placed(attempt: Attempt, places: Tensor) -> Attempt:
    """Return an attempt about points at `places` of the problem.

    The look at the point itself, which found it open, is added to its cost.
    """
    return dataclasses.replace(attempt.at_places(places), forwards=attempt.forwards + 1)


def _settled_inside(
    wide: Problem, enough: Tensor, attempt: Attempt, points: Tensor, seed: int
) -> Attempt:
    """Return the attempt, polished only where candidates lie too far out.

    Adversarial candidates at most `enough` away stay as they are. For the others see `_settled`;
    the copies in `points` are moved in place.
    """
    part = wide.take(attempt.index)
    far = torch.nonzero(
        (part.region.distance(points) > enough[attempt.index]) | (part.clearance(points) > 0)
    ).flatten()
    attempt = dataclasses.replace(attempt, forwards=attempt.forwards + 1)
    if not len(far):
        return attempt
    moved = points[far]
    some = Attempt(
        attempt.index[far], attempt.candidate[far], attempt.forwards[far], attempt.backwards[far]
    )
    settled = _settled(wide, some, moved, seed)
    candidate, forwards, backwards = (
        attempt.candidate.clone(),
        attempt.forwards.clone(),
        attempt.backwards.clone(),
    )
    candidate[far], forwards[far], backwards[far] = (
        settled.candidate,
        settled.forwards,
        settled.backwards,
    )
    return Attempt(attempt.index, candidate, forwards, backwards)


def _settled(wide: Problem, attempt: Attempt, points: Tensor, seed: int) -> Attempt:
    """Return the attempt with its candidates pulled back to the boundary.

    The copies in `points` are moved in place; the passes that this took are added to the attempt's.
    """
    problem = wide.take(attempt.index)
    with problem.classifier.passes.counting() as spent:
        polish(problem, points, problem.streams(seed))
        candidate = _decided(problem, points)
        # on its way nearer to x a point may have left what the constraints allow
        if isinstance(problem.region, ConstrainedRegion):
            candidate = torch.where(
                per_job(problem.clearance(candidate) <= 0, candidate), candidate, attempt.candidate
            )
    return Attempt(
        attempt.index,
        candidate,
        attempt.forwards + shared_out(spent.forwards, attempt.index),
        attempt.backwards + shared_out(spent.backwards, attempt.index),
    )


def _unsettled(problem: Problem, attempt: Attempt, points: Tensor) -> Attempt:
    """Return the attempt after an interrupt, with candidates moved so far.

    A moved point replaces its candidate where exact arithmetic agrees that it is adversarial.
    """
    points = problem.region.snap(points)
    return dataclasses.replace(
        attempt,
        candidate=torch.where(
            per_job(problem.clearance(points) <= 0, points), points, attempt.candidate
        ),
    )


def _decided(problem: Problem, points: Tensor) -> Tensor:
    """Return adversarial points only just beyond the boundary.

    Where the model's and exact arithmetic disagree, they lie a little farther.
    """
    region = problem.region
    best = points
    undecided = torch.ones(len(points), dtype=torch.bool, device=points.device)
    for push in _PUSHES:
        trial = (
            points
            if push == 1
            else region.snap(region.project(region.center + (points - region.center) * push))
        )
        clear = undecided & (problem.clearance(trial) <= 0)
        best, undecided = torch.where(per_job(clear, points), trial, best), undecided & ~clear
        if not bool(undecided.any()):
            break
    hit = torch.nonzero(~undecided).flatten()
    return (
        region.snap(best.index_copy(0, hit, pull_back(problem.take(hit), best[hit])))
        if len(hit)
        else best
    )


def check_between(tool: object, **bounds: tuple[float, float]) -> None:
    """Raise `BadInput` where a setting of the tool leaves its closed range."""
    for name, (lowest, highest) in bounds.items():
        value = getattr(tool, name)
        if not lowest <= value <= highest:
            raise BadInput(
                f"{type(tool).__name__} takes {name} from {lowest:g} to {highest:g}, got {value}"
            )


def cosine(first: float, last: float, step: Tensor, steps: int) -> Tensor:
    """Return a setting that falls along half a cosine.

    From `first` to `last`, float64, one value per job.
    """
    return last + (first - last) * (1 + (torch.pi * step.double() / steps).cos()) / 2


def unit(g: Tensor) -> Tensor:
    """Return each gradient divided by its Euclidean length.

    Zero stays zero. Gradients are scaled by their largest entry first, so that squares of tiny
    gradients do not vanish.
    """
    tiny = torch.finfo(g.dtype).tiny
    flat = g.flatten(1)
    scaled = flat / flat.abs().amax(1, keepdim=True).clamp_min(tiny)
    return (scaled / scaled.square().sum(1, keepdim=True).sqrt().clamp_min(1.0)).view_as(g)


def length(region: Region, delta: Tensor) -> Tensor:
    """Return the region's norm of perturbations (M, *D), (M,).

    In the dtype of the perturbations.
    """
    flat = delta.flatten(1)
    return region.norm.of(flat if region.weight is None else flat * region.weight)


def slope(region: Region, g: Tensor) -> Tensor:
    """Return the dual norm of gradients, (M,).

    This is how much <g, .> gains per unit of distance, the box left out.
    """
    flat = g.flatten(1)
    return region.norm.dual(flat if region.weight is None else flat / region.weight)


def widths(region: Region) -> Tensor:
    """Return how far each feature can move in all, (M, *D).

    This is the natural unit of a step: infinite without a box, 0 for features that the mask fixes.
    """
    return (region.high - region.low).view_as(region.center)
