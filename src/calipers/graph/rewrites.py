"""Rewrites of operations on several inputs as operations with bounds.

These are sums, curves, and the product x * y. Each rewrite computes what the operation does in real
arithmetic; rounding differs, and capture compares the whole network. Forms are chosen for tight
bounds: softmax is written as exp(x - log sum exp x), which needs no product, and whose inner part
has a relaxation of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calipers.errors import CaptureError
from calipers.graph.activations import TwoPieces
from calipers.graph.affine import Scale, Sum
from calipers.graph.logsumexp import LogSumExp
from calipers.graph.matmul import MatMul
from calipers.graph.node_writer import NodeResult, Writer
from calipers.graph.parameters import require
from calipers.graph.products import Product
from calipers.graph.smooth_relaxation import Smooth
from calipers.graph.smooth_table import (
    ERF,
    EXP,
    GELU,
    MISH,
    RECIPROCAL,
    RECIPROCAL_OR_0,
    RSQRT,
    RSQRT_OR_0,
    SIGMOID,
    SILU,
    SQRT,
    SQUARE,
    TANH,
    softplus,
)

Value = NodeResult | Tensor
RELU, SOFTPLUS = TwoPieces(0.0, 1.0), softplus(1.0, 20.0)


def scaled(w: Writer, x: NodeResult, factor: Any, shift: Any = 0.0) -> NodeResult:
    """Write factor * x + shift with constants, which may enlarge x."""
    constants = [torch.as_tensor(c, dtype=w.dtype, device=w.device) for c in (factor, shift)]
    # constants of a single-point program have no batch axis of the graph: add one
    a, b = (c[None] if w.lead and c.dim() else c for c in constants)
    shape = torch.broadcast_shapes((1, *x.shape), a.shape, b.shape)[1:]
    return w.write(Scale(a, b), w.expand(x, tuple(shape)))


def add(w: Writer, x: Value, y: Value, alpha: float = 1.0) -> NodeResult | None:
    """Write x + alpha * y."""
    if isinstance(x, NodeResult) and isinstance(y, NodeResult):
        return w.write(Sum((1.0, float(alpha))), *w.broadcast(x, y))
    if isinstance(x, NodeResult):
        return scaled(w, x, 1.0, alpha * torch.as_tensor(y, dtype=w.dtype))
    return scaled(w, y, alpha, x) if isinstance(y, NodeResult) else None


def subtract(w: Writer, x: Value, y: Value, alpha: float = 1.0) -> NodeResult | None:
    """Write x - alpha * y."""
    return add(w, x, y, -alpha)


def multiply(w: Writer, x: Value, y: Value) -> NodeResult | None:
    """Write x * y, as one curve where one factor is computed from the other."""
    if isinstance(x, NodeResult) and isinstance(y, NodeResult):
        if x.number == y.number and x.shape == y.shape:
            return w.write(SQUARE, x)
        return _gated(w, x, y) or _gated(w, y, x) or w.write(Product(), *w.broadcast(x, y))
    return (
        scaled(w, x, y)
        if isinstance(x, NodeResult)
        else scaled(w, y, x)
        if isinstance(y, NodeResult)
        else None
    )


def _gated(w: Writer, x: NodeResult, gate: NodeResult) -> NodeResult | None:
    """Return the curve that x * gate is, for x = c z, or None.

    c z * sigmoid(k z) is c / k * silu(k z); c z * (1 + erf(k z)) is c sqrt(2) / k * gelu(sqrt(2) k
    z); c z * tanh(softplus(z)) is c * mish(z). None where the gate is not one of these.
    """
    (source, c, shift), (made, one, offset) = _line(w, x), _line(w, gate)
    if not made or x.shape != gate.shape or shift != 0 or one != 1:
        return None
    node = w.nodes[made - 1]
    inner = NodeResult(node.inputs[0], node.shape)
    below = w.nodes[inner.number - 1] if inner.number else None
    if (
        node.op is TANH
        and offset == 0
        and below is not None
        and getattr(below.op, "name", "") == SOFTPLUS.name
    ):
        return (
            _times(w, w.write(_gate(MISH, c), NodeResult(source, x.shape)), c)
            if below.inputs == (source,)
            else None
        )
    origin, k, inner_shift = _line(w, inner)
    if origin != source or inner_shift != 0 or k == 0:
        return None
    if node.op is SIGMOID and offset == 0:
        return _times(w, w.write(_gate(SILU, c / k), inner), c / k)
    wide = math.sqrt(2) * k
    if node.op is not ERF or offset != 1:
        return None
    return _times(
        w,
        w.write(_gate(GELU, 2 * c / wide), _times(w, NodeResult(source, x.shape), wide)),
        2 * c / wide,
    )


def _gate(curve: Smooth, factor: float) -> Smooth:
    return dataclasses.replace(curve, gate=abs(factor))


def _line(w: Writer, x: NodeResult) -> tuple[int, float, float]:
    """Return number, factor and shift of the result x is a scaling of.

    One factor and one shift for all elements. Where x is no such scaling, the number is that of x
    itself, with factor 1 and shift 0.
    """
    op = w.nodes[x.number - 1].op if x.number else None
    if not isinstance(op, Scale) or op.scale.numel() > 1 or op.shift.numel() > 1:
        return x.number, 1.0, 0.0
    return w.nodes[x.number - 1].inputs[0], float(op.scale), float(op.shift)


def _times(w: Writer, x: NodeResult, factor: float) -> NodeResult:
    return x if abs(factor - 1) < 1e-15 else scaled(w, x, factor)


def inverse(w: Writer, y: NodeResult, *, or_zero: bool = False) -> NodeResult:
    """Write 1 / y, with `or_zero` 0 where y is 0.

    The inverse of a square root is one curve.
    """
    node = w.nodes[y.number - 1] if y.number else None
    if node is None or node.op is not SQRT:
        return w.write(RECIPROCAL_OR_0 if or_zero else RECIPROCAL, y)
    return w.write(RSQRT_OR_0 if or_zero else RSQRT, NodeResult(node.inputs[0], y.shape))


def divide(w: Writer, x: Value, y: Value) -> NodeResult | None:
    """Write x * (1 / y)."""
    if isinstance(y, NodeResult):
        return multiply(w, x, inverse(w, y))
    return (
        scaled(w, x, 1 / torch.as_tensor(y, dtype=w.dtype)) if isinstance(x, NodeResult) else None
    )


def maximum(w: Writer, x: Value, y: Value) -> NodeResult | None:
    """Write y + max(x - y, 0)."""
    over = subtract(w, x, y)
    return None if over is None else add(w, w.write(RELU, over), y)


def minimum(w: Writer, x: Value, y: Value) -> NodeResult | None:
    """Write x - max(x - y, 0)."""
    over = subtract(w, x, y)
    return None if over is None else subtract(w, x, w.write(RELU, over))


def matmul(w: Writer, x: Value, y: Value) -> NodeResult | None:
    """Write the matrix product, the sum over k of x_ik * y_kj.

    Matrices that broadcast over a stack are copied.
    """
    if (
        not isinstance(x, NodeResult)
        or not isinstance(y, NodeResult)
        or min(len(x.shape), len(y.shape)) < 2
    ):
        return None
    stack = tuple(torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]))
    return w.write(MatMul(), *(w.expand(v, stack + v.shape[-2:]) for v in (x, y)))


def add_matmul(w: Writer, bias: Value, x: Value, y: Value) -> NodeResult | None:
    """Write bias + x y."""
    product = matmul(w, x, y)
    return None if product is None else add(w, product, bias)


def softmax(w: Writer, x: NodeResult, dim: int) -> NodeResult:
    """Write exp(x - log sum exp x) along an axis."""
    return w.write(EXP, log_softmax(w, x, dim))


def log_softmax(w: Writer, x: NodeResult, dim: int) -> NodeResult:
    """Write x - log sum exp x along an axis."""
    return w.write(Sum((1.0, -1.0)), x, w.expand(log_sum_exp(w, x, dim, True), x.shape))


def log_sum_exp(w: Writer, x: NodeResult, dims: Any, keepdim: bool = False) -> NodeResult:
    """Write log sum exp x along one axis."""
    axes = [w.axis(x, d) for d in (dims if isinstance(dims, tuple | list) else (dims,))]
    if len(axes) > 1:
        raise CaptureError(
            f"logsumexp over several axes at once ({w.where}) is not supported: flatten them into "
            "one"
        )
    (axis,) = axes
    return w.move("sum", lambda t: t.sum(axis, keepdim=keepdim), w.write(LogSumExp(axis), x))


def attention(
    w: Writer,
    q: Value,
    k: Value,
    v: Value,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
) -> NodeResult | None:
    """Write softmax(q k^T * scale + mask) v.

    The mask is a finite constant, or one that hides nothing.
    """
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and bool(mask.all()):
        mask = None
    if (
        not isinstance(k, NodeResult)
        or dropout
        or causal
        or isinstance(mask, NodeResult)
        or (mask is not None and not (mask.is_floating_point() and mask.isfinite().all()))
    ):
        return None
    scores = matmul(w, q, w.move("transpose", lambda t: t.transpose(-1, -2), k))
    if scores is None:
        return None
    scores = scaled(
        w, scores, k.shape[-1] ** -0.5 if scale is None else scale, 0.0 if mask is None else mask
    )
    return matmul(w, softmax(w, scores, -1), v)


def normalised(w: Writer, x: NodeResult, axes: int, eps: float) -> NodeResult:
    """Write (x - mean) / sqrt(variance + eps) over the last axes."""
    dims = tuple(range(-axes, 0))
    # |1 - 1/n| for the element itself and 1/n for the others is share * r + mean(r)
    share = 1 - 2 / math.prod(x.shape[-axes:])
    centred = w.move(
        "centre",
        lambda t: t - t.mean(dims, keepdim=True),
        x,
        absolute=lambda t: share * t + t.mean(dims, keepdim=True),
    )
    variance = w.move("mean", lambda t: t.mean(dims, keepdim=True), w.write(SQUARE, centred))
    return w.write(
        Product(), centred, w.expand(w.write(RSQRT, scaled(w, variance, 1.0, eps)), x.shape)
    )


def layer_norm(
    w: Writer,
    x: NodeResult,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> NodeResult:
    """Write layer norm over the last axes, with a factor and shift per place."""
    return scaled(
        w,
        normalised(w, x, len(shape), eps),
        1.0 if weight is None else weight,
        0.0 if bias is None else bias,
    )


def group_norm(
    w: Writer,
    x: NodeResult,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> NodeResult:
    """Write group norm over the channels of a group and all places."""
    kept = x.shape[w.lead :]
    made = w.reshape(
        normalised(w, w.reshape(x, (groups, math.prod(kept) // groups)), 1, eps), x.shape
    )
    each = [None if t is None else t.reshape(-1, *[1] * (len(kept) - 1)) for t in (weight, bias)]
    return scaled(w, made, 1.0 if each[0] is None else each[0], 0.0 if each[1] is None else each[1])


class _InstanceNorm(NamedTuple):
    """The arguments of torch's instance norm after the input, in order."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Any
    running_var: Any
    use_input_stats: bool
    momentum: float
    eps: float
    cudnn_enabled: bool = True


