"""What may the adversary do to a point? A norm ball, cut by a box and a mask; and the region it makes around each point of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.norms import Norm, norm_named
from calipers.problem.streams import Streams

_SNAP_ROUNDS = 8  # each round shrinks by a little more than the rounding that spoiled the last; two have always been enough


class Attained(NamedTuple):
    """The maximum of <g, x'> over a region, (M,), and an admissible point that attains it, (M, *D)."""

    value: Tensor
    point: Tensor


class Fall(NamedTuple):
    """How far a linear function can fall inside a region, (P, S), and the size of the terms that were added up for it."""

    value: Tensor
    terms: Tensor


def contract(a: Tensor, values: Tensor) -> Tensor:
    """Return <a, values> over the last axis, (P, S), for a (P, S, n) and values (P, n): from the left, several times as fast as columns from the right."""
    return (values[:, None] @ a.mT)[:, 0]


@dataclass(frozen=True, eq=False)
class Ball:
    """All x' with norm(weights * (x' - x)) <= radius, inside the box, equal to x where the mask is False.

    `radius` is in the data's native units: one number, or one for each point (N,). `box` is (low, high), numbers or tensors of one input's shape, or None.
    `mask` (bool) and `weights` (positive) have one input's shape; a feature of weight 2 may move half as far.

    >>> Ball("linf", 8 / 255).norm
    'linf'
    """

    norm: str
    radius: float | Tensor | Sequence[float]
    box: tuple[float | Tensor, float | Tensor] | None = (0.0, 1.0)
    mask: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", norm_named(self.norm).name)
        radius = torch.as_tensor(self.radius, dtype=torch.float64)
        if radius.dim() > 1:
            raise BadInput(f"radius must be one number or one for each point, got a tensor of shape {tuple(radius.shape)}")
        bad = torch.nonzero(~(radius.reshape(-1) >= 0) | radius.reshape(-1).isinf()).flatten()
        if len(bad):
            value = float(radius.reshape(-1)[bad[0]])
            raise BadInput(f"radius must be a finite number >= 0 in the data's own units, got {value}" + (f" at point {int(bad[0])}" if radius.dim() else ""))
        if self.box is not None and not bool((torch.as_tensor(self.box[0]) <= torch.as_tensor(self.box[1])).all()):
            raise BadInput(f"box must be (low, high) with low <= high in every feature, got {self.box}")
        if norm_named(self.norm).is_count and (self.box is None or not all(bool(torch.as_tensor(end).isfinite().all()) for end in self.box)):
            raise BadInput(f"norm {self.norm!r} counts changed features and lets each move freely: give a box=(low, high) of finite numbers")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise BadInput(f"mask must be of dtype bool (True where the adversary may change a feature), got {self.mask.dtype}")
        if self.weights is not None and not bool((self.weights > 0).all() and self.weights.isfinite().all()):
            raise BadInput("weights must be positive and finite in every feature; to freeze a feature use mask")

    def check(self, x: Tensor) -> None:
        """Raise `BadInput` where the points x (N, *D) lie outside the box, or radius and data are in different units."""
        radius = self.radii(len(x)).to(x.device)
        self.at(0.0).region(x[:1])  # do box, mask and weights fit the points?
        if self.box is None:
            return
        floor, ceiling = (torch.as_tensor(end, dtype=torch.float64, device=x.device) for end in self.box)
        _check_inside(x.double(), floor, ceiling)
        span = (ceiling - floor).expand(x.shape[1:])
        if bool(span.isfinite().all()):
            weighted = span if self.weights is None else span * self.weights.double().to(x.device)
            diagonal = norm_named(self.norm).of(weighted.reshape(1, -1))
            if bool((radius > diagonal).any()):
                raise BadInput(
                    f"radius {float(radius.max()):g} is larger than the whole box {_box_text(floor, ceiling)} ({self.norm} diameter {float(diagonal):g}): "
                    f"radius and box are in different units. For 8-bit steps on [0, 1] data write {float(radius.max()):g} / 255."
                )

    def radii(self, n: int) -> Tensor:
        """Return the radius of each of n points, (N,) float64."""
        radius = torch.as_tensor(self.radius, dtype=torch.float64)
        if radius.dim() and len(radius) != n:
            raise BadInput(f"radius has {len(radius)} entries, but there are {n} points: give one number, or one for each point")
        return radius.expand(n).clone()

    def at(self, radius: float | Tensor) -> Ball:
        """Return the same ball with another radius."""
        return dataclasses.replace(self, radius=radius)

    def widest(self, x: Tensor) -> Tensor:
        """Return the radius beyond which the box adds nothing, (N,) float64: the distance from each point to its farthest corner, infinite without a box."""
        region = self.region(x.double())
        corner = torch.maximum(-region.low, region.high)
        return region.norm.of(corner if region.weight is None else corner * region.weight)

    def region(self, x: Tensor, *, outward: bool = False) -> Region:
        """Return the admissible set around each point of x (N, *D).

        With `outward`, offsets to the box are rounded away from the point, so that the region holds the exact set whatever the rounding of a
        subtraction (certificates ask for this; attacks do not, since the referee compares exactly).
        """
        flat = x.flatten(1)
        low, high = torch.full_like(flat, -torch.inf), torch.full_like(flat, torch.inf)
        if self.box is not None:
            exact = x.double()  # an end such as 0.9 is no float32 number: rounding it first would take more off than one step outward puts back
            floor, ceiling = (_per_feature(end, exact) for end in self.box)
            low, high = (floor - exact.flatten(1)).clamp(max=0).to(x.dtype), (ceiling - exact.flatten(1)).clamp(min=0).to(x.dtype)
            if outward:
                low, high = torch.nextafter(low, torch.full_like(low, -torch.inf)), torch.nextafter(high, torch.full_like(high, torch.inf))
        if self.mask is not None:
            frozen = ~_per_feature(self.mask, x)
            low, high = low.masked_fill(frozen, 0.0), high.masked_fill(frozen, 0.0)
        weight = None if self.weights is None else _per_feature(self.weights, x)
        return Region(self, norm_named(self.norm), x, self.radii(len(x)).to(x.device), low, high, weight)

    def take(self, index: Tensor) -> Ball:
        """Return the ball for the chosen points."""
        radius = torch.as_tensor(self.radius, dtype=torch.float64)
        return self if radius.dim() == 0 else self.at(radius[index.to(radius.device)])

    def below(self, distance: NDArray[np.float64], proved: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return where the search for a certificate begins under witnesses at these distances: a third of the way, or just above what is proved already."""
        return np.maximum(distance / 3, np.minimum(1.08 * proved, 0.95 * distance))

    def identity(self) -> dict[str, Any]:
        """Return what makes two threats the same question, JSON-ready; the radius is not part of it (a verdict is a reading of a bracket)."""
        listed = [None if t is None else torch.as_tensor(t).tolist() for t in (*(self.box or (None, None)), self.mask, self.weights)]
        return {"norm": self.norm, "box": None if self.box is None else listed[:2], "mask": listed[2], "weights": listed[3]}

    def particulars(self) -> dict[str, Any]:
        """Return what a record keeps, beside norm, radius and box, to bring the threat back: nothing."""
        return {}


@dataclass(frozen=True, eq=False)
class Region:
    """The admissible set around each of M points. Both jaws ask the same object, so they cannot disagree about what the adversary may do.

    `center (M, *D)`, `radius (M,)` float64; `low`, `high (M, d)` are the offsets to the box (0 where masked); `weight (d,)` or None.
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
        return Region(self.ball, self.norm, self.center[index], self.radius[index], low, high, self.weight)

    def outer_box(self) -> tuple[Tensor, Tensor]:
        """Return the lowest and highest values of the smallest box around each region, (M, *D) each, a rounding outward where the region ends there."""
        low, high = self._corners
        down, up = (torch.nextafter(end, torch.full_like(end, sign)) for end, sign in ((low, -torch.inf), (high, torch.inf)))
        return torch.where(low < self.center, down, low), torch.where(high > self.center, up, high)

    def boxes(self, low: Tensor, high: Tensor) -> Region:
        """Return regions that are whole boxes (P, *D), inside the first of these regions, with the same norm; rounded outward."""
        center = (low + high) / 2
        down, up = ((end - center).flatten(1) for end in (low, high))
        down, up = torch.nextafter(down, torch.full_like(down, -torch.inf)), torch.nextafter(up, torch.full_like(up, torch.inf))
        down, up = torch.where(low.flatten(1) < high.flatten(1), down, 0.0), torch.where(low.flatten(1) < high.flatten(1), up, 0.0)
        return Region(self.ball, self.norm, center, torch.full_like(self.radius[:1], torch.inf).expand(len(low)), down, up, None)

    def at(self, radius: Tensor) -> Region:
        """Return the same regions with other radii (M,)."""
        return dataclasses.replace(self, radius=radius.to(self.center.device, torch.float64))

    def distance(self, points: Tensor) -> Tensor:
        """Return the (weighted) distance of each point from its center, (M,) float64."""
        delta = (points.double() - self.center.double()).flatten(1)
        return self.norm.of(delta if self.weight is None else delta * self.weight.double())

    def contains(self, points: Tensor) -> Tensor:
        """Is each point admissible, (M,) bool? Exact comparison in float64, no tolerance; a NaN is not inside."""
        inside = self.distance(points) <= self.radius
        flat = points.double().flatten(1)
        if self.ball.box is not None:
            floor, ceiling = (_per_feature(end, points.double()) for end in self.ball.box)
            inside = inside & ((flat >= floor) & (flat <= ceiling)).all(1)
        if self.ball.mask is not None:
            frozen = ~_per_feature(self.ball.mask, points)
            inside = inside & (flat == self.center.double().flatten(1))[:, frozen].all(1)
        return inside

    def support(self, g: Tensor) -> Attained:
        """Return the maximum of <g, x'> and where it is attained, for one direction g (M, *D) a point.

        The value is a dual bound: it dominates the maximum for real arithmetic (see norms.py). The maximiser is the steepest one-step attack.
        """
        best = self.offset_support(g)
        point = self.center + best[1].view_as(self.center)
        return Attained((g * self.center).flatten(1).sum(-1) + best[0], point)

    def offset_support(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maximum of <g, delta> (M,) and the maximising offset (M, d); `value` is a sum of non-negative terms."""
        flat, radius = g.flatten(1), self.radius.to(g.dtype)
        if self.weight is None:
            return self.norm.support(flat, radius, self.low, self.high)
        scaled = self.norm.support(flat / self.weight, radius, self.low * self.weight, self.high * self.weight)
        return scaled.value, scaled.delta / self.weight

    def lowest(self, a: Tensor) -> Attained:
        """Return the minimum of <a, x'> and an admissible point that attains it; as `support` of -a, up to rounding, and cheaper where the ball is a box."""
        if not self.norm.is_box:
            best = self.support(-a)
            return Attained(-best.value, best.point)
        point = torch.where(a > 0, *self._corners)
        return Attained((a * point).flatten(1).sum(1), point)

    def step(self, points: Tensor, g: Tensor, share: float | Tensor, spread: Tensor | None = None) -> Tensor:
        """Return the points moved by `share` (a number, or (M,)) of the radius along which <g, .> rises fastest, for `project` to follow.

        In weighted l2 along g itself, just as far: the projection is Euclidean, and after a steepest step it ends beside the maximum.
        `spread (M,)`: over how many features a sparse norm's step is spread at least.
        """
        length = self.radius.to(g.dtype) * share
        if self.norm.is_box:
            sides = length[:, None] if self.weight is None else length[:, None] / self.weight
            return torch.addcmul(points, g.sign(), self._like_center(sides))
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
        """Return how far <a, x'> can fall below <a, x>, for directions a (P, S, d) at the chosen points (P,): the dual bound alone."""
        return self.window_fall(a, points, self.low[points], self.high[points], None if self.weight is None else self.weight.expand(len(points), -1))

    def window_fall(self, a: Tensor, points: Tensor, low: Tensor, high: Tensor, weight: Tensor | None) -> Fall:
        """Return the same where each row sees only some features: `low`, `high`, `weight (P, d)` are those features' own."""
        radius = self.radius.to(a.dtype)[points]
        if self.norm.is_box:
            # Features move independently: |a| times the half width and a times the middle replace the search for a maximiser.
            # As low <= 0 <= high the middle is no longer than the half width.
            length = radius[:, None] if weight is None else radius[:, None] / weight
            down, up = torch.maximum(low, -length), torch.minimum(high, length)
            wide = contract(a.abs(), (up - down) / 2)
            return Fall(wide - contract(a, (up + down) / 2), 2 * wide)
        width = a.shape[1]
        low, high, radius = (t.repeat_interleave(width, 0) for t in (low, high, radius))
        g = -a.flatten(0, 1)
        if weight is not None:
            w = weight.repeat_interleave(width, 0)
            w = torch.where(w > 0, w, torch.ones_like(w))  # outside an image nothing moves, and the window has no weight
            g, low, high = g / w, low * w, high * w
        value = self.norm.support(g, radius, low, high).value.view(a.shape[:2])
        return Fall(value, value)

    def project(self, points: Tensor) -> Tensor:
        """Return the nearest admissible point of each, up to rounding of the sum (`snap` removes that)."""
        if self.norm.is_box:
            return points.clamp(*self._corners)
        delta = self.norm.project((points - self.center).flatten(1), self.radius.to(points.dtype), self.low, self.high, self.weight)
        return self.center + delta.view_as(self.center)

    @cached_property
    def _corners(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest admissible points, up to rounding, where the ball is a box."""
        reach = self.radius.to(self.low.dtype)[:, None]
        reach = reach if self.weight is None else reach / self.weight
        down, up = torch.maximum(self.low, -reach), torch.minimum(self.high, reach)
        return self.center + down.view_as(self.center), self.center + up.view_as(self.center)

    def _like_center(self, flat: Tensor) -> Tensor:
        """Return (M, 1) or (M, d) in a shape that broadcasts with the points."""
        return flat.view_as(self.center) if flat.shape[1] == self.low.shape[1] else flat.view(-1, *[1] * (self.center.dim() - 1))

    def snap(self, points: Tensor) -> Tensor:
        """Return nearly the same points, moved inward by a few roundings so that `contains` holds exactly."""
        still = ((self.low == 0) & (self.high == 0)).view_as(points)  # another dtype's rounding of a masked feature would be a change of it
        snapped = self._into_box(torch.where(still, self.center.to(points.dtype), points))
        for k in range(_SNAP_ROUNDS):
            distance = self.distance(snapped)
            over = torch.nonzero(distance > self.radius).flatten()
            if not len(over):
                break
            part, distance = self.take(over), distance[over]
            # A rounding of a coordinate may be many roundings of a small radius: inward by what the dtype can resolve at this place.
            resolution = torch.finfo(points.dtype).eps * (1 + snapped[over].double().flatten(1).abs().amax(1) / part.radius.clamp_min(1e-300))
            shrink = part.radius / distance * (1 - resolution * 2.0**k).clamp_min(0)
            delta = (snapped[over].double() - part.center.double()).flatten(1) * shrink[:, None]
            moved = self._into_box((part.center.double() + delta.view_as(part.center)).to(points.dtype))
            snapped = snapped.index_copy(0, over, moved)
        return snapped

    def _into_box(self, points: Tensor) -> Tensor:
        if self.ball.box is None:
            return points
        floor, ceiling = (_per_feature(end, points[:0].double()) for end in self.ball.box)
        # A float64 box end may fall between two floats of the data: take the inner one.
        inner_floor, inner_ceiling = floor.to(points.dtype), ceiling.to(points.dtype)
        inner_floor = torch.where(inner_floor.double() < floor, torch.nextafter(inner_floor, torch.full_like(inner_floor, torch.inf)), inner_floor)
        inner_ceiling = torch.where(inner_ceiling.double() > ceiling, torch.nextafter(inner_ceiling, torch.full_like(inner_ceiling, -torch.inf)), inner_ceiling)
        return torch.minimum(torch.maximum(points.flatten(1), inner_floor), inner_ceiling).view_as(points)

    def sample(self, streams: Streams) -> Tensor:
        """Return one admissible point per region: uniform in the ball, then clamped into the box (so the box's faces get more than their share)."""
        d, dtype = self.low.shape[1], self.center.dtype
        normal = self.low if self.norm.is_box else streams.fork(1).normal(d, dtype)  # a box looks at their shape alone
        delta = self.norm.sample(streams.fork(0).uniform(d + 1, dtype), normal, self.radius.to(dtype))
        delta = (delta if self.weight is None else delta / self.weight).clamp(self.low, self.high)
        return self.center + delta.view_as(self.center)


def _per_feature(value: float | Tensor, x: Tensor) -> Tensor:
    """Return a number or an input-shaped tensor as (1 or d,) of x's device, and of x's dtype unless it is a mask."""
    is_mask = isinstance(value, Tensor) and value.dtype == torch.bool
    t = torch.as_tensor(value, dtype=torch.bool if is_mask else x.dtype, device=x.device)
    try:
        return t if t.dim() == 0 else t.expand(x.shape[1:]).flatten()
    except RuntimeError as error:
        raise BadInput(f"a box, mask or weight of shape {tuple(t.shape)} does not fit inputs of shape {tuple(x.shape[1:])}") from error


def _check_inside(x64: Tensor, floor: Tensor, ceiling: Tensor) -> None:
    outside = torch.nonzero(((x64 < floor) | (x64 > ceiling)).flatten(1).any(1)).flatten()
    if not len(outside):
        return
    grey_levels = float(x64[outside].max()) > 2 and float(floor.min()) == 0 and float(ceiling.max()) == 1
    hint = (
        "The data look like 0..255: divide by 255, or give box=(0, 255) and the radius in grey levels."
        if grey_levels
        else "Give the data's own box=(low, high), or box=None if any value is allowed."
    )
    raise BadInput(
        f"{len(outside)} of {len(x64)} points lie outside the box {_box_text(floor, ceiling)} (first: point {int(outside[0])}, values "
        f"{float(x64[outside[0]].min()):.9g}..{float(x64[outside[0]].max()):.9g}). {hint}"
    )


def _box_text(low: Tensor, high: Tensor) -> str:
    return f"[{float(low.min()):g}, {float(high.max()):g}]"
