"""Which neighbours are one operation? A convolution or linear layer and the scaling behind it
(batch norm) become one layer; what nobody reads is left out.

Every operation less is a pass less over the coefficients of a backward sweep, and one rounding
allowance less.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from calipers.graph.affine import Conv, Linear, Scale
from calipers.graph.ir import Graph, Node


def fused(graph: Graph) -> Graph:
    """Return the same network with every scaling that only one layer feeds, and that alone reads
    that layer, merged into it.

    Without the numbers that the last one does not hang on: where a rewrite saw through a gate, its
    parts are left behind. The layers as they were stay at hand in `apart`: merging changes what is
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
    """Return s (W x + b) + t as (s W) x + (s b + t), if the scaling goes by the layer's outputs."""
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
