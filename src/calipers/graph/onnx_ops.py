"""How does each of ONNX's operations read in the words of the graph? Layers and functions here; what only moves elements in onnx_moves.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calipers.graph.onnx_layers import LAYERS, constant
from calipers.graph.onnx_moves import MOVES, Step, ints, padded, reshaped, transposed
from calipers.graph.rewrites import inverse, leaky
from calipers.graph.tape import Held, Tape, Value, fitted

Reader = Callable[..., Value | tuple[Value, ...]]
_FLOAT_TYPES = (1, 11)  # TensorProto.FLOAT, DOUBLE


def _linear(tape: Tape, v: Held, weight: Tensor, bias: Tensor | None) -> Held:
    """Write x W^T + b over the file's last axis."""
    k = next((i for i, n in enumerate(v.shape[:-1]) if n != 1), len(v.shape) - 1)
    made = tape.call("aten.linear.default", tape.view(v, v.shape[k:]), weight, bias)
    return Held(made.number, made.held, (*v.shape[:-1], weight.shape[0]))


def _gemm(tape: Tape, step: Step, a: Value, b: Value, c: Value | None = None) -> Value:
    alpha, beta = step.get("alpha", 1.0), step.get("beta", 1.0)
    if step.get("transA", 0):
        a = transposed(tape, step, a, [1, 0])
    if isinstance(a, Tensor) or isinstance(b, Held):
        product = _matmul(tape, step, a, transposed(tape, step, b, [1, 0]) if step.get("transB", 0) else b)
        product = product if alpha == 1 else tape.pair("aten.mul.Tensor", product, torch.tensor(alpha, dtype=tape.dtype, device=tape.device))
        bias = c
    else:
        weight = alpha * (b if step.get("transB", 0) else b.T)
        merged = isinstance(c, Tensor) and c.numel() == weight.shape[0] and c.shape[-1:] == weight.shape[:1]
        product = _linear(tape, a, weight, beta * c.reshape(-1) if merged and isinstance(c, Tensor) else None)
        bias = None if merged else c
    if bias is None:
        return product
    return tape.pair("aten.add.Tensor", product, beta * bias if isinstance(bias, Tensor) else _times(tape, bias, beta))


def _times(tape: Tape, v: Value, factor: float) -> Value:
    return v if factor == 1 else tape.pair("aten.mul.Tensor", v, torch.tensor(factor, dtype=tape.dtype, device=tape.device))


def _matmul(tape: Tape, step: Step, a: Value, b: Value) -> Value:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a @ b
    if isinstance(a, Held) and isinstance(b, Tensor) and (matrix := _matrix(b)) is not None:
        if b.dim() > 1:
            return _linear(tape, a, matrix.T, None)
        return reshaped(_linear(tape, a, matrix[None], None), a.shape[:-1])
    if isinstance(a, Tensor) and isinstance(b, Held) and (matrix := _matrix(a if a.dim() > 1 else a[None])) is not None:
        if len(b.shape) == 1:
            made: Value = _linear(tape, b, matrix, None)
            return made if a.dim() > 1 else reshaped(made, ())
        order = [*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2]
        turned = transposed(tape, step, b, order)
        assert isinstance(turned, Held)
        return transposed(tape, step, _linear(tape, turned, matrix, None), order)
    return _product(tape, a, b)


def _matrix(weight: Tensor) -> Tensor | None:
    """Return a constant as one matrix; None where it is a stack of them."""
    while weight.dim() > 2 and weight.shape[0] == 1:
        weight = weight[0]
    return weight if weight.dim() <= 2 else None


