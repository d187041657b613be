"""The elements whose bounds matter: those of unstable operations.

An element matters where some operation is not linear over its box, at the element itself or at a
value made of it by affine operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.bounds.interval import Box
from calipers.graph.ir import Graph
from calipers.graph.kinds import is_affine


def unstable_elements(graph: Graph, number: int, box: Box) -> Tensor:
    """Return (N, n) flags: the elements of a number with an unstable reader.

    An element is flagged if an operation is not linear over its box, or over the box of something
    made of the element on the way to that operation.
    """
    unstable = torch.zeros_like(box.lower.flatten(1), dtype=torch.bool)
    for op, i in ((n.op, i) for n in graph.nodes for i in set(n.inputs)):
        if is_affine(op) or graph.ways[i][0] != number:
            continue
        way = graph.ways[i]
        there = carried(graph, way, box)
        unstable = unstable | _brought_back(
            graph, way, op.unstable(there.lower, there.upper), box.lower
        ).flatten(1)
    return unstable


def carried(graph: Graph, way: tuple[int, ...], box: Box) -> Box:
    """Return the box at the end of a way.

    By interval arithmetic without care for rounding: for choices, not for claims.
    """
    for op in (graph.nodes[k - 1].op for k in way[1:]):
        if not is_affine(op):
            box = Box(*op.interval(box.ends))
            continue
        middle, radius = (
            op.value((box.lower + box.upper) / 2),
            op.absolute((box.upper - box.lower) / 2),
        )
        box = Box(middle - radius, middle + radius)
    return box


def _brought_back(graph: Graph, way: tuple[int, ...], flags: Tensor, like: Tensor) -> Tensor:
    """Return the elements that flagged ones at the end of a way depend on.

    The elements are those at the way's beginning.
    """
    for k in reversed(way[1:]):
        op, shape = graph.nodes[k - 1].op, graph.shape(graph.nodes[k - 1].inputs[0])
        if not is_affine(op):
            continue
        with torch.enable_grad():
            zeros = torch.zeros(
                len(flags), *shape, dtype=like.dtype, device=like.device, requires_grad=True
            )
            (weights,) = torch.autograd.grad(op.absolute(zeros), zeros, flags.to(like.dtype))
        flags = weights > 0
    return flags
