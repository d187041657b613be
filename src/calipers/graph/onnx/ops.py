"""Readers of ONNX's operations: layers and functions.

Each writes an operation of the file as operations of the graph. Operations that only move elements
are in onnx_moves.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calipers.graph.compositions import where
from calipers.graph.file_builder import Compared, FileResult, Tape, Value, fitted
from calipers.graph.onnx.layers import LAYERS, constant
from calipers.graph.onnx.shape_ops import MOVES, reshaped, transposed
from calipers.graph.onnx.steps import Step, ints
from calipers.graph.onnx.windows import WINDOWS
from calipers.graph.rewrites import inverse, leaky

Reader = Callable[..., Value | tuple[Value, ...]]
_MOST_EXPONENTS = 64  # different exponents in one power, each written as its own operations
_FLOAT_TYPES = (1, 11)  # TensorProto.FLOAT, DOUBLE
_HALF_TYPES = {10: torch.float16, 16: torch.bfloat16}
_WHOLE_TYPES = {
    7: (-(2**63), 2**63 - 1),
    6: (-(2**31), 2**31 - 1),
    5: (-(2**15), 2**15 - 1),
    3: (-128, 127),
    2: (0, 255),
}


def _linear(tape: Tape, v: FileResult, weight: Tensor, bias: Tensor | None) -> FileResult:
    """Write x W^T + b over the file's last axis."""
    k = next((i for i, n in enumerate(v.shape[:-1]) if n != 1), len(v.shape) - 1)
    made = tape.call("aten.linear.default", tape.view(v, v.shape[k:]), weight, bias)
    return FileResult(made.number, made.held, (*v.shape[:-1], weight.shape[0]))


def _gemm(tape: Tape, step: Step, a: Value, b: Value, c: Value | None = None) -> Value:
    alpha, beta = step.get("alpha", 1.0), step.get("beta", 1.0)
    if step.get("transA", 0):
        a = transposed(tape, step, a, [1, 0])
    if isinstance(a, Tensor) or isinstance(b, FileResult):
        product = _matmul(
            tape, step, a, transposed(tape, step, b, [1, 0]) if step.get("transB", 0) else b
        )
        product = (
            product
            if alpha == 1
            else tape.pair(
                "aten.mul.Tensor",
                product,
                torch.tensor(alpha, dtype=tape.dtype, device=tape.device),
            )
        )
        bias = c
    else:
        weight = alpha * (b if step.get("transB", 0) else b.T)
        merged = (
            isinstance(c, Tensor)
            and c.numel() == weight.shape[0]
            and c.shape[-1:] == weight.shape[:1]
        )
        product = _linear(
            tape, a, weight, beta * c.reshape(-1) if merged and isinstance(c, Tensor) else None
        )
        bias = None if merged else c
    if bias is None:
        return product
    return tape.pair(
        "aten.add.Tensor",
        product,
        beta * bias if isinstance(bias, Tensor) else _times(tape, bias, beta),
    )


def _times(tape: Tape, v: Value, factor: float) -> Value:
    return (
        v
        if factor == 1
        else tape.pair(
            "aten.mul.Tensor", v, torch.tensor(factor, dtype=tape.dtype, device=tape.device)
        )
    )


def _matmul(tape: Tape, step: Step, a: Value, b: Value) -> Value:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a @ b
    if isinstance(a, FileResult) and isinstance(b, Tensor) and (matrix := _matrix(b)) is not None:
        if b.dim() > 1:
            return _linear(tape, a, matrix.T, None)
        return reshaped(_linear(tape, a, matrix[None], None), a.shape[:-1])
    if (
        isinstance(a, Tensor)
        and isinstance(b, FileResult)
        and (matrix := _matrix(a if a.dim() > 1 else a[None])) is not None
    ):
        if len(b.shape) == 1:
            made: Value = _linear(tape, b, matrix, None)
            return made if a.dim() > 1 else reshaped(made, ())
        order = [*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2]
        turned = transposed(tape, step, b, order)
        assert isinstance(turned, FileResult)
        return transposed(tape, step, _linear(tape, turned, matrix, None), order)
    return _product(tape, a, b)


def _matrix(weight: Tensor) -> Tensor | None:
    """Return a constant as one matrix; None where it is a stack of them."""
    while weight.dim() > 2 and weight.shape[0] == 1:
        weight = weight[0]
    return weight if weight.dim() <= 2 else None


