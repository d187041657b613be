"""The part of an ONNX file that is read as a network.

It is the output that is meant, the one input that it depends on, and the nodes between them. A
branch whose condition is constant is replaced by the side that is taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from calipers.errors import BadInput, UnsupportedOp

FLOATING = (1, 10, 11, 16)  # TensorProto.FLOAT, FLOAT16, DOUBLE, BFLOAT16


class NetworkParts(NamedTuple):
    """Declarations of input and output, and the nodes with their places."""

    input: Any
    output: Any
    nodes: list[tuple[int, Any]]


def chosen(graph: Any, output: str | int | None, path: Path) -> NetworkParts:
    """Return the part of a graph that is read for one of its outputs.

    By default that is the only one that holds floating-point numbers. Raises `BadInput` where this
    leaves more than one output or input.
    """
    wanted = _output(graph, output, path)
    nodes, needed = _needed(graph, wanted.name)
    stored = {t.name for t in graph.initializer}
    given = [i for i in graph.input if i.name not in stored]
    used = [i for i in given if i.name in needed] or given
    if len(used) != 1:
        raise BadInput(
            f"{path.name}: the output {wanted.name} depends on {len(used)} inputs "
            f"({', '.join(i.name for i in used[:4])}); networks of one input are read. Make the "
            "others constants (initializers) of the file, or cut the part that is meant out with "
            "onnx.utils.extract_model."
        )
    return NetworkParts(used[0], wanted, nodes)


def _output(graph: Any, output: str | int | None, path: Path) -> Any:
    """Return the output that is meant, or raise `BadInput`."""
    outputs = list(graph.output)
    names = [o.name for o in outputs]
    if output is not None:
        if isinstance(output, str) and output in names:
            return outputs[names.index(output)]
        place = int(output) if str(output).lstrip("-").isdigit() else None
        if place is not None and 0 <= place < len(outputs):
            return outputs[place]
        raise BadInput(
            f"{path.name} has no output {output!r}: choose one of {', '.join(names)}, or a number "
            f"from 0 to {len(names) - 1}"
        )
    floating = [o for o in outputs if o.type.tensor_type.elem_type in FLOATING]
    if len(outputs) == 1 or len(floating) == 1:
        return (floating or outputs)[0]
    raise BadInput(
        f"{path.name} has {len(outputs)} outputs ({', '.join(names[:4])}), {len(floating)} of them "
        "tensors of floating-point numbers: choose the one that holds the scores, output='NAME'"
    )


def _needed(graph: Any, output: str) -> tuple[list[tuple[int, Any]], set[str]]:
    """Return the nodes that an output depends on, and all names they read."""
    wanted, kept = {output}, []
    for place, node in reversed(list(enumerate(graph.node))):
        if wanted.intersection(name for name in node.output if name):
            wanted.update(name for name in node.input if name)
            kept.append((place, node))
    return kept[::-1], wanted


def is_whole(graph: Any, parts: NetworkParts) -> bool:
    """Return whether other programs can run the file as it stands.

    It has one input, one output, and no unused nodes of another domain, which they may not know.
    """
    stored, kept = {t.name for t in graph.initializer}, {place for place, _ in parts.nodes}
    idle = [node for place, node in enumerate(graph.node) if place not in kept]
    inputs = [i for i in graph.input if i.name not in stored]
    known = all(node.domain in ("", "ai.onnx") for node in idle)
    return len(inputs) == len(graph.output) == 1 and known


def alone(model: Any, parts: NetworkParts) -> bytes:
    """Return a file of these parts only, for other programs to run."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    used = {name for _, node in parts.nodes for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in used]
    for name, values in (
        ("node", [node for _, node in parts.nodes]), ("input", [parts.input]),
        ("output", [parts.output]), ("initializer", kept), ("sparse_initializer", []),
        ("value_info", []),
    ):  # fmt: skip
        graph.ClearField(name)
        getattr(graph, name).extend(values)
    return bytes(made.SerializeToString())


def made_dense(graph: Any, most: int, path: Path) -> None:
    """Replace the sparse tensors of a graph by dense ones."""
    from onnx import numpy_helper

    for sparse in graph.sparse_initializer:
        name, shape = sparse.values.name, tuple(sparse.dims)
        if min(shape, default=0) < 0 or np.prod([int(n) for n in shape], dtype=float) > most:
            raise UnsupportedOp(f"{path.name}: the sparse tensor {name!r} has the shape {shape}")
        values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        dense = np.zeros(shape, values.dtype)
        at = places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), shape)
        if len(at) and (at.min() < 0 or at.max() >= dense.size or len(at) != values.size):
            raise BadInput(f"{path.name}: the sparse tensor {name!r} names places it does not have")
        dense.reshape(-1)[at] = values
        graph.initializer.append(numpy_helper.from_array(dense, name))
    graph.ClearField("sparse_initializer")


