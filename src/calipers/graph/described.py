"""How is a network written down, so that a program without PyTorch can read it? A list of
operations as JSON, and arrays.

The list is the network that bounds are about: as captured, batch norm merged. `record/checker.py`
says what each operation means.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from calipers.errors import UnsupportedOp
from calipers.graph.activations import Clip, TwoPieces
from calipers.graph.affine import Conv, Generic, Linear, Scale, Sum
from calipers.graph.ir import Affine, Graph, Node
from calipers.graph.products import MaxPool, Product
from calipers.graph.smooth import Smooth

_AT_ONCE = 2**24  # bytes of unit vectors
_Entry = tuple[dict[str, Any], dict[str, Tensor]]


@functools.lru_cache(maxsize=4)
def described(graph: Graph) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the list of operations, JSON-ready, and their arrays by name (`net.3.weight`). Raises
    `UnsupportedOp` for what has no description.
    """
    nodes: list[dict[str, Any]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for k, node in enumerate(graph.nodes, start=1):
        facts, held = _entry(graph, node)
        nodes.append({**facts, "inputs": list(node.inputs), "shape": list(node.shape)})
        arrays |= {f"net.{k}.{name}": value.detach().cpu().numpy() for name, value in held.items()}
    return {"input": list(graph.input_shape), "nodes": nodes}, arrays


def _entry(graph: Graph, node: Node) -> _Entry:
    op, shapes = node.op, [graph.shape(i) for i in node.inputs]
    if isinstance(op, Affine):
        return _affine(shapes, node, op)
    if isinstance(op, TwoPieces):
        return _function("two pieces", op.left, op.right)
    if isinstance(op, Clip):
        return _function("clip", op.low, op.high)
    if isinstance(op, Smooth) and (curve := _curve(op.name)) is not None:
        return curve
    if isinstance(op, MaxPool):
        return {"op": "largest"}, {"windows": op.windows}
    if isinstance(op, Product):
        every = torch.arange(torch.Size(node.shape).numel())
        return {"op": "product"}, {"left": every, "right": every, "into": every}
    if op.kind == "contraction":
        return {"op": "product"}, _pairs(shapes, node.shape)
    if op.kind == "pooling" and hasattr(op, "axis"):
        return _shares(node.shape, op.axis)
    what = getattr(op, "name", type(op).__name__)
    raise UnsupportedOp(
        f"{what} ({node.where}) cannot be written into a proof file yet: measure this model "
        "without proofs"
    )


def _function(name: str, *parameters: float) -> _Entry:
    return {"op": "function", "function": name, "parameters": list(parameters)}, {}


_NAMED = frozenset(
    "tanh sigmoid erf atan gelu silu mish hardswish exp expm1 log log1p sin cos".split()
) | {
    "gelu by tanh",
    "log sigmoid",
}
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}


def _curve(name: str) -> _Entry | None:
    """Return a smooth function by its name, which holds its parameters after the first words."""
    words = name.split()
    if words[0] in ("power", "softplus", "elu"):
        return _function(words[0], *map(float, words[1:]))
    return (
        _function("power", _POWERS[name])
        if name in _POWERS
        else _function(name)
        if name in _NAMED
        else None
    )


def _pairs(shapes: list[tuple[int, ...]], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return every product of two elements in a matrix product (*b, I, K) @ (*b, K, J): the places
    of both, and that of the sum it belongs to.
    """
    x, y, out = (torch.arange(torch.Size(s).numel()).view(s) for s in (*shapes, shape))
    whole = (*shape[:-1], shapes[0][-1], shape[-1])
    left, right, into = (
        x[..., :, :, None].expand(whole),
        y[..., None, :, :].expand(whole),
        out[..., :, None, :].expand(whole),
    )
    return {"left": left.flatten(), "right": right.flatten(), "into": into.flatten()}


def _shares(shape: tuple[int, ...], axis: int) -> _Entry:
    """Return the logarithm of the sum of the exponentials of each row along an axis of a batch, of
    which every element of the row is an equal share.
    """
    count = shape[axis - 1]
    rows = torch.arange(torch.Size(shape).numel()).view(1, *shape).movedim(axis, -1)
    windows = rows[..., None, :].expand(*rows.shape, count).movedim(-2, axis)
    return {"op": "logsumexp", "share": 1 / count}, {"windows": windows.reshape(-1, count)}


def _affine(shapes: list[tuple[int, ...]], node: Node, op: Affine) -> _Entry:
    match op:
        case Linear():
            return {"op": "linear"}, _given(weight=op.weight, bias=op.bias)
        case Conv():
            facts = {
                "op": "convolution",
                "stride": list(op.stride),
                "padding": list(op.padding),
                "dilation": list(op.dilation),
                "groups": op.groups,
            }
            return facts, _given(weight=op.weight, bias=op.bias)
        case Scale():
            size = torch.Size(node.shape).numel()
            return {"op": "matrix"}, {
                **_diagonal(0, size, _one(op.scale, node.shape).expand(node.shape)),
                "bias": _one(op.shift, node.shape),
            }
        case Sum():
            each = [
                _diagonal(k, torch.Size(node.shape).numel(), torch.tensor(sign))
                for k, sign in enumerate(op.signs)
            ]
            return {"op": "matrix"}, {name: value for held in each for name, value in held.items()}
        case Generic(diagonal=True):
            return {"op": "matrix"}, _diagonal(0, torch.Size(node.shape).numel(), torch.ones(()))
    held = _matrix(shapes, op)
    return {"op": "matrix"}, {**held, "bias": held.pop("constant").view(node.shape)}


def _diagonal(k: int, size: int, factor: Tensor) -> dict[str, Tensor]:
    """Return the matrix of input k that has these factors on its diagonal, as entries."""
    places = torch.arange(size)
    return {f"row{k}": places, f"column{k}": places, f"value{k}": factor.reshape(-1).expand(size)}


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if value is not None}


def _one(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a constant without its axis for the batch."""
    return value[0] if value.dim() > len(shape) else value


def _matrix(shapes: list[tuple[int, ...]], op: Affine) -> dict[str, Tensor]:
    """Return the operation as entries of a matrix, found by asking it about unit vectors."""
    zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
    constant = op.value(*zeros)
    held = {"constant": constant.flatten()}
    for k, shape in enumerate(shapes):
        size = torch.Size(shape).numel()
        parts = []
        for begin in range(0, size, max(1, _AT_ONCE // (8 * max(size, constant.numel())))):
            end = min(size, begin + max(1, _AT_ONCE // (8 * max(size, constant.numel()))))
            unit = torch.zeros(end - begin, size, dtype=torch.float64)
            unit[torch.arange(end - begin), torch.arange(begin, end)] = 1
            inputs = [
                unit.view(-1, *shape) if i == k else zero.expand(end - begin, *zero.shape[1:])
                for i, zero in enumerate(zeros)
            ]
            change = (op.value(*inputs) - constant).flatten(1)
            point, row = change.nonzero(as_tuple=True)
            parts.append((row, point + begin, change[point, row]))
        held |= {
            f"{name}{k}": torch.cat(list(each))
            for name, each in zip(("row", "column", "value"), zip(*parts, strict=True), strict=True)
        }
    return held
