"""How do ONNX's operations that only move, copy, add up or average elements read? Shapes, slices, gathers, pads, reductions and pooled means.

Each works on constants (shapes are computed in the file itself) and on what depends on the point. A function `f(x, shift)` works along the
file's axes plus `shift`: a leading axis of 1 that it leaves alone is where the points of a batch go, otherwise they have an axis of their own in front.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calipers.errors import CaptureError, UnsupportedOp
from calipers.graph.tape import Held, Tape, Value

Move = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of the file: its kind, its attributes, the version of the operator set, whether the file leaves its batch size free, and its place."""

    kind: str
    attributes: dict[str, Any]
    opset: int
    free_batch: bool
    where: str
    outputs: int = 1

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)

    def refuse(self, why: str) -> UnsupportedOp:
        """Return the error that names the place."""
        return UnsupportedOp(f"{self.where}: {why}")


def ints(value: Value | None, step: Step) -> list[int]:
    """Return a constant's whole numbers."""
    if not isinstance(value, Tensor):
        raise step.refuse("a shape, index or size that depends on the point cannot be bounded; export the network with constant ones")
    return [int(n) for n in value.reshape(-1).tolist()]


def rearranged(tape: Tape, step: Step, v: Value, move: Move, axes: Iterable[int], mixes: bool = True) -> Value:
    """Return `move` of the value, which touches these axes of the file (>= 0); `mixes`: along them elements meet."""
    if isinstance(v, Tensor):
        return move(v, 0)
    touched = 0 in axes
    if touched and mixes:
        not_along_the_batch(step, v)
    if v.shape[:1] == (1,) and len(v.shape) > 1 and not touched:
        return tape.move(step.kind, [v], lambda x: move(x, 0), v.shape[1:], lambda s: (1, *s))
    made = tape.move(step.kind, [v], lambda x: move(x, 1), v.shape, lambda s: s)
    return made if v.shape else Held(made.number, made.held, ())


def not_along_the_batch(step: Step, v: Value) -> None:
    """Raise `CaptureError` where elements meet along an axis that the file leaves free."""
    if isinstance(v, Held) and step.free_batch and v.shape[:1] == (1,) and len(v.shape) > 1:
        raise CaptureError(f"{step.where}: works along the batch axis, whose size the file leaves free: an answer for one point would depend on the others")


def reshaped(v: Value, shape: Iterable[int]) -> Value:
    """Return the value in another shape of the file: nothing moves."""
    shape = tuple(shape)
    return v.reshape(shape) if isinstance(v, Tensor) else Held(v.number, v.held, shape)


def _axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _axes(tape: Tape, step: Step, v: Value, given: Value | None) -> list[int] | None:
    """Return the axes of an attribute (older operator sets) or an input, None where there are none."""
    found = step.get("axes") if given is None else ints(given, step)
    return None if found is None else [_axis(int(a), len(v.shape)) for a in found]


