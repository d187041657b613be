"""What stands in an ONNX file? Read with the package `onnx`, handed on in plain words and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.errors import BadInput, UnsupportedOp
from calipers.graph.onnx_moves import Step
from calipers.graph.onnx_net import Line, OnnxNet, Program
from calipers.interchange.files import content, existing

_HALVES = (torch.float16, torch.bfloat16)


def is_onnx(path: Path) -> bool:
    """Does the name say that it is an ONNX file, packed or not?"""
    return path.name.endswith((".onnx", ".onnx.gz"))


def load_onnx(source: str | Path, *, paired: bool = False) -> OnnxNet:
    """Return the network of a file, a module in the file's own precision (half precision becomes float32), weights as they stand there.

    The first axis is the batch where the file leaves it free or gives it as 1. `paired` turns a single output into two logits.
    Raises `BadInput` for a file that cannot be read, `UnsupportedOp` for an operation that cannot be bounded, with its name and node.
    """
    path = existing(source, "a network")
    model = _parsed(path)
    constants = {t.name: _tensor(t, path) for t in model.graph.initializer}
    given = [i for i in model.graph.input if i.name not in constants]
    if len(given) != 1 or len(model.graph.output) != 1:
        raise BadInput(f"{path.name} has {len(given)} inputs and {len(model.graph.output)} outputs; only networks of one each are read")
    shape, free = _input_shape(given[0], path)
    versions = {v.domain: v.version for v in model.opset_import}
    lines = tuple(_line(node, k, versions, free, path) for k, node in enumerate(model.graph.node))
    lines, constants = _without_constant_nodes(lines, constants)
    used = {name for line in lines for name in line.inputs}
    program = Program(path.name, given[0].name, shape, model.graph.output[0].name, lines)
    return OnnxNet(program, {name: tensor for name, tensor in constants.items() if name in used}, paired).eval()


def _parsed(path: Path) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise BadInput(f"reading {path.name} needs the package onnx: pip install 'calipers[onnx]'") from error
    try:
        model = onnx.load_model_from_string(content(path))
        onnx.external_data_helper.load_external_data_for_model(model, str(path.resolve().parent))
    except Exception as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} cannot be read as an ONNX file ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from error
    if not model.graph.node or not model.graph.output:
        raise BadInput(f"{path} holds no network: is it an ONNX file, and complete?")
    if model.functions:
        raise BadInput(f"{path} defines functions of its own ({model.functions[0].name}, ...); write it with them inlined (onnx.inliner)")
    return model


def _tensor(proto: Any, path: Path) -> Tensor:
    from onnx import numpy_helper

    try:
        tensor = torch.from_numpy(np.array(numpy_helper.to_array(proto)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{path.name}: the tensor {proto.name!r} cannot be read ({error})") from error
    return tensor.float() if tensor.dtype in _HALVES else tensor


def _input_shape(given: Any, path: Path) -> tuple[tuple[int, ...], bool]:
    """Return the input's shape with 1 for a free first axis, and whether that is free."""
    sizes = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in given.type.tensor_type.shape.dim]
    if not sizes or any(n is None for n in sizes[1:]):
        raise BadInput(f"{path.name}: the input {given.name} has the shape {sizes or 'of a scalar'}: only the first axis, the batch, may be free")
    free = sizes[0] is None
    return tuple(1 if n is None else n for n in sizes), free and len(sizes) > 1


def _line(node: Any, place: int, versions: dict[str, int], free: bool, path: Path) -> Line:
    where = f"{path.name}, node {node.name or place} ({node.op_type})"
    if node.domain not in ("", "ai.onnx"):
        raise UnsupportedOp(f"{where}: operations of the domain {node.domain} are not read. Export the network with the standard operators.")
    attributes = {a.name: _attribute(a, path) for a in node.attribute}
    step = Step(node.op_type, attributes, versions.get("", versions.get("ai.onnx", 1)), free, where, sum(1 for name in node.output if name))
    return Line(step, tuple(node.input), tuple(node.output))


def _attribute(attribute: Any, path: Path) -> Any:
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return _tensor(value, path) if type(value).__name__ == "TensorProto" else list(value) if not isinstance(value, (int, float)) else value


def _without_constant_nodes(lines: tuple[Line, ...], constants: dict[str, Tensor]) -> tuple[tuple[Line, ...], dict[str, Tensor]]:
    """Put the tensors of Constant nodes among the weights, where they convert with the network and count for its identity."""
    found = {line.outputs[0]: line.step.attributes["value"] for line in lines if line.step.kind == "Constant" and "value" in line.step.attributes}
    return tuple(line for line in lines if line.outputs[0] not in found), {**constants, **found}
