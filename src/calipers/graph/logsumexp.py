"""Planes below and above the logarithm of a sum of exponentials.

log sum exp is convex: its tangent plane at any point lies below it, and the slopes of that plane
are the softmax there. From above every exponential is at most its chord, and the logarithm of their
sum at most a tangent (Wei et al. 2023, arXiv:2303.01713). Below, bounding the operations one by one
would give a chord of the logarithm over tangents of the exponentials, which is far lower.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.graph.kinds import Entry, Op, Shape
from calipers.graph.relaxations import Ends, Lines

_ULPS = 16  # units in the last place of the largest term, besides one for each term


@dataclass(frozen=True)
class LogSumExp(Op):
    """log sum_j exp(x_j) along an axis, divided into equal shares.

    Each of the n elements of a row is 1/n of the row's value. A row's plane is therefore one line
    for each element, and these lines hold *together* only: the operation that follows directly may
    read nothing but the sum of a row.
    """

    axis: int

    def value(self, x: Tensor) -> Tensor:
        """Return each element's share."""
        return (x.logsumexp(self.axis, keepdim=True) / x.shape[self.axis]).expand_as(x)

    def interval(self, x: Ends) -> Ends:
        """Return the values at the ends, as the function increases in each input."""
        lower, upper = x
        least, most = self.value(lower), self.value(upper)
        return least - self._room(lower, lower, least), most + self._room(upper, upper, most)

    def unstable(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return True in the rows that are not a single point."""
        return (upper > lower).any(self.axis, keepdim=True).expand_as(lower)

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry of each row's members.

        Every element of a row is an equal share of the row's value.
        """
        count = shape[self.axis - 1]
        rows = torch.arange(torch.Size(shape).numel()).view(1, *shape).movedim(self.axis, -1)
        windows = rows[..., None, :].expand(*rows.shape, count).movedim(-2, self.axis)
        facts = {"op": "logsumexp", "share": 1 / count}
        return Entry(facts, {"windows": windows.reshape(-1, count)})

    def relaxation(self, x: Ends, alpha: Tensor | None = None) -> Lines:
        """Return lines whose sums along the axis bound the function over the box.

        They have no free parameter.
        """
        lower, upper = x
        count, middle = lower.shape[self.axis], (lower + upper) / 2
        weight = middle.softmax(self.axis)
        below = (self.value(middle) * count - self._sum(weight * middle)) / count
        top = upper.amax(self.axis, keepdim=True)
        low, high = (lower - top).exp(), (upper - top).exp()
        wide = upper - lower
        chord = torch.where(
            wide > 0, (high - low) / torch.where(wide > 0, wide, torch.ones_like(wide)), high
        )
        total = self._sum((low + high) / 2)
        slope = chord / total
        above = (top + total.log() - 1 + self._sum(low / total - slope * lower)) / count
        room = self._room(lower, upper, below) + self._room(lower, upper, slope * lower)
        below, above = (
            torch.nan_to_num(below - room, nan=-torch.inf),
            torch.nan_to_num((above + room).expand_as(slope), nan=torch.inf),
        )
        ends = (lower.isfinite() & upper.isfinite()).all(self.axis, keepdim=True).expand_as(lower)
        none = torch.zeros_like(weight)
        return Lines(
            torch.where(ends, weight, none),
            torch.where(ends, below, none - torch.inf),
            torch.where(ends, slope, none),
            torch.where(ends, above, none + torch.inf),
        )

    def _sum(self, t: Tensor) -> Tensor:
        return t.sum(self.axis, keepdim=True)

    def _room(self, lower: Tensor, upper: Tensor, share: Tensor) -> Tensor:
        """Return the rounding allowance of a share.

        It is some units in the last place of everything that was added up.
        """
        size = (
            torch.maximum(lower.abs(), upper.abs()).amax(self.axis, keepdim=True)
            + 1
            + self._sum(share.abs())
        )
        return (
            (lower.shape[self.axis] + _ULPS) * 2 * torch.finfo(lower.dtype).eps * size
        ).expand_as(share)
