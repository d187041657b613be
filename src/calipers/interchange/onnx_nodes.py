"""Nodes of ONNX files: attributes, defaults and shape inference.

Attributes become plain values; defaults and the rules for shapes come from the operator set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.errors import BadInput, BadModel, UnsupportedOp
from calipers.graph.file_builder import Shape
from calipers.graph.onnx.network import Line
from calipers.graph.onnx.steps import Foresight, Step

OPERATOR_SETS = range(7, 27)
"""The versions of ONNX's operators that are read: those that the tests compare with the reference.
(Up to 6, broadcasting had rules of its own.)
"""

_BY_CHANCE = frozenset(
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial".split()
)
"""Operations whose results are random. All others, on constants alone, are evaluated by ONNX's
reference.
"""

_HALVES = (torch.float16, torch.bfloat16)
_KNOWN_NUMBERS = 256  # most elements of a constant that may be a shape, an index or a scale
_TYPES = {
    torch.float32: 1,
    torch.float64: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
}


def operator_set(model: Any, path: Path) -> int:
    """Return the version of the standard operators that a file uses.

    Raises `UnsupportedOp` where it is not one that is read, `BadInput` where there is not exactly
    one.
    """
    from onnx import defs

    found = {v.version for v in model.opset_import if v.domain in ("", "ai.onnx")}
    newest = min(OPERATOR_SETS[-1], defs.onnx_opset_version())
    if len(found) != 1:
        raise BadInput(
            f"{path.name} names {len(found)} versions of the standard operators, not one: is it an "
            "ONNX file, and complete?"
        )
    (version,) = found
    if not OPERATOR_SETS[0] <= version <= newest:
        raise UnsupportedOp(
            f"{path.name} is written in operator set {version}; {OPERATOR_SETS[0]} to {newest} are "
            "read. Convert it with onnx.version_converter.convert_version, or export it again "
            "with another opset_version."
        )
    return int(version)


def line(node: Any, place: int, version: int, free: bool, path: Path) -> Line:
    """Return one operation with its attributes, defaults and shape rule.

    Raises `UnsupportedOp` for what the operator set does not know, `BadModel` where the node does
    not fit its operation.
    """
    where = f"{path.name}, node {node.name or place} ({node.op_type})"
    if node.domain not in ("", "ai.onnx"):
        raise UnsupportedOp(
            f"{where}: operations of the domain {node.domain} are not read. Export the network "
            "with the standard operators."
        )
    schema = _schema(node.op_type, version, where)
    _check_counts(node, schema, where)
    attributes = {a.name: _attribute(a, schema, where, path) for a in node.attribute}
    if len(attributes) < len(node.attribute):
        raise BadModel(f"{where}: an attribute is given twice; the file is damaged")
    defaults = {
        name: value
        for name, a in schema.attributes.items()
        if (value := _plain(a.default_value)) is not None
    }
    outputs = sum(1 for name in node.output if name)
    foresee = _foresight(node, schema, version)
    fold = None if node.op_type in _BY_CHANCE else _folding(node, version)
    step = Step(
        node.op_type,
        attributes,
        version,
        free,
        where,
        outputs,
        defaults,
        (lambda _: []) if schema.deprecated else foresee,
        fold,
    )
    return Line(step, tuple(node.input), tuple(node.output))


def tensor(proto: Any, path: Path) -> Tensor:
    """Return a tensor of a file; half precision becomes float32."""
    from onnx import numpy_helper

    try:
        if min(proto.dims, default=0) < 0:
            raise ValueError(f"its shape is {list(proto.dims)}")
        found = torch.from_numpy(np.array(numpy_helper.to_array(proto)))
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"{path.name}: the tensor {proto.name!r} cannot be read ({error})"
        ) from error
    return found.float() if found.dtype in _HALVES else found


def _schema(kind: str, version: int, where: str) -> Any:
    """Return the definition of an operation in an operator set."""
    from onnx import defs

    try:
        return defs.get_schema(kind, version, "")
    except defs.SchemaError as error:
        raise UnsupportedOp(
            f"{where}: operator set {version} has no operation {kind}. Export the network with the "
            "standard operators."
        ) from error


def _check_counts(node: Any, schema: Any, where: str) -> None:
    """Raise `BadModel` for too few or too many inputs or outputs.

    An input that is necessary and left out is refused as well.
    """
    optional = {i for i, given in enumerate(schema.inputs) if given.option.name == "Optional"}
    missing = [i for i, name in enumerate(node.input) if not name and i not in optional]
    for what, names, least, most in (
        ("inputs", node.input, schema.min_input, schema.max_input),
        ("outputs", node.output, 1, schema.max_output),
    ):
        if not least <= len(names) <= most or missing:
            raise BadModel(
                f"{where}: {len(names)} {what}, where the operation has {least} to {most}, or "
                f"input {missing} left out; the file is damaged"
            )


def _attribute(attribute: Any, schema: Any, where: str, path: Path) -> Any:
    """Return an attribute as a number, text, list of either, or tensor."""
    known = schema.attributes.get(attribute.name)
    if known is None:
        raise UnsupportedOp(
            f"{where}: the operation has no attribute {attribute.name} in this operator set. "
            "Export the network without it."
        )
    if known.type.name != attribute.AttributeType.Name(attribute.type) or attribute.ref_attr_name:
        raise BadModel(
            f"{where}: the attribute {attribute.name} is not of the type {known.type.name}; the "
            "file is damaged"
        )
    if attribute.type == attribute.TENSOR:
        return tensor(attribute.t, path)
    value = _plain(attribute)
    if value is None:
        raise UnsupportedOp(
            f"{where}: the attribute {attribute.name} holds a {known.type.name.lower()}, which is "
            "not read (of branches, those that constants decide are). Export the network without "
            "it."
        )
    return value


def _plain(attribute: Any) -> Any:
    """Return numbers, text and lists of them as Python's own; else None."""
    from onnx import AttributeProto, helper

    plain = (
        AttributeProto.FLOAT,
        AttributeProto.INT,
        AttributeProto.STRING,
        AttributeProto.FLOATS,
        AttributeProto.INTS,
        AttributeProto.STRINGS,
    )
    if attribute.type not in plain:
        return None
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return (
        value
        if isinstance(value, (int, float))
        else [v.decode() if isinstance(v, bytes) else v for v in value]
    )


