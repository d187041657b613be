"""A threat model in which each point has its own box."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.threats.ball import Ball
from calipers.threats.norms import norm_for
from calipers.threats.region import Region


@dataclass(frozen=True, eq=False)
class BoxesRegion(Region):
    """Each point's own box, `floor`, `ceiling (M, d)` float64."""

    floor: Tensor = field(default_factory=lambda: torch.zeros(0))
    ceiling: Tensor = field(default_factory=lambda: torch.zeros(0))

    def take(self, index: Tensor | slice) -> BoxesRegion:
        """Return the regions of the chosen points, repetitions allowed."""
        parts = ("center", "radius", "low", "high", "floor", "ceiling")
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in parts})

    def contains(self, points: Tensor) -> Tensor:
        """Return whether each point is in its box, (M,) bool.

        The comparison is exact, in float64.
        """
        flat = points.double().flatten(1)
        inside = ((flat >= self.floor) & (flat <= self.ceiling)).all(1)
        return inside & (self.distance(points) <= self.radius)

    def _into_box(self, points: Tensor) -> Tensor:
        """Return the points clamped into their boxes."""
        return self._clamped(points, self.floor, self.ceiling)


@dataclass(frozen=True, eq=False)
class Boxes(Ball):
    """A box for each of N points, `floors`, `ceilings (N, *D)` float64.

    The radius of each point is large enough to contain its box.
    """

    floors: Tensor = field(default_factory=lambda: torch.zeros(0))
    ceilings: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def around(cls, x: Tensor, floors: Tensor, ceilings: Tensor) -> Boxes:
        """Return boxes (N, *D) around points x inside them, as a threat."""
        exact = x.double()
        reach = torch.maximum(ceilings - exact, exact - floors).flatten(1).amax(1)
        radius = torch.nextafter(reach, torch.full_like(reach, torch.inf))
        return cls("linf", radius, None, floors=floors, ceilings=ceilings)

    def check(self, x: Tensor) -> None:
        """Raise `BadInput` where a point (N, *D) lies outside its box."""
        self.radii(len(x))
        exact = x.double()
        if x.shape != self.floors.shape or not bool(
            ((exact >= self.floors) & (exact <= self.ceilings)).all()
        ):
            raise BadInput(
                f"points of shape {tuple(x.shape)} do not lie in boxes of shape "
                f"{tuple(self.floors.shape)}, one for each"
            )

    def take(self, index: Tensor) -> Boxes:
        """Return the boxes of the chosen points."""
        at = index.to(self.floors.device)
        radius = torch.as_tensor(self.radius, dtype=torch.float64)
        return dataclasses.replace(
            self,
            radius=radius if radius.dim() == 0 else radius[index.to(radius.device)],
            floors=self.floors[at],
            ceilings=self.ceilings[at],
        )

    def region(self, x: Tensor, *, outward: bool = False) -> BoxesRegion:
        """Return the box around each point of x (N, *D).

        Offsets to its ends are rounded as those of a `Ball` to its box.
        """
        exact = x.double().flatten(1)
        floor, ceiling = (end.to(x.device).flatten(1) for end in (self.floors, self.ceilings))
        low = (floor - exact).clamp(max=0).to(x.dtype)
        high = (ceiling - exact).clamp(min=0).to(x.dtype)
        if outward:
            low = torch.nextafter(low, torch.full_like(low, -torch.inf))
            high = torch.nextafter(high, torch.full_like(high, torch.inf))
        norm, radius = norm_for(self.norm, x.shape[1:]), self.radii(len(x)).to(x.device)
        return BoxesRegion(self, norm, x, radius, low, high, None, floor, ceiling)
