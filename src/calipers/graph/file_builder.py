"""A writer of graphs for networks that are not modules.

It takes one call at a time, named like the exported operations. A file's network is written for one
point, often with a leading axis of 1 for the batch. The tape keeps two shapes of each result:
`shape`, as the file has it, and `held`, as the graph's node has it (without the batch). Reshapes
change only the first; a node is written only when an operation needs the elements in another
arrangement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calipers.errors import UnsupportedOp
from calipers.graph.affine import Scale
from calipers.graph.call_builder import Asked, bind, build
from calipers.graph.calls import leaves
from calipers.graph.compositions import Condition
from calipers.graph.ir import Graph
from calipers.graph.kinds import Op
from calipers.graph.node_writer import NodeResult, Writer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FileResult:
    """A result that depends on the point.

    It is number `number` of the graph, has shape `held` there, and shape `shape` in the file.
    """

    number: int
    held: Shape
    shape: Shape


@dataclass(frozen=True)
class Compared:
    """A comparison of a value with a number, for use in a choice.

    The value depends on the input point.
    """

    condition: Condition
    shape: Shape


Value = FileResult | Tensor


class Tape:
    """A writer that turns calls into nodes.

    The `where` of its `writer` names the place in the file that is being read, for messages and for
    the nodes.
    """

    def __init__(self, held: Shape, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.input = FileResult(0, held, shape)
        self.dtype, self.device, self.writer = dtype, device, Writer(dtype, device)

    def graph(self, output: FileResult) -> Graph:
        """Return the graph written so far, with `output` as its last result."""
        if not output.number:
            output = self._move("output", lambda x: x, (output,), diagonal=True)
        return Graph(self.input.held, tuple(self.writer.nodes)).up_to(output.number)

    def call(self, name: str, *args: Any) -> FileResult:
        """Write the exported operation `name` and return its result.

        Its tensors are taken in the arrangement they are held in, and the result's `shape` is its
        `held` one.
        """
        target, numbers = target_of(name), _numbers(args)
        variable = tuple(a for a in leaves(args) if isinstance(a, FileResult))
        shape = self._result(bind(self.writer, target, numbers), variable)
        try:
            made = build(self.writer, Asked(name, target, numbers, shape))
        except UnsupportedOp as refused:
            raise UnsupportedOp(f"{self.writer.where}: {refused}") from refused
        if not isinstance(made, NodeResult):
            raise UnsupportedOp(
                f"no bounds for {name} at {self.writer.where}. Export the network without it, or "
                "add the "
                "op's facts in calipers/graph; attacks that only ask run on calipers.load(path)."
            )
        return FileResult(made.number, made.shape, made.shape)

    def several(self, rewrite: Callable[..., NodeResult | None], *args: Any) -> FileResult | None:
        """Write the operations of a rewrite; None where it refuses the arguments."""
        made = rewrite(self.writer, *_numbers(args))
        return None if made is None else FileResult(made.number, made.shape, made.shape)

    def alike(self, rewrite: Callable[..., NodeResult], v: FileResult, *args: Any) -> FileResult:
        """Write a rewrite whose result has its first argument's shape."""
        made = self.several(rewrite, v, *args)
        assert made is not None
        return FileResult(made.number, made.held, v.shape)

    def view(self, v: FileResult, shape: Sequence[int]) -> FileResult:
        """Return the value held in another shape; its shape in the file stays."""
        if v.held == tuple(shape):
            return v
        made = self._move("view", lambda x: x.reshape(len(x), *shape), (v,), diagonal=True)
        return FileResult(made.number, made.held, v.shape)

    def elementwise(self, name: str, v: Value, *args: Any) -> Value:
        """Write a function of each element; evaluate it for a constant."""
        if isinstance(v, Tensor):
            return target_of(name)(v, *args)  # type: ignore[no-any-return]
        made = self.call(name, v, *args)
        return FileResult(made.number, made.held, v.shape)

    def pair(self, name: str, a: Value, b: Value) -> Value:
        """Write arithmetic on two values that broadcast."""
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return target_of(name)(a, b)  # type: ignore[no-any-return]
        shape = tuple(torch.broadcast_shapes(a.shape, b.shape))
        a, b = (self.expand(v, shape) if isinstance(v, FileResult) else v for v in (a, b))
        if isinstance(a, FileResult) and isinstance(b, FileResult):
            b = self.view(b, a.held)
        held = a if isinstance(a, FileResult) else b
        assert isinstance(held, FileResult)
        made = self.call(name, *(fitted(v, held) if isinstance(v, Tensor) else v for v in (a, b)))
        return FileResult(made.number, made.held, shape)

    def scale(self, v: FileResult, factor: Tensor, shift: Tensor) -> FileResult:
        """Write factor * v + shift; the constants broadcast to v's file shape."""
        made = self._write(Scale(fitted(factor, v), fitted(shift, v)), (v,))
        return FileResult(made.number, made.held, v.shape)

    def expand(self, v: FileResult, shape: Shape) -> FileResult:
        """Write copies along axes of size 1."""
        if v.shape == shape:
            return v
        own = (1,) * (len(shape) - len(v.shape)) + v.shape
        return self.move(
            "expand",
            [FileResult(v.number, v.held, own)],
            lambda x: x.expand(len(x), *shape),
            own,
            lambda _: shape,
        )

    def move(
        self,
        name: str,
        values: Sequence[FileResult],
        run: Callable[..., Tensor],
        held: Shape,
        shape: Callable[[Shape], Shape],
    ) -> FileResult:
        """Write an operation that moves, copies, adds or averages elements.

        All values are held as `held`; `shape` maps the result's held shape to the file's.
        """
        made = self.moved(name, tuple(self.view(v, held) for v in values), run)
        return FileResult(made.number, made.held, shape(made.held))

    def moved(
        self, name: str, values: tuple[FileResult, ...], run: Callable[..., Tensor]
    ) -> FileResult:
        """Write such an operation on values as they are held."""
        return self._move(name, run, values)

    def _move(
        self,
        name: str,
        run: Callable[..., Tensor],
        values: tuple[FileResult, ...],
        diagonal: bool = False,
    ) -> FileResult:
        made = self.writer.move(name, run, *_numbers(values), diagonal=diagonal)
        return FileResult(made.number, made.shape, made.shape)

    def _write(self, op: Op, values: tuple[FileResult, ...]) -> FileResult:
        made = self.writer.write(op, *_numbers(values))
        return FileResult(made.number, made.shape, made.shape)

    def _result(self, run: Callable[..., Tensor], values: tuple[FileResult, ...]) -> Shape:
        with torch.no_grad():
            return tuple(
                run(
                    *(torch.zeros(1, *v.held, dtype=self.dtype, device=self.device) for v in values)
                ).shape[1:]
            )


def fitted(constant: Tensor, v: FileResult) -> Tensor:
    """Return a constant rearranged to broadcast to a value as it is held.

    The given constant broadcasts to the value's shape in the file; the returned one has an axis of
    1 for the batch.
    """
    if constant.numel() == 1:
        return constant.reshape(())
    dropped = len(v.shape) - len(v.held)
    own = constant.reshape((1,) * (len(v.shape) - constant.dim()) + constant.shape)
    if dropped >= 0 and v.shape == (1,) * dropped + v.held:
        return own.reshape(1, *own.shape[dropped:])
    return own.expand(v.shape).reshape(1, *v.held)


def _numbers(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments with each `Held` as a `Result` of the graph."""

    def number(a: Any) -> Any:
        if isinstance(a, (list, tuple)):
            made = [number(item) for item in a]
            return tuple(made) if isinstance(a, tuple) else made
        return NodeResult(a.number, a.held) if isinstance(a, FileResult) else a

    return tuple(number(a) for a in args)


def target_of(name: str) -> Callable[..., Any]:
    """Return the torch operation of a name such as `aten.relu.default`."""
    _, operation, overload = name.split(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, operation), overload)
    return found