def _product(tape: Tape, a: Value, b: Value) -> Value:
    """Write the product of stacks of matrices, at least one of them variable.

    A vector is a matrix of one row or column.
    """
    shape = (
        *torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]),
        *a.shape[-2:-1],
        *(b.shape[-1:] if len(b.shape) > 1 else ()),
    )
    a = reshaped(a, (1, *a.shape)) if len(a.shape) == 1 else a
    b = reshaped(b, (*b.shape, 1)) if len(b.shape) == 1 else b
    rank = max(len(a.shape), len(b.shape))
    lead = 1 if rank > 2 and all(len(v.shape) < rank or v.shape[0] == 1 for v in (a, b)) else 0
    both = []
    for v in (a, b):
        held = v.shape[1:] if lead and len(v.shape) == rank else v.shape
        both.append(tape.view(v, held) if isinstance(v, FileResult) else v.reshape(held))
    product = tape.call("aten.matmul.default", *both)
    return FileResult(product.number, product.held, shape)


def _batch_norm(tape: Tape, step: Step, v: Value, *given: Value) -> Value:
    scale, bias, mean, var = (constant(g, step, "a statistic") for g in given)
    step.ignore("momentum")  # of running statistics, in training
    if step.get("training_mode", 0) or step.outputs > 1:
        raise step.refuse("batch normalisation in training mode mixes the points of a batch")
    if not isinstance(v, FileResult) or v.shape[0] != 1:
        raise step.refuse(f"expects one point of shape (1, channels, ...), got {tuple(v.shape)}")
    x = tape.view(v, v.shape[1:])
    made = tape.call(
        "aten.batch_norm.default",
        x,
        scale,
        bias,
        mean,
        var,
        False,
        0.0,
        step.get("epsilon", 1e-5),
        False,
    )
    return FileResult(made.number, made.held, v.shape)


def _function(name: str, *attributes: tuple[str, float]) -> Reader:
    """Return the reader of an elementwise function.

    `attributes` are the arguments after the first, with ONNX's defaults.
    """
    return lambda tape, step, v: tape.elementwise(
        name, v, *(step.get(a, default) for a, default in attributes)
    )


def _clip(
    tape: Tape, step: Step, v: Value, low: Value | None = None, high: Value | None = None
) -> Value:
    ends = [
        step.get(name) if end is None else float(constant(end, step, "a bound"))
        for name, end in (("min", low), ("max", high))
    ]
    if ends == [None, None]:
        return v
    return tape.elementwise("aten.clamp.default", v, *ends)


def _prelu(tape: Tape, step: Step, v: Value, slope: Value) -> Value:
    a = constant(slope, step, "the slope")
    if isinstance(v, Tensor):
        return torch.where(v > 0, v, a * v)
    return (
        tape.elementwise("aten.leaky_relu.default", v, float(a))
        if a.numel() == 1
        else tape.alike(leaky, v, fitted(a, v))
    )


def _hard_sigmoid(tape: Tape, step: Step, v: Value) -> Value:
    offset = torch.tensor(step.get("beta", 0.5), dtype=tape.dtype, device=tape.device)
    return tape.elementwise(
        "aten.clamp.default",
        tape.pair("aten.add.Tensor", _times(tape, v, step.get("alpha", 0.2)), offset),
        0.0,
        1.0,
    )


def _arithmetic(name: str) -> Reader:
    return lambda tape, step, a, b: tape.pair(name, a, b)


def _divide(tape: Tape, step: Step, a: Value, b: Value) -> Value:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not a.is_floating_point():
        return torch.div(a, b, rounding_mode="trunc")
    if isinstance(b, FileResult):
        return tape.pair("aten.mul.Tensor", a, _inverse(tape, step, b))
    return tape.pair("aten.div.Tensor", a, b)


def _inverse(tape: Tape, step: Step, v: Value) -> Value:
    return v.reciprocal() if isinstance(v, Tensor) else tape.alike(inverse, v)


def _power(tape: Tape, step: Step, v: Value, exponent: Value) -> Value:
    p = constant(exponent, step, "the exponent")
    if isinstance(v, Tensor):
        return torch.pow(v, p)
    each = p.unique().tolist()
    if len(each) == 1:
        shape = tuple(torch.broadcast_shapes(v.shape, p.shape))
        return tape.elementwise("aten.pow.Tensor_Scalar", tape.expand(v, shape), float(each[0]))
    return _powers(tape, step, v, p.double(), [float(e) for e in each])