def decided(model: Any, path: Path) -> None:
    """Replace each `If` whose condition is constant by the branch taken.

    One that depends on the input stays, and is refused later.
    """
    graph, place, count = model.graph, 0, 0
    while place < len(graph.node):
        node = graph.node[place]
        condition = _known(model, place) if _is_if(node) else None
        if condition is None:
            place += 1
            continue
        count += 1
        inside = _branch(node, condition, f"{node.name or 'if'}/{count}/", path)
        rest = list(graph.node[place + 1 :])
        del graph.node[place:]
        graph.initializer.extend(inside.initializer)
        graph.node.extend([*inside.node, *rest])


def _is_if(node: Any) -> bool:
    """Return whether a node is the standard operation `If`."""
    return node.op_type == "If" and node.domain in ("", "ai.onnx")


def _known(model: Any, place: int) -> bool | None:
    """Return the condition of an `If` that depends on constants only, or None."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    node, graph = model.graph.node[place], model.graph
    stored = {t.name for t in graph.initializer}
    before, wanted = [], {node.input[0]}
    for earlier in reversed(graph.node[:place]):
        if wanted.intersection(earlier.output):
            wanted.update(name for name in earlier.input if name)
            before.append(earlier)
    inputs = {i.name for i in graph.input} - stored
    if wanted & inputs or any(a.HasField("g") for n in before for a in n.attribute):
        return None
    small = onnx.helper.make_graph(
        before[::-1], "condition", [], [onnx.ValueInfoProto(name=node.input[0])],
        [t for t in graph.initializer if t.name in wanted],
    )  # fmt: skip
    asked = onnx.helper.make_model(
        small, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
    (found,) = ReferenceEvaluator(asked).run(None, {})
    return bool(np.asarray(found).reshape(-1)[0]) if np.asarray(found).size == 1 else None


def _branch(node: Any, condition: bool, prefix: str, path: Path) -> Any:
    """Return a branch as a graph with names of its own.

    These begin with a prefix; its results have the node's names.
    """
    import onnx

    name = "then_branch" if condition else "else_branch"
    found = [a.g for a in node.attribute if a.name == name]
    if len(found) != 1 or len(found[0].output) != len(node.output) or found[0].input:
        raise BadInput(f"{path.name}, node {node.name} (If): its {name} does not fit it")
    made = onnx.GraphProto()
    made.CopyFrom(found[0])
    own = [t.name for t in made.initializer] + [n for x in made.node for n in x.output if n]
    names = {n: prefix + n for n in own}
    passed = []
    for inner, outer in zip(made.output, node.output, strict=True):
        # a value that a branch only passes on from outside is copied
        passed.append(
            onnx.helper.make_node("Identity", [names.get(inner.name, inner.name)], [outer])
        )
    for t in made.initializer:
        t.name = names[t.name]
    for x in made.node:
        x.input[:] = [names.get(n, n) for n in x.input]
        x.output[:] = [names.get(n, n) for n in x.output]
        if any(a.HasField("g") for a in x.attribute):
            raise UnsupportedOp(
                f"{path.name}, node {node.name} (If): a branch with a branch or a loop inside is "
                "not read"
            )
    made.node.extend(passed)
    return made


def fixed_first_axes(model: Any, given: Any) -> frozenset[str]:
    """Return the values whose first axis is not the batch.

    Its size stays fixed while the input's first axis is free, so what is combined along it are
    elements of one point, not points of a batch.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    graph.ClearField("value_info")
    for output in graph.output:
        output.type.tensor_type.ClearField("shape")
    for one in graph.input:
        if one.name == given.name:
            dim = one.type.tensor_type.shape.dim[0]
            dim.ClearField("value")
            dim.dim_param = "the batch of all points"
    try:
        found = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except Exception:  # shapes that cannot be inferred are unknown
        return frozenset()
    return frozenset(
        value.name
        for value in (*found.value_info, *found.output)
        if value.type.tensor_type.shape.dim
        and value.type.tensor_type.shape.dim[0].HasField("dim_value")
    )
