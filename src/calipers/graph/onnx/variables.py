"""Readers of ONNX operations that consist of others.

They are reductions, gates, norms, and sums of products, of what depends on the point. Operations on
constants are evaluated by ONNX's reference (see `onnx_net`), so no reader here is ever called with
constants alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from calipers.graph import reductions
from calipers.graph.activations import TwoPieces
from calipers.graph.compositions import compared, rms_norm, soft_shrink, threshold
from calipers.graph.file_builder import Compared, FileResult, Tape, Value
from calipers.graph.node_writer import NodeResult, Writer
from calipers.graph.onnx.layers import constant
from calipers.graph.onnx.shape_ops import (
    axes_of,
    not_along_the_batch,
    picked,
    product_along,
    rearranged,
    reshaped,
    transposed,
)
from calipers.graph.onnx.steps import Step, ints
from calipers.graph.rewrites import divide, inverse, log_sum_exp, scaled
from calipers.graph.smooth_table import LOG, SQUARE

Rewrite = Callable[[Writer, NodeResult], NodeResult | None]
_ABSOLUTE = TwoPieces(-1.0, 1.0)


def _apart(tape: Tape, v: FileResult) -> FileResult:
    """Return the value held without the file's axis of 1 for the batch."""
    return tape.view(v, v.shape[1:] if v.shape[:1] == (1,) and len(v.shape) > 1 else v.shape)


def _alike(rewrite: Rewrite) -> Callable[[Tape, Step, FileResult], Value]:
    """Return a reader whose result has the shape of its input."""
    return lambda tape, step, v: _same_shape(tape, step, rewrite, v)


def _same_shape(tape: Tape, step: Step, rewrite: Rewrite, v: FileResult) -> FileResult:
    made = tape.several(rewrite, v)
    if made is None:
        raise step.refuse(f"{step.kind} is not read in this form")
    return FileResult(made.number, made.held, v.shape)


def _along_the_last(
    tape: Tape, step: Step, v: FileResult, over: list[int], rewrite: Rewrite
) -> FileResult:
    """Write an operation on some axes as one on the last axis.

    The operation reduces that axis to size 1; the given axes are kept with size 1.
    """
    if 0 in over:
        not_along_the_batch(step, v)
    kept = [a for a in range(len(v.shape)) if a not in over]
    count = math.prod(v.shape[a] for a in over)
    turned = transposed(tape, step, v, [*kept, *over])
    flat = reshaped(turned, (*(v.shape[a] for a in kept), count))
    assert isinstance(flat, FileResult)
    made = _same_shape(tape, step, rewrite, _apart(tape, flat))
    return FileResult(
        made.number, made.held, tuple(1 if a in over else n for a, n in enumerate(v.shape))
    )


def _reduced(rewrite: Rewrite) -> Callable[..., Value]:
    """Return the reader of a reduction, with axes by attribute or input."""

    def read(tape: Tape, step: Step, v: FileResult, axes: Value | None = None) -> Value:
        over, keep = axes_of(step, v, axes), bool(step.get("keepdims", 1))
        if not over:
            if step.get("noop_with_empty_axes", 0):
                raise step.refuse(f"{step.kind} over no axis is not read")
            over = list(range(len(v.shape)))
        kept = _along_the_last(tape, step, v, over, rewrite)
        left = (n for i, n in enumerate(v.shape) if i not in over)
        return kept if keep else reshaped(kept, left)

    return read


def _summed(w: Writer, x: NodeResult) -> NodeResult:
    return reductions.total(w, x, -1, True)


REDUCED: dict[str, Rewrite] = {
    "ReduceMax": lambda w, x: reductions.largest(w, x, -1, True),
    "ReduceMin": lambda w, x: reductions.smallest(w, x, -1, True),
    "ReduceL1": lambda w, x: reductions.p_norm(w, x, 1, -1, True),
    "ReduceL2": lambda w, x: reductions.p_norm(w, x, 2, -1, True),
    "ReduceSumSquare": lambda w, x: _summed(w, w.write(SQUARE, x)),
    "ReduceLogSumExp": lambda w, x: log_sum_exp(w, x, -1, True),
    "ReduceLogSum": lambda w, x: w.write(LOG, _summed(w, x)),
    "ReduceProd": lambda w, x: reductions.product(w, x, -1, True),
}


def _normalised(tape: Tape, step: Step, v: FileResult) -> Value:
    """Write x / |x| along an axis, and 0 where all of x is 0."""
    order, over = step.get("p", 2), [step.axis(step.get("axis", -1), len(v.shape))]
    size = _along_the_last(
        tape, step, v, over, lambda w, x: reductions.p_norm(w, x, order, -1, True)
    )
    return tape.pair("aten.mul.Tensor", v, tape.alike(partial(inverse, or_zero=True), size))


