"""Rewrites of layers as operations that have bounds.

These are gates, norms, shrinkage, clamps, and choices by the sign of a number. Each rewrite
computes, in real arithmetic, what the layer does, as `rewrites` does for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calipers.errors import UnsupportedOp
from calipers.graph.activations import TwoPieces
from calipers.graph.affine import Scale, Sum
from calipers.graph.kinds import Elementwise
from calipers.graph.node_writer import NodeResult, Writer
from calipers.graph.parameters import require_numbers
from calipers.graph.products import MaxPool, Product
from calipers.graph.recurrent import RECURRENT
from calipers.graph.reductions import REDUCTIONS
from calipers.graph.rewrites import RELU, REWRITES, Value, maximum, minimum, multiply, scaled
from calipers.graph.rewrites import where as where_constant
from calipers.graph.smooth_table import RSQRT, SIGMOID, SQUARE

_JUMPS = (
    "its value jumps, and no line through the jump bounds it usefully. Replace it by a continuous "
    "function"
)
_CONTINUOUS = 1e-12  # relative: equal values may differ by this much through rounding


@dataclass(frozen=True)
class Condition:
    """A comparison of each element with a number, for use in `where` only.

    x > threshold (`above`) or x < threshold. Whether the threshold itself is included makes no
    difference: `where` accepts only choices that are continuous there.
    """

    x: NodeResult
    threshold: float
    above: bool

    def refused(self) -> UnsupportedOp:
        """Return the error for any use but a continuous choice."""
        return UnsupportedOp(
            f"a comparison of what depends on the point with {self.threshold:g}: {_JUMPS}, or "
            "choose with where between functions that meet there"
        )


def compared(above: bool) -> Callable[..., Condition | None]:
    """Return the reader of a comparison with one constant number."""

    def read(w: Writer, x: Value, threshold: Any) -> Condition | None:
        turned = not isinstance(x, NodeResult)
        x, threshold = (threshold, x) if turned else (x, threshold)
        if not isinstance(x, NodeResult) or isinstance(threshold, NodeResult):
            return None
        number = torch.as_tensor(threshold, dtype=torch.float64).reshape(-1)
        if len(number) != 1 or not bool(number.isfinite()):
            return None
        return Condition(x, float(number[0]), above != turned)

    return read


_Steps = list[Elementwise | Scale] | Tensor


def where(w: Writer, mask: Any, x: Value, y: Value) -> NodeResult | None:
    """Choose x or y, by a constant mask or by a comparison.

    By a comparison of z with c, the choice must be between elementwise functions of z that are
    equal at c; it is written as x(max(z, c)) + y(min(z, c)) - x(c).
    """
    if not isinstance(mask, Condition):
        return where_constant(w, mask, x, y)
    z, c = mask.x, mask.threshold
    over, under = (_function_of(w, z, v) for v in ((x, y) if mask.above else (y, x)))
    if over is None or under is None:
        raise UnsupportedOp(
            "a choice by a comparison of what depends on the point is read between functions of "
            "the compared number itself, element by element"
        )
    at = torch.full((1, *z.shape), c, dtype=w.dtype, device=w.device)
    meet, other = (_worked_out(function, at) for function in (over, under))
    if not bool(((meet - other).abs() <= _CONTINUOUS * (1 + meet.abs())).all()):
        raise UnsupportedOp(
            f"a choice by a number's place above or below {c:g}, between functions that do not "
            f"meet there: {_JUMPS}"
        )
    left, right = _slope(under), _slope(over)
    if left is not None and right is not None:
        return scaled(w, w.write(TwoPieces(left, right), scaled(w, z, 1.0, -c)), 1.0, meet[0])
    above = w.write(RELU, scaled(w, z, 1.0, -c))
    below = w.write(Sum((1.0, -1.0)), z, above)
    both = w.write(
        Sum((1.0, 1.0)), _written(w, over, scaled(w, above, 1.0, c)), _written(w, under, below)
    )
    return scaled(w, both, 1.0, -meet[0])


def _slope(steps: _Steps) -> float | None:
    """Return the slope of a linear function, or None.

    None where the function is not linear or the slope is not the same for all elements.
    """
    if isinstance(steps, Tensor):
        return 0.0
    slope = 1.0
    for op in steps:
        if not isinstance(op, Scale) or op.scale.numel() > 1 or op.shift.numel() > 1:
            return None
        slope *= float(op.scale)
    return slope


def _function_of(w: Writer, z: NodeResult, value: Value) -> _Steps | None:
    """Return the chain of functions from z to a value, or the constant it is."""
    if not isinstance(value, NodeResult):
        given = torch.as_tensor(value, dtype=w.dtype, device=w.device)
        return given if given.numel() == 1 else None
    steps: list[Elementwise | Scale] = []
    number = value.number
    while number != z.number:
        node = w.nodes[number - 1] if number else None
        if node is None or len(node.inputs) != 1 or node.shape != z.shape:
            return None
        if not isinstance(node.op, Elementwise | Scale):
            return None
        steps.append(node.op)
        number = node.inputs[0]
    return steps[::-1]


def _worked_out(steps: _Steps, at: Tensor) -> Tensor:
    if isinstance(steps, Tensor):
        return steps.reshape(()).expand_as(at)
    for op in steps:
        at = op.value(at)
    return at


def _written(w: Writer, steps: _Steps, x: NodeResult) -> NodeResult:
    if isinstance(steps, Tensor):
        return scaled(w, x, 0.0, float(steps))
    for op in steps:
        x = w.write(op, x)
    return x


def gated(w: Writer, x: NodeResult, dim: int = -1) -> NodeResult | None:
    """Write the first half along an axis times the sigmoid of the second."""
    axis = w.axis(x, dim)
    half = x.shape[axis - 1] // 2
    first, second = (
        w.move("narrow", lambda t, k=k: t.narrow(axis, k * half, half), x) for k in (0, 1)
    )
    return multiply(w, first, w.write(SIGMOID, second))


def rms_norm(
    w: Writer, x: NodeResult, shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> NodeResult:
    """Write x / sqrt(mean of x^2 + eps) over the last axes, times a weight."""
    if eps is None:
        raise UnsupportedOp(
            "RMS normalisation without an eps takes that of the number type, which is another one "
            "in float64: give it, RMSNorm(size, eps=1e-6)"
        )
    dims = tuple(range(-len(shape), 0))
    mean = w.move("mean", lambda t: t.mean(dims, keepdim=True), w.write(SQUARE, x))
    factor = w.write(RSQRT, scaled(w, w.write(RELU, mean), 1.0, float(eps)))
    made = w.write(Product(), x, w.expand(factor, x.shape))
    return made if weight is None else scaled(w, made, weight)


def soft_shrink(w: Writer, x: NodeResult, size: float = 0.5) -> NodeResult:
    """Write x moved towards 0 by a size: max(x - s, 0) - max(-x - s, 0)."""
    require_numbers("softshrink", size=float(size))
    above = w.write(RELU, scaled(w, x, 1.0, -float(size)))
    below = w.write(RELU, scaled(w, x, -1.0, -float(size)))
    return w.write(Sum((1.0, -1.0)), above, below)


def hard_shrink(w: Writer, x: NodeResult, size: float = 0.5) -> NodeResult:
    """Write x outside of [-size, size], 0 inside; only size 0 is continuous."""
    if float(size) == 0:
        return scaled(w, x, 1.0)
    raise UnsupportedOp(f"hardshrink with size {float(size):g}: {_JUMPS} (softshrink)")


def threshold(w: Writer, x: NodeResult, least: float, otherwise: float) -> NodeResult | None:
    """Write x where it is above `least`, and `otherwise` elsewhere.

    That is max(x, least) where both numbers are equal; otherwise the function jumps and is refused.
    """
    if float(least) == float(otherwise):
        return maximum(w, x, torch.tensor(float(least), dtype=torch.float64))
    raise UnsupportedOp(
        f"a threshold at {float(least):g} with the value {float(otherwise):g} below: {_JUMPS}"
    )


def clamp(w: Writer, x: Value, low: Any = None, high: Any = None) -> NodeResult | None:
    """Write min(max(x, low), high), with bounds for each element.

    The result is `high` where `low` is above it.
    """
    made: Value | None = x
    for end, function in ((low, maximum), (high, minimum)):
        if end is not None and made is not None:
            made = function(w, made, end if isinstance(end, NodeResult) else torch.as_tensor(end))
    return made if isinstance(made, NodeResult) else None


def adaptive_max_pool(rank: int) -> Callable[[Writer, NodeResult, Any], NodeResult | None]:
    """Return the rewrite of a max-pool with a given output size.

    Its windows may overlap and differ in size.
    """
    pool: Callable[..., Tensor] = (
        functional.adaptive_max_pool1d,
        functional.adaptive_max_pool2d,
        functional.adaptive_max_pool3d,
    )[rank - 1]

    def rewrite(w: Writer, x: NodeResult, size: Any) -> NodeResult | None:
        if len(x.shape) != rank + 1 or w.lead:
            return None
        sizes = tuple(size) if isinstance(size, list | tuple) else (size,) * rank
        count = math.prod(x.shape)
        flat = torch.zeros(1, 1, dtype=torch.long)
        for n, m in zip(x.shape, (x.shape[0], *sizes), strict=True):
            spans = [(i * n // m, -((i + 1) * n // -m)) for i in range(m)]
            longest = max(end - start for start, end in spans)
            # a shorter window repeats its last index: that leaves its maximum unchanged
            place = torch.tensor(
                [[min(start + k, end - 1) for k in range(longest)] for start, end in spans]
            )
            flat = (flat[:, None, :, None] * n + place[None, :, None, :]).reshape(len(flat) * m, -1)
        assert int(flat.max()) < count
        return w.write(
            MaxPool(lambda t: pool(t, sizes), _once(flat, count), (x.shape[0], *sizes)), x
        )

    return rewrite


def _once(windows: Tensor, nowhere: int) -> Tensor:
    """Return the windows with each index in them once.

    Repeated entries are replaced by `nowhere`, an index outside the image.
    """
    ordered = windows.sort(-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.where(again, nowhere, ordered).sort(-1).values


CHOICES = tuple(f"aten.where.{kind}" for kind in ("self", "ScalarSelf", "ScalarOther", "Scalar"))
"""The operations in which a comparison may be used."""

COMPOSITIONS: dict[str, Callable[..., Any]] = {
    **REWRITES,
    **REDUCTIONS,
    **RECURRENT,
    "aten.gt.Scalar": compared(True),
    "aten.gt.Tensor": compared(True),
    "aten.ge.Scalar": compared(True),
    "aten.ge.Tensor": compared(True),
    "aten.lt.Scalar": compared(False),
    "aten.lt.Tensor": compared(False),
    "aten.le.Scalar": compared(False),
    "aten.le.Tensor": compared(False),
    **dict.fromkeys(CHOICES, where),
    "aten.glu.default": gated,
    "aten.rms_norm.default": rms_norm,
    "aten.softshrink.default": soft_shrink,
    "aten.hardshrink.default": hard_shrink,
    "aten.threshold.default": threshold,
    "aten.clamp.Tensor": clamp,
    "aten.clamp_min.Tensor": lambda w, x, low: clamp(w, x, low),
    "aten.clamp_max.Tensor": lambda w, x, high: clamp(w, x, None, high),
    **{f"aten.adaptive_max_pool{rank}d.default": adaptive_max_pool(rank) for rank in (1, 2, 3)},
}
"""Every rewrite by exported name, as `rewrites.REWRITES`.

A comparison is made into a `Condition`, for `CHOICES` only, and a layer with several results gives
a list of them.
"""
