"""Fusion of a layer with the scaling behind it, such as batch norm.

A convolution or linear layer and the scaling that follows become one layer, and results that nobody
reads are removed. Each operation fewer saves a pass over the coefficients in backward bound
propagation, and one rounding allowance.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from calipers.graph.affine import Conv, Linear, Scale
from calipers.graph.ir import Graph, Node


def fused(graph: Graph) -> Graph:
    """Return the same network with scalings merged into the layers before.

    A scaling is merged where it reads one layer only and is the only reader of that layer. Results
    on which the output does not depend are left out: a rewrite that recognises a gate leaves the
    gate's parts unused. The network as it was is kept in `apart`, since merging changes what is
    executed.
    """
    graph = graph.up_to(len(graph.nodes))
    readers = Counter(i for node in graph.nodes for i in node.inputs)
    nodes: list[Node] = []
    number = {0: 0}
    for old, node in enumerate(graph.nodes, start=1):
        source = number[node.inputs[0]]
        merged = (
            _merged(nodes[source - 1], node) if source and readers[node.inputs[0]] == 1 else None
        )
        if merged is None:
            nodes.append(dataclasses.replace(node, inputs=tuple(number[i] for i in node.inputs)))
            number[old] = len(nodes)
        else:
            nodes[source - 1], number[old] = merged, source
    return Graph(graph.input_shape, tuple(nodes), graph, graph.computed)


def _merged(layer: Node, node: Node) -> Node | None:
    """Return s (W x + b) + t as (s W) x + (s b + t), or None.

    None unless the node is a scaling with one factor per output channel of the layer (or one for
    all).
    """
    op, scale = layer.op, node.op
    if not isinstance(op, Conv | Linear) or not isinstance(scale, Scale):
        return None
    axes = (
        (1, -1, *[1] * (len(layer.shape) - 1))
        if isinstance(op, Conv)
        else (*[1] * len(layer.shape), -1)
    )
    each = (
        1,
        *(size if axis == -1 else 1 for size, axis in zip(layer.shape, axes[1:], strict=True)),
    )
    made_of = scale.shift.abs() if scale.constant_terms is None else scale.constant_terms
    if any(t.dim() and t.shape != each for t in (scale.scale, scale.shift, made_of)):
        return None
    s, t, made_of = (v.expand(each).flatten() for v in (scale.scale, scale.shift, made_of))
    weight = op.weight * s.view(-1, *[1] * (op.weight.dim() - 1))
    before = s.new_zeros(()) if op.bias is None else op.bias * s
    earlier = before.abs() if op.constant_terms is None else op.constant_terms.flatten() * s.abs()
    merged = dataclasses.replace(
        op, weight=weight, bias=before + t, constant_terms=(earlier + made_of).view(each)
    )
    return Node(merged, layer.inputs, node.shape, layer.where)
