"""Norm-ball threat models, restricted by a box, a mask and constraints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calipers.arguments import tensor
from calipers.errors import BadInput
from calipers.threats.constraints import ConstrainedRegion, check_satisfied, read_constraints
from calipers.threats.norms import norm_for, norm_named, unboxed
from calipers.threats.region import (
    Attained,
    Fall,
    Region,
    is_on_grid,
    levels,
    per_feature,
)
from calipers.threats.units import cure_for

__all__ = ["Attained", "Ball", "Fall", "Region"]

_MULTIPLES = 2.0**10  # of the radius that stay finite in the numbers of the points
_BOX = "box must be (low, high), two numbers or arrays, 'data', or None; got {}"


@dataclass(frozen=True, eq=False)
class Ball:
    """A norm ball around each input, intersected with a box.

    The admissible points of an input x are all x' with norm(weights * (x' - x)) <= radius that lie
    inside the box, equal x where the mask is False, and satisfy the constraints. The ball is
    closed.

    Args:
        norm: "linf", "l2", "l1", "l0" (number of changed features) or "pixels" (number of changed
            pixels of inputs (channels, ...): all channels of a pixel may change together).
        radius: the size of the ball in the data's native units: one number, or one for each point
            (N,). In "l0" it is a number of features, in "pixels" of pixels.
        box: (low, high), numbers or tensors of one input's shape; None for no box. The default fits
            images scaled to [0, 1]. "data" stands for the range of the measured points: of each
            column of a table, of each channel of images. "l0" and "pixels" need a finite box.
        mask: bool, of one input's shape; False freezes a feature. None lets all features move.
        weights: positive numbers of one input's shape; a feature of weight 2 may move half as far.
            None stands for ones.
        constraints: (A, b), A (m, d) over the flattened input and b (m,), in the data's units: only
            points with A x' <= b are admissible. For rows of a table, say, whose features have an
            order or a bounded sum. Not with "l0" and "pixels", whose balls are not convex.
        grid: the step between neighbouring values, 1/255 for 8-bit images in [0, 1]. Only points
            whose values are whole multiples of the step then count as adversarial examples; attacks
            are rounded onto the grid, and a certificate for the whole ball holds for its grid
            points too. A linf radius that is a whole number of steps is raised by the float32
            rounding of a step, so that 8/255 allows eight steps.

    Raises:
        BadInput: for an unknown norm, a radius that is negative or not finite, a box with low >
            high, a mask that is not bool, weights that are not positive, constraints that are no
            finite inequalities, or a combination that is not offered.

    Example:
        >>> Ball("linf", 8 / 255).norm
        'linf'
        >>> Ball("l2", 0.5, box=None).at(1.0).radius
        1.0
    """

    norm: str
    radius: float | Tensor | Sequence[float]
    box: tuple[float | Tensor, float | Tensor] | Literal["data"] | None = (0.0, 1.0)
    mask: Tensor | None = None
    weights: Tensor | None = None
    constraints: tuple[Any, Any] | None = None
    grid: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", norm_named(self.norm).name)
        self._read()
        radius = torch.as_tensor(self.radius, dtype=torch.float64)
        if radius.dim() > 1:
            raise BadInput(
                "radius must be one number or one for each point, got a tensor of shape "
                f"{tuple(radius.shape)}"
            )
        bad = torch.nonzero(~(radius.reshape(-1) >= 0) | radius.reshape(-1).isinf()).flatten()
        if len(bad):
            value = float(radius.reshape(-1)[bad[0]])
            raise BadInput(
                f"radius must be a finite number >= 0 in the data's own units, got {value}"
                + (f" at point {int(bad[0])}" if radius.dim() else "")
            )
        ends = None if self.box == "data" else self.ends
        if ends is not None and not bool(
            (torch.as_tensor(ends[0]) <= torch.as_tensor(ends[1])).all()
        ):
            raise BadInput(
                f"box must be (low, high) with low <= high in every feature, got {self.box}"
            )
        if norm_named(self.norm).is_count and (
            self.box is None
            or not all(bool(torch.as_tensor(end).isfinite().all()) for end in ends or ())
        ):
            raise BadInput(
                f"norm {self.norm!r} counts changed features and lets each move freely: give a "
                "box=(low, high) of finite numbers"
            )
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise BadInput(
                "mask must be of dtype bool (True where the adversary may change a feature), got "
                f"{self.mask.dtype}"
            )
        if self.weights is not None and not bool(
            (self.weights > 0).all() and self.weights.isfinite().all()
        ):
            raise BadInput(
                "weights must be positive and finite in every feature; to freeze a feature use mask"
            )
        if self.grid is not None:
            self._read_grid()
        if self.constraints is not None:
            object.__setattr__(self, "constraints", read_constraints(self.constraints))
            if norm_named(self.norm).is_count:
                raise BadInput(
                    f"constraints cut a convex ball, and norm {self.norm!r} counts: take 'linf', "
                    "'l2' or 'l1'"
                )

    def _read(self) -> None:
        """Convert arrays and lists to tensors; leave numbers and tensors alone."""
        cure = "Give one number, or an array of one input's shape."
        if self.box is not None and not isinstance(self.box, str):
            if isinstance(self.box, Tensor | int | float) or len(self.box) != 2:
                raise BadInput(_BOX.format(self.box))
            ends = (_plain(end, "an end of the box", cure) for end in self.box)
            object.__setattr__(self, "box", tuple(ends))
        elif self.box not in (None, "data"):
            raise BadInput(_BOX.format(repr(self.box)))
        object.__setattr__(
            self,
            "radius",
            _plain(self.radius, "radius", "Give one number, or one for each point (N,)."),
        )
        for name in ("mask", "weights"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tensor(value, name, cure))

    def _read_grid(self) -> None:
        step = self.grid
        if type(step) not in (int, float) or not 0 < float(step or 0) < float("inf"):
            raise BadInput(
                f"grid is the step between neighbouring values, such as 1/255, got {step!r}"
            )
        object.__setattr__(self, "grid", float(step or 0))
        if norm_named(self.norm).is_box:
            radius = torch.as_tensor(self.radius, dtype=torch.float64)
            steps = (radius / float(step or 0)).round()
            # a difference of two float32 values of up to 1, or up to 255, each with its rounding
            near = (radius - steps * float(step or 0)).abs() < 1e-4 * float(step or 0)
            raised = steps * float(step or 0) + 2**-23 * max(1.0, 255 * float(step or 0))
            radius = torch.where(near & (steps > 0), raised, radius)
            kept = float(radius) if radius.dim() == 0 else radius
            object.__setattr__(self, "radius", kept)

    @property
    def ends(self) -> tuple[float | Tensor, float | Tensor] | None:
        """The lowest and highest values of the box, or None.

        Raises `BadInput` for `box="data"`, whose ends are unknown until `fitted` was called.
        """
        if isinstance(self.box, str):
            raise BadInput(
                "box='data' is the range of the points: call ball.fitted(x) first, or give "
                "box=(low, high)"
            )
        return self.box

    def fitted(self, x: Tensor) -> Ball:
        """Return the ball with `box="data"` replaced by the range of points.

        The range of the points x (N, *D) is taken by column, for images (N, C, ...) by channel. NaN
        and infinity are left out. Any other box is returned unchanged.
        """
        if self.box != "data":
            return self
        dims = (0,) if x.dim() == 2 else (0, *range(2, x.dim()))
        low = torch.where(x.isfinite(), x, torch.inf).amin(dims, keepdim=True)[0]
        high = torch.where(x.isfinite(), x, -torch.inf).amax(dims, keepdim=True)[0]
        if not bool((low <= high).all()):
            raise BadInput("box='data' needs a finite value of every feature among the points")
        return dataclasses.replace(self, box=(low, high))

    def check(self, x: Tensor) -> None:
        """Raise `BadInput` where points x (N, *D) do not fit the ball.

        The points must lie inside the box, on the grid and within the constraints, and the radius
        must not exceed the diameter of the box (a sign that radius and data are in different
        units).
        """
        radius = self.radii(len(x)).to(x.device)
        self.at(0.0).region(x[:1])  # raises where box, mask or weights do not fit the points
        beyond = radius > self._most(x.dtype)
        if bool(beyond.any()):
            raise BadInput(
                f"a ball of radius {float(radius[beyond][0]):g} reaches beyond what numbers of "
                f"{x.dtype} can hold: lower the radius, or raise the smallest weight"
            )
        if self.constraints is not None:
            check_satisfied(x, self.constraints)
        if self.grid is not None:
            _check_on_grid(x, self.grid)
        if self.ends is None:
            return
        floor, ceiling = (
            torch.as_tensor(end, dtype=torch.float64, device=x.device) for end in self.ends
        )
        _check_inside(x.double(), floor, ceiling)
        span = (ceiling - floor).expand(x.shape[1:])
        if bool(span.isfinite().all()):
            weighted = span if self.weights is None else span * self.weights.double().to(x.device)
            diagonal = norm_for(self.norm, x.shape[1:]).of(weighted.reshape(1, -1))
            if bool((radius > diagonal).any()):
                raise BadInput(
                    f"radius {float(radius.max()):g} is larger than the whole box "
                    f"{_box_text(floor, ceiling)} ({self.norm} diameter {float(diagonal):g}): "
                    "radius and box are in different units. For 8-bit steps on [0, 1] data write "
                    f"{float(radius.max()):g} / 255."
                )

    def radii(self, n: int) -> Tensor:
        """Return the radius of each of n points, (N,) float64."""
        radius = torch.as_tensor(self.radius, dtype=torch.float64)
        if radius.dim() and len(radius) != n:
            raise BadInput(
                f"radius has {len(radius)} entries, but there are {n} points: give one number, or "
                "one for each point"
            )
        return radius.expand(n).clone()

    def at(self, radius: float | Tensor) -> Ball:
        """Return the same ball with another radius."""
        return dataclasses.replace(self, radius=radius)

    def widest(self, x: Tensor) -> Tensor:
        """Return the radius at which the ball contains the whole box.

        (N,) float64: the distance from each point to its farthest corner of the box, infinite
        without a box.
        """
        region = self.region(x.double())
        corner = torch.maximum(-region.low, region.high)
        return region.norm.of(corner if region.weight is None else corner * region.weight)

    def _most(self, dtype: torch.dtype) -> float:
        """Return the largest radius whose multiples are finite in a dtype."""
        least = 1.0 if self.weights is None else min(1.0, float(self.weights.min()))
        return torch.finfo(dtype).max / _MULTIPLES * least

    def region(self, x: Tensor, *, outward: bool = False) -> Region:
        """Return the admissible set around each point of x (N, *D).

        With `outward`, offsets to the box are rounded away from the point, so that the region
        contains the exact set whatever the rounding of a subtraction (certificates ask for this;
        attacks do not, since candidates are checked by exact comparison).
        """
        flat = x.flatten(1)
        low, high = torch.full_like(flat, -torch.inf), torch.full_like(flat, torch.inf)
        if self.ends is not None:
            # The difference is taken in float64: an end such as 0.9 is no float32 number, and to
            # round it first could lose more than one step outward restores.
            exact = x.double()
            floor, ceiling = (per_feature(end, exact) for end in self.ends)
            low, high = (
                (floor - exact.flatten(1)).clamp(max=0).to(x.dtype),
                (ceiling - exact.flatten(1)).clamp(min=0).to(x.dtype),
            )
            if outward:
                low, high = (
                    torch.nextafter(low, torch.full_like(low, -torch.inf)),
                    torch.nextafter(high, torch.full_like(high, torch.inf)),
                )
        if self.mask is not None:
            frozen = ~per_feature(self.mask, x)
            low, high = low.masked_fill(frozen, 0.0), high.masked_fill(frozen, 0.0)
        weight = None if self.weights is None else per_feature(self.weights, x)
        kind, norm = Region, norm_for(self.norm, x.shape[1:])
        if self.constraints is not None:
            kind, norm = ConstrainedRegion, unboxed(norm)  # features no longer move independently
        return kind(self, norm, x, self.radii(len(x)).to(x.device), low, high, weight)

    def take(self, index: Tensor) -> Ball:
        """Return the ball for the chosen points."""
        radius = torch.as_tensor(self.radius, dtype=torch.float64)
        return self if radius.dim() == 0 else self.at(radius[index.to(radius.device)])

    def below(
        self, distance: NDArray[np.float64], proved: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the radius at which the search for a certificate begins.

        Given the distances of the witnesses and the radii proved so far: a third of the distance,
        or just above what is proved already.
        """
        return np.maximum(distance / 3, np.minimum(1.08 * proved, 0.95 * distance))

    def least(self, radius: Tensor) -> Tensor:
        """Return the smallest radii (N,) that admit the same points as these.

        They differ from these only where the norm counts changes: counts are whole numbers.
        """
        return radius.floor() if norm_named(self.norm).is_count else radius

    def next(self, radius: Tensor) -> Tensor:
        """Return the smallest radii (N,) that admit more points than these.

        For a count, the next whole number; otherwise these radii themselves, as any larger one
        admits more.
        """
        return radius.floor() + 1 if norm_named(self.norm).is_count else radius

    def identity(self) -> dict[str, Any]:
        """Return what identifies the threat in a record, JSON-ready.

        The radius is not part of it: a bracket of the distance answers the question at every
        radius.
        """
        listed = [
            None if t is None else torch.as_tensor(t).tolist()
            for t in (*(self.ends or (None, None)), self.mask, self.weights)
        ]
        box = None if self.box is None else listed[:2]
        told: dict[str, Any] = {
            "norm": self.norm,
            "box": box,
            "mask": listed[2],
            "weights": listed[3],
        }
        if self.grid is not None:
            told["grid"] = self.grid
        if self.constraints is not None:
            told["constraints"] = [t.tolist() for t in self.constraints]
        return told