def _product(tape: Tape, a: Value, b: Value) -> Value:
    """Write the product of stacks of matrices, at least one of them variable; a vector is a matrix of one row or column."""
    shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *a.shape[-2:-1], *(b.shape[-1:] if len(b.shape) > 1 else ()))
    a = reshaped(a, (1, *a.shape)) if len(a.shape) == 1 else a
    b = reshaped(b, (*b.shape, 1)) if len(b.shape) == 1 else b
    rank = max(len(a.shape), len(b.shape))
    lead = 1 if rank > 2 and all(len(v.shape) < rank or v.shape[0] == 1 for v in (a, b)) else 0
    both = []
    for v in (a, b):
        held = v.shape[1:] if lead and len(v.shape) == rank else v.shape
        both.append(tape.view(v, held) if isinstance(v, Held) else v.reshape(held))
    product = tape.call("aten.matmul.default", *both)
    return Held(product.number, product.held, shape)


def _image(tape: Tape, step: Step, v: Value) -> Held:
    """Return the value held as channels and places; the file's own batch axis must be 1."""
    if not isinstance(v, Held) or len(v.shape) < 3 or v.shape[0] != 1:
        raise step.refuse(f"expects one image of shape (1, channels, ...), got {tuple(v.shape)}")
    return tape.view(v, v.shape[1:])


