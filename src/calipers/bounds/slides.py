"""How do the lines and planes of one operation depend on what may be chosen, and how does a bound
change with that choice?

An operation of one number has two lines for each element that bends, a product two planes for each
side. What is fixed has no choice, and the same interface.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from calipers.bounds.coefficients import Dense
from calipers.graph.ir import Bilinear, Contraction, Elementwise, Facets, Lines, Planes
from calipers.graph.smooth import Slid


class Slide:
    """The lines of one operation's columns as a function of alpha."""

    def __init__(self, op: Elementwise, low: Tensor, high: Tensor) -> None:
        self.op, self.low, self.high = op, low, high
        slid = getattr(op, "slid", None)
        self.slid: Slid | None = None if slid is None else slid(low, high)
        self.ends: tuple[Lines, list[Tensor | None]] | None = None
        if getattr(op, "straight", False):
            first, last = (op.relax(low, high, torch.full_like(low, a)) for a in (0.0, 1.0))
            rise = [b - a for a, b in zip(first, last, strict=True)]
            self.ends = first, [r if bool(r.any()) else None for r in rise]

    def start(self) -> Tensor:
        """Return the activation's own guess."""
        guess: Callable[[Tensor, Tensor], Tensor] | None = getattr(self.op, "guess", None)
        if self.slid is not None:
            return self.slid.start
        return torch.full_like(self.low, 0.5) if guess is None else guess(self.low, self.high)

    def lines(self, alpha: Tensor) -> Lines:
        """Return the lines at alpha."""
        if self.slid is not None:
            return self.slid.lines(alpha)
        if self.ends is None:
            return self.op.relax(self.low, self.high, alpha)
        return Lines(
            *(
                a if r is None else torch.addcmul(a, r, alpha)
                for a, r in zip(*self.ends, strict=True)
            )
        )

    def pull(self, alpha: Tensor, a: Tensor, z: Tensor) -> Tensor:
        """Return d bound / d alpha from the coefficients behind the operation and the values before
        it.
        """
        below, above = a.clamp(min=0), a.clamp(max=0)
        pulls = (below * z, below, above * z, above)
        if self.ends is None:
            with torch.enable_grad():
                free = alpha.detach().requires_grad_()
                lines = self.lines(free)
                moving = [
                    (line, p) for line, p in zip(lines, pulls, strict=True) if line.requires_grad
                ]
                if not moving:
                    return torch.zeros_like(alpha)
                (gradient,) = torch.autograd.grad(
                    [line for line, _ in moving], free, [p for _, p in moving]
                )
            return gradient.nan_to_num(0.0)
        moved = [r * p for r, p in zip(self.ends[1], pulls, strict=True) if r is not None]
        return sum(moved[1:], moved[0]) if moved else torch.zeros_like(alpha)


class Sheet(Protocol):
    """An operation on several numbers at once, between planes; `a (P, *out)` are the coefficients
    of what it makes, one direction a row.
    """

    def start(self) -> Tensor | None:
        """Return where the choice begins, (P, n); None where there is none."""

    def through(self, a: Tensor, alpha: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the coefficients of its inputs, (P, ...) each, and the offset (P,)."""

    def value(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """Return the planes that the coefficients take, at the inputs."""

    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """Return d bound / d alpha, (P, n)."""


class Fixed:
    """The largest of some elements, or a sum of lines: nothing to choose."""

    def __init__(
        self, planes: Planes | Lines, rows: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        self.shape = shape
        self.planes = type(planes)(
            *(t[rows].to(dtype) if t.is_floating_point() else t[rows] for t in planes)
        )

    def start(self) -> Tensor | None:
        """Nothing."""
        return None

    def through(self, a: Tensor, alpha: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """As in a sweep of one direction a row."""
        rows = Dense(a[:, None], None)
        back, offset = (
            rows.relaxed(self.planes)
            if isinstance(self.planes, Lines)
            else rows.selected(self.planes, self.shape)
        )
        return (back.dense().a[:, 0],), offset[:, 0]

    def value(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """The line, the element or the ceiling."""
        if isinstance(self.planes, Lines):
            low, low_at, high, high_at = self.planes
            return torch.where(a > 0, low * inputs[0] + low_at, high * inputs[0] + high_at)
        picked = inputs[0].flatten(1).gather(1, self.planes.pick.flatten(1)).view_as(a)
        return torch.where(self.planes.exact | (a > 0), picked, self.planes.ceiling)

    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """Nothing."""
        return None


class Tilt:
    """The product of two numbers: alpha weighs each side's second plane, element by element."""

    def __init__(self, op: Bilinear, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> None:
        first, last = (op.saddle(x, y, torch.full_like(x[0], a)) for a in (0.0, 1.0))
        self.first, self.rise = first, [b - a for a, b in zip(first, last, strict=True)]

    def start(self) -> Tensor | None:
        """The mean of both planes."""
        return torch.full_like(self.rise[0], 0.5).flatten(1)

    def _plane(self, a: Tensor, alpha: Tensor | None) -> list[Tensor]:
        """Return the slopes and intercept of the planes that the coefficients take: the lower where
        they are positive.
        """
        assert alpha is not None
        mine = [
            torch.addcmul(t, r, alpha.view_as(t))
            for t, r in zip(self.first, self.rise, strict=True)
        ]
        return [torch.where(a > 0, low, high) for low, high in zip(mine[:3], mine[3:], strict=True)]

    def through(self, a: Tensor, alpha: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Element by element."""
        x, y, at = self._plane(a, alpha)
        return (a * x, a * y), (a * at).flatten(1).sum(1)

    def value(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """Element by element."""
        x, y, at = self._plane(a, alpha)
        return x * inputs[0] + y * inputs[1] + at

    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """The rise from the first plane to the second, weighed."""
        x, y, at = (
            torch.where(a > 0, low, high)
            for low, high in zip(self.rise[:3], self.rise[3:], strict=True)
        )
        return (a * (x * inputs[0] + y * inputs[1] + at)).flatten(1)


class Contracted:
    """The product of two matrices: alpha weighs each side's second planes, one for each element of
    the result.
    """

    def __init__(self, op: Contraction, facets: Facets, rows: Tensor, dtype: torch.dtype) -> None:
        self.op, self.facets = op, Facets(*(t[rows].to(dtype) for t in facets))

    def _with(self, alpha: Tensor | None) -> Facets:
        assert alpha is not None
        return self.facets._replace(alpha=alpha)

    def start(self) -> Tensor | None:
        """The first planes."""
        return torch.zeros_like(self.facets.low_low).flatten(1)

    def through(self, a: Tensor, alpha: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Products with the matrices of ends."""
        x, y, offset = self.op.back(a[:, None], self._with(alpha))
        return (x[:, 0], y[:, 0]), offset[:, 0]

    def value(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """Sums of planes."""
        return self.op.plane(a, self._with(alpha), inputs[0], inputs[1])

    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """The rise from the first planes to the second, weighed."""
        return self.op.pull(a, self.facets, inputs[0], inputs[1]).flatten(1)
