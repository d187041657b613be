"""Readers of ONNX operations on windows: convolutions and pooling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from calipers.graph.file_builder import FileResult, Tape, Value
from calipers.graph.onnx.layers import constant
from calipers.graph.onnx.shape_ops import padded
from calipers.graph.onnx.steps import Step
from calipers.graph.products import MaxPool, windows

_BLOCK = 2**22  # numbers of windows that are read at once


def _image(tape: Tape, step: Step, v: Value) -> FileResult:
    """Return the value held as channels and places.

    The file's own batch axis must be 1.
    """
    if not isinstance(v, FileResult) or len(v.shape) < 3 or v.shape[0] != 1:
        raise step.refuse(f"expects one image of shape (1, channels, ...), got {tuple(v.shape)}")
    return tape.view(v, v.shape[1:])


def _windows(
    step: Step, size: tuple[int, ...], kernel: list[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return strides, dilations, and the padding before and after each axis.

    `auto_pad` is resolved.
    """
    rank = len(size)
    strides, dilations, given = (
        _each(step, "strides", rank),
        _each(step, "dilations", rank),
        step.get("pads") or [0] * 2 * rank,
    )
    auto = step.get("auto_pad", "NOTSET")
    if (
        step.get("kernel_shape", kernel) != kernel
        or auto not in _PADDINGS
        or len(given) != 2 * rank
        or (auto != "NOTSET" and any(given))
    ):
        raise step.damaged(
            f"the padding {auto} {given} or the window {step.get('kernel_shape')} does not fit a "
            f"window of {kernel}"
        )
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            for n, s, k, d in zip(size, strides, kernel, dilations, strict=True)
        ]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        return strides, dilations, *((less, more) if auto == "SAME_UPPER" else (more, less))
    return strides, dilations, given[:rank], given[rank:]


_PADDINGS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


def _each(step: Step, name: str, rank: int) -> list[int]:
    """Return the strides or dilations, one positive number per window axis."""
    found: list[int] = step.get(name) or [1] * rank
    if len(found) != rank or min(found) < 1:
        raise step.damaged(f"{name} {found} for windows of {rank} axes")
    return found


def _conv(tape: Tape, step: Step, v: Value, weight: Value, bias: Value | None = None) -> Value:
    w = constant(weight, step, "the kernel")
    b = None if bias is None else constant(bias, step, "the bias")
    x, rank = _image(tape, step, v), w.dim() - 2
    if len(x.held) != rank + 1 or x.held[0] != w.shape[1] * step.get("group", 1):
        raise step.damaged(
            f"kernels of shape {tuple(w.shape)} in {step.get('group', 1)} groups do not fit an "
            f"image of shape {x.held}"
        )
    strides, dilations, before, after = _windows(step, x.held[1:], list(w.shape[2:]))
    if before != after or min(before) < 0:
        x = _image(
            tape,
            step,
            padded(
                tape,
                step,
                x,
                {2 + i: pair for i, pair in enumerate(zip(before, after, strict=True))},
            ),
        )
        before = [0] * rank
    made = tape.call(
        f"aten.conv{rank}d.default", x, w, b, strides, before, dilations, step.get("group", 1)
    )
    return FileResult(made.number, made.held, (1, *made.held))