def instance_norm(w: Writer, x: NodeResult, *arguments: Any) -> NodeResult | None:
    """Write instance norm: a group norm with one group per channel.

    None where it uses running statistics instead of the point's own.
    """
    call = _InstanceNorm(*arguments)
    if not call.use_input_stats:
        return None
    return group_norm(w, x, x.shape[w.lead], call.weight, call.bias, call.eps)


def prelu(w: Writer, x: NodeResult, slope: Tensor) -> NodeResult:
    """Write a leaky ReLU with a slope for each channel."""
    kept = x.shape[w.lead :]
    return leaky(w, x, slope.reshape(-1, *[1] * (len(kept) - 1)) if len(kept) > 0 else slope)


def leaky(w: Writer, x: NodeResult, slope: Tensor) -> NodeResult:
    """Write slope * x + (1 - slope) * max(x, 0), with slopes that broadcast."""
    return w.write(Sum((1.0, 1.0)), scaled(w, x, slope), scaled(w, w.write(RELU, x), 1 - slope))


def hard_sigmoid(w: Writer, x: NodeResult) -> NodeResult:
    """Write max(min(x / 6 + 1/2, 1), 0) as relu(z) - relu(z - 1)."""
    z = scaled(w, x, 1 / 6, 0.5)
    return w.write(Sum((1.0, -1.0)), w.write(RELU, z), w.write(RELU, scaled(w, z, 1.0, -1.0)))


