"""The network of an ONNX file as a module that carries its own graph.

It holds the file's operations, and its weights in buffers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calipers.errors import BadModel, CaptureError, UnsupportedOp
from calipers.graph.affine import Linear
from calipers.graph.file_builder import Compared, FileResult, Shape, Tape, Value
from calipers.graph.ir import Graph, Node
from calipers.graph.onnx.agreement import Outputs, compare
from calipers.graph.onnx.ops import OPS, Reader
from calipers.graph.onnx.steps import Step
from calipers.graph.onnx.variables import VARIABLES


@dataclass(frozen=True, eq=False)
class Line:
    """One operation of the file, with the names of its inputs and outputs.

    The name of an input that is left out is "".
    """

    step: Step
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class NetworkFile:
    """The contents of a file, without the weights.

    `input_shape` is as given there, with 1 for a free batch; `lines` are the operations on which
    the output depends, in order.
    """

    source: str
    input: str
    input_shape: Shape
    output: str
    lines: tuple[Line, ...]

    @property
    def point_shape(self) -> Shape:
        """Return the shape of one point.

        It is the input's shape without the leading axis of 1 that stands for the batch.
        """
        return (
            self.input_shape[1:]
            if len(self.input_shape) > 1 and self.input_shape[0] == 1
            else self.input_shape
        )

    def digest(self) -> str:
        """Return a hash of everything but the weights."""
        h = hashlib.sha256(f"{self.input} {self.input_shape} {self.output}".encode())
        for line in self.lines:
            plain = {
                k: v.tolist() if isinstance(v, Tensor) else v
                for k, v in sorted(line.step.attributes.items())
            }
            h.update(
                f"{line.step.kind} {line.step.opset} {plain} {line.inputs} {line.outputs}".encode()
            )
        return h.hexdigest()[:16]


class Other(Protocol):
    """Another program that runs the file."""

    dtype: np.dtype[Any]

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float64]:
        """Return the outputs (M, K) of inputs (M, *input_shape)."""

    def edited(self, net: nn.Module) -> bool:
        """Return whether the network's weights were changed since it was read."""

    def in_double(self) -> Other | None:
        """Return the file with double precision inside its layers.

        None where it is like that already.
        """


