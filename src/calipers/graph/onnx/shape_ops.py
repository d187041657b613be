"""Readers of ONNX operations that move, copy, add or average elements.

These are reshapes, slices, gathers, pads, reductions, resizing and the like. Each works on
constants (shapes are computed in the file itself) and on what depends on the point. A function
`f(x, shift)` works along the file's axes plus `shift`. With shift 0 the batch of points takes the
place of a leading axis of 1 that the operation leaves alone; with shift 1 it has an axis of its own
in front.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

from calipers.errors import CaptureError
from calipers.graph.file_builder import FileResult, Tape, Value
from calipers.graph.onnx.steps import Step, ints

Move = Callable[[Tensor, int], Tensor]


def rearranged(
    tape: Tape, step: Step, v: Value, move: Move, axes: Iterable[int], mixes: bool = True
) -> Value:
    """Return `move` applied to the value.

    `axes` are the axes of the file (>= 0) that it affects; `mixes` says that elements along them
    are combined.
    """
    if isinstance(v, Tensor):
        return move(v, 0)
    touched = 0 in axes
    if touched and mixes:
        not_along_the_batch(step, v)
    if v.shape[:1] == (1,) and len(v.shape) > 1 and not touched:
        return tape.move(step.kind, [v], lambda x: move(x, 0), v.shape[1:], lambda s: (1, *s))
    made = tape.move(step.kind, [v], lambda x: move(x, 1), v.shape, lambda s: s)
    return made if v.shape else FileResult(made.number, made.held, ())


def not_along_the_batch(step: Step, v: Value) -> None:
    """Raise `CaptureError` if elements mix along an axis of free batch size."""
    if isinstance(v, FileResult) and step.free_batch and v.shape[:1] == (1,) and len(v.shape) > 1:
        raise CaptureError(
            f"{step.where}: works along the batch axis, whose size the file leaves free: an answer "
            "for one point would depend on the others"
        )


def reshaped(v: Value, shape: Iterable[int]) -> Value:
    """Return the value in another shape of the file; no element moves."""
    shape = tuple(shape)
    if math.prod(shape) != math.prod(v.shape) or min(shape, default=0) < 0:
        raise ValueError(f"{tuple(v.shape)} does not fit the shape {shape}")
    return v.reshape(shape) if isinstance(v, Tensor) else FileResult(v.number, v.held, shape)


def axes_of(step: Step, v: Value, given: Value | None) -> list[int] | None:
    """Return the axes given by an attribute or an input, or None.

    Older operator sets give them by attribute.
    """
    found = step.get("axes") if given is None else ints(given, step)
    return None if found is None else _distinct(step, found, len(v.shape))


def _distinct(step: Step, given: Iterable[int], rank: int) -> list[int]:
    axes = [step.axis(int(a), rank) for a in given]
    if len(set(axes)) < len(axes):
        raise step.damaged(f"an axis is named twice: {axes}")
    return axes


def _reshape(tape: Tape, step: Step, v: Value, target: Value | None = None) -> Value:
    wanted = [int(n) for n in step.get("shape", [])] if target is None else ints(target, step)
    if not step.get("allowzero", 0):
        wanted = [v.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    if wanted.count(-1) > 1 or (-1 in wanted and not math.prod(n for n in wanted if n != -1)):
        raise step.refuse(f"the shape {wanted} leaves more than one size open")
    size, rest = math.prod(v.shape), math.prod(n for n in wanted if n != -1)
    found = [size // rest if n == -1 else n for n in wanted]
    if math.prod(found) != size:
        raise step.refuse(
            f"{size} elements of shape {tuple(v.shape)} do not fit the shape {wanted}; was the "
            "file written for a fixed batch above 1?"
        )
    return reshaped(v, found)


def _flatten(tape: Tape, step: Step, v: Value) -> Value:
    axis = step.get("axis", 1)
    axis = axis if axis == len(v.shape) else step.axis(axis, len(v.shape))
    return reshaped(v, (math.prod(v.shape[:axis]), math.prod(v.shape[axis:])))


def _squeeze(tape: Tape, step: Step, v: Value, axes: Value | None = None) -> Value:
    gone = axes_of(step, v, axes)
    if gone is not None and any(v.shape[a] != 1 for a in gone):
        raise step.damaged(
            f"axes {gone} of shape {tuple(v.shape)} are left out, but not all of them are 1"
        )
    return reshaped(
        v, (n for i, n in enumerate(v.shape) if (n != 1 if gone is None else i not in gone))
    )


def _unsqueeze(tape: Tape, step: Step, v: Value, axes: Value | None = None) -> Value:
    found = step.get("axes") if axes is None else ints(axes, step)
    new = set(_distinct(step, found, len(v.shape) + len(found)))
    old = iter(v.shape)
    return reshaped(v, (1 if i in new else next(old) for i in range(len(v.shape) + len(new))))


def transposed(tape: Tape, step: Step, v: Value, order: list[int]) -> Value:
    """Return the value with its axes in another order."""
    if sorted(order) != list(range(len(v.shape))):
        raise step.damaged(f"{order} is no order of {len(v.shape)} axes")
    shape = [v.shape[p] for p in order]
    if [p for p in order if v.shape[p] != 1] == sorted(p for p in order if v.shape[p] != 1):
        return reshaped(v, shape)  # only axes of size 1 change places
    touched = [] if order[0] == 0 else [0]
    return rearranged(
        tape,
        step,
        v,
        lambda x, s: x.permute(*range(s), *(p + s for p in order)),
        touched,
        mixes=False,
    )


def _transpose(tape: Tape, step: Step, v: Value) -> Value:
    return transposed(tape, step, v, step.get("perm") or list(range(len(v.shape)))[::-1])


def picked(tape: Tape, step: Step, v: Value, axis: int, places: list[int]) -> Value:
    """Return the elements at these places of an axis."""
    size = v.shape[axis]
    if any(not -size <= p < size for p in places):
        raise step.refuse(f"index {max(places, key=abs)} of an axis of {size} elements")
    if places == list(range(size)):
        return v

    def move(x: Tensor, shift: int) -> Tensor:
        return x.index_select(
            axis + shift,
            torch.tensor([p % size for p in places], dtype=torch.long, device=x.device),
        )

    return rearranged(tape, step, v, move, [axis])


def _gather(tape: Tape, step: Step, v: Value, index: Value) -> Value:
    axis = step.axis(step.get("axis", 0), len(v.shape))
    found = picked(tape, step, v, axis, ints(index, step))
    return reshaped(found, (*v.shape[:axis], *index.shape, *v.shape[axis + 1 :]))


def _slice(tape: Tape, step: Step, v: Value, *given: Value | None) -> Value:
    if given:
        starts, ends, axes, steps = (
            None if g is None else ints(g, step) for g in (*given, None, None)[:4]
        )
    else:
        starts, ends, axes, steps = step.get("starts"), step.get("ends"), step.get("axes"), None
    assert starts is not None and ends is not None
    axes = _distinct(step, range(len(starts)) if axes is None else axes, len(v.shape))
    for start, end, axis, by in zip(starts, ends, axes, steps or [1] * len(starts), strict=True):
        v = picked(
            tape,
            step,
            v,
            axis,
            list(
                range(v.shape[axis])[
                    _from(start, v.shape[axis], by) : _to(end, v.shape[axis], by) : by
                ]
            ),
        )
    return v


def _from(start: int, size: int, by: int) -> int:
    """Return where a slice begins, clamped as the operator set defines it.

    With a negative step and a start that is too low that differs from what Python does.
    """
    start = start + size if start < 0 else start
    return min(max(start, 0), size - 1 if by < 0 else size)


def _to(end: int, size: int, by: int) -> int | None:
    end = end + size if end < 0 else end
    return None if by < 0 and end < 0 else min(max(end, 0), size)


def _split(tape: Tape, step: Step, v: Value, sizes: Value | None = None) -> tuple[Value, ...]:
    axis = step.axis(step.get("axis", 0), len(v.shape))
    each, parts = (
        (step.get("split") if sizes is None else ints(sizes, step)),
        step.get("num_outputs") or step.outputs,
    )
    if each is None:
        most = -(-v.shape[axis] // parts)
        each = [min(most, v.shape[axis] - most * k) for k in range(parts)]
    if sum(each) != v.shape[axis] or min(each) < 0 or len(each) != parts:
        raise step.damaged(
            f"an axis of {v.shape[axis]} cannot be split into {each} for {parts} outputs"
        )
    ends = list(itertools.accumulate(each))
    return tuple(
        picked(tape, step, v, axis, list(range(end - n, end)))
        for end, n in zip(ends, each, strict=True)
    )


def _concat(tape: Tape, step: Step, *values: Value) -> Value:
    axis = step.axis(step.get("axis", 0), len(values[0].shape))
    if all(isinstance(v, Tensor) for v in values):
        return torch.cat([v for v in values if isinstance(v, Tensor)], axis)
    held = tuple(v for v in values if isinstance(v, FileResult))
    lead = axis > 0 and all(v.shape[0] == 1 for v in values)
    if axis == 0:
        for v in held:
            not_along_the_batch(step, v)
    shapes = [v.shape[1:] if lead else v.shape for v in values]
    place = axis if lead else axis + 1

    def join(*inputs: Tensor) -> Tensor:
        left = iter(inputs)
        parts = [
            next(left) if isinstance(v, FileResult) else inputs[0].new_zeros(len(inputs[0]), *s)
            for v, s in zip(values, shapes, strict=True)
        ]
        return torch.cat(parts, place)

    wanted = [s for v, s in zip(values, shapes, strict=True) if isinstance(v, FileResult)]
    made = tape.moved(
        step.kind, tuple(tape.view(v, s) for v, s in zip(held, wanted, strict=True)), join
    )
    result = FileResult(made.number, made.held, (1, *made.held) if lead else made.held)
    if len(held) == len(values):
        return result
    filled = [
        v if isinstance(v, Tensor) else torch.zeros(v.shape, dtype=tape.dtype, device=tape.device)
        for v in values
    ]
    return tape.scale(
        result, torch.ones((), dtype=tape.dtype, device=tape.device), torch.cat(filled, axis)
    )


def padded(
    tape: Tape, step: Step, v: Value, pairs: dict[int, tuple[int, int]], value: float = 0.0
) -> Value:
    """Return the value with constant elements added around some axes.

    `pairs` are the numbers of elements (before, after) for each axis; negative ones remove
    elements.
    """
    pairs = {axis: pair for axis, pair in pairs.items() if pair != (0, 0)}
    if not pairs:
        return v
    wider = [n + sum(pairs.get(axis, (0, 0))) for axis, n in enumerate(v.shape)]
    if (
        any(
            n - after < 0 or n - before < 0
            for n, (before, after) in ((wider[axis], pair) for axis, pair in pairs.items())
        )
        or min(wider) < 0
    ):
        raise step.refuse(f"a value of shape {tuple(v.shape)} cannot lose as much as {pairs} says")
    step.room(wider, math.prod(v.shape))

    def around(x: Tensor, shift: int, filling: float) -> Tensor:
        amounts = [
            n for axis in range(x.dim() - 1, shift - 1, -1) for n in pairs.get(axis - shift, (0, 0))
        ]
        return functional.pad(x, amounts, value=filling)

    made = rearranged(tape, step, v, lambda x, s: around(x, s, 0.0), pairs, mixes=False)
    if value == 0:
        return made
    border = around(torch.zeros(v.shape, dtype=tape.dtype, device=tape.device), 0, value)
    one = torch.ones((), dtype=tape.dtype, device=tape.device)
    return tape.scale(made, one, border) if isinstance(made, FileResult) else made + border


def _pad(tape: Tape, step: Step, v: Value, *given: Value | None) -> Value:
    amounts, filling, where = (*given, None, None, None)[:3]
    pads = step.get("pads") if amounts is None else ints(amounts, step)
    value = step.get("value", 0.0) if filling is None else float(filling)  # type: ignore[arg-type]
    axes = (
        list(range(len(v.shape)))
        if where is None
        else _distinct(step, ints(where, step), len(v.shape))
    )
    if len(pads) != 2 * len(axes):
        raise step.damaged(f"{len(pads)} amounts of padding for {len(axes)} axes")
    pairs = {axis: (pads[k], pads[k + len(axes)]) for k, axis in enumerate(axes)}
    mode = step.get("mode", "constant")
    if mode == "constant":
        return padded(tape, step, v, pairs, value)
    for axis, (before, after) in pairs.items():
        n = v.shape[axis]
        places = range(-before, n + after)
        reflected = {
            "edge": lambda p, n=n: min(max(p, 0), n - 1),
            "reflect": lambda p, n=n: n - 1 - abs(n - 1 - abs(p)),
            "wrap": lambda p, n=n: p % n,
        }
        if mode not in reflected or (mode == "reflect" and max(before, after) >= n):
            raise step.refuse(f"padding by {mode!r} is not read")
        v = picked(tape, step, v, axis, [reflected[mode](p) for p in places])
    return v


def _reduce(mean: bool) -> Callable[..., Value]:
    def build(tape: Tape, step: Step, v: Value, axes: Value | None = None) -> Value:
        over, keep = axes_of(step, v, axes), bool(step.get("keepdims", 1))
        if not over:
            if step.get("noop_with_empty_axes", 0):
                return v
            over = list(range(len(v.shape)))
        if 0 in over:
            not_along_the_batch(step, v)

        def move(x: Tensor, shift: int) -> Tensor:
            dims = [a + shift for a in over]
            return x.mean(dims, keepdim=True) if mean else x.sum(dims, keepdim=True)

        kept = v if all(v.shape[a] == 1 for a in over) else rearranged(tape, step, v, move, over)
        return kept if keep else reshaped(kept, (n for i, n in enumerate(v.shape) if i not in over))

    return build


def _expand(tape: Tape, step: Step, v: Value, target: Value) -> Value:
    shape = tuple(torch.broadcast_shapes(v.shape, tuple(ints(target, step))))
    return v.expand(shape) if isinstance(v, Tensor) else tape.expand(v, shape)


def _tile(tape: Tape, step: Step, v: Value, repeats: Value) -> Value:
    many = ints(repeats, step)
    if len(many) != len(v.shape) or min(many, default=0) < 0:
        raise step.damaged(f"{many} is no number of copies for each of {len(v.shape)} axes")
    for axis, n in enumerate(many):
        v = picked(tape, step, v, axis, list(range(v.shape[axis])) * n)
    return v


def _depth_to_space(tape: Tape, step: Step, v: Value) -> Value:
    b, mode, (_, c, h, w) = step.get("blocksize"), step.get("mode", "DCR"), v.shape
    if mode not in ("DCR", "CRD"):
        raise step.refuse(f"the mode {mode!r} is not known")
    deep = (1, b, b, c // b**2, h, w) if mode == "DCR" else (1, c // b**2, b, b, h, w)
    order = [0, 3, 4, 1, 5, 2] if mode == "DCR" else [0, 1, 4, 2, 5, 3]
    return reshaped(transposed(tape, step, reshaped(v, deep), order), (1, c // b**2, h * b, w * b))


def _space_to_depth(tape: Tape, step: Step, v: Value) -> Value:
    b, (_, c, h, w) = step.get("blocksize"), v.shape
    return reshaped(
        transposed(tape, step, reshaped(v, (1, c, h // b, b, w // b, b)), [0, 3, 5, 1, 2, 4]),
        (1, c * b * b, h // b, w // b),
    )


def _resize(tape: Tape, step: Step, v: Value, *given: Value | None) -> Value:
    """Write nearest or linear interpolation, one axis at a time.

    Each is a matrix of non-negative weights.
    """
    if step.kind == "Upsample" or step.opset < 11:
        scales, sizes = (
            (given[0] if given else torch.tensor(step.get("scales"), dtype=torch.float64)),
            None,
        )
    else:
        _, scales, sizes = (*given, None, None, None)[:3]
    if (
        step.get("axes") is not None
        or step.get("antialias", 0)
        or step.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        raise step.refuse("resizing with axes, antialias or keep_aspect_ratio_policy is not read")
    step.ignore("cubic_coeff_a", "extrapolation_value")  # of modes that are refused
    rates = (
        [float(s) for s in scales.reshape(-1).tolist()]
        if isinstance(scales, Tensor) and scales.numel()
        else None
    )
    if (rates is None) == (sizes is None) or min(rates or [1.0]) <= 0:
        raise step.damaged(
            f"resizing needs either sizes or positive scales, got scales {rates} and "
            f"{'sizes' if sizes is not None else 'no sizes'}"
        )
    target = (
        ints(sizes, step)
        if rates is None
        else [math.floor(n * s) for n, s in zip(v.shape, rates, strict=True)]
    )
    _check_resizing(step)
    for axis, (n, m) in enumerate(zip(v.shape, target, strict=True)):
        if n == m and (rates is None or rates[axis] == 1):
            continue
        at = _positions(step, n, m, m / n if rates is None else rates[axis])
        if step.get("mode", "nearest") == "nearest":
            v = picked(tape, step, v, axis, _rounded(step, at).clamp(0, n - 1).long().tolist())
            continue
        step.room((m, n))
        matrix = _interpolation(at, n).to(dtype=tape.dtype, device=tape.device)
        if bool(((matrix == 0) | (matrix == 1)).all()):
            v = picked(tape, step, v, axis, matrix.argmax(1).tolist())
        else:
            v = rearranged(tape, step, v, product_along(axis, matrix), [axis])
    return v


def product_along(axis: int, matrix: Tensor) -> Move:
    """Return the move that multiplies by a matrix along an axis."""

    def move(x: Tensor, shift: int) -> Tensor:
        return torch.movedim(x, axis + shift, -1).matmul(matrix.T.to(x)).movedim(-1, axis + shift)

    return move


def _check_resizing(step: Step) -> None:
    """Check the three modes, also where no axis changes its size."""
    kind, mode, rounding = (
        _coordinates(step),
        step.get("mode", "nearest"),
        step.get("nearest_mode", "floor"),
    )
    if (
        kind not in _POSITIONS
        or mode not in ("nearest", "linear", "bilinear", "trilinear")
        or rounding not in _ROUNDINGS
    ):
        raise step.refuse(
            f"resizing by {mode!r} with coordinates {kind!r} and rounding {rounding!r} is not read"
        )


def _coordinates(step: Step) -> str:
    default = "asymmetric" if step.kind == "Upsample" or step.opset < 11 else "half_pixel"
    return str(step.get("coordinate_transformation_mode", default))


_POSITIONS: dict[str, Callable[[Tensor, int, int, float], Tensor]] = {
    "asymmetric": lambda i, n, m, rate: i / rate,
    "half_pixel": lambda i, n, m, rate: (i + 0.5) / rate - 0.5,
    "pytorch_half_pixel": lambda i, n, m, rate: (i + 0.5) / rate - 0.5 if m > 1 else 0 * i,
    "align_corners": lambda i, n, m, rate: i * (n - 1) / (m - 1) if m > 1 else 0 * i,
}
_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "round_prefer_floor": lambda p: (p - 0.5).ceil(),
    "round_prefer_ceil": lambda p: (p + 0.5).floor(),
    "floor": torch.floor,
    "ceil": torch.ceil,
}


def _positions(step: Step, n: int, m: int, rate: float) -> Tensor:
    """Return where among n samples the m new ones lie."""
    return _POSITIONS[_coordinates(step)](torch.arange(m, dtype=torch.float64), n, m, rate)


def _rounded(step: Step, at: Tensor) -> Tensor:
    older = step.kind == "Upsample" or step.opset < 11
    return _ROUNDINGS[step.get("nearest_mode", "floor" if older else "round_prefer_floor")](at)


def _interpolation(at: Tensor, n: int) -> Tensor:
    """Return the matrix (m, n) that interpolates n samples at m positions."""
    matrix, rows = torch.zeros(len(at), n, dtype=torch.float64), torch.arange(len(at))
    low = at.floor()
    for place, share in ((low, 1 - (at - low)), (low + 1, at - low)):
        matrix.index_put_((rows, place.clamp(0, n - 1).long()), share, accumulate=True)
    return matrix


MOVES: dict[str, Callable[..., Value | tuple[Value, ...]]] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
    "Concat": _concat,
    "Pad": _pad,
    "ReduceSum": _reduce(mean=False),
    "ReduceMean": _reduce(mean=True),
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Resize": _resize,
    "Upsample": _resize,
}
"""Readers by ONNX's names.

They take tape, step and the inputs' values, and return the results.
"""
