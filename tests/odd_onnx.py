"""ONNX files as strangers write them: small models over every operation that is read, attributes at and beyond their range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

OPSETS = range(6, 29)
Rng = np.random.Generator


class Node(NamedTuple):
    """An operation: the shape of the point (its first input), constants behind it (None where left out), attributes, and how many results."""

    kind: str
    shape: tuple[int, ...]
    constants: list[Any]
    attributes: dict[str, Any]
    outputs: int = 1


def pick(rng: Rng, values: Any) -> Any:
    """Return one of the values."""
    values = list(values)
    return values[int(rng.integers(len(values)))]


def numbers(rng: Rng, *shape: int) -> np.ndarray:
    """Return random floats, now and then large, tiny or whole ones."""
    scale = pick(rng, [1, 1, 1, 1, 0.1, 30])
    found = (rng.standard_normal(shape) * scale).astype(np.float32)
    return np.round(found) if rng.random() < 0.1 else found


def ints(*values: int) -> np.ndarray:
    """Return a tensor of whole numbers."""
    return np.array(values, dtype=np.int64)


def some(rng: Rng, most: int = 4, rank: int | None = None) -> tuple[int, ...]:
    """Return a shape of a point, mostly with a leading 1 for its batch."""
    rank = int(rng.integers(1, 5)) if rank is None else rank
    shape = tuple(int(n) for n in rng.integers(1, most + 1, rank))
    return (1, *shape[1:]) if rng.random() < 0.8 else shape


def broadcast(rng: Rng, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape that broadcasts with this one, or nearly always does."""
    found = tuple(
        n if rng.random() < 0.7 else 1 for n in shape[int(rng.integers(len(shape) + 1)) :]
    )
    found = (int(rng.integers(1, 4)), *found) if rng.random() < 0.1 else found
    return (*found[:-1], 3) if found and rng.random() < 0.05 else found


def axis(rng: Rng, rank: int) -> int:
    """Return an axis, now and then one that there is not."""
    return (
        int(rng.integers(-rank, rank)) if rng.random() < 0.93 else pick(rng, [rank, -rank - 1, 7])
    )


def axes(rng: Rng, rank: int) -> list[int]:
    """Return a few axes, now and then one twice."""
    chosen = [int(a) for a in rng.permutation(rank)[: int(rng.integers(1, rank + 1))]]
    chosen = [a - rank if rng.random() < 0.3 else a for a in chosen]
    return chosen + chosen[:1] if rng.random() < 0.04 else chosen


# ---- what each operation takes -----------------------------------------------------------------------------------------------------------------------


def _plain(rng: Rng, kind: str, opset: int) -> Node:
    return Node(kind, some(rng), [], {})


