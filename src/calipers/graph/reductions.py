"""Rewrites of extremes, norms, products and deviations along axes.

Each consists of operations that have bounds and computes, in real arithmetic, what the operation
does, as `rewrites` does for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calipers.graph.activations import TwoPieces
from calipers.graph.node_writer import NodeResult, Writer
from calipers.graph.parameters import require
from calipers.graph.products import MaxPool
from calipers.graph.rewrites import RELU, multiply, scaled, variance
from calipers.graph.smooth_table import SQRT, SQUARE, power

_ABSOLUTE = TwoPieces(-1.0, 1.0)
_MOST_FACTORS = 256  # of one product, each of which becomes an operation of its own


def axes_of(w: Writer, x: NodeResult, dims: Any) -> tuple[int, ...]:
    """Return the axes of a batch (M, *shape) that a call names, or all."""
    if isinstance(dims, int):
        dims = (dims,)
    given = dims if dims else range(len(x.shape) + 1 - w.lead)
    return tuple(sorted({w.axis(x, d) for d in given}))


def total(w: Writer, x: NodeResult, dims: Any, keepdim: bool = False) -> NodeResult:
    """Write the sum along axes."""
    axes = axes_of(w, x, dims)
    return w.move("sum", lambda t: t.sum(axes, keepdim=keepdim), x)


def largest(w: Writer, x: NodeResult, dims: Any = (), keepdim: bool = False) -> NodeResult:
    """Write the largest element along axes.

    Each result has one window of a max-pool.
    """
    axes = axes_of(w, x, dims)
    over = [a - 1 for a in axes]
    kept = [a for a in range(len(x.shape)) if a not in over]
    places = torch.arange(math.prod(x.shape)).reshape(x.shape).permute(*kept, *over)
    windows = places.reshape(-1, math.prod(x.shape[a] for a in over))
    if keepdim:
        shape = tuple(1 if a in over else n for a, n in enumerate(x.shape))
    else:
        shape = tuple(x.shape[a] for a in kept) or (1,)

    def run(t: Tensor) -> Tensor:
        return t.amax(axes).reshape(len(t), *shape)

    return w.write(MaxPool(run, windows, shape), x)


def smallest(w: Writer, x: NodeResult, dims: Any = (), keepdim: bool = False) -> NodeResult:
    """Write the smallest element along axes."""
    return scaled(w, largest(w, scaled(w, x, -1.0), dims, keepdim), -1.0)


def sum_of_squares(w: Writer, x: NodeResult, dims: Any = (), keepdim: bool = False) -> NodeResult:
    """Write the sum of the squares along axes.

    A ReLU keeps its bounds from falling below 0 by rounding.
    """
    return w.write(RELU, total(w, w.write(SQUARE, x), dims, keepdim))


def p_norm(
    w: Writer, x: NodeResult, order: Any = 2, dims: Any = None, keepdim: bool = False
) -> NodeResult | None:
    """Write the l-p norm along axes, for p above 0.

    For p of +-infinity it is the largest or smallest absolute value.
    """
    p = float(order)
    if p == 2:
        return w.write(SQRT, sum_of_squares(w, x, dims, keepdim))
    sizes = w.write(_ABSOLUTE, x)
    if math.isinf(p):
        return (largest if p > 0 else smallest)(w, sizes, dims, keepdim)
    require(p > 0, "a norm", "an order above 0", order=p)
    if p == 1:
        return total(w, sizes, dims, keepdim)
    inner, outer = power(p), power(1 / p)
    if inner is None or outer is None:
        return None
    return w.write(outer, w.write(RELU, total(w, w.write(inner, sizes), dims, keepdim)))


def product(w: Writer, x: NodeResult, dim: int, keepdim: bool = False) -> NodeResult | None:
    """Write the product along an axis, by multiplying halves repeatedly."""
    (axis,) = axes_of(w, x, dim)
    require(
        x.shape[axis - 1] <= _MOST_FACTORS,
        "a product of all elements of an axis",
        f"an axis of at most {_MOST_FACTORS}",
        elements=x.shape[axis - 1],
    )

    def part(v: NodeResult, first: int, count: int) -> NodeResult:
        return w.move("narrow", lambda t: t.narrow(axis, first, count), v)

    while x.shape[axis - 1] > 1:
        half, odd = divmod(x.shape[axis - 1], 2)
        made = multiply(w, part(x, 0, half), part(x, half, half))
        if made is None:
            return None
        x = (
            w.move("cat", lambda *t: torch.cat(t, axis), made, part(x, 2 * half, 1))
            if odd
            else made
        )
    shape = x.shape if keepdim else x.shape[: axis - 1] + x.shape[axis:]
    return w.reshape(x, shape or (1,))


def deviation(
    w: Writer, x: NodeResult, dims: Any, correction: Any = 1, keepdim: bool = False
) -> NodeResult:
    """Write the root of the variance."""
    return w.write(SQRT, w.write(RELU, variance(w, x, dims, correction, keepdim)))


REDUCTIONS: dict[str, Callable[..., NodeResult | None]] = {
    "aten.amax.default": largest,
    "aten.amin.default": smallest,
    "aten.max.dim": largest,
    "aten.min.dim": smallest,
    "aten.linalg_vector_norm.default": p_norm,
    "aten.norm.ScalarOpt_dim": p_norm,
    "aten.prod.dim_int": product,
    "aten.std.correction": deviation,
    "aten.std.dim": lambda w, x, dims, unbiased=True, keepdim=False: deviation(
        w, x, dims, int(unbiased), keepdim
    ),
}
"""Rewrites by exported name, as `rewrites.REWRITES`."""