def _foresight(node: Any, schema: Any, version: int) -> Foresight:
    """Return the rule that infers the shapes of the results.

    It is the operator set's own, applied before anything is computed.
    """
    from onnx import helper, numpy_helper, shape_inference

    operators = [helper.make_opsetid("", version)]

    def foresee(values: Sequence[Tensor | Shape | None]) -> list[Shape | None]:
        types, numbers = {}, {}
        for name, value in zip(node.input, values, strict=False):
            if value is None:
                continue
            if not isinstance(value, Tensor):
                types[name] = helper.make_tensor_type_proto(1, list(value))
                continue
            types[name] = helper.make_tensor_type_proto(
                _TYPES.get(value.dtype, 1), list(value.shape)
            )
            if value.numel() <= _KNOWN_NUMBERS:
                single = value.float() if value.dtype == torch.float64 else value
                numbers[name] = numpy_helper.from_array(single.detach().cpu().numpy(), name)
        found = shape_inference.infer_node_outputs(
            schema, node, types, numbers, opset_imports=operators
        )
        return [_shape(found.get(name)) for name in node.output]

    return foresee


def _folding(node: Any, version: int) -> Callable[[Sequence[Tensor | None]], tuple[Tensor, ...]]:
    """Return the operation on constants, evaluated by ONNX's reference."""
    from onnx import ValueInfoProto, helper
    from onnx.reference import ReferenceEvaluator

    def fold(values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        numbers = {
            name: v.detach().cpu().numpy()
            for name, v in zip(node.input, values, strict=False)
            if v is not None
        }
        given, results = (
            [ValueInfoProto(name=name) for name in names if name]
            for names in (numbers, node.output)
        )
        model = helper.make_model(
            helper.make_graph([node], "constants", given, results),
            opset_imports=[helper.make_opsetid("", version)],
        )
        return tuple(
            torch.as_tensor(np.array(found))
            for found in ReferenceEvaluator(model).run(None, numbers)
        )

    return fold


def _shape(kind: Any) -> Shape | None:
    """Return the shape of an inferred type, or None where it is not known."""
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.tensor_type.shape.dim]
    return None if None in sizes else tuple(int(n) for n in sizes if n is not None)
