"""What stands in an ONNX file? Read with the package `onnx`, handed on in plain words and
tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from calipers.errors import BadInput, CalipersError, UnsupportedOp, typed
from calipers.graph.onnx_net import Line, OnnxNet, Program
from calipers.graph.onnx_steps import LARGEST
from calipers.interchange.files import content, existing
from calipers.interchange.onnx_nodes import line, operator_set, tensor
from calipers.interchange.onnx_runs import Execution

_FLOATING = (1, 10, 11, 16)  # TensorProto.FLOAT, FLOAT16, DOUBLE, BFLOAT16


def is_onnx(path: Path) -> bool:
    """Does the name say that it is an ONNX file, packed or not?"""
    return path.name.endswith((".onnx", ".onnx.gz"))


def load_onnx(source: str | Path, *, paired: bool = False) -> OnnxNet:
    """Return the network of a file, a module in the file's own precision (half precision becomes
    float32), weights as they stand there.

    The first axis is the batch where the file leaves it free or gives it as 1. `paired` is for
    properties: the outputs are numbered whatever their shape, and a single one turns into two
    logits. Raises `BadInput` for a file that cannot be read, `UnsupportedOp` for an operation that
    cannot be bounded, with its name and node.
    """
    path = existing(source, "a network")
    try:
        return _read(path, paired)
    except CalipersError:
        raise
    except Exception as error:  # bytes from strangers: there is no end of what the libraries raise
        raise BadInput(
            f"{path} cannot be read as an ONNX file ({typed(error)}); is it damaged?"
        ) from error


def _read(path: Path, paired: bool) -> OnnxNet:
    model, data = _parsed(path)
    return _built(model, data, path, paired)


def _built(model: Any, data: bytes, path: Path, paired: bool) -> OnnxNet:
    import onnx

    version, graph = operator_set(model, path), model.graph
    stored = {t.name: t for t in graph.initializer}
    given = [i for i in graph.input if i.name not in stored]
    _check_names(graph, [*stored, *(i.name for i in given)], path)
    if len(given) != 1 or len(graph.output) != 1:
        raise BadInput(
            f"{path.name} has {len(given)} inputs and {len(graph.output)} outputs; only networks "
            "of one each are read. Cut out the part that is meant with onnx.utils.extract_model."
        )
    shape, free = _input_shape(given[0], path)
    nodes = _needed(graph)
    lines = tuple(line(node, k, version, free, path) for k, node in nodes)
    used = {name for _, node in nodes for name in node.input}
    lines, constants = _without_constant_nodes(
        lines, {name: tensor(t, path) for name, t in stored.items() if name in used}
    )
    program = Program(path.name, given[0].name, shape, graph.output[0].name, lines)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(given[0].type.tensor_type.elem_type)
    other = Execution(
        data,
        path.name,
        given[0].name,
        graph.output[0].name,
        dtype,
        lambda: _built(onnx.load_model_from_string(data), data, path, paired),
    )
    return OnnxNet(program, constants, paired, other).eval()


def _check_names(graph: Any, names: list[str], path: Path) -> None:
    """Has every value one maker?"""
    made = Counter([*names, *(name for node in graph.node for name in node.output if name)])
    twice = [name for name, times in made.items() if times > 1]
    if twice or len({t.name for t in graph.initializer}) < len(graph.initializer):
        raise BadInput(
            f"{path.name} makes the value {', '.join(twice[:3]) or 'of a weight'} twice; the file "
            "is damaged"
        )
    sparse = [t.values.name for t in graph.sparse_initializer]
    if sparse:
        raise UnsupportedOp(
            f"{path.name} stores {sparse[0]!r} as a sparse tensor, which is not read. Store it as "
            "a dense one."
        )


def _needed(graph: Any) -> list[tuple[int, Any]]:
    """Return the nodes that the output depends on, with their places."""
    wanted, kept = {graph.output[0].name}, []
    for place, node in reversed(list(enumerate(graph.node))):
        if wanted.intersection(name for name in node.output if name):
            wanted.update(name for name in node.input if name)
            kept.append((place, node))
    return kept[::-1]


def _parsed(path: Path) -> tuple[Any, bytes]:
    """Return the file's message, weights that stand in other files brought in, and the bytes of
    it.
    """
    try:
        import onnx
    except ImportError as error:
        raise BadInput(
            f"reading {path.name} needs the package onnx: pip install 'calipers[onnx]'"
        ) from error
    try:
        data = content(path)
        model = onnx.load_model_from_string(data)
        tensors = [
            *model.graph.initializer,
            *(a.t for node in model.graph.node for a in node.attribute),
        ]
        if any(map(onnx.external_data_helper.uses_external_data, tensors)):
            onnx.external_data_helper.load_external_data_for_model(
                model, str(path.resolve().parent)
            )
            data = model.SerializeToString()
    except Exception as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} cannot be read as an ONNX file ({typed(error)})") from error
    if not model.graph.node or not model.graph.output:
        raise BadInput(f"{path} holds no network: is it an ONNX file, and complete?")
    if model.functions:
        raise BadInput(
            f"{path} defines functions of its own ({model.functions[0].name}, ...); write it with "
            "them inlined (onnx.inliner)"
        )
    return model, data


def _input_shape(given: Any, path: Path) -> tuple[tuple[int, ...], bool]:
    """Return the input's shape with 1 for a free first axis, and whether that is free."""
    if given.type.tensor_type.elem_type not in _FLOATING:
        raise BadInput(
            f"{path.name}: the input {given.name} does not hold floating-point numbers, as a "
            "point must"
        )
    sizes = [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
        for d in given.type.tensor_type.shape.dim
    ]
    if not sizes or any(n is None for n in sizes[1:]):
        said = sizes or "of a scalar"
        raise BadInput(
            f"{path.name}: the input {given.name} has the shape {said}: only the first axis, the "
            "batch, may be free. Export it with fixed sizes."
        )
    if math.prod(n or 1 for n in sizes) > LARGEST:
        raise BadInput(
            f"{path.name}: the input {given.name} has the shape {sizes}: up to {LARGEST:,} "
            "numbers are read"
        )
    free = sizes[0] is None
    return tuple(1 if n is None else n for n in sizes), free and len(sizes) > 1


def _without_constant_nodes(
    lines: tuple[Line, ...], constants: dict[str, Tensor]
) -> tuple[tuple[Line, ...], dict[str, Tensor]]:
    """Put the tensors of Constant nodes among the weights, where they convert with the network and
    count for its identity.
    """
    found = {
        line.outputs[0]: line.step.attributes["value"]
        for line in lines
        if line.step.kind == "Constant" and list(line.step.attributes) == ["value"]
    }
    return tuple(line for line in lines if line.outputs[0] not in found), {**constants, **found}
