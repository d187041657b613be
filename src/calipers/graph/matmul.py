"""Relaxation of a product of two matrices that both depend on the input.

Every x_ik y_kj lies between its McCormick planes, and the sums of these over k are computed at
once. The planes of x_ik y_kj have the ends of y_kj as slopes in x_ik, and those of x_ik as slopes
in y_kj. So backward propagation takes the coefficients of a sum over k through products with the
matrices of ends, and no tensor of the size of all products is ever allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.graph.kinds import Entry, Op, Shape
from calipers.graph.relaxations import Ends, Parametrised, Relaxation

_SLACK = 16


class _Facets(NamedTuple):
    low_x: Tensor
    high_x: Tensor
    low_y: Tensor
    high_y: Tensor
    low_low: Tensor
    low_high: Tensor
    high_low: Tensor
    high_high: Tensor
    alpha: Tensor


class Facets(_Facets, Relaxation):
    """The planes of a matrix product over a box.

    They are given by the ends of both factors, the products of these ends, and the weight (M, *out)
    of each side's second plane. With an empty weight (M, 0) the first plane of each side is used.
    """

    __slots__ = ()

    def size(self, *magnitudes: Tensor) -> Tensor:
        """Return the magnitude that the rounding of an output's plane scales with.

        That is the size of everything the plane adds up, times the number of roundings in its sums
        over k: a plane is made of 3 products for each k, and the products of the ends have k
        roundings each.
        """
        x, y = magnitudes
        return (3 * x.shape[-1] + _SLACK) * (x @ y)

    def backward(
        self, a: Tensor, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Take coefficients through products with the matrices of ends."""
        f, up, down = self, a.clamp(min=0), a.clamp(max=0)
        if not f.alpha.numel():
            x, y = _rows(up, f.low_y) + _rows(down, f.high_y), _columns(f.low_x, a)
            return (x, y), -_dot(up, f.low_low) - _dot(down, f.low_high)
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
        y = _columns(f.low_x, up_first + down_first) + _columns(f.high_x, up_second + down_second)
        return (x, y), -offset

    def pull(self, a: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return d <a, plane at (x, y)> / d alpha, one direction per row.

        For a (P, *b, I, J) that is a times the difference of the second and the first plane.
        """
        up, down = a.clamp(min=0), a.clamp(max=0)
        by_x = x @ (self.high_y - self.low_y)
        by_y = (self.high_x - self.low_x) @ y
        return up * (by_x + by_y - self.high_high + self.low_low) + down * (
            by_y - by_x - self.high_low + self.low_high
        )

    def at(self, a: Tensor, *inputs: Tensor) -> Tensor:
        """Return the value at (x, y) of the planes chosen by the signs of a.

        `a` is (P, *b, I, J).
        """
        x, y = inputs
        first = (
            torch.where(a > 0, x @ self.low_y - self.low_low, x @ self.high_y - self.low_high)
            + self.low_x @ y
        )
        if not self.alpha.numel():
            return first
        second = (
            torch.where(a > 0, x @ self.high_y - self.high_high, x @ self.low_y - self.high_low)
            + self.high_x @ y
        )
        return first + self.alpha.view_as(a) * (second - first)


class Contracted(Parametrised):
    """The product of two matrices as a function of alpha.

    alpha is the weight of each side's second planes, one for each element of the result.
    """

    def __init__(self, facets: Facets) -> None:
        self.facets = facets

    def _with(self, alpha: Tensor | None) -> Facets:
        assert alpha is not None
        return self.facets._replace(alpha=alpha)

    def start(self) -> Tensor | None:
        """Return 0 everywhere: the first planes."""
        return torch.zeros_like(self.facets.low_low).flatten(1)

    def backward(
        self, a: Tensor, alpha: Tensor | None, shapes: list[tuple[int, ...]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Take coefficients through products with the matrices of ends."""
        (x, y), offset = self._with(alpha).backward(a[:, None], shapes)
        return (x[:, 0], y[:, 0]), offset[:, 0]

    def at(self, a: Tensor, alpha: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """Return sums of planes."""
        return self._with(alpha).at(a, *inputs)

    def pull(self, a: Tensor, inputs: list[Tensor]) -> Tensor | None:
        """Return a times the difference of the second and the first planes."""
        return self.facets.pull(a, inputs[0], inputs[1]).flatten(1)


@dataclass(frozen=True)
class MatMul(Op):
    """x (M, *b, I, K) @ y (M, *b, K, J).

    Planes as for `Product`; all products of one sum share their alpha, the weight of each side's
    second plane.
    """

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x @ y."""
        return x @ y

    def interval(self, x: Ends, y: Ends) -> Ends:
        """Return sums of the extremes of each product, taken at the corners.

        0 times infinity gives NaN, which bounds nothing.
        """
        every = torch.stack([a[..., None] * b[..., None, :, :] for a in x for b in y])
        least, most = every.amin(0), every.amax(0)
        finfo = torch.finfo(every.dtype)
        room = (x[0].shape[-1] + _SLACK) * finfo.eps * torch.maximum(least.abs(), most.abs()).sum(
            -2
        ) + finfo.tiny
        return least.sum(-2) - room, most.sum(-2) + room

    def described(self, shapes: list[Shape], shape: Shape) -> Entry:
        """Return the entry of all products of two elements.

        In (*b, I, K) @ (*b, K, J) each has the places of both factors, and the place of the sum it
        belongs to.
        """
        x, y, out = (torch.arange(torch.Size(s).numel()).view(s) for s in (*shapes, shape))
        whole = (*shape[:-1], shapes[0][-1], shape[-1])
        left, right = x[..., :, :, None].expand(whole), y[..., None, :, :].expand(whole)
        places = {"left": left, "right": right, "into": out[..., :, None, :].expand(whole)}
        return Entry({"op": "product"}, {name: t.flatten() for name, t in places.items()})

    def parametrised(self, held: Relaxation, *ends: Ends) -> Parametrised:
        """Return the planes as a function of the weights of the second ones."""
        assert isinstance(held, Facets)
        return Contracted(held)

    def chosen(self, held: Relaxation, alpha: Tensor, *ends: Ends) -> Relaxation:
        """Return the same planes with these weights."""
        assert isinstance(held, Facets)
        return held._replace(alpha=alpha.to(held.low_x.dtype))

    def relaxation(self, x: Ends, y: Ends, alpha: Tensor | None = None) -> Facets:
        """Return the planes over a box, without an allowance for rounding.

        The caller that adds up allows for rounding. By default the first plane of each side.
        """
        (low_x, high_x), (low_y, high_y) = x, y
        weight = low_x.new_zeros(len(low_x), 0) if alpha is None else alpha
        return Facets(
            *x, *y, low_x @ low_y, low_x @ high_y, high_x @ low_y, high_x @ high_y, weight
        )


def _dot(a: Tensor, values: Tensor) -> Tensor:
    return (a.flatten(2) @ values.flatten(1)[..., None])[..., 0]


def _rows(a: Tensor, y: Tensor) -> Tensor:
    """Return a @ y^T for each direction.

    a (P, S, *b, I, J), y (P, *b, K, J); the result is (P, S, *b, I, K).
    """
    moved = a.movedim(1, -3)  # directions and rows are merged into the rows of one matrix product
    made = moved.flatten(-3, -2) @ y.transpose(-1, -2)
    return made.view(*moved.shape[:-1], -1).movedim(-3, 1)


def _columns(x: Tensor, a: Tensor) -> Tensor:
    """Return x^T @ a for each direction.

    x (P, *b, I, K), a (P, S, *b, I, J); the result is (P, S, *b, K, J).
    """
    moved = a.movedim(1, -2)
    made = x.transpose(-1, -2) @ moved.flatten(-2)
    return made.view(*made.shape[:-1], *moved.shape[-2:]).movedim(-2, 1)