class OnnxNet(nn.Module):
    """The network of an ONNX file, (M, *point_shape) -> (M, K).

    It evaluates its graph, with gradients, in the precision of its buffers.

    `paired` is for properties, which number the outputs whatever their shape: a single output z is
    returned as the logits (0, z), so that there are two classes. Otherwise outputs of more axes are
    returned with those axes, and the code that needs logits refuses them. `outputs` is the number
    of the file's own outputs. `other` runs the file, for `confirm`. The inputs listed in `echoed`
    are appended to the outputs, in their order. The constructor raises `UnsupportedOp` where an
    operation has no known facts.
    """

    def __init__(
        self,
        program: NetworkFile,
        constants: Mapping[str, Tensor],
        paired: bool = False,
        other: Other | None = None,
        echoed: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.program, self.paired, self.other, self.echoed = program, paired, other, echoed
        self.names = {name: f"constant_{k}" for k, name in enumerate(constants)}
        for name, tensor in constants.items():
            self.register_buffer(self.names[name], tensor)
        self.register_buffer(
            "anchor",
            torch.zeros((), dtype=torch.float64 if _all_double(constants) else torch.float32),
        )
        self._built: tuple[object, Graph] | None = None
        self.outputs, self._axes, self._foreseen = 0, Shape(), False
        self.graph()

    def graph(self) -> Graph:
        """Return the graph, built anew whenever a buffer has changed."""
        state = tuple((id(t), t._version) for t in self.buffers())
        if self._built is None or self._built[0] != state:
            self._built = (state, self._read())
        return self._built[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs: (M, *point_shape) -> (M, K)."""
        if x.shape[1:] != self.program.point_shape:
            raise BadModel(
                f"{self.program.source} takes points of shape {self.program.point_shape}, got "
                f"{tuple(x.shape[1:])}"
            )
        z = self.graph().values(x)[-1]
        return z if self.paired or len(self._axes) < 2 else z.reshape(len(z), *self._axes)

    @property
    def largest(self) -> int:
        """Return the number of elements of the largest value for one point."""
        return max(math.prod(node.shape) for node in self.graph().nodes)

    def confirm(self, x: Tensor, run: Tensor, exact: Tensor) -> None:
        """Compare outputs with those of the program that runs the file.

        `x` (M, *point_shape) are the points, `run` the outputs of this network and `exact` those of
        a float64 copy.

        Raises `BadModel` with the size of the difference. Where the weights were changed since the
        file was read a difference is accepted, since the network is no longer that of the file.
        Where the file asks for single precision inside a layer of double precision, that rounding
        explains a difference if there is none once the same layer computes in double.
        """
        if self.other is None:
            return
        given = x.detach().cpu().reshape(len(x), *self.program.input_shape)
        last = -len(self.echoed) or None
        own, double = (z.detach().cpu().flatten(1)[:, :last] for z in (run, exact))
        own, double = own[:, -self.outputs :], double[:, -self.outputs :]
        try:
            self._compare(own, double, given, self.other, single=False)
        except BadModel:
            if self.other.edited(self):
                return
            wide = self.other.in_double()
            if wide is None:
                raise
            self._compare(own, double, given, self.other, single=True)
            self._compare(own, double, given, wide, single=False)

    def _compare(
        self, own: Tensor, double: Tensor, given: Tensor, other: Other, *, single: bool
    ) -> None:
        """Raise `BadModel` where outputs differ by more than rounding.

        By that of the file's precision, or of single precision.
        """
        dtype = torch.float32 if single else torch.as_tensor(np.zeros((), other.dtype)).dtype
        outputs = Outputs(own, double, torch.as_tensor(other(given.numpy())))
        compare(outputs, dtype, self.program.source, "onnxruntime or the reference")

    def extra_repr(self) -> str:
        """Return what tells this network from another with the same weights."""
        echoed = f", echoed={self.echoed}" if self.echoed else ""
        return f"{self.program.digest()}, paired={self.paired}{echoed}"

    def echoing(self, inputs: tuple[int, ...]) -> OnnxNet:
        """Return the network with some inputs appended to its outputs.

        The inputs are indices into the flattened point.
        """
        constants = {name: self.get_buffer(buffer) for name, buffer in self.names.items()}
        return OnnxNet(self.program, constants, self.paired, self.other, inputs).eval()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the graph: a copy builds its own."""
        return {**self.__dict__, "_built": None}

    def _read(self) -> Graph:
        anchor = self.get_buffer("anchor")
        tape = Tape(self.program.point_shape, self.program.input_shape, anchor.dtype, anchor.device)
        known: dict[str, Value | None] = {"": None, self.program.input: tape.input}
        known.update({name: self.get_buffer(buffer) for name, buffer in self.names.items()})
        with torch.no_grad():
            for line in self.program.lines:
                known.update(
                    zip(line.outputs, _results(tape, line, known, not self._foreseen), strict=False)
                )
        output = known.get(self.program.output)
        if not isinstance(output, FileResult):
            raise CaptureError(
                f"{self.program.source}: the output {self.program.output} does not depend on the "
                f"input {self.program.input}: nothing to bound"
            )
        if not math.prod(output.shape):
            raise BadModel(
                f"{self.program.source}: the output {self.program.output} has the shape "
                f"{output.shape}: no number at all"
            )
        self._foreseen = True  # once is enough: sizes are the same in every precision
        self.outputs = torch.Size(output.shape).numel()
        self._axes = (
            output.shape[1:] if output.shape[:1] == (1,) and len(output.shape) > 1 else output.shape
        )
        last = tape.view(output, (self.outputs,))
        if self.echoed:
            places = torch.tensor(self.echoed, device=anchor.device)
            given = tape.view(tape.input, (math.prod(self.program.point_shape),))
            last = tape.moved("echo", (last, given), lambda z, x: torch.cat([z, x[:, places]], 1))
            return tape.graph(last)
        graph = tape.graph(last)
        return _with_zero(graph, anchor) if self.paired and self.outputs == 1 else graph


def _all_double(constants: Mapping[str, Tensor]) -> bool:
    floats = [t.dtype for t in constants.values() if t.is_floating_point()]
    return bool(floats) and all(dtype == torch.float64 for dtype in floats)


def _results(
    tape: Tape, line: Line, known: Mapping[str, Value | None], foresee: bool
) -> tuple[Value, ...]:
    step = line.step.fresh()
    missing = [name for name in line.inputs if name not in known]
    if missing:
        raise BadModel(
            f"{step.where}: the input {missing[0]!r} is made nowhere before: the file is damaged, "
            "its operations are out of order, or it is a further result of an operation of which "
            "only the first is read"
        )
    values = [known[name] for name in line.inputs]
    while values and values[-1] is None:
        values.pop()
    for value in values:
        if isinstance(value, Compared) and step.kind != "Where":
            raise step.refuse(str(value.condition.refused()))
    reader = _reader(step, values)
    if reader is None:
        raise UnsupportedOp(
            f"no bounds for ONNX's {step.kind} at {step.where}. Export the network without it, or "
            "add it to "
            "calipers/graph/onnx/ops.py; attacks that only ask run on calipers.load(path)."
        )
    tape.writer.where = step.where
    with step.guarded():
        shapes = step.foreseen(values) if foresee else []
        found = reader(tape, step, *values)
        made = found if isinstance(found, tuple) else (found,)
        step.finish()
        for value, shape in zip(made, shapes, strict=False):
            if shape is not None and tuple(value.shape) != shape:
                raise step.damaged(
                    f"a result of shape {tuple(value.shape)} was read, where the operator set "
                    f"says {shape}"
                )
    return made


def _reader(step: Step, values: Sequence[Value | None]) -> Reader | None:
    """Return the reader of an operation, or None.

    It is the reader of that name; for an operation on constants only that has none, ONNX's
    reference.
    """
    if step.kind in OPS:
        return OPS[step.kind]
    if any(isinstance(v, FileResult) for v in values):
        return VARIABLES.get(step.kind)
    if step.fold is None:
        return None
    step.ignore(*step.attributes)
    work_out = step.fold

    def read(tape: Tape, step: Step, *constants: Tensor | None) -> tuple[Value, ...]:
        return tuple(
            t.to(tape.device, tape.dtype if t.is_floating_point() else t.dtype)
            for t in work_out(constants)
        )

    return read


def _with_zero(graph: Graph, anchor: Tensor) -> Graph:
    pair = Linear(torch.tensor([[0.0], [1.0]], dtype=anchor.dtype, device=anchor.device), None)
    return Graph(
        graph.input_shape,
        (*graph.nodes, Node(pair, (len(graph.nodes),), (2,), "the single output as two logits")),
    )
