"""ONNX files, read with the package `onnx` into plain values and tensors."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calipers.errors import (
    BadInput,
    BadModel,
    CalipersError,
    CaptureError,
    UnsupportedOp,
    typed,
)
from calipers.graph.onnx.network import Line, NetworkFile, OnnxNet
from calipers.graph.onnx.steps import LARGEST
from calipers.interchange.files import content, existing
from calipers.interchange.onnx_graphs import (
    FLOATING,
    NetworkParts,
    alone,
    chosen,
    decided,
    fixed_first_axes,
    is_whole,
    made_dense,
)
from calipers.interchange.onnx_nodes import line, operator_set, tensor
from calipers.interchange.onnx_runs import Execution
from calipers.models.wrappers import BlackBox

_ASKED_AGAIN = 32  # runs of the same point, to detect random outputs


def is_onnx(path: Path) -> bool:
    """Return whether the name is that of an ONNX file, packed or not."""
    return path.name.endswith((".onnx", ".onnx.gz"))


def load_onnx(
    source: str | Path,
    *,
    paired: bool = False,
    output: str | int | None = None,
    shape: Sequence[int] | None = None,
) -> OnnxNet:
    """Return the network of an ONNX file as a module.

    It has the file's own precision (half precision becomes float32) and its weights as they are.
    The first axis is the batch where the file leaves it free or gives it as 1.

    Args:
        source: An .onnx or .onnx.gz file.
        paired: For properties: outputs are numbered whatever their shape, and a single one becomes
            two logits.
        output: Name or number of the output that is meant; by default the only one, or the only one
            that holds floating-point numbers.
        shape: Shape of one point, where the file leaves more sizes free than the batch's.

    Raises:
        BadInput: For a file that cannot be read, or in which more than one output could be meant.
        UnsupportedOp: For an operation that cannot be bounded, with its name and node.
    """
    path = existing(source, "a network")
    wanted = _Wanted(paired, output, None if shape is None else tuple(int(n) for n in shape))
    try:
        return _built(*_parsed(path), path, wanted)
    except CalipersError:
        raise
    except Exception as error:  # for untrusted bytes the libraries raise anything
        raise BadInput(
            f"{path} cannot be read as an ONNX file ({typed(error)}); is it damaged?"
        ) from error


def ask_onnx(
    source: str | Path,
    *,
    paired: bool = False,
    output: str | int | None = None,
    shape: Sequence[int] | None = None,
    no_graph: str = "",
) -> AskedNet:
    """Return the network of an ONNX file as a module that is only run.

    onnxruntime runs it, or else ONNX's reference. For operations that cannot be bounded, and for
    attacks without gradients.

    Args:
        source, paired, output, shape: As for `load_onnx`.
        no_graph: Why there are no bounds; the message for certifiers.

    Raises:
        BadInput: For a file that cannot be opened, or in which more than one output could be meant.
        BadModel: Where no program runs the file, or its outputs are random.
    """
    path = existing(source, "a network")
    model, data = _parsed(path)
    made_dense(model.graph, LARGEST, path)
    parts = chosen(model.graph, output, path)
    size, _ = _input_shape(parts.input, path, None if shape is None else tuple(shape))
    run = data if is_whole(model.graph, parts) else alone(model, parts)
    execution = _execution(run, path, parts, nn.Identity)
    found = execution(np.full((_ASKED_AGAIN, *size), 0.5))
    if not np.array_equal(found, found[:1].repeat(len(found), 0), equal_nan=True):
        raise BadModel(f"{path.name} answers the same point differently: it depends on chance")

    def ask(x: NDArray[Any]) -> NDArray[np.float64]:
        found = execution(x.reshape(len(x), *size))
        return (
            np.hstack([np.zeros((len(x), 1)), found]) if paired and found.shape[1] == 1 else found
        )

    inner = size[1:] if len(size) > 1 and size[0] == 1 else size
    name = f"{path.name} {hashlib.sha256(data).hexdigest()[:16]}, output {parts.output.name}"
    dtype = torch.float64 if execution.dtype == np.float64 else torch.float32
    module = BlackBox(ask, name=name, dtype=dtype)
    module.no_graph = no_graph
    return AskedNet(module.eval(), inner, found.shape[1])


class AskedNet(NamedTuple):
    """A network that can only be run, its point shape and number of outputs."""

    module: BlackBox
    point_shape: tuple[int, ...]
    outputs: int


def read_or_ask(source: str | Path, **wanted: Any) -> nn.Module:
    """Return the network of a file, which is only run if it cannot be bounded.

    As `load_onnx`, or where an operation cannot be bounded, as `ask_onnx`: attacks still work, and
    the error that certifiers raise says what could not be bounded.
    """
    try:
        return load_onnx(source, **wanted)
    except (UnsupportedOp, CaptureError) as refused:
        try:
            return ask_onnx(source, **wanted, no_graph=str(refused)).module
        except CalipersError:
            raise refused from None


class _Wanted(NamedTuple):
    """What the caller specifies about a file; see `load_onnx`."""

    paired: bool
    output: str | int | None
    shape: tuple[int, ...] | None


def _built(model: Any, data: bytes, path: Path, wanted: _Wanted) -> OnnxNet:
    """Return the network of a parsed file."""
    import onnx

    version, sparse = operator_set(model, path), bool(model.graph.sparse_initializer)
    made_dense(model.graph, LARGEST, path)
    decided(model, path)
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    _check_names(graph, [*stored, *(i.name for i in graph.input if i.name not in stored)], path)
    parts = chosen(graph, wanted.output, path)
    plain = not sparse and is_whole(graph, parts)
    run = data if plain else alone(model, parts)
    shape, free = _input_shape(parts.input, path, wanted.shape)
    fixed = fixed_first_axes(model, parts.input) | {*stored, ""} if free else frozenset()
    lines = tuple(
        line(node, k, version, free and not fixed.issuperset(node.input), path)
        for k, node in parts.nodes
    )
    used = {name for _, node in parts.nodes for name in node.input}
    lines, constants = _without_constant_nodes(
        lines, {name: tensor(t, path) for name, t in stored.items() if name in used}
    )
    program = NetworkFile(path.name, parts.input.name, shape, parts.output.name, lines)
    other = _execution(
        run, path, parts, lambda: _built(onnx.load_model_from_string(data), data, path, wanted)
    )
    return OnnxNet(program, constants, wanted.paired, other).eval()


def _execution(
    data: bytes, path: Path, parts: NetworkParts, again: Callable[[], nn.Module]
) -> Execution:
    """Return the independent execution of a file's network."""
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(parts.input.type.tensor_type.elem_type)
    return Execution(data, path.name, parts.input.name, parts.output.name, dtype, again)