def _conv_transpose(
    tape: Tape, step: Step, v: Value, weight: Value, bias: Value | None = None
) -> Value:
    """Write a transposed convolution.

    It is a convolution of the input, with zeros between its elements, by the flipped kernel.
    """
    w, x = constant(weight, step, "the kernel"), _image(tape, step, v)
    rank, groups, size = w.dim() - 2, step.get("group", 1), x.held[1:]
    if (
        len(size) != rank
        or x.held[0] != w.shape[0]
        or w.shape[0] % groups
        or step.get("kernel_shape", list(w.shape[2:])) != list(w.shape[2:])
    ):
        raise step.damaged(
            f"kernels of shape {tuple(w.shape)} in {groups} groups do not fit an image of shape "
            f"{x.held}"
        )
    strides, dilations = _each(step, "strides", rank), _each(step, "dilations", rank)
    before, after = _transpose_pads(step, size, list(w.shape[2:]), strides, dilations)
    spread = [(n - 1) * s + 1 for n, s in zip(size, strides, strict=True)]
    step.room((x.held[0], *spread))

    def between(t: Tensor) -> Tensor:
        wide = t.new_zeros(*t.shape[:2], *spread)
        places: Any = (..., *(slice(None, None, s) for s in strides))
        wide[places] = t
        return wide

    if max(strides) > 1:
        made = tape.moved("spread", (x,), between)
        x = FileResult(made.number, made.held, (1, *made.held))
    reach = [(k - 1) * d for k, d in zip(w.shape[2:], dilations, strict=True)]
    x = _image(
        tape,
        step,
        _trimmed(
            tape, step, x, [(r - p, r - q) for r, p, q in zip(reach, before, after, strict=True)]
        ),
    )
    turned = (
        w.flip(*range(2, w.dim()))
        .reshape(groups, w.shape[0] // groups, *w.shape[1:])
        .transpose(1, 2)
        .flatten(0, 1)
    )
    b = None if bias is None else constant(bias, step, "the bias")
    out = tape.call(
        f"aten.conv{rank}d.default", x, turned, b, [1] * rank, [0] * rank, dilations, groups
    )
    return FileResult(out.number, out.held, (1, *out.held))


def _trimmed(tape: Tape, step: Step, x: FileResult, pairs: list[tuple[int, int]]) -> Value:
    return padded(tape, step, x, {2 + i: pair for i, pair in enumerate(pairs)})


def _transpose_pads(
    step: Step, size: tuple[int, ...], kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[int], list[int]]:
    """Return the elements cut off before and after each axis.

    Elements that `output_padding` adds at the end are subtracted from those cut off there.
    """
    rank = len(size)
    extra, pads, auto = (
        step.get("output_padding") or [0] * rank,
        step.get("pads") or [0] * 2 * rank,
        step.get("auto_pad", "NOTSET"),
    )
    if (
        auto not in _PADDINGS
        or len(pads) != 2 * rank
        or len(extra) != rank
        or (auto != "NOTSET" and any(pads))
    ):
        raise step.damaged(
            f"the padding {auto} {pads}, or {extra} at the end, does not fit an image of {rank} "
            "axes"
        )
    wanted = step.get("output_shape") or (
        [n * s for n, s in zip(size, strides, strict=True)] if auto.startswith("SAME") else None
    )
    if wanted is None:
        return pads[:rank], [q - e for q, e in zip(pads[rank:], extra, strict=True)]
    full = [
        s * (n - 1) + e + (k - 1) * d + 1
        for n, s, k, d, e in zip(size, strides, kernel, dilations, extra, strict=True)
    ]
    if (
        any(f < w for f, w in zip(full, wanted[-rank:], strict=True))
        or len(wanted) != rank
        or auto == "VALID"
        or any(pads)
    ):
        raise step.refuse(
            f"the output_shape {wanted} is not read where {full} is as large as it gets, or where "
            "paddings are given: leave it out"
        )
    total = [f - w for f, w in zip(full, wanted, strict=True)]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    before, after = (less, more) if auto == "SAME_UPPER" else (more, less)
    return before, [q - e for q, e in zip(after, extra, strict=True)]


def _max_pool(tape: Tape, step: Step, v: Value) -> Value:
    x, kernel = _image(tape, step, v), step.get("kernel_shape")
    strides, dilations, before, after = _windows(step, x.held[1:], kernel)
    ceil = bool(step.get("ceil_mode", 0))
    if before != after or max(2 * p - k for p, k in zip(before, kernel, strict=True)) > 0:
        made = _max_of(tape, step, x, _places(step, x.held[1:], kernel))
    else:
        made = tape.call(
            f"aten.max_pool{len(kernel)}d.default", x, kernel, strides, before, dilations, ceil
        )
    return FileResult(made.number, made.held, (1, *made.held))


class _Places(NamedTuple):
    """The places of an image that each window reads, (windows, k).

    Places outside the image hold the number of its elements. `padded` counts the places of each
    window in the image or its padding; `size` is the number of windows along each axis.
    """

    windows: Tensor
    padded: Tensor
    size: tuple[int, ...]


def _places(step: Step, size: tuple[int, ...], kernel: list[int]) -> _Places:
    """Return the windows of a pool with any padding.

    With `ceil_mode` the last window may reach beyond the padding, if it begins before its end.
    """
    strides, dilations, before, after = _windows(step, size, kernel)
    out = []
    for n, k, s, d, p, q in zip(size, kernel, strides, dilations, before, after, strict=True):
        room = n + p + q - (k - 1) * d - 1
        count = (-(-room // s) if step.get("ceil_mode", 0) else room // s) + 1
        out.append(count - 1 if (count - 1) * s >= n + p else count)
    if min(out) < 1:
        raise step.damaged(f"windows of {kernel} do not fit an image of {size}")
    wider = tuple(n + p + q for n, p, q in zip(size, before, after, strict=True))
    step.room((math.prod(out), math.prod(kernel)))
    shape, window = tuple(out), tuple(kernel)
    found, within = (
        windows(whole, shape, window, tuple(strides), tuple(pads), tuple(dilations))
        for whole, pads in ((size, before), (wider, [0] * len(size)))
    )
    return _Places(found, (within < math.prod(wider)).sum(-1), shape)


def _over_windows(
    x: Tensor, places: Tensor, outside: float, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """Reduce the elements of each window, to (M, channels, windows).

    The elements (M, channels, windows, k) are read a block of windows at a time.
    """
    flat = functional.pad(x.flatten(2), (0, 1), value=outside)
    rows = max(1, _BLOCK // (flat[..., 0].numel() * places.shape[1]))
    return torch.cat([reduce(flat[:, :, some.to(x.device)]) for some in places.split(rows)], 2)


def _max_of(tape: Tape, step: Step, x: FileResult, places: _Places) -> FileResult:
    channels, count = x.held[0], math.prod(x.held[1:])
    found, shape = places.windows, (x.held[0], *places.size)
    if bool((found == count).all(-1).any()):
        raise step.refuse("a window of a max-pool that lies in the padding has no largest element")
    every = torch.cat(
        [torch.where(found == count, channels * count, found + k * count) for k in range(channels)]
    )

    def run(t: Tensor) -> Tensor:
        largest = _over_windows(t, found, -math.inf, lambda window: window.amax(-1))
        return largest.reshape(len(t), *shape)

    made = tape.several(lambda w, t: w.write(MaxPool(run, every, shape), t), x)
    assert made is not None
    return made


def _average_pool(tape: Tape, step: Step, v: Value) -> Value:
    x, kernel = _image(tape, step, v), step.get("kernel_shape")
    strides, dilations, before, after = _windows(step, x.held[1:], kernel)
    if step.get("ceil_mode", 0) or max(dilations) > 1:
        made = _mean_of(tape, step, x, _places(step, x.held[1:], kernel))
        return FileResult(made.number, made.held, (1, *made.held))
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    around = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
    shares = None if step.get("count_include_pad", 0) or not any(around) else 1 / pool(
        functional.pad(torch.ones(1, 1, *x.held[1:], dtype=tape.dtype, device=tape.device), around),
        kernel,
        strides
    )  # fmt: skip

    def run(t: Tensor) -> Tensor:
        mean: Tensor = pool(functional.pad(t, around), kernel, strides)
        return mean if shares is None else mean * shares.to(mean)

    made = tape.moved(step.kind, (x,), run)
    return FileResult(made.number, made.held, (1, *made.held))


def _mean_of(tape: Tape, step: Step, x: FileResult, places: _Places) -> FileResult:
    found, shape = places.windows, (x.held[0], *places.size)
    inside = (found < math.prod(x.held[1:])).sum(-1)
    divisor = places.padded if step.get("count_include_pad", 0) else inside
    if bool((divisor == 0).any()):
        raise step.refuse("a window of an average-pool that lies in the padding has no mean")

    def run(t: Tensor) -> Tensor:
        total = _over_windows(t, found, 0.0, lambda window: window.sum(-1))
        return (total / divisor.to(t)).reshape(len(t), *shape)

    return tape.moved(step.kind, (x,), run)


def _global_pool(tape: Tape, step: Step, v: Value) -> Value:
    x = _image(tape, step, v)
    size = x.held[1:]
    if step.kind == "GlobalMaxPool":
        made = tape.call(f"aten.max_pool{len(size)}d.default", x, list(size), list(size))
    else:
        made = tape.moved(step.kind, (x,), lambda t: t.mean(tuple(range(2, t.dim())), keepdim=True))
    return FileResult(made.number, made.held, (1, *made.held))


WINDOWS: dict[str, Callable[..., Value]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
}
"""Readers by ONNX's names.

They take tape, step and the inputs' values, and return the result.
"""
