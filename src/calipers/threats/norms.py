"""Norms, and the perturbation of bounded norm that helps an attack most.

This is the only file that knows p. Everything works on flat perturbations: `delta (M, d)`, `radius
(M,)`, and a box `low <= delta <= high` of the same shape with low <= 0 <= high (infinite where
unbounded). The methods `of`, `support` and `project` are exact for the norm ball intersected with
the box.

`support` returns the value of the *dual* problem, whose terms are all non-negative: so the value is
an upper bound of the true maximum in real arithmetic for any multiplier, and its floating-point
evaluation errs by at most `support_rounding(d)` units of relative rounding (certification relies on
both).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.threats.count_norms import L0
from calipers.threats.water_filling import (
    Support,
    caps,
    rise_in_order,
    rise_together,
    share_out,
    soft_threshold,
    spend_in_order,
    toward,
)

__all__ = [
    "L0",
    "L1",
    "L2",
    "NORMS",
    "Linf",
    "Norm",
    "Support",
    "distance_between",
    "norm_for",
    "norm_named",
    "support_rounding",
    "unboxed",
]


def support_rounding(d: int) -> int:
    """Return how many relative roundings a support value can accumulate.

    For d terms: d - 1 additions and at most 15 operations inside a term.
    """
    return d + 16


class Norm(Protocol):
    """A norm with its dual, and the geometry of its ball within a box.

    The geometry of the intersection with a box around 0 is exact.
    """

    @property
    def name(self) -> str:
        """The name of the norm for users and records."""

    @property
    def is_box(self) -> bool:
        """Whether the ball is a box.

        Then features move independently, and interval arithmetic over one affine operation is
        exact.
        """

    @property
    def is_euclidean(self) -> bool:
        """Whether the norm is the Euclidean length, whose square has a gradient."""

    @property
    def is_count(self) -> bool:
        """Whether the norm counts features.

        Then distances are whole numbers, scaling a perturbation does not change its length, and
        only a box bounds it.
        """

    @property
    def is_sparse(self) -> bool:
        """Whether the steepest step moves few features rather than all of them.

        Then it matters over how many features a step is spread.
        """

    def alone(self, radius: Tensor) -> Tensor:
        """Return how far one feature can move if it moves alone.

        Of the radius's shape: half the side of the smallest cube around the ball.
        """

    def longest_unit(self, features: int) -> float:
        """Return the Euclidean length of the longest perturbation of norm 1.

        Its square is the energy that the norm allows.
        """

    def of(self, delta: Tensor) -> Tensor:
        """Return the norm over the last axis."""

    def dual(self, g: Tensor) -> Tensor:
        """Return the dual norm over the last axis.

        It is the maximum of <g, u> over perturbations u of norm 1.
        """

    def support(self, g: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Support:
        """Return the maximum of <g, delta> over ball and box, and its maximiser.

        Features of zero gradient keep delta = 0.
        """

    def step(self, g: Tensor, length: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return a perturbation of length (M,) along which <g, .> rises fastest.

        It is cheap to compute, and not kept in the box unless the norm is sparse.
        """

    def project(
        self, delta: Tensor, radius: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Return the nearest point of ball and box in the Euclidean distance.

        The ball is {delta : norm(weight * delta) <= radius}.
        """

    def reach(self, g: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the shortest delta in the box with <g, delta> >= gain (M,).

        It is 0 where the gain is not positive, and the farthest corner where no point of the box
        reaches the gain. On a linear model this is the exact projection onto a decision boundary.
        Infinite sides are allowed.
        """

    def sample(self, uniform: Tensor, normal: Tensor, radius: Tensor) -> Tensor:
        """Return points drawn uniformly from the ball, without the box.

        They are made from independent `uniform (M, d + 1)` and `normal (M, d)` numbers.
        """


@dataclass(frozen=True)
class Linf:
    """The largest absolute change of any feature."""

    name: str = "linf"
    is_box: bool = True
    is_euclidean: bool = False
    is_count: bool = False
    is_sparse: bool = False

    def alone(self, radius: Tensor) -> Tensor:
        """Return the radius itself."""
        return radius

    def longest_unit(self, features: int) -> float:
        """Return sqrt(features): every feature moves by 1."""
        return math.sqrt(features)

    def of(self, delta: Tensor) -> Tensor:
        """Return max |delta_i|."""
        return delta.abs().amax(-1) if delta.shape[-1] else delta.sum(-1)

    def dual(self, g: Tensor) -> Tensor:
        """Return the l1 norm."""
        return g.abs().sum(-1)

    def support(self, g: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Support:
        """Return the maximum with each feature at its own end of the interval.

        It is the sign step of Goodfellow et al. 2015, kept inside the box.
        """
        delta = torch.where(
            g > 0, torch.minimum(high, radius[:, None]), torch.maximum(low, -radius[:, None])
        ) * (g != 0)
        return Support((g * delta).sum(-1), delta)

    def step(self, g: Tensor, length: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the sign of the gradient times the length."""
        return g.sign() * length[:, None]

    def project(
        self, delta: Tensor, radius: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Return delta with every feature clamped."""
        reach = radius[:, None] if weight is None else radius[:, None] / weight
        return delta.clamp(torch.maximum(low, -reach), torch.minimum(high, reach))

    def reach(self, g: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return delta with all features moved by the same amount.

        Features whose box ends sooner move as far as it lets them.
        """
        return rise_together(g, torch.ones_like(g), gain, low, high)

    def sample(self, uniform: Tensor, normal: Tensor, radius: Tensor) -> Tensor:
        """Return points uniform in each feature."""
        return (2 * uniform[:, : normal.shape[1]] - 1) * radius[:, None]


@dataclass(frozen=True)
class L2:
    """The Euclidean length."""

    name: str = "l2"
    is_box: bool = False
    is_euclidean: bool = True
    is_count: bool = False
    is_sparse: bool = False

    def alone(self, radius: Tensor) -> Tensor:
        """Return the radius itself."""
        return radius

    def longest_unit(self, features: int) -> float:
        """Return 1: all perturbations of norm 1 have Euclidean length 1."""
        return 1.0

    def of(self, delta: Tensor) -> Tensor:
        """Return (sum delta_i^2)^(1/2), summed in float64.

        Squares of float32 numbers can neither overflow nor vanish there.
        """
        length: Tensor = torch.linalg.vector_norm(delta, dim=-1, dtype=torch.float64)
        return length.to(delta.dtype)

    def dual(self, g: Tensor) -> Tensor:
        """Return the l2 norm, which is its own dual."""
        return self.of(g)

    def support(self, g: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Support:
        """Return the maximum along the gradient, clipped to the box.

        delta_i = clip(s g_i) with the one s that uses up the radius. Dual value, valid for every
        multiplier m = 1/s >= 0: sum_i max over the box of (g_i d - m d^2 / 2), plus m radius^2 / 2.
        """
        size, cap = g.abs(), caps(g, radius, low, high)
        length, scale = share_out(size, cap, radius)
        multiplier = 1 / scale
        # The maximum inside the sum is that for the multiplier as rounded; where the box lies
        # inside the ball, the multiplier is 0 and every feature goes to its end.
        inner = torch.where(
            scale.isinf()[:, None] | (size == 0), cap, torch.minimum(size * scale[:, None], cap)
        )
        value = (inner * (size - multiplier[:, None] * inner / 2)).sum(
            -1
        ) + multiplier * radius * radius / 2
        return Support(value, length * g.sign())

    def step(self, g: Tensor, length: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the gradient scaled to the length; 0 for a zero gradient."""
        # scaled first, so that the squares of tiny gradients do not underflow
        largest = g.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
        scaled = g / largest
        return scaled * (length / self.of(scaled).clamp_min(1.0))[:, None]

    def project(
        self, delta: Tensor, radius: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Return clip(s delta), with s = 1 if that already lies in the ball.

        With weights the nearest point is clip(delta / (1 + m weight^2)), for the one multiplier m
        >= 0 at which it lies on the sphere.
        """
        clipped = delta.clamp(low, high)
        inside = self.of(clipped if weight is None else clipped * weight) <= radius
        if weight is not None:
            return torch.where(
                inside[:, None], clipped, self._shrink(delta, radius, low, high, weight)
            )
        size, cap = delta.abs(), caps(delta, radius, low, high)
        return torch.where(inside[:, None], clipped, share_out(size, cap, radius)[0] * delta.sign())

    def _shrink(
        self, delta: Tensor, radius: Tensor, low: Tensor, high: Tensor, weight: Tensor
    ) -> Tensor:
        # The length falls monotonically in the multiplier: bisect its logarithm, and keep the end
        # whose point is inside the ball. In float64, whose range is wide enough for all cases.
        """Return the weighted projection, with its multiplier by bisection."""
        wide, weight, limit = delta.double(), weight.double(), radius.double()
        square = weight.square()
        low, high = low.double(), high.double()
        inside, outside = torch.full_like(limit, 600.0), torch.full_like(limit, -600.0)
        for _ in range(64):
            middle = (inside + outside) / 2
            fits = (
                self.of(weight * (wide / (1 + middle.exp()[:, None] * square)).clamp(low, high))
                <= limit
            )
            inside, outside = torch.where(fits, middle, inside), torch.where(fits, outside, middle)
        shrunk = (wide / (1 + inside.exp()[:, None] * square)).clamp(low, high)
        return (shrunk * (limit > 0)[:, None]).to(delta.dtype)

    def reach(self, g: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return the shortest delta: along the gradient, clipped to the box."""
        return rise_together(g, g.abs(), gain, low, high)

    def sample(self, uniform: Tensor, normal: Tensor, radius: Tensor) -> Tensor:
        """Return uniform directions at lengths whose d-th power is uniform."""
        direction = normal / self.of(normal).clamp_min(torch.finfo(normal.dtype).tiny)[:, None]
        return direction * (radius * uniform[:, -1] ** (1 / normal.shape[1]))[:, None]


@dataclass(frozen=True)
class L1:
    """The sum of all absolute changes."""

    name: str = "l1"
    is_box: bool = False
    is_euclidean: bool = False
    is_count: bool = False
    is_sparse: bool = True

    def alone(self, radius: Tensor) -> Tensor:
        """Return the radius itself."""
        return radius

    def longest_unit(self, features: int) -> float:
        """Return 1: the whole budget goes to one feature."""
        return 1.0

    def of(self, delta: Tensor) -> Tensor:
        """Return sum |delta_i|."""
        return delta.abs().sum(-1)

    def dual(self, g: Tensor) -> Tensor:
        """Return the linf norm."""
        return g.abs().amax(-1)

    def support(self, g: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Support:
        """Return the maximum that spends the radius on the largest |g_i| first.

        Each feature moves up to its end of the box. Dual value, valid for every threshold t >= 0: t
        radius + sum_i cap_i max(|g_i| - t, 0); the best t is the |g_i| at which the radius is used
        up.
        """
        size, cap = g.abs(), caps(g, radius, low, high)
        ranked, order = size.sort(dim=-1, descending=True)
        room = cap.gather(-1, order)
        spent_before = room.cumsum(-1) - room
        length = torch.minimum((radius[:, None] - spent_before).clamp_min(0), room)
        last = ((spent_before + room < radius[:, None]).sum(-1)).clamp(max=size.shape[-1] - 1)
        threshold = ranked.gather(-1, last[:, None])[:, 0] * (room.sum(-1) >= radius)
        value = threshold * radius + (cap * (size - threshold[:, None]).clamp_min(0)).sum(-1)
        return Support(value, torch.zeros_like(g).scatter(-1, order, length) * g.sign())

    def step(self, g: Tensor, length: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return a step along the features of largest gradient.

        Each moves only as far as its end of the box: a step along one feature that is at its end
        already would be lost in the projection.
        """
        return (
            spend_in_order(g.abs(), torch.ones_like(g), caps(g, length, low, high), length)
            * g.sign()
        )

    def project(
        self, delta: Tensor, radius: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Return the soft threshold inside the box.

        |d_i| = clip(|delta_i| - t w_i, 0, cap_i) with the one t that uses up the radius: Croce and
        Hein 2021, extended to any box and weights.
        """
        size, sign = delta.abs(), delta.sign()
        cap = toward(sign, low, high)
        w = torch.ones_like(size) if weight is None else weight.expand_as(size)
        threshold = soft_threshold(size, cap, w, radius)
        return (size - threshold[:, None] * w).clamp_min(0).minimum(cap) * sign

    def reach(self, g: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return delta with the features of largest gradient moved first.

        Each moves up to its end of the box.
        """
        return rise_in_order(g, g.abs(), gain, low, high)

    def sample(self, uniform: Tensor, normal: Tensor, radius: Tensor) -> Tensor:
        """Return uniform points: spacings of d + 1 exponentials with signs.

        The spacings give a uniform point of the simplex; signs come from the normal numbers.
        """
        exponential = -uniform.clamp(torch.finfo(uniform.dtype).tiny, 1.0).log()
        share = exponential[:, :-1] / exponential.sum(-1, keepdim=True).clamp_min(
            torch.finfo(uniform.dtype).tiny
        )
        return share * normal.sign() * radius[:, None]


_ALL: tuple[Norm, ...] = (Linf(), L2(), L1(), L0(), L0("pixels"))
NORMS: dict[str, Norm] = {norm.name: norm for norm in _ALL}
_ALIASES = {
    "inf": "linf",
    "l_inf": "linf",
    "l∞": "linf",
    "2": "l2",
    "1": "l1",
    "0": "l0",
    "pixel": "pixels",
    "euclidean": "l2",
}


def norm_named(name: str) -> Norm:
    """Return the norm of a name ("linf", "l2", "l1", "l0", "pixels").

    Raises `BadInput` for an unknown name.
    """
    key = _ALIASES.get(str(name).lower(), str(name).lower())
    if key not in NORMS:
        raise BadInput(
            f"unknown norm {name!r}; a Ball takes 'linf', 'l2' or 'l1', or 'l0' or 'pixels' inside "
            "a bounded box."
        )
    return NORMS[key]


def norm_for(name: str, shape: Sequence[int]) -> Norm:
    """Return the norm of a name for inputs of one shape.

    A count of pixels has to know the channels. Raises `BadInput` where the inputs have none.
    """
    norm = norm_named(name)
    return norm.over(shape) if isinstance(norm, L0) else norm


def unboxed(norm: Norm) -> Norm:
    """Return the same norm, without the claim that its ball is a box.

    For admissible sets that constraints cut further.
    """
    return Linf(is_box=False) if isinstance(norm, Linf) else norm


def distance_between(a: Tensor, b: Tensor, norm: str) -> Tensor:
    """Return the distance between two batches, point by point.

    Args:
        a: a batch (N, *D).
        b: another of the same shape.
        norm: "linf", "l2", "l1", "l0" or "pixels".

    Returns:
        (N,) float64, computed in float64.

    Raises:
        BadInput: for an unknown norm, and for "pixels" of inputs without channels.

    Example:
        >>> distance_between(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), "l2").tolist()
        [5.0]
    """
    return norm_for(norm, a.shape[1:]).of((a.double() - b.double()).flatten(1))
