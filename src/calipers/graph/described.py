"""How is a network written down, so that a program without PyTorch can read it? A list of operations as JSON, and arrays.

The list is the network that bounds are about: as captured, batch norm merged. `record/checker.py` says what each operation means.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from calipers.errors import UnsupportedOp
from calipers.graph.activations import Clip, TwoPieces
from calipers.graph.affine import Conv, Generic, Linear, Scale, Sum
from calipers.graph.curves import SIGMOID, TANH
from calipers.graph.ir import Affine, Graph, Node
from calipers.graph.products import MaxPool

_AT_ONCE = 2**24  # bytes of unit vectors
_Entry = tuple[dict[str, Any], dict[str, Tensor]]


@functools.lru_cache(maxsize=4)
def described(graph: Graph) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the list of operations, JSON-ready, and their arrays by name (`net.3.weight`). Raises `UnsupportedOp` for what has no description."""
    nodes: list[dict[str, Any]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for k, node in enumerate(graph.nodes, start=1):
        facts, held = _entry(graph, node)
        nodes.append({**facts, "inputs": list(node.inputs), "shape": list(node.shape)})
        arrays |= {f"net.{k}.{name}": value.detach().cpu().numpy() for name, value in held.items()}
    return {"input": list(graph.input_shape), "nodes": nodes}, arrays


def _entry(graph: Graph, node: Node) -> _Entry:
    op = node.op
    if isinstance(op, Affine):
        return _affine(graph, node, op)
    if isinstance(op, TwoPieces):
        return _pieces([0.0], op.left, op.right)
    if isinstance(op, Clip):
        low, high = math.isfinite(op.low), math.isfinite(op.high)
        return _pieces([end for end in (op.low, op.high) if math.isfinite(end)], float(not low), float(not high))
    if isinstance(op, MaxPool):
        return {"op": "largest"}, {"windows": op.windows}
    if op in (TANH, SIGMOID):
        return {"op": "curve", "function": "tanh" if op is TANH else "sigmoid"}, {}
    what = getattr(op, "name", type(op).__name__)
    raise UnsupportedOp(f"{what} ({node.where}) cannot be written into a proof file yet: measure this model without proofs")


def _pieces(kinks: list[float], left: float, right: float) -> _Entry:
    """Return a function made of straight pieces; every one of ours has the value of its kinks there, or 0 at 0."""
    at = torch.tensor(kinks, dtype=torch.float64)
    return {"op": "pieces", "left": left, "right": right}, {"kinks": at, "values": at}


def _affine(graph: Graph, node: Node, op: Affine) -> _Entry:
    match op:
        case Linear():
            return {"op": "linear"}, _given(weight=op.weight, bias=op.bias)
        case Conv():
            facts = {"op": "convolution", "stride": list(op.stride), "padding": list(op.padding), "dilation": list(op.dilation), "groups": op.groups}
            return facts, _given(weight=op.weight, bias=op.bias)
        case Scale():
            return {"op": "scale"}, {"scale": _one(op.scale, node.shape), "shift": _one(op.shift, node.shape)}
        case Sum():
            return {"op": "sum", "signs": list(op.signs)}, {}
        case Generic(diagonal=True):
            return {"op": "reshape"}, {}
    return {"op": "matrix"}, _matrix([graph.shape(i) for i in node.inputs], op)


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
            inputs = [unit.view(-1, *shape) if i == k else zero.expand(end - begin, *zero.shape[1:]) for i, zero in enumerate(zeros)]
            change = (op.value(*inputs) - constant).flatten(1)
            point, row = change.nonzero(as_tuple=True)
            parts.append((row, point + begin, change[point, row]))
        held |= {f"{name}{k}": torch.cat(list(each)) for name, each in zip(("row", "column", "value"), zip(*parts, strict=True), strict=True)}
    return held
