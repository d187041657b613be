"""The admissible set around each point, shared by attacks and certifiers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from calipers.conv_gradient import contract
from calipers.errors import BadInput
from calipers.random_streams import Streams
from calipers.threats.norms import Norm

if TYPE_CHECKING:
    from calipers.threats.ball import Ball

# each round shrinks by a little more than the rounding that made the last one fail; two have always
# been enough
_SNAP_ROUNDS = 8
_MISSED = 1e-9  # relative to the gap: a smaller shortfall is due to rounding


class Attained(NamedTuple):
    """The maximum of <g, x'> over a region, (M,), and a maximiser, (M, *D).

    The maximiser is admissible.
    """

    value: Tensor
    point: Tensor


class Reached(NamedTuple):
    """The distance (P,) to the nearest points with <g, delta> >= gap.

    It is infinite where no admissible point has that. `delta (P, d)` are the offsets to the points.
    """

    distance: Tensor
    delta: Tensor


class Fall(NamedTuple):
    """How far a linear function can fall inside a region, (P, S).

    `terms` is the size of the terms that were summed for it, which scales its rounding error.
    """

    value: Tensor
    terms: Tensor


@dataclass(frozen=True, eq=False)
class Region:
    """The admissible set around each of M points.

    Attacks and certifiers use the same object, so they cannot disagree about what the adversary may
    do. `center (M, *D)`, `radius (M,)` float64; `low`, `high (M, d)` are the offsets to the box (0
    where masked); `weight (d,)` or None.
    """

    ball: Ball
    norm: Norm
    center: Tensor
    radius: Tensor
    low: Tensor
    high: Tensor
    weight: Tensor | None

    def take(self, index: Tensor | slice) -> Region:
        """Return the regions of the chosen points, repetitions allowed."""
        low, high = self.low[index], self.high[index]
        return Region(
            self.ball, self.norm, self.center[index], self.radius[index], low, high, self.weight
        )

    def outer_box(self) -> tuple[Tensor, Tensor]:
        """Return the ends of the smallest box around each region, (M, *D) each.

        They are rounded outward where the region ends there, and equal the center in features that
        cannot move.
        """
        low, high = self._corners
        down, up = (
            torch.nextafter(end, torch.full_like(end, sign))
            for end, sign in ((low, -torch.inf), (high, torch.inf))
        )
        return torch.where(low < self.center, down, low), torch.where(high > self.center, up, high)

    def boxes(self, low: Tensor, high: Tensor) -> Region:
        """Return regions that are whole boxes (P, *D), rounded outward.

        The boxes lie inside the first of these regions, and keep its norm.
        """
        center = (low + high) / 2
        down, up = ((end - center).flatten(1) for end in (low, high))
        down, up = (
            torch.nextafter(down, torch.full_like(down, -torch.inf)),
            torch.nextafter(up, torch.full_like(up, torch.inf)),
        )
        down, up = (
            torch.where(low.flatten(1) < high.flatten(1), down, 0.0),
            torch.where(low.flatten(1) < high.flatten(1), up, 0.0),
        )
        return Region(
            self.ball,
            self.norm,
            center,
            torch.full_like(self.radius[:1], torch.inf).expand(len(low)),
            down,
            up,
            None,
        )

    def at(self, radius: Tensor) -> Region:
        """Return the same regions with other radii (M,)."""
        return dataclasses.replace(self, radius=radius.to(self.center.device, torch.float64))

    def distance(self, points: Tensor) -> Tensor:
        """Return the (weighted) distance of each point from its center.

        (M,) float64.
        """
        delta = (points.double() - self.center.double()).flatten(1)
        return self.norm.of(delta if self.weight is None else delta * self.weight.double())

    def contains(self, points: Tensor) -> Tensor:
        """Return whether each point is admissible, (M,) bool.

        Exact comparison in float64, without a tolerance; a NaN is not inside, nor is a point off
        the grid where there is one.
        """
        inside = self.distance(points) <= self.radius
        flat = points.double().flatten(1)
        inside = inside & self.inside_box(points).flatten(1).all(1)
        if self.ball.grid is not None:
            inside = inside & is_on_grid(points, self.ball.grid)
        if self.ball.mask is not None:
            frozen = ~per_feature(self.ball.mask, points)
            inside = inside & (flat == self.center.double().flatten(1))[:, frozen].all(1)
        return inside

    def inside_box(self, points: Tensor) -> Tensor:
        """Return whether each feature lies inside the box, (M, *D) bool.

        Exact comparison in float64.
        """
        if self.ball.ends is None:
            return torch.ones_like(points, dtype=torch.bool)
        flat = points.double().flatten(1)
        floor, ceiling = (per_feature(end, points.double()) for end in self.ball.ends)
        return ((flat >= floor) & (flat <= ceiling)).view_as(points)

    def support(self, g: Tensor) -> Attained:
        """Return the maximum of <g, x'> and a maximiser, for g (M, *D).

        The value is that of the dual problem: an upper bound of the maximum in real arithmetic (see
        norms.py). The maximiser is the steepest one-step attack.
        """
        best = self.offset_support(g)
        point = self.center + best[1].view_as(self.center)
        return Attained((g * self.center).flatten(1).sum(-1) + best[0], point)

    def offset_support(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maximum of <g, delta>, (M,), and a maximiser (M, d).

        The value is a sum of non-negative terms.
        """
        flat, radius = g.flatten(1), self.radius.to(g.dtype)
        if self.weight is None:
            return self.norm.support(flat, radius, self.low, self.high)
        scaled = self.norm.support(
            flat / self.weight, radius, self.low * self.weight, self.high * self.weight
        )
        return scaled.value, scaled.delta / self.weight

    def lowest(self, a: Tensor) -> Attained:
        """Return the minimum of <a, x'> and an admissible point that attains it.

        The same as `support` of -a up to rounding and sign, and cheaper where the ball is a box.
        """
        if not self.norm.is_box:
            best = self.support(-a)
            return Attained(-best.value, best.point)
        point = torch.where(a > 0, *self._corners)
        return Attained((a * point).flatten(1).sum(1), point)

    def step(
        self, points: Tensor, g: Tensor, share: float | Tensor, spread: Tensor | None = None
    ) -> Tensor:
        """Return the points moved along the steepest ascent of <g, .>.

        They move by `share` (a number, or (M,)) of the radius, and `project` is meant to follow. In
        weighted l2 they move along g itself, just as far: the projection is Euclidean, and after a
        steepest step it would end beside the maximum. `spread (M,)`: over how many features the
        step of a sparse norm is spread at least.
        """
        length = self.radius.to(g.dtype) * share
        if self.norm.is_box:
            sides = length[:, None] if self.weight is None else length[:, None] / self.weight
            return torch.addcmul(points, g.sign(), self._like_center(sides))
        if self.norm.is_count:
            length = length.clamp_min(1.0)  # a count below 1 allows no change
        offset, flat = (points - self.center).flatten(1), g.flatten(1)
        low, high = self.low - offset, self.high - offset
        if self.weight is not None:
            low, high, flat = low * self.weight, high * self.weight, flat / self.weight
        if spread is not None:
            most = (length / spread)[:, None]
            low, high = torch.maximum(low, -most), torch.minimum(high, most)
        moved = self.norm.step(flat, length, low, high)
        if self.weight is not None:
            moved = moved / self.weight
            if self.norm.is_euclidean:
                moved = self.norm.step(g.flatten(1), self.norm.of(moved), low, high)
        return points + moved.view_as(points)

    def fall(self, a: Tensor, points: Tensor) -> Fall:
        """Return how far <a, x'> can fall below <a, x>.

        For directions a (P, S, d) at the chosen points (P,): the dual bound alone.
        """
        return self.window_fall(
            a,
            points,
            self.low[points],
            self.high[points],
            None if self.weight is None else self.weight.expand(len(points), -1),
        )

    def window_fall(
        self, a: Tensor, points: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Fall:
        """Return the same where each row sees only some features.

        `low`, `high`, `weight (P, d)` are those of the features seen.
        """
        radius = self.radius.to(a.dtype)[points]
        if self.norm.is_box:
            # Features move independently, so the fall is |a| times the half width minus a times
            # the middle. As low <= 0 <= high, the middle is at most the half width in absolute
            # value, so twice the first term bounds the size of both.
            length = radius[:, None] if weight is None else radius[:, None] / weight
            down, up = torch.maximum(low, -length), torch.minimum(high, length)
            wide = contract(a.abs(), (up - down) / 2)
            return Fall(wide - contract(a, (up + down) / 2), 2 * wide)
        width = a.shape[1]
        low, high, radius = (t.repeat_interleave(width, 0) for t in (low, high, radius))
        g = -a.flatten(0, 1)
        if weight is not None:
            w = weight.repeat_interleave(width, 0)
            # in the padding around an image nothing moves, and the weight is 0
            w = torch.where(w > 0, w, torch.ones_like(w))
            g, low, high = g / w, low * w, high * w
        value = self.norm.support(g, radius, low, high).value.view(a.shape[:2])
        return Fall(value, value)

    def project(self, points: Tensor) -> Tensor:
        """Return the nearest admissible point of each.

        Up to rounding of the sum; `snap` makes the point exactly admissible.
        """
        if self.norm.is_box:
            return points.clamp(*self._corners)
        delta = self.norm.project(
            (points - self.center).flatten(1),
            self.radius.to(points.dtype),
            self.low,
            self.high,
            self.weight,
        )
        return self.center + delta.view_as(self.center)

    @cached_property
    def _corners(self) -> tuple[Tensor, Tensor]:
        """The lowest and highest admissible points where the ball is a box.

        Up to rounding.
        """
        reach = self.radius.to(self.low.dtype)[:, None]
        reach = reach if self.weight is None else reach / self.weight
        down, up = torch.maximum(self.low, -reach), torch.minimum(self.high, reach)
        return self.center + down.view_as(self.center), self.center + up.view_as(self.center)

    def _like_center(self, flat: Tensor) -> Tensor:
        """Return (M, 1) or (M, d) in a shape that broadcasts with the points."""
        return (
            flat.view_as(self.center)
            if flat.shape[1] == self.low.shape[1]
            else flat.view(-1, *[1] * (self.center.dim() - 1))
        )

    def snap(self, points: Tensor) -> Tensor:
        """Return nearly the same points, moved inward to be exactly admissible.

        They move by a few roundings, so that `contains` holds.
        """
        # rounding to another dtype could change a feature that may not move
        still = ((self.low == 0) & (self.high == 0)).view_as(points)
        snapped = self._into_box(torch.where(still, self.center.to(points.dtype), points))
        if self.norm.is_count:  # shrinking a perturbation does not change its count
            over = torch.nonzero(self.distance(snapped) > self.radius).flatten()
            return (
                snapped.index_copy(0, over, self._into_box(self.take(over).project(snapped[over])))
                if len(over)
                else snapped
            )
        for k in range(_SNAP_ROUNDS):
            distance = self.distance(snapped)
            over = torch.nonzero(distance > self.radius).flatten()
            if not len(over):
                break
            part, distance = self.take(over), distance[over]
            # A rounding of a coordinate may be large relative to a small radius: move inward by
            # what the dtype can resolve at this point.
            resolution = torch.finfo(points.dtype).eps * (
                1 + snapped[over].double().flatten(1).abs().amax(1) / part.radius.clamp_min(1e-300)
            )
            shrink = part.radius / distance * (1 - resolution * 2.0**k).clamp_min(0)
            delta = (snapped[over].double() - part.center.double()).flatten(1) * shrink[:, None]
            moved = self._into_box(
                (part.center.double() + delta.view_as(part.center)).to(points.dtype)
            )
            snapped = snapped.index_copy(0, over, moved)
        return snapped

    def _into_box(self, points: Tensor) -> Tensor:
        """Return the points clamped into the box."""
        if self.ball.ends is None:
            return points
        floor, ceiling = (per_feature(end, points[:0].double()) for end in self.ball.ends)
        return self._clamped(points, floor, ceiling)

    @staticmethod
    def _clamped(points: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
        # a float64 end may lie between two floats of the data's dtype: take the inner one
        """Return the points clamped between float64 ends, exactly."""
        inner_floor, inner_ceiling = floor.to(points.dtype), ceiling.to(points.dtype)
        inner_floor = torch.where(
            inner_floor.double() < floor,
            torch.nextafter(inner_floor, torch.full_like(inner_floor, torch.inf)),
            inner_floor,
        )
        inner_ceiling = torch.where(
            inner_ceiling.double() > ceiling,
            torch.nextafter(inner_ceiling, torch.full_like(inner_ceiling, -torch.inf)),
            inner_ceiling,
        )
        return torch.minimum(torch.maximum(points.flatten(1), inner_floor), inner_ceiling).view_as(
            points
        )

    def sample(self, streams: Streams) -> Tensor:
        """Return one admissible point per region.

        Uniform in the ball, then clamped into the box (so that the faces of the box get more than
        their share).
        """
        d, dtype = self.low.shape[1], self.center.dtype
        # a box uses the normal numbers for their shape only
        normal = self.low if self.norm.is_box else streams.fork(1).normal(d, dtype)
        delta = self.norm.sample(
            streams.fork(0).uniform(d + 1, dtype), normal, self.radius.to(dtype)
        )
        delta = (delta if self.weight is None else delta / self.weight).clamp(self.low, self.high)
        return self.center + delta.view_as(self.center)


def distance_to(region: Region, g: Tensor, gap: Tensor) -> Reached:
    """Return the distance of each center from <g, delta> = gap (P,).

    The hyperplane within the box and the features that may move; constraints are ignored.
    """
    low, high, flat = region.low, region.high, g
    if region.weight is not None:
        low, high, flat = low * region.weight, high * region.weight, flat / region.weight
    flat = torch.where((low == 0) & (high == 0), 0.0, flat)
    delta = region.norm.reach(flat, gap, low, high)
    got = (flat * delta).sum(-1)
    length = region.norm.of(delta)
    none = got < gap * (1 - _MISSED)
    return Reached(
        torch.where(none, torch.inf, length),
        delta if region.weight is None else delta / region.weight,
    )


def per_feature(value: float | Tensor, x: Tensor) -> Tensor:
    """Return a number or an input-shaped tensor flattened, (1 or d,).

    It gets x's device, and x's dtype unless it is a mask. Raises `BadInput` where the shape does
    not fit.
    """
    is_mask = isinstance(value, Tensor) and value.dtype == torch.bool
    t = torch.as_tensor(value, dtype=torch.bool if is_mask else x.dtype, device=x.device)
    try:
        return t if t.dim() == 0 else t.expand(x.shape[1:]).flatten()
    except RuntimeError as error:
        each = t.shape[1:] == x.shape[1:]
        raise BadInput(
            f"a box, mask or weight of shape {tuple(t.shape)} does not fit inputs of shape "
            f"{tuple(x.shape[1:])}"
            + (
                ": there is one box, one mask for all points; ask about the points of each mask "
                "apart"
                if each
                else ""
            )
        ) from error


def levels(points: Tensor, step: float) -> Tensor:
    """Return the whole number of steps nearest to each value, float64."""
    return (points.double() / step).round()


def on_level(level: Tensor, step: float, dtype: torch.dtype) -> Tensor:
    """Return the values at these whole numbers of steps, rounded once.

    At a step of 1/255 these are the bytes divided by 255.
    """
    whole = round(1 / step)
    exact = level / whole if whole and abs(1 / step - whole) < 1e-9 * whole else level * step
    return exact.to(dtype)


def is_on_grid(points: Tensor, step: float) -> Tensor:
    """Return whether all values of a point are whole steps, (M,) bool.

    Exactly, in the points' own dtype.
    """
    return (points == on_level(levels(points, step), step, points.dtype)).flatten(1).all(1)