def _reshape(tape: Tape, step: Step, v: Value, target: Value | None = None) -> Value:
    wanted = [int(n) for n in step.get("shape", [])] if target is None else ints(target, step)
    if not step.get("allowzero", 0):
        wanted = [v.shape[i] if n == 0 else n for i, n in enumerate(wanted)]
    if wanted.count(-1) > 1 or (-1 in wanted and not math.prod(n for n in wanted if n != -1)):
        raise step.refuse(f"the shape {wanted} leaves more than one size open")
    size, rest = math.prod(v.shape), math.prod(n for n in wanted if n != -1)
    found = [size // rest if n == -1 else n for n in wanted]
    if math.prod(found) != size:
        raise step.refuse(f"{size} elements of shape {tuple(v.shape)} do not fit the shape {wanted}; was the file written for a fixed batch above 1?")
    return reshaped(v, found)


def _flatten(tape: Tape, step: Step, v: Value) -> Value:
    axis = _axis(step.get("axis", 1), len(v.shape))
    return reshaped(v, (math.prod(v.shape[:axis]), math.prod(v.shape[axis:])))


def _squeeze(tape: Tape, step: Step, v: Value, axes: Value | None = None) -> Value:
    gone = _axes(tape, step, v, axes)
    return reshaped(v, (n for i, n in enumerate(v.shape) if (n != 1 if gone is None else i not in gone)))


def _unsqueeze(tape: Tape, step: Step, v: Value, axes: Value | None = None) -> Value:
    found = step.get("axes") if axes is None else ints(axes, step)
    new = {_axis(int(a), len(v.shape) + len(found)) for a in found}
    old = iter(v.shape)
    return reshaped(v, (1 if i in new else next(old) for i in range(len(v.shape) + len(new))))


def transposed(tape: Tape, step: Step, v: Value, order: list[int]) -> Value:
    """Return the value with its axes in another order."""
    shape = [v.shape[p] for p in order]
    if [p for p in order if v.shape[p] != 1] == sorted(p for p in order if v.shape[p] != 1):
        return reshaped(v, shape)  # only axes of size 1 change places
    touched = [] if order[0] == 0 else [0]
    return rearranged(tape, step, v, lambda x, s: x.permute(*range(s), *(p + s for p in order)), touched, mixes=False)


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
        return x.index_select(axis + shift, torch.tensor([p % size for p in places], dtype=torch.long, device=x.device))

    return rearranged(tape, step, v, move, [axis])


def _gather(tape: Tape, step: Step, v: Value, index: Value) -> Value:
    axis = _axis(step.get("axis", 0), len(v.shape))
    found = picked(tape, step, v, axis, ints(index, step))
    return reshaped(found, (*v.shape[:axis], *index.shape, *v.shape[axis + 1 :]))


def _slice(tape: Tape, step: Step, v: Value, *given: Value | None) -> Value:
    if given:
        starts, ends, axes, steps = (None if g is None else ints(g, step) for g in (*given, None, None)[:4])
    else:
        starts, ends, axes, steps = step.get("starts"), step.get("ends"), step.get("axes"), None
    assert starts is not None and ends is not None
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = _axis(k if axes is None else axes[k], len(v.shape))
        by = 1 if steps is None else steps[k]
        v = picked(tape, step, v, axis, list(range(v.shape[axis]))[start:end:by])  # out of range and backwards as in Python
    return v


def _split(tape: Tape, step: Step, v: Value, sizes: Value | None = None) -> tuple[Value, ...]:
    axis = _axis(step.get("axis", 0), len(v.shape))
    each = step.get("split") if sizes is None else ints(sizes, step)
    if each is None:
        most = -(-v.shape[axis] // step.outputs)
        each = [min(most, v.shape[axis] - most * k) for k in range(step.outputs)]
    ends = list(itertools.accumulate(each))
    return tuple(picked(tape, step, v, axis, list(range(end - n, end))) for end, n in zip(ends, each, strict=True))


def _concat(tape: Tape, step: Step, *values: Value) -> Value:
    axis = _axis(step.get("axis", 0), len(values[0].shape))
    if all(isinstance(v, Tensor) for v in values):
        return torch.cat([v for v in values if isinstance(v, Tensor)], axis)
    held = tuple(v for v in values if isinstance(v, Held))
    lead = axis > 0 and all(v.shape[0] == 1 for v in values)
    if axis == 0:
        for v in held:
            not_along_the_batch(step, v)
    shapes = [v.shape[1:] if lead else v.shape for v in values]
    place = axis if lead else axis + 1

    def join(*inputs: Tensor) -> Tensor:
        left = iter(inputs)
        parts = [next(left) if isinstance(v, Held) else inputs[0].new_zeros(len(inputs[0]), *s) for v, s in zip(values, shapes, strict=True)]
        return torch.cat(parts, place)

    wanted = [s for v, s in zip(values, shapes, strict=True) if isinstance(v, Held)]
    made = tape.moved(step.kind, tuple(tape.view(v, s) for v, s in zip(held, wanted, strict=True)), join)
    result = Held(made.number, made.held, (1, *made.held) if lead else made.held)
    if len(held) == len(values):
        return result
    filled = [v if isinstance(v, Tensor) else torch.zeros(v.shape, dtype=tape.dtype, device=tape.device) for v in values]
    return tape.scale(result, torch.ones((), dtype=tape.dtype, device=tape.device), torch.cat(filled, axis))


def padded(tape: Tape, step: Step, v: Value, pairs: dict[int, tuple[int, int]], value: float = 0.0) -> Value:
    """Return the value with (before, after) elements of a number around some axes."""
    pairs = {axis: pair for axis, pair in pairs.items() if pair != (0, 0)}
    if not pairs:
        return v

    def around(x: Tensor, shift: int, filling: float) -> Tensor:
        amounts = [n for axis in range(x.dim() - 1, shift - 1, -1) for n in pairs.get(axis - shift, (0, 0))]
        return functional.pad(x, amounts, value=filling)

    made = rearranged(tape, step, v, lambda x, s: around(x, s, 0.0), pairs, mixes=False)
    if value == 0:
        return made
    border = around(torch.zeros(v.shape, dtype=tape.dtype, device=tape.device), 0, value)
    one = torch.ones((), dtype=tape.dtype, device=tape.device)
    return tape.scale(made, one, border) if isinstance(made, Held) else made + border


def _pad(tape: Tape, step: Step, v: Value, *given: Value | None) -> Value:
    amounts, filling, where = (*given, None, None, None)[:3]
    pads = step.get("pads") if amounts is None else ints(amounts, step)
    value = step.get("value", 0.0) if filling is None else float(filling)  # type: ignore[arg-type]
    axes = list(range(len(v.shape))) if where is None else [_axis(a, len(v.shape)) for a in ints(where, step)]
    pairs = {axis: (pads[k], pads[k + len(axes)]) for k, axis in enumerate(axes)}
    mode = step.get("mode", "constant")
    if mode == "constant":
        return padded(tape, step, v, pairs, value)
    for axis, (before, after) in pairs.items():
        n = v.shape[axis]
        places = range(-before, n + after)
        reflected = {"edge": lambda p, n=n: min(max(p, 0), n - 1), "reflect": lambda p, n=n: n - 1 - abs(n - 1 - abs(p)), "wrap": lambda p, n=n: p % n}
        if mode not in reflected or (mode == "reflect" and max(before, after) >= n):
            raise step.refuse(f"padding by {mode!r} is not read")
        v = picked(tape, step, v, axis, [reflected[mode](p) for p in places])
    return v


def _reduce(mean: bool) -> Callable[..., Value]:
    def build(tape: Tape, step: Step, v: Value, axes: Value | None = None) -> Value:
        over = _axes(tape, step, v, axes)
        if not over:
            if step.get("noop_with_empty_axes", 0):
                return v
            over = list(range(len(v.shape)))
        keep = bool(step.get("keepdims", 1))
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
    for axis, n in enumerate(ints(repeats, step)):
        v = picked(tape, step, v, axis, list(range(v.shape[axis])) * n)
    return v


def _depth_to_space(tape: Tape, step: Step, v: Value) -> Value:
    b, (_, c, h, w) = step.get("blocksize"), v.shape
    deep = (1, b, b, c // b**2, h, w) if step.get("mode", "DCR") == "DCR" else (1, c // b**2, b, b, h, w)
    order = [0, 3, 4, 1, 5, 2] if step.get("mode", "DCR") == "DCR" else [0, 1, 4, 2, 5, 3]
    return reshaped(transposed(tape, step, reshaped(v, deep), order), (1, c // b**2, h * b, w * b))


def _space_to_depth(tape: Tape, step: Step, v: Value) -> Value:
    b, (_, c, h, w) = step.get("blocksize"), v.shape
    return reshaped(transposed(tape, step, reshaped(v, (1, c, h // b, b, w // b, b)), [0, 3, 5, 1, 2, 4]), (1, c * b * b, h // b, w // b))


def _resize(tape: Tape, step: Step, v: Value, *given: Value | None) -> Value:
    """Nearest and linear interpolation, an axis at a time, each a matrix of non-negative weights."""
    if step.kind == "Upsample" or step.opset < 11:
        scales, sizes = (given[0] if given else torch.tensor(step.get("scales"), dtype=torch.float64)), None
    else:
        _, scales, sizes = (*given, None, None, None)[:3]
    if step.get("axes") is not None or step.get("antialias", 0) or step.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise step.refuse("resizing with axes, antialias or keep_aspect_ratio_policy is not read")
    rates = [float(s) for s in scales.reshape(-1).tolist()] if isinstance(scales, Tensor) and scales.numel() else None
    target = ints(sizes, step) if rates is None else [math.floor(n * s) for n, s in zip(v.shape, rates, strict=True)]
    for axis, (n, m) in enumerate(zip(v.shape, target, strict=True)):
        if n == m and (rates is None or rates[axis] == 1):
            continue
        matrix = _interpolation(step, n, m, m / n if rates is None else rates[axis]).to(dtype=tape.dtype, device=tape.device)
        if bool(((matrix == 0) | (matrix == 1)).all()):
            v = picked(tape, step, v, axis, matrix.argmax(1).tolist())
        else:
            v = rearranged(tape, step, v, lambda x, s, a=axis, w=matrix: torch.movedim(x, a + s, -1).matmul(w.T.to(x)).movedim(-1, a + s), [axis])  # type: ignore[misc]
    return v


def _interpolation(step: Step, n: int, m: int, rate: float) -> Tensor:
    """Return the matrix (m, n) that makes m samples of n."""
    default = "asymmetric" if step.kind == "Upsample" or step.opset < 11 else "half_pixel"
    kind = step.get("coordinate_transformation_mode", default)
    at: dict[str, Callable[[int], float]] = {
        "asymmetric": lambda i: i / rate,
        "half_pixel": lambda i: (i + 0.5) / rate - 0.5,
        "pytorch_half_pixel": lambda i: (i + 0.5) / rate - 0.5 if m > 1 else 0.0,
        "align_corners": lambda i: i * (n - 1) / (m - 1) if m > 1 else 0.0,
    }
    nearest: dict[str, Callable[[float], int]] = {
        "round_prefer_floor": lambda p: math.ceil(p - 0.5),
        "round_prefer_ceil": lambda p: math.floor(p + 0.5),
        "floor": math.floor,
        "ceil": math.ceil,
    }
    mode, rounding = step.get("mode", "nearest"), step.get("nearest_mode", "floor" if default == "asymmetric" else "round_prefer_floor")
    if kind not in at or mode not in ("nearest", "linear", "bilinear", "trilinear"):
        raise step.refuse(f"resizing by {mode!r} with coordinates {kind!r} is not read")
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        p = at[kind](i)
        if mode == "nearest":
            matrix[i, min(max(nearest[rounding](p), 0), n - 1)] = 1
        else:
            low, share = math.floor(p), p - math.floor(p)
            matrix[i, min(max(low, 0), n - 1)] += 1 - share
            matrix[i, min(max(low + 1, 0), n - 1)] += share
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
"""Readers by ONNX's names: tape, step and the inputs' values to the results."""
