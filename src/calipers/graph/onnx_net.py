"""What does an ONNX file compute? A module that carries its own graph: the file's operations, its weights in buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calipers.errors import BadModel, CalipersError, CaptureError, UnsupportedOp
from calipers.graph.affine import Linear
from calipers.graph.ir import Graph, Node
from calipers.graph.onnx_moves import Step
from calipers.graph.onnx_ops import OPS
from calipers.graph.tape import Held, Shape, Tape, Value


@dataclass(frozen=True, eq=False)
class Line:
    """One operation of the file with the names of its inputs ("" where one is left out) and outputs."""

    step: Step
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """What a file says, weights apart: `input_shape` as it stands there, with 1 for a free batch; the lines in order."""

    source: str
    input: str
    input_shape: Shape
    output: str
    lines: tuple[Line, ...]

    @property
    def point_shape(self) -> Shape:
        """The shape of one point: the input's, without the leading axis of 1 that stands for the batch."""
        return self.input_shape[1:] if len(self.input_shape) > 1 and self.input_shape[0] == 1 else self.input_shape

    def needed(self) -> tuple[Line, ...]:
        """Return the lines that the output depends on."""
        wanted, kept = {self.output}, []
        for line in reversed(self.lines):
            if wanted.intersection(line.outputs):
                wanted.update(line.inputs)
                kept.append(line)
        return tuple(reversed(kept))

    def digest(self) -> str:
        """Return a hash of everything but the weights."""
        h = hashlib.sha256(f"{self.input} {self.input_shape} {self.output}".encode())
        for line in self.lines:
            plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in sorted(line.step.attributes.items())}
            h.update(f"{line.step.kind} {line.step.opset} {plain} {line.inputs} {line.outputs}".encode())
        return h.hexdigest()[:16]


class OnnxNet(nn.Module):
    """The network of an ONNX file, (M, *point_shape) -> (M, K): evaluates its graph, with gradients, in the precision of its buffers.

    `paired`: a single output z comes out as the logits (0, z), so that there are two classes; `outputs` counts the file's own. Raises `UnsupportedOp` at
    once where an operation has no facts.
    """

    def __init__(self, program: Program, constants: Mapping[str, Tensor], paired: bool = False) -> None:
        super().__init__()
        self.program, self.paired = program, paired
        self.names = {name: f"constant_{k}" for k, name in enumerate(constants)}
        for name, tensor in constants.items():
            self.register_buffer(self.names[name], tensor)
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64 if _all_double(constants) else torch.float32))
        self._built: tuple[object, Graph] | None = None
        self.outputs = 0
        self.graph()

    def graph(self) -> Graph:
        """Return the graph, made anew whenever a buffer has changed."""
        state = tuple((id(t), t._version) for t in self.buffers())
        if self._built is None or self._built[0] != state:
            self._built = (state, self._read())
        return self._built[1]

    def forward(self, x: Tensor) -> Tensor:
        """(M, *point_shape) -> (M, K)."""
        if x.shape[1:] != self.program.point_shape:
            raise BadModel(f"{self.program.source} takes points of shape {self.program.point_shape}, got {tuple(x.shape[1:])}")
        return self.graph().values(x)[-1]

    def extra_repr(self) -> str:
        """Return what tells this network from another one with the same weights."""
        return f"{self.program.digest()}, paired={self.paired}"

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own graph."""
        return {**self.__dict__, "_built": None}

    def _read(self) -> Graph:
        anchor = self.get_buffer("anchor")
        tape = Tape(self.program.point_shape, self.program.input_shape, anchor.dtype, anchor.device)
        known: dict[str, Value | None] = {"": None, self.program.input: tape.input}
        known.update({name: self.get_buffer(buffer) for name, buffer in self.names.items()})
        with torch.no_grad():
            for line in self.program.needed():
                known.update(zip(line.outputs, _results(tape, line, known), strict=False))
        output = known.get(self.program.output)
        if not isinstance(output, Held):
            raise CaptureError(f"{self.program.source}: the output {self.program.output} does not depend on the input {self.program.input}: nothing to bound")
        self.outputs = torch.Size(output.shape).numel()
        graph = tape.graph(tape.view(output, (self.outputs,)))
        return _with_zero(graph, anchor) if self.paired and self.outputs == 1 else graph


def _all_double(constants: Mapping[str, Tensor]) -> bool:
    floats = [t.dtype for t in constants.values() if t.is_floating_point()]
    return bool(floats) and all(dtype == torch.float64 for dtype in floats)


def _results(tape: Tape, line: Line, known: Mapping[str, Value | None]) -> tuple[Value, ...]:
    step = line.step
    missing = [name for name in line.inputs if name not in known]
    if missing:
        raise BadModel(f"{step.where}: the input {missing[0]!r} is made nowhere before; the file is damaged or its operations are out of order")
    if step.kind not in OPS:
        raise UnsupportedOp(
            f"no bounds for ONNX's {step.kind} at {step.where}. Export the network without it, or add it to calipers/graph/onnx_ops.py; "
            "calipers.from_onnx runs attacks that only ask for answers."
        )
    tape.writer.where = step.where
    values = [known[name] for name in line.inputs]
    while values and values[-1] is None:
        values.pop()
    try:
        found = OPS[step.kind](tape, step, *values)
    except (RuntimeError, TypeError, IndexError, AttributeError, ValueError) as error:
        if isinstance(error, CalipersError):
            raise
        raise BadModel(f"{step.where}: {step.kind} cannot be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from error
    return found if isinstance(found, tuple) else (found,)


def _with_zero(graph: Graph, anchor: Tensor) -> Graph:
    pair = Linear(torch.tensor([[0.0], [1.0]], dtype=anchor.dtype, device=anchor.device), None)
    return Graph(graph.input_shape, (*graph.nodes, Node(pair, (len(graph.nodes),), (2,), "the single output as two logits")))