def _check_on_grid(x: Tensor, step: float) -> None:
    """Raise `BadInput` where finite points x (N, *D) lie off the grid."""
    off = torch.nonzero(x.flatten(1).isfinite().all(1) & ~is_on_grid(x, step)).flatten()
    if len(off):
        worst = float((x[off].double() / step - levels(x[off], step)).abs().max())
        raise BadInput(
            f"{len(off)} of {len(x)} points do not lie on the grid of {step:g} (first: point "
            f"{int(off[0])}; up to {worst:.3g} steps beside it). Give the data as they were "
            "stored, of 8-bit images x.float() / 255 in the model's precision, or take no grid."
        )


def _plain(value: Any, what: str, cure: str) -> float | Tensor:
    """Return a number as it is, and anything else as a tensor."""
    return value if type(value) in (int, float) else tensor(value, what, cure)


def _check_inside(x64: Tensor, floor: Tensor, ceiling: Tensor) -> None:
    """Raise `BadInput` where points lie outside the box, with a remedy."""
    outside = torch.nonzero(((x64 < floor) | (x64 > ceiling)).flatten(1).any(1)).flatten()
    if not len(outside):
        return
    cure = cure_for(x64, floor, ceiling)
    raise BadInput(
        f"{len(outside)} of {len(x64)} points lie outside the box {_box_text(floor, ceiling)} "
        f"(first: point {int(outside[0])}, values "
        f"{float(x64[outside[0]].min()):.9g}..{float(x64[outside[0]].max()):.9g}). {cure}"
    )


def _box_text(low: Tensor, high: Tensor) -> str:
    return f"[{float(low.min()):g}, {float(high.max()):g}]"