def _powers(tape: Tape, step: Step, v: FileResult, p: Tensor, each: list[float]) -> Value:
    """Write powers with several exponents, each exponent's elements apart.

    The elements are then put back in order.
    """
    if len(each) > _MOST_EXPONENTS:
        raise step.refuse(f"{len(each)} different exponents: up to {_MOST_EXPONENTS} are read")
    shape = tuple(torch.broadcast_shapes(v.shape, p.shape))
    flat, p = tape.view(tape.expand(v, shape), (math.prod(shape),)), p.expand(shape).reshape(-1)
    places = [torch.nonzero(p == e).flatten() for e in each]
    parts = []
    for exponent, at in zip(each, places, strict=True):
        part = tape.moved("pick", (flat,), lambda x, at=at: x[:, at.to(x.device)])
        made = tape.elementwise("aten.pow.Tensor_Scalar", part, exponent)
        assert isinstance(made, FileResult)
        parts.append(made)
    back = torch.cat(places).argsort()
    joined = tape.moved("cat", tuple(parts), lambda *t: torch.cat(t, 1)[:, back.to(t[0].device)])
    return FileResult(joined.number, joined.held, shape)


def _sum(tape: Tape, step: Step, first: Value, *others: Value) -> Value:
    for v in others:
        first = tape.pair("aten.add.Tensor", first, v)
    return _times(tape, first, 1 / (1 + len(others))) if step.kind == "Mean" else first


def _extreme(tape: Tape, step: Step, first: Value, *others: Value) -> Value:
    for v in others:
        first = tape.pair(
            "aten.maximum.default" if step.kind == "Max" else "aten.minimum.default", first, v
        )
    return first


def _where(tape: Tape, step: Step, mask: Value | Compared, x: Value, y: Value) -> Value:
    """Write mask * x + (1 - mask) * y for a constant mask.

    For a comparison see `compositions.where`.
    """
    if isinstance(mask, Compared):
        made = tape.several(where, mask.condition, x, y)
        assert made is not None
        return FileResult(made.number, made.held, mask.shape)
    chosen = constant(mask, step, "a choice").bool()
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.where(chosen, x, y)
    parts = []
    for v, keep in ((x, chosen), (y, ~chosen)):
        parts.append(
            torch.where(keep, v, torch.zeros_like(v))
            if isinstance(v, Tensor)
            else tape.pair("aten.mul.Tensor", v, keep.to(tape.dtype))
        )
    return tape.pair("aten.add.Tensor", *parts)


def _identity(tape: Tape, step: Step, v: Value) -> Value:
    return v


def _dropout(
    tape: Tape, step: Step, v: Value, ratio: Value | None = None, training: Value | None = None
) -> Value:
    """Return the value unchanged: nothing is dropped in evaluation.

    The ratio and the seed do not matter. A file that sets training mode is refused.
    """
    step.ignore("ratio", "seed")
    if training is not None and bool(constant(training, step, "the mode").any()):
        raise step.refuse(
            "drops at random (training_mode is true): a network whose answers depend on chance. "
            "Export it in evaluation mode"
        )
    return v


def _mod(tape: Tape, step: Step, a: Value, b: Value) -> Value:
    """Return the remainder of constants.

    It has the sign of the divisor, or with fmod that of the dividend.
    """
    a, b = (constant(v, step, "a term of a remainder") for v in (a, b))
    return torch.fmod(a, b) if step.get("fmod", 0) else torch.remainder(a, b)


def _cast(tape: Tape, step: Step, v: Value) -> Value:
    to = step.get("to")
    step.ignore("saturate", "round_mode")  # of types that are not read
    if isinstance(v, FileResult):
        if to not in _FLOAT_TYPES:
            raise step.refuse(
                f"casts what depends on the point to type {to}, whose rounding no bound covers: "
                "only float and double are read. Export the network in float32"
            )
        return v
    if to in _FLOAT_TYPES or to in _HALF_TYPES:
        return v.to(_HALF_TYPES.get(to, tape.dtype)).to(tape.dtype)
    if to == 9:
        return v.bool()
    whole = v.trunc().long() if v.is_floating_point() else v.long()
    low, high = _WHOLE_TYPES.get(to, (0, -1))
    if whole.numel() and (int(whole.min()) < low or int(whole.max()) > high):
        raise step.refuse(
            f"casts {int(whole.min())}..{int(whole.max())} to type {to}, which does not hold it"
        )
    return whole