def _windows(step: Step, size: tuple[int, ...], kernel: list[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return strides, dilations, and the padding before and after each axis, auto_pad worked out."""
    rank = len(size)
    strides, dilations = step.get("strides") or [1] * rank, step.get("dilations") or [1] * rank
    auto = step.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n) for n, s, k, d in zip(size, strides, kernel, dilations, strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        return strides, dilations, *((less, more) if auto == "SAME_UPPER" else (more, less))
    pads = [0] * 2 * rank if auto == "VALID" else step.get("pads") or [0] * 2 * rank
    return strides, dilations, pads[:rank], pads[rank:]


def _conv(tape: Tape, step: Step, v: Value, weight: Value, bias: Value | None = None) -> Value:
    w = constant(weight, step, "the kernel")
    b = None if bias is None else constant(bias, step, "the bias")
    x, rank = _image(tape, step, v), w.dim() - 2
    strides, dilations, before, after = _windows(step, x.held[1:], list(w.shape[2:]))
    if before != after or min(before) < 0:
        x = _image(tape, step, padded(tape, step, x, {2 + i: pair for i, pair in enumerate(zip(before, after, strict=True))}))
        before = [0] * rank
    made = tape.call(f"aten.conv{rank}d.default", x, w, b, strides, before, dilations, step.get("group", 1))
    return Held(made.number, made.held, (1, *made.held))


def _conv_transpose(tape: Tape, step: Step, v: Value, weight: Value, bias: Value | None = None) -> Value:
    """A convolution of the input with zeros between its elements, by the kernel turned around."""
    w, x = constant(weight, step, "the kernel"), _image(tape, step, v)
    rank, groups, size = w.dim() - 2, step.get("group", 1), x.held[1:]
    strides, dilations = step.get("strides") or [1] * rank, step.get("dilations") or [1] * rank
    before, after = _transpose_pads(step, size, list(w.shape[2:]), strides, dilations)
    spread = [(n - 1) * s + 1 for n, s in zip(size, strides, strict=True)]

    def between(t: Tensor) -> Tensor:
        wide = t.new_zeros(*t.shape[:2], *spread)
        places: Any = (..., *(slice(None, None, s) for s in strides))
        wide[places] = t
        return wide

    if max(strides) > 1:
        made = tape.moved("spread", (x,), between)
        x = Held(made.number, made.held, (1, *made.held))
    reach = [(k - 1) * d for k, d in zip(w.shape[2:], dilations, strict=True)]
    x = _image(tape, step, _trimmed(tape, step, x, [(r - p, r - q) for r, p, q in zip(reach, before, after, strict=True)]))
    turned = w.flip(*range(2, w.dim())).reshape(groups, w.shape[0] // groups, *w.shape[1:]).transpose(1, 2).flatten(0, 1)
    b = None if bias is None else constant(bias, step, "the bias")
    out = tape.call(f"aten.conv{rank}d.default", x, turned, b, [1] * rank, [0] * rank, dilations, groups)
    return Held(out.number, out.held, (1, *out.held))


def _trimmed(tape: Tape, step: Step, x: Held, pairs: list[tuple[int, int]]) -> Value:
    return padded(tape, step, x, {2 + i: pair for i, pair in enumerate(pairs)})


def _transpose_pads(step: Step, size: tuple[int, ...], kernel: list[int], strides: list[int], dilations: list[int]) -> tuple[list[int], list[int]]:
    """Return what is cut off before and after each axis; what is added at the end counts as cut off less."""
    rank = len(size)
    extra = step.get("output_padding") or [0] * rank
    pads, auto = step.get("pads") or [0] * 2 * rank, step.get("auto_pad", "NOTSET")
    wanted = step.get("output_shape") or ([n * s for n, s in zip(size, strides, strict=True)] if auto.startswith("SAME") else None)
    if wanted is None:
        return pads[:rank], [q - e for q, e in zip(pads[rank:], extra, strict=True)]
    full = [s * (n - 1) + e + (k - 1) * d + 1 for n, s, k, d, e in zip(size, strides, kernel, dilations, extra, strict=True)]
    total = [max(0, f - w) for f, w in zip(full, wanted, strict=True)]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    before, after = (less, more) if auto == "SAME_UPPER" else (more, less)
    return before, [q - e for q, e in zip(after, extra, strict=True)]


def _batch_norm(tape: Tape, step: Step, v: Value, *given: Value) -> Value:
    scale, bias, mean, var = (constant(g, step, "a statistic") for g in given)
    if step.get("training_mode", 0) or step.outputs > 1:
        raise step.refuse("batch normalisation in training mode mixes the points of a batch")
    if not isinstance(v, Held) or v.shape[0] != 1:
        raise step.refuse(f"expects one point of shape (1, channels, ...), got {tuple(v.shape)}")
    x = tape.view(v, v.shape[1:])
    made = tape.call("aten.batch_norm.default", x, scale, bias, mean, var, False, 0.0, step.get("epsilon", 1e-5), False)
    return Held(made.number, made.held, v.shape)


def _max_pool(tape: Tape, step: Step, v: Value) -> Value:
    x, kernel = _image(tape, step, v), step.get("kernel_shape")
    strides, dilations, before, after = _windows(step, x.held[1:], kernel)
    if before != after or max(2 * p - k for p, k in zip(before, kernel, strict=True)) > 0:
        raise step.refuse(f"max-pooling with padding {before} before and {after} after is not read: only equal padding of at most half a window")
    made = tape.call(f"aten.max_pool{len(kernel)}d.default", x, kernel, strides, before, dilations, bool(step.get("ceil_mode", 0)))
    return Held(made.number, made.held, (1, *made.held))


def _average_pool(tape: Tape, step: Step, v: Value) -> Value:
    x, kernel = _image(tape, step, v), step.get("kernel_shape")
    strides, dilations, before, after = _windows(step, x.held[1:], kernel)
    if step.get("ceil_mode", 0) or max(dilations) > 1:
        raise step.refuse("average-pooling with ceil_mode or dilations is not read")
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    around = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
    shares = None if step.get("count_include_pad", 0) or not any(around) else 1 / pool(
        functional.pad(torch.ones(1, 1, *x.held[1:], dtype=tape.dtype, device=tape.device), around), kernel, strides
    )  # fmt: skip

    def run(t: Tensor) -> Tensor:
        mean: Tensor = pool(functional.pad(t, around), kernel, strides)
        return mean if shares is None else mean * shares.to(mean)

    made = tape.moved(step.kind, (x,), run)
    return Held(made.number, made.held, (1, *made.held))


def _global_pool(tape: Tape, step: Step, v: Value) -> Value:
    x = _image(tape, step, v)
    size = x.held[1:]
    if step.kind == "GlobalMaxPool":
        made = tape.call(f"aten.max_pool{len(size)}d.default", x, list(size), list(size))
    else:
        made = tape.moved(step.kind, (x,), lambda t: t.mean(tuple(range(2, t.dim())), keepdim=True))
    return Held(made.number, made.held, (1, *made.held))


def _function(name: str, *attributes: tuple[str, float]) -> Reader:
    """Return the reader of an elementwise function; `attributes` are the arguments after the first, with ONNX's defaults."""
    return lambda tape, step, v: tape.elementwise(name, v, *(step.get(a, default) for a, default in attributes))


def _clip(tape: Tape, step: Step, v: Value, low: Value | None = None, high: Value | None = None) -> Value:
    ends = [step.get(name) if end is None else float(constant(end, step, "a bound")) for name, end in (("min", low), ("max", high))]
    if ends == [None, None]:
        return v
    return tape.elementwise("aten.clamp.default", v, *ends)


def _prelu(tape: Tape, step: Step, v: Value, slope: Value) -> Value:
    a = constant(slope, step, "the slope")
    if isinstance(v, Tensor):
        return torch.where(v > 0, v, a * v)
    return tape.elementwise("aten.leaky_relu.default", v, float(a)) if a.numel() == 1 else tape.alike(leaky, v, fitted(a, v))


def _hard_sigmoid(tape: Tape, step: Step, v: Value) -> Value:
    offset = torch.tensor(step.get("beta", 0.5), dtype=tape.dtype, device=tape.device)
    return tape.elementwise("aten.clamp.default", tape.pair("aten.add.Tensor", _times(tape, v, step.get("alpha", 0.2)), offset), 0.0, 1.0)


def _arithmetic(name: str) -> Reader:
    return lambda tape, step, a, b: tape.pair(name, a, b)


def _divide(tape: Tape, step: Step, a: Value, b: Value) -> Value:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not a.is_floating_point():
        return torch.div(a, b, rounding_mode="trunc")
    if isinstance(b, Held):
        return tape.pair("aten.mul.Tensor", a, _inverse(tape, step, b))
    return tape.pair("aten.div.Tensor", a, b)


def _inverse(tape: Tape, step: Step, v: Value) -> Value:
    return v.reciprocal() if isinstance(v, Tensor) else tape.alike(inverse, v)


def _power(tape: Tape, step: Step, v: Value, exponent: Value) -> Value:
    p = constant(exponent, step, "the exponent")
    if isinstance(v, Tensor) or p.numel() > 1:
        return torch.pow(constant(v, step, "the base"), p)
    return tape.elementwise("aten.pow.Tensor_Scalar", v, float(p))


def _sum(tape: Tape, step: Step, first: Value, *others: Value) -> Value:
    for v in others:
        first = tape.pair("aten.add.Tensor", first, v)
    return _times(tape, first, 1 / (1 + len(others))) if step.kind == "Mean" else first


def _extreme(tape: Tape, step: Step, first: Value, *others: Value) -> Value:
    for v in others:
        first = tape.pair("aten.maximum.default" if step.kind == "Max" else "aten.minimum.default", first, v)
    return first


def _where(tape: Tape, step: Step, mask: Value, x: Value, y: Value) -> Value:
    """mask * x + (1 - mask) * y for a constant mask."""
    chosen = constant(mask, step, "a choice").bool()
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        return torch.where(chosen, x, y)
    parts = []
    for v, keep in ((x, chosen), (y, ~chosen)):
        parts.append(torch.where(keep, v, torch.zeros_like(v)) if isinstance(v, Tensor) else tape.pair("aten.mul.Tensor", v, keep.to(tape.dtype)))
    return tape.pair("aten.add.Tensor", *parts)


def _identity(tape: Tape, step: Step, v: Value, *_: Any) -> Value:
    return v


def _cast(tape: Tape, step: Step, v: Value) -> Value:
    to = step.get("to")
    if isinstance(v, Held):
        if to not in _FLOAT_TYPES:
            raise step.refuse(f"casts what depends on the point to type {to}: only float and double are read")
        return v
    return v.to(tape.dtype) if to in (*_FLOAT_TYPES, 10, 16) else v.bool() if to == 9 else v.trunc().long() if v.is_floating_point() else v.long()


def _constant_node(tape: Tape, step: Step) -> Value:
    value = next(iter(step.attributes.values()))
    t = value if isinstance(value, Tensor) else torch.as_tensor(value)
    return t.to(tape.device, tape.dtype if t.is_floating_point() else t.dtype)


def _constant_of_shape(tape: Tape, step: Step, shape: Value) -> Value:
    value = step.get("value")
    fill = torch.zeros(1, dtype=tape.dtype) if value is None else value
    return fill.reshape(()).to(tape.device, tape.dtype if fill.is_floating_point() else fill.dtype).expand(ints(shape, step))


def _shape(tape: Tape, step: Step, v: Value) -> Value:
    return torch.tensor(v.shape[step.get("start", 0) : step.get("end")], dtype=torch.long, device=tape.device)


def _folded(function: Callable[..., Tensor]) -> Reader:
    """Return the reader of an operation that is only known for constants."""

    def build(tape: Tape, step: Step, *values: Value) -> Value:
        if any(isinstance(v, Held) for v in values):
            raise step.refuse(f"no bounds for {step.kind} of values that depend on the point. Export the network without it; attacks that only ask work.")
        return function(*values)

    return build


OPS: dict[str, Reader] = {
    **MOVES, **LAYERS,
    "Gemm": _gemm, "MatMul": _matmul, "Conv": _conv, "ConvTranspose": _conv_transpose, "BatchNormalization": _batch_norm,
    "MaxPool": _max_pool, "AveragePool": _average_pool, "GlobalAveragePool": _global_pool, "GlobalMaxPool": _global_pool,
    "Add": _arithmetic("aten.add.Tensor"), "Sub": _arithmetic("aten.sub.Tensor"), "Mul": _arithmetic("aten.mul.Tensor"), "Div": _divide,
    "Pow": _power, "Sum": _sum, "Mean": _sum, "Max": _extreme, "Min": _extreme, "Neg": _function("aten.neg.default"),
    "Relu": _function("aten.relu.default"), "LeakyRelu": _function("aten.leaky_relu.default", ("alpha", 0.01)), "PRelu": _prelu,
    "Elu": _function("aten.elu.default", ("alpha", 1.0)), "Sigmoid": _function("aten.sigmoid.default"), "Tanh": _function("aten.tanh.default"),
    "Softplus": _function("aten.softplus.default"), "Exp": _function("aten.exp.default"), "Log": _function("aten.log.default"),
    "Sqrt": _function("aten.sqrt.default"), "Abs": _function("aten.abs.default"), "Reciprocal": _inverse,
    "Erf": _function("aten.erf.default"), "Sin": _function("aten.sin.default"), "Cos": _function("aten.cos.default"), "Clip": _clip,
    "Atan": _function("aten.atan.default"), "Mish": _function("aten.mish.default"), "Celu": _function("aten.celu.default", ("alpha", 1.0)),
    "Selu": lambda tape, step, v: tape.elementwise("aten.elu.default", v, step.get("alpha", 1.67326319217681884765625),
                                                   step.get("gamma", 1.05070102214813232421875)),
    "HardSigmoid": _hard_sigmoid, "HardSwish": _function("aten.hardswish.default"),
    "Identity": _identity, "Dropout": _identity, "Cast": _cast, "Constant": _constant_node, "ConstantOfShape": _constant_of_shape, "Shape": _shape,
    "Range": _folded(lambda a, b, c: torch.arange(a.item(), b.item(), c.item(), dtype=a.dtype, device=a.device)),
    "Where": _where, "Mod": _folded(torch.remainder), "Equal": _folded(torch.eq),
    "Less": _folded(torch.lt), "Greater": _folded(torch.gt), "Not": _folded(torch.logical_not),
    "Floor": _folded(torch.floor), "Ceil": _folded(torch.ceil), "And": _folded(torch.logical_and), "Or": _folded(torch.logical_or),
}  # fmt: skip
"""Readers by ONNX's names: tape, step and the inputs' values (None where left out) to the result, or a tuple of results."""