def where(w: Writer, mask: Any, x: Value, y: Value) -> NodeResult | None:
    """Write mask * x + (1 - mask) * y for a constant mask."""
    if isinstance(mask, NodeResult):
        return None
    chosen, other = mask.to(w.dtype), (~mask).to(w.dtype)
    if isinstance(x, NodeResult) and isinstance(y, NodeResult):
        return add(w, scaled(w, x, chosen), scaled(w, y, other))
    constant = torch.as_tensor(
        y if isinstance(x, NodeResult) else x, dtype=w.dtype, device=w.device
    )
    if isinstance(x, NodeResult):
        return scaled(w, x, chosen, torch.where(mask, torch.zeros_like(constant), constant))
    return (
        scaled(w, y, other, torch.where(mask, constant, torch.zeros_like(constant)))
        if isinstance(y, NodeResult)
        else None
    )


def masked_fill(w: Writer, x: Value, mask: Any, value: Any) -> NodeResult | None:
    """Write the value where the mask is True, x elsewhere."""
    return where(w, mask, torch.as_tensor(value, dtype=w.dtype), x)


def plain_power(w: Writer, x: NodeResult, exponent: Any) -> NodeResult | None:
    """Write x to the power of 1 or 0: x itself, or 1 everywhere."""
    if isinstance(exponent, NodeResult) or exponent not in (0, 1):
        return None
    return scaled(w, x, float(exponent), 1.0 - float(exponent))


