"""The network in a form that a program without PyTorch can read.

It is a list of operations as JSON, and arrays. The list is the network that the bounds are about:
as captured, batch norm merged. `record/checker.py` says what each operation means.
"""

from __future__ import annotations

import functools
from typing import Any

from numpy.typing import NDArray

from calipers.errors import UnsupportedOp
from calipers.graph.ir import Graph, Node
from calipers.graph.kinds import Entry


@functools.lru_cache(maxsize=4)
def described(graph: Graph) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the list of operations, ready for JSON, and their arrays.

    The arrays are named like `net.3.weight`. Raises `UnsupportedOp` for an operation without a
    description.
    """
    nodes: list[dict[str, Any]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for k, node in enumerate(graph.nodes, start=1):
        facts, held = _entry(graph, node)
        nodes.append({**facts, "inputs": list(node.inputs), "shape": list(node.shape)})
        arrays |= {f"net.{k}.{name}": value.detach().cpu().numpy() for name, value in held.items()}
    return {"input": list(graph.input_shape), "nodes": nodes}, arrays


def _entry(graph: Graph, node: Node) -> Entry:
    entry = node.op.described([graph.shape(i) for i in node.inputs], node.shape)
    if entry is None:
        raise UnsupportedOp(
            f"{node.op.label} ({node.where}) cannot be written into a proof file yet: measure this "
            "model without proofs"
        )
    return entry