def _pair(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    return Node(kind, shape, [numbers(rng, *broadcast(rng, shape))], {})


def _many(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    return Node(
        kind,
        shape,
        [numbers(rng, *broadcast(rng, shape)) for _ in range(int(rng.integers(0, 3)))],
        {},
    )


def _power(rng: Rng, kind: str, opset: int) -> Node:
    plain = [2.0, 3.0, 0.5, -1.0, 0.0, 1.0]
    exponent = pick(
        rng, [*(np.float32(p) for p in plain), np.array([2, 3], np.float32), np.int64(2)]
    )
    shape = some(rng)
    if rng.random() < 0.3:
        exponent = np.array([pick(rng, plain) for _ in range(shape[-1])], np.float32)
    return Node(kind, shape, [exponent], {})


def _clip(rng: Rng, kind: str, opset: int) -> Node:
    low, high = (np.float32(v) for v in rng.standard_normal(2))
    if opset < 11:
        return Node(
            kind,
            some(rng),
            [],
            {k: float(v) for k, v in (("min", low), ("max", high)) if rng.random() < 0.8},
        )
    return Node(kind, some(rng), [v if rng.random() < 0.8 else None for v in (low, high)], {})


def _gemm(rng: Rng, kind: str, opset: int) -> Node:
    n, k, m, a, b = (
        *(int(v) for v in rng.integers(1, 5, 3)),
        int(rng.random() < 0.3),
        int(rng.random() < 0.5),
    )
    n = 1 if rng.random() < 0.7 else n
    bias = pick(rng, [None, (m,), (1, m), (n, m), (), (1,), (n, 1)])
    found = {
        "alpha": float(pick(rng, [1, 0.5, -2])),
        "beta": float(pick(rng, [1, 0, 3])),
        "transA": a,
        "transB": b,
    }
    extra = [] if bias is None and opset >= 11 else [numbers(rng, *(bias or ()))]
    found = {k: v for k, v in found.items() if rng.random() < 0.8 or v == 1}
    return Node(
        kind, (k, n) if a else (n, k), [numbers(rng, *((m, k) if b else (k, m))), *extra], found
    )


def _matmul(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    other = pick(
        rng,
        [
            (shape[-1],),
            (shape[-1], 3),
            (*shape[:-2], shape[-1], 2),
            (2, shape[-1], 2),
            (1, shape[-1], 2),
        ],
    )
    return Node(kind, shape, [numbers(rng, *other)], {})


def _window(rng: Rng, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "strides": [int(v) for v in rng.integers(1, 4, rank)],
        "dilations": [int(v) for v in rng.integers(1, 3, rank)],
    }
    way = pick(rng, ["none", "pads", "pads", "SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
    if way == "pads":
        found["pads"] = [int(v) for v in rng.integers(0, 3, 2 * rank)]
    elif way != "none":
        found["auto_pad"] = way
    return {k: v for k, v in found.items() if rng.random() < 0.7}


def _image(rng: Rng, channels: int | None = None) -> tuple[tuple[int, ...], int]:
    rank = pick(rng, [1, 2, 2, 2, 3])
    return (
        1,
        channels or int(rng.integers(1, 4)),
        *(int(n) for n in rng.integers(3, 7, rank)),
    ), rank


def _conv(rng: Rng, kind: str, opset: int) -> Node:
    group, each, out = pick(rng, [1, 1, 2]), int(rng.integers(1, 3)), int(rng.integers(1, 3))
    shape, rank = _image(rng, group * each)
    kernel = [int(k) for k in rng.integers(1, 4, rank)]
    found = {
        **_window(rng, rank),
        **({"group": group} if group > 1 else {}),
        **({"kernel_shape": kernel} if rng.random() < 0.5 else {}),
    }
    if kind == "Conv":
        weight, outs = (group * out, each, *kernel), group * out
    else:
        weight, outs = (group * each, out, *kernel), group * out
        if rng.random() < 0.3:
            found["output_padding"] = [int(rng.integers(0, 2)) for _ in range(rank)]
        if rng.random() < 0.3:
            found["output_shape"] = [
                int(n * pick(rng, [1, 2, 3])) + int(rng.integers(-1, 2)) for n in shape[2:]
            ]
    return Node(
        kind,
        shape,
        [numbers(rng, *weight), *([numbers(rng, outs)] if rng.random() < 0.5 else [])],
        found,
    )


def _pool(rng: Rng, kind: str, opset: int) -> Node:
    shape, rank = _image(rng)
    found = {"kernel_shape": [int(k) for k in rng.integers(1, 4, rank)], **_window(rng, rank)}
    found = {k: v for k, v in found.items() if k in defs.get_schema(kind, opset).attributes}
    for name, share in (("ceil_mode", 0.3), ("count_include_pad", 0.4), ("storage_order", 0.1)):
        if rng.random() < share and name in defs.get_schema(kind, opset).attributes:
            found[name] = 1
    return Node(kind, shape, [], found)


def _picture(rng: Rng, kind: str, opset: int) -> Node:
    return Node(kind, _image(rng)[0], [], {})


def _batch_norm(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng, rank=int(rng.integers(2, 5)))
    c = shape[1]
    return Node(
        kind,
        shape,
        [numbers(rng, c), numbers(rng, c), numbers(rng, c), np.abs(numbers(rng, c)) + 0.1],
        {"epsilon": float(pick(rng, [1e-5, 0.1]))},
    )


def _instance_norm(rng: Rng, kind: str, opset: int) -> Node:
    shape, _ = _image(rng, pick(rng, [2, 4]))
    if kind == "InstanceNormalization":
        return Node(
            kind, shape, [numbers(rng, shape[1]), numbers(rng, shape[1])], {"epsilon": 0.01}
        )
    groups = pick(rng, [1, 2])
    each = shape[1] if opset >= 21 else groups
    return Node(kind, shape, [numbers(rng, each), numbers(rng, each)], {"num_groups": groups})


def _layer_norm(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    place = int(rng.integers(-len(shape), len(shape)))
    size = shape[place:]
    return Node(
        kind,
        shape,
        [numbers(rng, *size), *([numbers(rng, *size)] if rng.random() < 0.6 else [])],
        {"axis": place, "epsilon": 0.02},
    )


def _along(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    return Node(kind, shape, [], {"axis": axis(rng, len(shape))} if rng.random() < 0.8 else {})


def _prelu(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    return Node(kind, shape, [numbers(rng, *pick(rng, [(1,), shape[1:], shape]))], {})


def _reshape(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    target = list(rng.permutation(shape)) if rng.random() < 0.5 else [-1]
    target = (
        [0, *target[1:]]
        if rng.random() < 0.2
        else [-1, *target[1:]]
        if rng.random() < 0.3
        else target
    )
    return Node(
        kind,
        shape,
        [ints(*(int(n) for n in target))],
        {"allowzero": 1} if rng.random() < 0.1 and opset >= 14 else {},
    )


def _squeeze(rng: Rng, kind: str, opset: int) -> Node:
    shape = tuple(1 if rng.random() < 0.6 else n for n in some(rng))
    gone = [a for a, n in enumerate(shape) if n == 1 and rng.random() < 0.7]
    gone = (
        [*gone, 0]
        if rng.random() < 0.06
        else [a - len(shape) if rng.random() < 0.3 else a for a in gone]
    )
    if kind == "Unsqueeze":
        gone = axes(rng, len(shape) + 1)
    return Node(
        kind,
        shape,
        [ints(*gone)] if opset >= 13 and gone else [],
        {"axes": gone} if opset < 13 and gone else {},
    )


def _transpose(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    order = [int(a) for a in rng.permutation(len(shape))]
    return Node(kind, shape, [], {"perm": order} if rng.random() < 0.9 else {})


def _gather(rng: Rng, kind: str, opset: int) -> Node:
    shape, place = some(rng), 0
    place = int(rng.integers(-len(shape), len(shape)))
    n = shape[place]
    index = (
        rng.integers(-n, n, pick(rng, [(), (2,), (2, 2), (1,)]))
        if rng.random() < 0.95
        else np.int64(n)
    )
    return Node(
        kind,
        shape,
        [np.asarray(index, dtype=np.int64)],
        {"axis": place} if rng.random() < 0.9 or place == 0 else {},
    )


def _slice(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng, 6)
    over = [a % len(shape) for a in axes(rng, len(shape))]
    starts, ends = ([int(v) for v in rng.integers(-8, 9, len(over))] for _ in range(2))
    steps = [pick(rng, [1, 1, 2, -1, -2]) for _ in over]
    if rng.random() < 0.7:  # mostly something is left
        starts = [
            pick(rng, [0, 0, -shape[a], -9] if by > 0 else [-1, shape[a] - 1, 9])
            for a, by in zip(over, steps, strict=True)
        ]
        ends = [
            pick(rng, [shape[a], 2**40, -1] if by > 0 else [-9, -(2**40), 0])
            for a, by in zip(over, steps, strict=True)
        ]
    if opset < 10:
        return Node(
            kind,
            shape,
            [],
            {"starts": starts, "ends": ends, **({"axes": over} if rng.random() < 0.8 else {})},
        )
    return Node(
        kind,
        shape,
        [ints(*starts), ints(*ends), ints(*over), *([ints(*steps)] if rng.random() < 0.7 else [])],
        {},
    )


def _split(rng: Rng, kind: str, opset: int) -> Node:
    shape, parts = some(rng, 6), int(rng.integers(1, 4))
    place = int(rng.integers(-len(shape), len(shape)))
    cuts = np.sort(rng.integers(0, shape[place] + 1, parts - 1))
    sizes = [int(n) for n in np.diff([0, *cuts, shape[place]])]
    found: dict[str, Any] = {"axis": place} if rng.random() < 0.9 else {}
    if rng.random() < 0.5:
        return Node(
            kind, shape, [], {**found, **({"num_outputs": parts} if opset >= 18 else {})}, parts
        )
    return Node(
        kind,
        shape,
        [ints(*sizes)] if opset >= 13 else [],
        {**found, **({"split": sizes} if opset < 13 else {})},
        parts,
    )


def _concat(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    place = int(rng.integers(-len(shape), len(shape)))
    other = list(shape)
    other[place] = int(rng.integers(1, 4))
    return Node(kind, shape, [numbers(rng, *other)] if rng.random() < 0.8 else [], {"axis": place})


def _pad(rng: Rng, kind: str, opset: int) -> Node:
    shape, mode = some(rng, 5), pick(rng, ["constant", "constant", "reflect", "edge", "wrap"])
    amounts = [int(v) for v in rng.integers(-1 if rng.random() < 0.2 else 0, 3, 2 * len(shape))]
    if mode == "reflect":
        amounts = [min(a, shape[k % len(shape)] - 1) for k, a in enumerate(amounts)]
    found = {"mode": mode} if rng.random() < 0.9 else {}
    if opset < 11:
        return Node(
            kind,
            shape,
            [],
            {**found, "pads": amounts, **({"value": 0.7} if rng.random() < 0.5 else {})},
        )
    more = [np.float32(0.3) if rng.random() < 0.6 else None]
    if opset >= 18 and rng.random() < 0.3:
        over = sorted({a % len(shape) for a in axes(rng, len(shape))})
        amounts = [amounts[a + k * len(shape)] for k in range(2) for a in over]
        more.append(ints(*over))  # type: ignore[arg-type]
    return Node(kind, shape, [ints(*amounts), *more], found)


def _reduce(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    found: dict[str, Any] = {"keepdims": int(rng.integers(2))} if rng.random() < 0.7 else {}
    over = axes(rng, len(shape)) if rng.random() < 0.8 else []
    by_input = opset >= (13 if kind == "ReduceSum" else 18)
    if by_input and rng.random() < 0.2:
        found["noop_with_empty_axes"] = 1
    return Node(
        kind,
        shape,
        [ints(*over)] if by_input and (over or rng.random() < 0.3) else [],
        {**found, **({"axes": over} if over and not by_input else {})},
    )


def _expand(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    target = broadcast(rng, tuple(n if n > 1 else int(rng.integers(1, 4)) for n in shape))
    return Node(kind, shape, [ints(*target)], {})


def _tile(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    return Node(
        kind,
        shape,
        [ints(*(int(n) for n in rng.integers(0 if rng.random() < 0.1 else 1, 4, len(shape))))],
        {},
    )


def _blocks(rng: Rng, kind: str, opset: int) -> Node:
    b, c = pick(rng, [1, 2, 3]), int(rng.integers(1, 3))
    shape = (1, c * b * b, 2, 3) if kind == "DepthToSpace" else (1, c, 2 * b, 3 * b)
    found: dict[str, Any] = {"blocksize": b}
    if "mode" in defs.get_schema(kind, opset).attributes and rng.random() < 0.6:
        found["mode"] = pick(rng, ["DCR", "CRD"])
    return Node(kind, shape, [], found)


def _resize(rng: Rng, kind: str, opset: int) -> Node:
    shape, rank = _image(rng)
    scales = [1.0, 1.0, *(float(pick(rng, [1, 2, 0.5, 1.5, 3, 0.7])) for _ in range(rank))]
    mode = pick(
        rng,
        ["nearest", "nearest", "linear", "cubic"]
        if kind == "Resize" and opset >= 11
        else ["nearest", "linear"],
    )
    found: dict[str, Any] = {"mode": mode} if rng.random() < 0.9 else {}
    if kind == "Upsample" or opset < 11:
        scales = [max(1.0, s) for s in scales] if kind == "Upsample" else scales
        return Node(
            kind,
            shape,
            [np.array(scales, np.float32)] if opset >= 9 else [],
            found if opset >= 9 else {**found, "scales": scales},
        )
    kinds = [
        "half_pixel",
        "pytorch_half_pixel",
        "align_corners",
        "asymmetric",
        "tf_crop_and_resize",
        "half_pixel_symmetric",
    ]
    if rng.random() < 0.7:
        found["coordinate_transformation_mode"] = pick(rng, kinds[:5] if opset < 19 else kinds)
    if rng.random() < 0.5:
        found["nearest_mode"] = pick(
            rng, ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
        )
    for name, value in (
        ("exclude_outside", 1),
        ("antialias", 1),
        ("cubic_coeff_a", -0.5),
        ("extrapolation_value", 1.0),
    ):
        if rng.random() < 0.07 and name in defs.get_schema(kind, opset).attributes:
            found[name] = value
    if rng.random() < 0.7:
        return Node(kind, shape, [np.array([], np.float32), np.array(scales, np.float32)], found)
    return Node(
        kind,
        shape,
        [
            np.array([], np.float32),
            np.array([], np.float32),
            ints(*shape[:2], *(int(n) for n in rng.integers(1, 9, rank))),
        ],
        found,
    )


def _recurrent(rng: Rng, kind: str, opset: int) -> Node:
    gates, way = (
        {"RNN": 1, "GRU": 3, "LSTM": 4}[kind],
        pick(rng, ["forward", "forward", "reverse", "bidirectional"]),
    )
    ways, steps, features, size = 1 + (way == "bidirectional"), int(rng.integers(1, 4)), 2, 2
    constants: list[Any] = [
        rng.standard_normal((ways, gates * size, n)).astype(np.float32) for n in (features, size)
    ]
    constants.append(
        rng.standard_normal((ways, 2 * gates * size)).astype(np.float32)
        if rng.random() < 0.7
        else None
    )
    if rng.random() < 0.3:
        constants += [None, rng.standard_normal((ways, 1, size)).astype(np.float32)]
    found: dict[str, Any] = {
        "hidden_size": size,
        **({"direction": way} if way != "forward" else {}),
    }
    if kind == "GRU" and rng.random() < 0.5:
        found["linear_before_reset"] = 1
    if rng.random() < 0.2:
        found["activations"] = [
            pick(rng, ["Sigmoid", "Tanh", "Relu"])
            for _ in range(ways * {"RNN": 1, "GRU": 2, "LSTM": 3}[kind])
        ]
    for name, value in (("clip", 0.5), ("layout", 1), ("input_forget", 1)):
        if rng.random() < 0.05 and name in defs.get_schema(kind, opset).attributes:
            found[name] = value
    return Node(kind, (steps, 1, features), constants, found, pick(rng, [1, 1, 2]))


def _dropout(rng: Rng, kind: str, opset: int) -> Node:
    if opset < 12:
        return Node(kind, some(rng), [], {"ratio": 0.3} if rng.random() < 0.5 else {})
    return Node(
        kind,
        some(rng),
        [
            v
            for v, share in ((np.float32(0.4), 0.6), (np.bool_(rng.random() < 0.3), 0.5))
            if rng.random() < share
        ][:2],
        {},
    )


def _cast(rng: Rng, kind: str, opset: int) -> Node:
    return Node(kind, some(rng), [], {"to": pick(rng, [1, 1, 1, 11, 10, 7, 6, 9, 16])})


def _function(rng: Rng, kind: str, opset: int) -> Node:
    names = [
        n
        for n, a in defs.get_schema(kind, opset).attributes.items()
        if a.type.name == "FLOAT" and rng.random() < 0.6
    ]
    return Node(
        kind, some(rng), [], {n: float(pick(rng, [0.3, 1.0, 1.7, 0.0, -0.4])) for n in names}
    )


def _gelu(rng: Rng, kind: str, opset: int) -> Node:
    return Node(
        kind,
        some(rng),
        [],
        {"approximate": pick(rng, ["none", "tanh", "sigmoid"])} if rng.random() < 0.7 else {},
    )


def _shrink(rng: Rng, kind: str, opset: int) -> Node:
    size = float(pick(rng, [0.0, 0.3, 1.0, -0.2]))
    return Node(kind, some(rng), [], {"lambd": size, "bias": size if rng.random() < 0.8 else 0.1})


def _cumulative(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    found = {name: 1 for name in ("reverse", "exclusive") if rng.random() < 0.5}
    return Node(kind, shape, [np.int64(axis(rng, len(shape)))], found)


def _triangle(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng, rank=int(rng.integers(2, 5)))
    found = {"upper": int(rng.integers(2))} if rng.random() < 0.7 else {}
    return Node(kind, shape, [np.int64(rng.integers(-2, 3))] if rng.random() < 0.6 else [], found)


def _elements(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    place = int(rng.integers(-len(shape), len(shape)))
    n, size = shape[place], list(shape)
    size[place] = int(rng.integers(1, 4))
    size = [int(rng.integers(1, m + 1)) if rng.random() < 0.2 else m for m in size]
    index = rng.integers(-n, n + (rng.random() < 0.05), tuple(size))
    return Node(kind, shape, [np.asarray(index, dtype=np.int64)], {"axis": place})


def _einsum(rng: Rng, kind: str, opset: int) -> Node:
    equation, other = pick(
        rng,
        [
            ("bij,jk->bik", (3, 2)), ("bij,ij->b", (2, 3)), ("bij,kj->bik", (2, 3)), ("bij,j->ib", (3,)), ("bij,kbj->ki", (2, 1, 3)),
            ("bij->bji", None), ("bij->bi", None), ("bij,bik->bjk", ...), ("bij,bkj->bik", ...), ("bij,bij->bi", ...), ("bij,bkl->bijkl", ...),
            ("bii->bi", None), ("bij,jk", (3, 2)),
        ],
    )  # fmt: skip
    constants = [] if other in (None, ...) else [numbers(rng, *other)]
    return Node(
        kind, (1, 2, 3), [*constants, *(["x"] if other is ... else [])], {"equation": equation}
    )


def _normalised(rng: Rng, kind: str, opset: int) -> Node:
    shape = some(rng)
    if kind == "RMSNormalization":
        place = int(rng.integers(-len(shape), len(shape)))
        return Node(kind, shape, [numbers(rng, *shape[place:])], {"axis": place, "epsilon": 0.02})
    return Node(kind, shape, [], {"axis": axis(rng, len(shape)), "p": int(pick(rng, [1, 2, 2, 3]))})


def _where(rng: Rng, kind: str, opset: int) -> Node:
    return Node(kind, some(rng), [], {})


TEMPLATES: dict[str, Callable[[Rng, str, int], Node]] = {
    **dict.fromkeys(["Relu", "Sigmoid", "Tanh", "Softplus", "Exp", "Log", "Sqrt", "Abs", "Neg", "Reciprocal", "Erf", "Sin", "Cos", "Atan", "Mish",
                     "HardSwish", "Identity", "Floor", "Ceil", "Softsign", "Sign", "Round"], _plain),
    **dict.fromkeys(["LeakyRelu", "Elu", "Celu", "Selu", "HardSigmoid", "ThresholdedRelu"], _function),
    **dict.fromkeys(["Add", "Sub", "Mul", "Div", "Mod"], _pair),
    **dict.fromkeys(["Sum", "Mean", "Max", "Min"], _many),
    **dict.fromkeys(["Softmax", "LogSoftmax", "Flatten", "Hardmax"], _along),
    **dict.fromkeys(["Conv", "ConvTranspose"], _conv),
    **dict.fromkeys(["MaxPool", "AveragePool", "LpPool"], _pool),
    **dict.fromkeys(["GlobalAveragePool", "GlobalMaxPool"], _picture),
    **dict.fromkeys(["InstanceNormalization", "GroupNormalization"], _instance_norm),
    **dict.fromkeys(["Squeeze", "Unsqueeze"], _squeeze),
    **dict.fromkeys(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceLogSum",
                     "ReduceSumSquare", "ReduceProd"], _reduce),
    **dict.fromkeys(["RMSNormalization", "LpNormalization"], _normalised),
    **dict.fromkeys(["DepthToSpace", "SpaceToDepth"], _blocks),
    **dict.fromkeys(["Resize", "Upsample"], _resize),
    **dict.fromkeys(["RNN", "GRU", "LSTM"], _recurrent),
    "Pow": _power, "Clip": _clip, "Gemm": _gemm, "MatMul": _matmul, "BatchNormalization": _batch_norm, "LayerNormalization": _layer_norm, "PRelu": _prelu,
    "Reshape": _reshape, "Transpose": _transpose, "Gather": _gather, "Slice": _slice, "Split": _split, "Concat": _concat, "Pad": _pad, "Expand": _expand,
    "Shrink": _shrink, "CumSum": _cumulative, "Trilu": _triangle, "GatherElements": _elements, "Einsum": _einsum,
    "Tile": _tile, "Dropout": _dropout, "Cast": _cast, "Gelu": _gelu,
}  # fmt: skip
CONSTANT = (
    "Range Mod Equal Less Greater Not And Or Where ConstantOfShape Shape Constant Floor Ceil Div Size Trilu ReduceMax ReduceMin ReduceProd ReduceL1 "
    "ReduceL2 Sign Round ArgMax ArgMin GreaterOrEqual LessOrEqual Xor CastLike CumSum"
).split()
"""Operations that are read of constants, most of them of nothing else."""


def generated(rng: Rng) -> onnx.ModelProto:
    """Return a model of one operation between others, or of two, at some operator set; now and then with one attribute more than usual."""
    if rng.random() < 0.15:
        return _of_constants(rng)
    while True:
        opset, kind = pick(rng, [pick(rng, OPSETS), 13, 17, 21]), pick(rng, TEMPLATES)
        try:
            defs.get_schema(kind, opset)
        except defs.SchemaError:
            continue
        break
    node = TEMPLATES[kind](rng, kind, opset)
    attributes = dict(node.attributes)
    if rng.random() < 0.15:
        attributes.update(_odd(rng, kind, opset))
    return _model(rng, node._replace(attributes=attributes), opset)


def _odd(rng: Rng, kind: str, opset: int) -> dict[str, Any]:
    """Return one attribute of the operation, at or beyond its range."""
    known = {n: a.type.name for n, a in defs.get_schema(kind, opset).attributes.items()}
    if not known:
        return {"mode": "odd"} if rng.random() < 0.2 else {}
    name = pick(rng, known)
    values: dict[str, list[Any]] = {
        "INT": [0, 1, -1, 2, 5, 2**40, -(2**31)], "FLOAT": [0.0, 1.0, -1.0, 0.5, 1e30, float("nan")], "STRING": ["", "NOTSET", "VALID", "linear", "tanh"],
        "INTS": [[], [0], [1], [1, 1], [2, 2], [-1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [2**31, 1]], "FLOATS": [[], [0.5], [1.0, 2.0, 3.0]],
        "STRINGS": [["Relu"], ["Sigmoid", "Tanh"]],
    }  # fmt: skip
    return {name: pick(rng, values[known[name]])} if known[name] in values else {}


def _model(rng: Rng, node: Node, opset: int) -> onnx.ModelProto:
    """Wrap an operation: perhaps a function before and behind, perhaps the point and the constant in each other's places."""
    nodes, given, constants = [], "x", {}
    if rng.random() < 0.3:
        nodes.append(helper.make_node(pick(rng, ["Sin", "Relu", "Identity"]), ["x"], ["before"]))
        given = "before"
    names = [given]
    for k, value in enumerate(node.constants):
        if value is None or isinstance(value, str):
            names.append(given if value else "")
            continue
        if rng.random() < 0.1 and isinstance(value, np.ndarray) and value.dtype == np.float32:
            nodes.append(helper.make_node("Identity", [f"c{k}"], [f"d{k}"]))
            names.append(f"d{k}")
        else:
            names.append(f"c{k}")
        constants[f"c{k}"] = value
    if (
        node.kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat", "MatMul", "Sum")
        and rng.random() < 0.25
    ):
        names = names[::-1] if rng.random() < 0.6 else [given] * len(names)
    outputs = [f"y{k}" for k in range(node.outputs)]
    nodes.append(
        helper.make_node(
            node.kind, names, outputs, **{k: v for k, v in node.attributes.items() if v != []}
        )
    )
    last = pick(rng, outputs)
    if rng.random() < 0.3:
        nodes.append(helper.make_node(pick(rng, ["Tanh", "Neg"]), [last], ["behind"]))
        last = "behind"
    return proto(nodes, node.shape, constants, opset, last)


def proto(
    nodes: list[Any], shape: Any, constants: dict[str, Any], opset: int, last: str
) -> onnx.ModelProto:
    """Return the model of these nodes from one input x."""
    tensors = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        nodes,
        "net",
        [given],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


_OF_ONE = "Trilu ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 Sign Round ArgMax ArgMin".split()


def _of_constants(rng: Rng) -> onnx.ModelProto:
    """Return x plus the sum of what an operation makes of constants."""
    opset = pick(rng, [9, 11, 13, 17, 21])
    kind = pick(
        rng,
        [
            k
            for k in CONSTANT
            if (
                opset >= 17
                or k
                not in ("Trilu", "CastLike", "CumSum", "GreaterOrEqual", "LessOrEqual", "Round")
            )
        ],
    )
    shape = some(rng, rank=2)
    a, b = numbers(rng, *shape), numbers(rng, *shape)
    if rng.random() < 0.4:
        a, b = (np.round(v * 3).astype(pick(rng, [np.int64, np.int32])) for v in (a, b))
    b = np.where(b == 0, np.ones_like(b), b)
    if kind in ("Mod", "Div", "Equal", "Less", "Greater") and a.dtype != b.dtype:
        b = b.astype(a.dtype)
    constants: dict[str, Any] = {"a": a, "b": b}
    found: dict[str, Any] = {}
    names = {
        "Not": ["t"], "And": ["t", "u"], "Or": ["t", "u"], "Where": ["t", "a", "b"], "Floor": ["a"], "Ceil": ["a"], "ConstantOfShape": ["s"],
        "Size": ["a"], "Shape": ["a"], "Constant": [], "Range": ["r0", "r1", "r2"],
        "Xor": ["t", "u"], "CumSum": ["a", "z"], **{one: ["a"] for one in _OF_ONE},
    }.get(kind, ["a", "b"])  # fmt: skip
    if kind == "Mod" and rng.random() < 0.6:
        found["fmod"] = 1
    if kind == "Shape" and opset >= 15:
        found.update({k: int(rng.integers(-3, 4)) for k in ("start", "end") if rng.random() < 0.5})
    if kind == "ConstantOfShape" and rng.random() < 0.7:
        found["value"] = numpy_helper.from_array(
            pick(rng, [np.array([1.5], np.float32), np.array([2], np.int64)])
        )
    if kind == "Constant":
        newer = [
            {"value_float": 0.3},
            {"value_ints": [1, 2]},
            {"value_floats": [0.5, 2.0]},
            {"value_int": 3},
        ]
        found = pick(rng, [{"value": numpy_helper.from_array(a)}, *(newer if opset >= 12 else [])])
    constants.update(
        t=rng.random(shape) < 0.5, u=rng.random(shape) < 0.5, s=ints(2, 2), z=np.int64(1)
    )
    if kind == "Range":
        start, by, floats = int(rng.integers(-3, 3)), pick(rng, [1, 2, -1, -2]), rng.random() < 0.3
        for name, v in zip(names, (start, start + by * int(rng.integers(0, 4)), by), strict=True):
            constants[name] = np.float32(v) if floats else np.int64(v)
    nodes = [helper.make_node(kind, names, ["k"], **found), helper.make_node("Cast", ["k"], ["f"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMax", ["f"], ["m"], keepdims=0) if rng.random() < 0.1 else helper.make_node("ReduceSum", ["f"], ["m"], keepdims=0),
             helper.make_node("Add", ["x", "m"], ["y"])]  # fmt: skip
    used = {name for node in nodes for name in node.input}
    return proto(nodes, (1, 3), {k: v for k, v in constants.items() if k in used}, opset, "y")