def _rms_norm(tape: Tape, step: Step, v: FileResult, scale: Value) -> Value:
    """Write x / sqrt(mean x^2 + eps) over the last axes, times a factor."""
    axis = step.axis(step.get("axis", -1), len(v.shape))
    if axis == 0:
        not_along_the_batch(step, v)
    shape, eps = v.shape[axis:], step.get("epsilon", 1e-5)
    x = tape.view(v, v.shape[1:] if axis and v.shape[0] == 1 else v.shape)
    made = _same_shape(tape, step, lambda w, t: rms_norm(w, t, shape, None, eps), x)
    return tape.pair("aten.mul.Tensor", FileResult(made.number, made.held, v.shape), scale)


def _shrink(tape: Tape, step: Step, v: FileResult) -> Value:
    """Write x moved towards 0 by a size, and 0 within it.

    Other forms of Shrink are discontinuous and are refused.
    """
    size, bias = step.get("lambd", 0.5), step.get("bias", 0.0)
    if size < 0 or size != bias:
        raise step.refuse(
            f"Shrink with lambd {size:g} and bias {bias:g} jumps, and no line through the jump "
            "bounds it usefully: only an equal bias is read"
        )
    return _same_shape(tape, step, lambda w, x: soft_shrink(w, x, size), v)


def _thresholded(tape: Tape, step: Step, v: FileResult) -> Value:
    """Write x above a number and 0 elsewhere: a ReLU for the number 0."""
    least = step.get("alpha", 1.0)
    return _same_shape(tape, step, lambda w, x: threshold(w, x, least, 0.0), v)


def _softsign(w: Writer, x: NodeResult) -> NodeResult | None:
    return divide(w, x, scaled(w, w.write(_ABSOLUTE, x), 1.0, 1.0))


def _cumulative(tape: Tape, step: Step, v: FileResult, axis: Value) -> Value:
    """Write a cumulative sum, as a product with a triangle of ones."""
    (along,) = (step.axis(a, len(v.shape)) for a in ints(axis, step))
    n, later = v.shape[along], int(bool(step.get("exclusive", 0)))
    step.room((n, n))
    ones = torch.ones(n, n, dtype=tape.dtype, device=tape.device)
    matrix = ones.triu(later) if step.get("reverse", 0) else ones.tril(-later)
    return rearranged(tape, step, v, product_along(along, matrix), [along])


def _triangle(tape: Tape, step: Step, v: FileResult, diagonal: Value | None = None) -> Value:
    """Write the elements on one side of a diagonal, 0 on the other."""
    (k,) = (0,) if diagonal is None else ints(diagonal, step)
    ones = torch.ones(v.shape, dtype=tape.dtype, device=tape.device)
    return tape.pair("aten.mul.Tensor", v, ones.triu(k) if step.get("upper", 1) else ones.tril(k))


def _gathered(tape: Tape, step: Step, v: FileResult, index: Value) -> Value:
    """Write the element of each line along an axis that an index names."""
    at, axis = (
        constant(index, step, "an index").long(),
        step.axis(step.get("axis", 0), len(v.shape)),
    )
    n, others = v.shape[axis], [a for a in range(len(v.shape)) if a != axis]
    if at.dim() != len(v.shape) or any(at.shape[a] > v.shape[a] for a in others):
        raise step.damaged(f"indices of shape {tuple(at.shape)} into {v.shape}")
    if bool(((at < -n) | (at >= n)).any()):
        raise step.refuse(f"an index beyond an axis of {n} elements")
    if axis == 0:
        not_along_the_batch(step, v)
    places = torch.arange(math.prod(v.shape), device=at.device).reshape(v.shape)
    flat = picked(
        tape, step, reshaped(v, (len(places.reshape(-1)),)), 0,
        places.gather(axis, at % n).reshape(-1).tolist(),
    )  # fmt: skip
    return reshaped(flat, at.shape)


def _einsum(tape: Tape, step: Step, *values: Value) -> Value:
    """Write sums of products, given by the names of the axes.

    They are products of constants and one value that depends on the point, or of two such values,
    which are written as a product of matrices.
    """
    equation = step.get("equation").replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if "." in equation or not arrow or any(len(set(t)) < len(t) for t in (*terms, out)):
        raise step.refuse(
            f"the equation {equation!r} is not read: letters only, each once in a term, and ->"
        )
    if len(terms) != len(values) or any(
        len(t) != len(v.shape) for t, v in zip(terms, values, strict=True)
    ):
        raise step.damaged(f"the equation {equation!r} does not fit its inputs")
    held = [(t, v) for t, v in zip(terms, values, strict=True) if isinstance(v, FileResult)]
    for term, v in held:
        if term[:1] not in (out[:1], ""):
            not_along_the_batch(step, v)
    if len(held) == 1 and len(values) <= 2:
        return _weighed(tape, step, terms, values, out)
    if len(held) == len(values) == 2:
        return _contracted(tape, step, _Term(*held[0]), _Term(*held[1]), out)
    raise step.refuse("a product of more than two is not read; write it as several")