def variance(
    w: Writer, x: NodeResult, dims: Any, correction: Any = 1, keepdim: bool = False
) -> NodeResult:
    """Write the variance: squared deviations summed, over n - correction."""
    axes = tuple(w.axis(x, d) for d in dims)
    count = math.prod(x.shape[a - 1] for a in axes)
    require(
        count > (1 if correction is None else correction),
        "a variance",
        "more elements than its correction",
        elements=count,
    )
    share = 1 - 2 / count
    centred = w.move(
        "centre",
        lambda t: t - t.mean(axes, keepdim=True),
        x,
        absolute=lambda t: share * t + t.mean(axes, keepdim=True),
    )
    total = w.move("sum", lambda t: t.sum(axes, keepdim=keepdim), w.write(SQUARE, centred))
    return scaled(w, total, 1 / (count - (1 if correction is None else correction)))


REWRITES: dict[str, Callable[..., NodeResult | None]] = {
    "aten.add.Tensor": add,
    "aten.sub.Tensor": subtract,
    "aten.mul.Tensor": multiply,
    "aten.div.Tensor": divide,
    "aten.maximum.default": maximum,
    "aten.max.other": maximum,
    "aten.minimum.default": minimum,
    "aten.min.other": minimum,
    "aten.matmul.default": matmul,
    "aten.bmm.default": matmul,
    "aten.mm.default": matmul,
    "aten.addmm.default": add_matmul,
    "aten.baddbmm.default": add_matmul,
    "aten.softmax.int": lambda w, x, dim, _=None: softmax(w, x, dim),
    "aten._softmax.default": lambda w, x, dim, _=None: softmax(w, x, dim),
    "aten.log_softmax.int": lambda w, x, dim, _=None: log_softmax(w, x, dim),
    "aten._log_softmax.default": lambda w, x, dim, _=None: log_softmax(w, x, dim),
    "aten.logsumexp.default": log_sum_exp,
    "aten.scaled_dot_product_attention.default": attention,
    "aten.layer_norm.default": layer_norm,
    "aten.group_norm.default": group_norm,
    "aten.instance_norm.default": instance_norm,
    "aten.prelu.default": prelu,
    "aten.hardsigmoid.default": hard_sigmoid,
    "aten.where.self": where,
    "aten.masked_fill.Scalar": masked_fill,
    "aten.masked_fill.Tensor": masked_fill,
    "aten.pow.Tensor_Scalar": plain_power,
    "aten.var.correction": variance,
    "aten.var.dim": lambda w, x, dims, unbiased=True, keepdim=False: variance(
        w, x, dims, int(unbiased), keepdim
    ),
}
"""Rewrites by exported name.

They take the writer, then the call's arguments, keyword-only ones by name, and return None where
the call is not in a form that is known here.
"""