def _constant_node(tape: Tape, step: Step) -> Value:
    given = {
        name: step.get(name)
        for name in ("value", "value_float", "value_floats", "value_int", "value_ints")
        if name in step.attributes
    }
    if len(step.attributes) != 1 or not given:
        raise step.refuse(
            f"a constant given by {', '.join(step.attributes) or 'nothing'} is not read"
        )
    value = next(iter(given.values()))
    t = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return t.to(tape.device, tape.dtype if t.is_floating_point() else t.dtype)


def _constant_of_shape(tape: Tape, step: Step, shape: Value) -> Value:
    value = step.get("value")
    fill = torch.zeros(1, dtype=tape.dtype) if value is None else value
    return (
        fill.reshape(())
        .to(tape.device, tape.dtype if fill.is_floating_point() else fill.dtype)
        .expand(ints(shape, step))
    )


def _shape(tape: Tape, step: Step, v: Value) -> Value:
    return torch.tensor(
        v.shape[step.get("start", 0) : step.get("end")], dtype=torch.long, device=tape.device
    )


def _size(tape: Tape, step: Step, v: Value) -> Value:
    return torch.tensor(math.prod(v.shape), dtype=torch.long, device=tape.device)


def _folded(function: Callable[..., Tensor]) -> Reader:
    """Return the reader of an operation that is only known for constants."""

    def build(tape: Tape, step: Step, *values: Value) -> Value:
        if any(isinstance(v, FileResult) for v in values):
            raise step.refuse(
                f"no bounds for {step.kind} of values that depend on the point. Export the network "
                "without it; attacks that only ask work."
            )
        return function(*values)

    return build


OPS: dict[str, Reader] = {
    **MOVES, **LAYERS, **WINDOWS,
    "Gemm": _gemm, "MatMul": _matmul, "BatchNormalization": _batch_norm,
    "Add": _arithmetic("aten.add.Tensor"), "Sub": _arithmetic("aten.sub.Tensor"),
    "Mul": _arithmetic("aten.mul.Tensor"), "Div": _divide,
    "Pow": _power, "Sum": _sum, "Mean": _sum, "Max": _extreme, "Min": _extreme,
    "Neg": _function("aten.neg.default"),
    "Relu": _function("aten.relu.default"),
    "LeakyRelu": _function("aten.leaky_relu.default", ("alpha", 0.01)), "PRelu": _prelu,
    "Elu": _function("aten.elu.default", ("alpha", 1.0)),
    "Sigmoid": _function("aten.sigmoid.default"),
    "Tanh": _function("aten.tanh.default"),
    "Softplus": _function("aten.softplus.default"), "Exp": _function("aten.exp.default"),
    "Log": _function("aten.log.default"),
    "Sqrt": _function("aten.sqrt.default"), "Abs": _function("aten.abs.default"),
    "Reciprocal": _inverse,
    "Size": _size,
    "Erf": _function("aten.erf.default"), "Sin": _function("aten.sin.default"),
    "Cos": _function("aten.cos.default"), "Clip": _clip,
    "Atan": _function("aten.atan.default"), "Mish": _function("aten.mish.default"),
    "Celu": _function("aten.celu.default", ("alpha", 1.0)),
    "Selu": lambda tape, step,
    v: tape.elementwise("aten.elu.default", v, step.get("alpha", 1.67326319217681884765625),
                                                   step.get("gamma", 1.05070102214813232421875)),
    "HardSigmoid": _hard_sigmoid, "HardSwish": _function("aten.hardswish.default"),
    "Identity": _identity, "Dropout": _dropout, "Cast": _cast, "Constant": _constant_node,
    "ConstantOfShape": _constant_of_shape, "Shape": _shape,
    "Range": _folded(
        lambda a, b, c: torch.arange(a.item(), b.item(), c.item(), dtype=a.dtype, device=a.device)
    ),
    "Where": _where, "Mod": _mod, "Equal": _folded(torch.eq),
    "Not": _folded(torch.logical_not),
    "Floor": _folded(torch.floor), "Ceil": _folded(torch.ceil), "And": _folded(torch.logical_and),
    "Or": _folded(torch.logical_or),
}  # fmt: skip
"""Readers by ONNX's names.

They take tape, step and the inputs' values (None where left out), and return the result or a tuple
of results.
"""