def _check_names(graph: Any, names: list[str], path: Path) -> None:
    """Raise `BadInput` where a value is made more than once."""
    made = Counter([*names, *(name for node in graph.node for name in node.output if name)])
    twice = [name for name, times in made.items() if times > 1]
    if twice or len({t.name for t in graph.initializer}) < len(graph.initializer):
        raise BadInput(
            f"{path.name} makes the value {', '.join(twice[:3]) or 'of a weight'} twice; the file "
            "is damaged"
        )


def _parsed(path: Path) -> tuple[Any, bytes]:
    """Return the parsed file, and its bytes.

    Weights that are kept in other files are brought in, and local functions are inlined.
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
        from onnx.inliner import inline_local_functions

        model = inline_local_functions(model)
    return model, data


def _input_shape(
    given: Any, path: Path, point: tuple[int, ...] | None
) -> tuple[tuple[int, ...], bool]:
    """Return the input's shape, and whether its first axis is free.

    A free first axis is given as 1.
    """
    if given.type.tensor_type.elem_type not in FLOATING:
        raise BadInput(
            f"{path.name}: the input {given.name} does not hold floating-point numbers, as a "
            "point must"
        )
    sizes: list[int | None] = [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
        for d in given.type.tensor_type.shape.dim
    ]
    if point is not None:
        sizes = _filled(sizes, point, given.name, path)
    if not sizes or any(n is None for n in sizes[1:]):
        said = ", ".join("?" if n is None else str(n) for n in sizes) or "of a scalar"
        raise BadInput(
            f"{path.name}: the input {given.name} has the shape ({said}): only the first axis, "
            "the batch, may be free. Export it with fixed sizes, or say the shape of a point: "
            "calipers.load(path, shape=(1, 28, 28))."
        )
    if math.prod(n or 1 for n in sizes) > LARGEST:
        raise BadInput(
            f"{path.name}: the input {given.name} has the shape {sizes}: up to {LARGEST:,} "
            "numbers are read"
        )
    free = sizes[0] is None
    return tuple(1 if n is None else n for n in sizes), free and len(sizes) > 1


def _filled(
    sizes: list[int | None], point: tuple[int, ...], name: str, path: Path
) -> list[int | None]:
    """Return the sizes, with those of a point for the free ones."""
    if len(point) != len(sizes) - 1 or any(
        n is not None and n != m for n, m in zip(sizes[1:], point, strict=False)
    ) or min(point, default=0) < 1:  # fmt: skip
        said = ", ".join("?" if n is None else str(n) for n in sizes)
        raise BadInput(
            f"{path.name}: a point of the shape {point} does not fit the input {name} of the shape "
            f"({said}), whose first axis is the batch"
        )
    return [sizes[0], *point]


def _without_constant_nodes(
    lines: tuple[Line, ...], constants: dict[str, Tensor]
) -> tuple[tuple[Line, ...], dict[str, Tensor]]:
    """Move the tensors of Constant nodes to the weights.

    There they are converted with the network, and count for its identity.
    """
    found = {
        line.outputs[0]: line.step.attributes["value"]
        for line in lines
        if line.step.kind == "Constant" and list(line.step.attributes) == ["value"]
    }
    return tuple(line for line in lines if line.outputs[0] not in found), {**constants, **found}
