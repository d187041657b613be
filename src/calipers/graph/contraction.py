"""Between which planes does a product of two matrices lie, both of them variable? Every x_ik y_kj
between McCormick's planes, and their sums over k at once.

The planes of x_ik y_kj have the ends of y_kj for slopes in x_ik, and those of x_ik for slopes in
y_kj. So the coefficients of a sum over k go back by products with the matrices of ends, and nothing
of the size of all products is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from calipers.graph.ir import Facets

_SLACK = 16


@dataclass(frozen=True)
class MatMul:
    """x (M, *b, I, K) @ y (M, *b, K, J). Planes as for `Product`; all products of one sum share
    their alpha, the weight of each side's second plane.
    """

    kind: Literal["contraction"] = field(default="contraction", repr=False)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """The product."""
        return x @ y

    def corners(self, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Extremes of each product are at the corners; 0 times infinity bounds nothing."""
        every = torch.stack([a[..., None] * b[..., None, :, :] for a in x for b in y])
        least, most = every.amin(0), every.amax(0)
        finfo = torch.finfo(every.dtype)
        room = (x[0].shape[-1] + _SLACK) * finfo.eps * torch.maximum(least.abs(), most.abs()).sum(
            -2
        ) + finfo.tiny
        return least.sum(-2) - room, most.sum(-2) + room

    def bends(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Everywhere but on a point."""
        return upper > lower

    def facets(
        self, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], alpha: Tensor | None = None
    ) -> Facets:
        """Return the planes over a box; rounding is left to whoever adds up. By default the first
        plane of each side.
        """
        (low_x, high_x), (low_y, high_y) = x, y
        weight = low_x.new_zeros(len(low_x), 0) if alpha is None else alpha
        return Facets(
            *x, *y, low_x @ low_y, low_x @ high_y, high_x @ low_y, high_x @ high_y, weight
        )

    def back(self, a: Tensor, facets: Facets) -> tuple[Tensor, Tensor, Tensor]:
        """Return the coefficients of x and of y, and the offset (P, S), from coefficients a (P, S,
        *b, I, J) of the product; facets (P, ...).
        """
        f, up, down = facets, a.clamp(min=0), a.clamp(max=0)
        if not f.alpha.numel():
            return (
                _rows(up, f.low_y) + _rows(down, f.high_y),
                _columns(f.low_x, a),
                -_dot(up, f.low_low) - _dot(down, f.low_high),
            )
        alpha = f.alpha.view_as(f.low_low)[:, None]
        up_second, down_second = up * alpha, down * alpha
        up_first, down_first = up - up_second, down - down_second
        offset = (
            _dot(up_first, f.low_low)
            + _dot(up_second, f.high_high)
            + _dot(down_first, f.low_high)
            + _dot(down_second, f.high_low)
        )
        x = _rows(up_first + down_second, f.low_y) + _rows(up_second + down_first, f.high_y)
        return (
            x,
            _columns(f.low_x, up_first + down_first) + _columns(f.high_x, up_second + down_second),
            -offset,
        )

    def pull(self, a: Tensor, facets: Facets, x: Tensor, y: Tensor) -> Tensor:
        """Return d <a, plane at (x, y)> / d alpha for a (P, *b, I, J), one direction a row: a times
        the rise from the first plane to the second.
        """
        up, down = a.clamp(min=0), a.clamp(max=0)
        by_x = x @ (facets.high_y - facets.low_y)
        by_y = (facets.high_x - facets.low_x) @ y
        return up * (by_x + by_y - facets.high_high + facets.low_low) + down * (
            by_y - by_x - facets.high_low + facets.low_high
        )

    def plane(self, a: Tensor, facets: Facets, x: Tensor, y: Tensor) -> Tensor:
        """Return the value at (x, y) of the planes that coefficients a (P, *b, I, J) take."""
        first = (
            torch.where(
                a > 0, x @ facets.low_y - facets.low_low, x @ facets.high_y - facets.low_high
            )
            + facets.low_x @ y
        )
        if not facets.alpha.numel():
            return first
        second = (
            torch.where(
                a > 0, x @ facets.high_y - facets.high_high, x @ facets.low_y - facets.high_low
            )
            + facets.high_x @ y
        )
        return first + facets.alpha.view_as(a) * (second - first)


def _dot(a: Tensor, values: Tensor) -> Tensor:
    return (a.flatten(2) @ values.flatten(1)[..., None])[..., 0]


def _rows(a: Tensor, y: Tensor) -> Tensor:
    """Return a (P, S, *b, I, J) @ y^T, (P, S, *b, I, K); y (P, *b, K, J)."""
    moved = a.movedim(1, -3)  # the directions stand beside the rows of one product
    made = moved.flatten(-3, -2) @ y.transpose(-1, -2)
    return made.view(*moved.shape[:-1], -1).movedim(-3, 1)


def _columns(x: Tensor, a: Tensor) -> Tensor:
    """Return x^T @ a (P, S, *b, I, J), (P, S, *b, K, J); x (P, *b, I, K)."""
    moved = a.movedim(1, -2)
    made = x.transpose(-1, -2) @ moved.flatten(-2)
    return made.view(*made.shape[:-1], *moved.shape[-2:]).movedim(-2, 1)