def _weighed(
    tape: Tape, step: Step, terms: list[str], values: tuple[Value, ...], out: str
) -> Value:
    """Write a sum of products with constants as one matrix."""
    (place,) = (k for k, v in enumerate(values) if isinstance(v, FileResult))
    v = values[place]
    assert isinstance(v, FileResult)
    sizes = {
        c: n for t, u in zip(terms, values, strict=True) for c, n in zip(t, u.shape, strict=True)
    }
    step.room((math.prod(v.shape), *(sizes[c] for c in out)))
    eye = torch.eye(math.prod(v.shape), dtype=tape.dtype, device=tape.device)
    rows = eye.reshape(len(eye), *v.shape)
    line = next(c for c in map(chr, range(65, 123)) if c.isalpha() and c not in sizes)
    args = [rows if k == place else u for k, u in enumerate(values)]
    subscripts = ",".join(f"{line}{t}" if k == place else t for k, t in enumerate(terms))
    matrix = torch.einsum(f"{subscripts}->{line}{out}", *args).flatten(1)
    flat = tape.view(v, (math.prod(v.shape),))
    made = tape.call("aten.linear.default", flat, matrix.T.contiguous(), None)
    return FileResult(made.number, made.held, tuple(sizes[c] for c in out))


class _Term(NamedTuple):
    """A factor of a sum of products, with one name for each of its axes."""

    axes: str
    value: FileResult


def _contracted(tape: Tape, step: Step, left: _Term, right: _Term, out: str) -> Value:
    """Write a product of two values as a product of stacks of matrices.

    Axes of both that are in the output index the stack; those that are not are summed over.
    """
    (first, a), (second, b) = left, right
    only = (set(first) ^ set(second)) - set(out)
    if only or set(out) - set(first) - set(second):
        raise step.refuse(f"a sum over {', '.join(sorted(only))} of one factor alone is not read")
    sizes = dict(zip(first + second, (*a.shape, *b.shape), strict=True))
    stack = [c for c in out if c in first and c in second]
    rows = [c for c in out if c in first and c not in second]
    columns = [c for c in out if c in second and c not in first]
    inner = [c for c in first if c in second and c not in out]

    def count(symbols: list[str]) -> int:
        return math.prod(sizes[c] for c in symbols)

    x = reshaped(
        transposed(tape, step, a, [first.index(c) for c in (*stack, *rows, *inner)]),
        (count(stack), count(rows), count(inner)),
    )
    y = reshaped(
        transposed(tape, step, b, [second.index(c) for c in (*stack, *inner, *columns)]),
        (count(stack), count(inner), count(columns)),
    )
    assert isinstance(x, FileResult) and isinstance(y, FileResult)
    made = tape.call("aten.matmul.default", tape.view(x, x.shape), tape.view(y, y.shape))
    whole = FileResult(made.number, made.held, tuple(sizes[c] for c in (*stack, *rows, *columns)))
    order = [*stack, *rows, *columns]
    return transposed(tape, step, whole, [order.index(c) for c in out])


def _compared(above: bool) -> Callable[..., Compared]:
    """Return the reader of a comparison, which only a choice may use."""

    def read(tape: Tape, step: Step, a: Value, b: Value) -> Compared:
        held, constant_ = (a, b) if isinstance(a, FileResult) else (b, a)
        if isinstance(constant_, FileResult) or not isinstance(held, FileResult):
            raise step.refuse("only comparisons with a constant number are read")
        given = [NodeResult(v.number, v.held) if isinstance(v, FileResult) else v for v in (a, b)]
        found = compared(above)(tape.writer, *given)
        if found is None or len(constant_.shape) > len(held.shape):
            raise step.refuse("only comparisons with one finite number are read")
        return Compared(found, held.shape)

    return read


VARIABLES: dict[str, Callable[..., Any]] = {
    **{kind: _reduced(rewrite) for kind, rewrite in REDUCED.items()},
    **dict.fromkeys(["Greater", "GreaterOrEqual"], _compared(above=True)),
    **dict.fromkeys(["Less", "LessOrEqual"], _compared(above=False)),
    "LpNormalization": _normalised,
    "RMSNormalization": _rms_norm,
    "Softsign": _alike(_softsign),
    "Shrink": _shrink,
    "ThresholdedRelu": _thresholded,
    "CumSum": _cumulative,
    "Trilu": _triangle,
    "GatherElements": _gathered,
    "Einsum": _einsum,
}
"""Readers by ONNX's names, for inputs that depend on the point.

At least one input does.
"""
