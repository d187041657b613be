"""One operation of an ONNX file: its attributes and its result shapes.

Every attribute is read or refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calipers.errors import BadModel, CalipersError, UnsupportedOp, typed
from calipers.graph.file_builder import Compared, FileResult, Shape, Value

LARGEST = 2**25
"""The most elements a value may have where its inputs have fewer.

(A picture of 3 x 2,000 x 2,000 has 12 million.)
"""

Foresight = Callable[[Sequence[Tensor | Shape | None]], list[Shape | None]]
"""A function from the inputs of an operation to its output shapes.

Constant inputs are given as they are, all others by their shapes, and None where left out. A shape
is None where it is not known.
"""


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of the file.

    It has a kind, attributes, the version of the operator set, a flag whether the file leaves its
    batch size free, and its place in the file.

    `fold` evaluates the operation on constants, where it is one that is read for constants only.
    `defaults` are the values that the operator set gives to attributes left out. An attribute that
    no reader asks for must have its default: what a file says is read, or the file is refused.
    """

    kind: str
    attributes: dict[str, Any]
    opset: int
    free_batch: bool
    where: str
    outputs: int = 1
    defaults: dict[str, Any] = field(default_factory=dict)
    foresee: Foresight = lambda values: []
    fold: Callable[[Sequence[Tensor | None]], tuple[Tensor, ...]] | None = None
    asked: set[str] = field(default_factory=set)

    def fresh(self) -> Step:
        """Return the same operation with no attribute marked as read."""
        return dataclasses.replace(self, asked=set())

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, and mark it as read."""
        self.asked.add(name)
        return self.attributes.get(name, self.defaults.get(name, default))

    def ignore(self, *names: str) -> None:
        """Mark attributes as read that change no result of what is read here."""
        self.asked.update(names)

    def unread(self) -> dict[str, Any]:
        """Return the attributes that were not read and differ from their defaults."""
        left = {name: value for name, value in self.attributes.items() if name not in self.asked}
        return {
            name: value
            for name, value in left.items()
            if isinstance(value, Tensor) or value != self.defaults.get(name, [])
        }

    def finish(self) -> None:
        """Raise `UnsupportedOp` where an attribute that matters was not read."""
        for name, value in self.unread().items():
            raise self.refuse(
                f"the attribute {name} = {value!r} of {self.kind} is not read (only "
                f"{self.defaults.get(name, 'leaving it out')!r} is). Export the network without "
                "it; attacks that only ask run on calipers.load(onnxruntime session)."
            )

    def refuse(self, why: str) -> UnsupportedOp:
        """Return the error that names the place."""
        return UnsupportedOp(f"{self.where}: {why}")

    def damaged(self, why: str) -> BadModel:
        """Return the error of a file that contradicts itself."""
        return BadModel(
            f"{self.where}: {why}; the file is damaged, or was not written by an exporter"
        )

    def axis(self, number: int, rank: int) -> int:
        """Return an axis counted from the front.

        Raises `BadModel` where there is no such axis.
        """
        if not -rank <= number < rank:
            raise self.damaged(f"there is no axis {number} in a value of {rank} axes")
        return number % rank

    def room(self, shape: Sequence[int], given: int = 0) -> None:
        """Raise `UnsupportedOp` where a value of this shape would be too large.

        It is called before the value is made. Too large is larger than `LARGEST` and than what the
        value is made from.
        """
        if math.prod(shape) > max(LARGEST, given):
            raise self.refuse(
                f"a value of shape {tuple(shape)} has {math.prod(shape):,} elements; up to "
                f"{LARGEST:,} are read"
            )

    def foreseen(self, values: Sequence[Value | None]) -> list[Shape | None]:
        """Return the output shapes that the operator set defines.

        Raises `UnsupportedOp` where one of them is too large.
        """
        if self.kind == "Split" and self.get("num_outputs", self.outputs) != self.outputs:
            raise self.damaged(  # ONNX's own inference of shapes ends the process there
                f"num_outputs is {self.get('num_outputs')}, but {self.outputs} outputs are named"
            )
        shapes = self.foresee([_told(v) for v in values])
        given = max((math.prod(v.shape) for v in values if v is not None), default=0)
        for shape in shapes:
            self.room(shape or (), given)
        return shapes

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn a library's error at impossible sizes or values into one sentence."""
        try:
            yield
        except UnsupportedOp as error:
            raise error if self.where in str(error) else self.refuse(str(error)) from error
        except CalipersError:
            raise
        except Exception as error:
            raise BadModel(f"{self.where}: {self.kind} cannot be read ({typed(error)})") from error


def _told(value: Value | Compared | None) -> Tensor | Shape | None:
    """Return what is known of a value beforehand: a constant, or a shape."""
    if isinstance(value, Compared):
        return torch.zeros((), dtype=torch.bool).expand(value.shape)
    return value.shape if isinstance(value, FileResult) else value


def ints(value: Value | None, step: Step) -> list[int]:
    """Return a constant's whole numbers."""
    if not isinstance(value, Tensor):
        raise step.refuse(
            "a shape, index or size that depends on the point cannot be bounded; export the "
            "network with constant ones"
        )
    return [int(n) for n in value.reshape(-1).tolist()]
