"""What does one operation of an ONNX file say? Its attributes, of which every one is read or
refused, and the sizes that it leads to.
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
from calipers.graph.tape import Compared, Held, Shape, Value

LARGEST = 2**25
"""Elements that one value of a file may have, where the operation's inputs have fewer. (A picture
of 3 x 2,000 x 2,000 has 12 million.)
"""

Foresight = Callable[[Sequence[Tensor | Shape | None]], list[Shape | None]]
"""From the inputs (constants as they are, the shapes of all others, None where left out) to the
shapes of the outputs, None where not known.
"""


@dataclass(frozen=True, eq=False)
class Step:
    """One operation of the file: its kind, its attributes, the version of the operator set, whether
    the file leaves its batch size free, and its place.

    `fold` works the operation out on constants where it is one that is read of nothing else.
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
        """Return the same operation, of which nothing has been asked yet."""
        return dataclasses.replace(self, asked=set())

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, and remember that it was asked for."""
        self.asked.add(name)
        return self.attributes.get(name, self.defaults.get(name, default))

    def ignore(self, *names: str) -> None:
        """Say that these attributes change no result of what is read here."""
        self.asked.update(names)

    def unread(self) -> dict[str, Any]:
        """Return the attributes that nobody asked for and that are not at their defaults."""
        left = {name: value for name, value in self.attributes.items() if name not in self.asked}
        return {
            name: value
            for name, value in left.items()
            if isinstance(value, Tensor) or value != self.defaults.get(name, [])
        }

    def finish(self) -> None:
        """Raise `UnsupportedOp` where an attribute says something that was not read."""
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
        """Return an axis counted from the front; one that does not exist is no axis of another
        number.
        """
        if not -rank <= number < rank:
            raise self.damaged(f"there is no axis {number} in a value of {rank} axes")
        return number % rank

    def room(self, shape: Sequence[int], given: int = 0) -> None:
        """Raise `UnsupportedOp` before a value of this shape is made, where it is larger than
        `LARGEST` and than what it is made from.
        """
        if math.prod(shape) > max(LARGEST, given):
            raise self.refuse(
                f"a value of shape {tuple(shape)} has {math.prod(shape):,} elements; up to "
                f"{LARGEST:,} are read"
            )

    def foreseen(self, values: Sequence[Value | None]) -> list[Shape | None]:
        """Return the shapes of the outputs as the operator set defines them, none of them too
        large.
        """
        shapes = self.foresee([_told(v) for v in values])
        given = max((math.prod(v.shape) for v in values if v is not None), default=0)
        for shape in shapes:
            self.room(shape or (), given)
        return shapes

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn whatever a library makes of impossible sizes and values into one sentence."""
        try:
            yield
        except UnsupportedOp as error:
            raise error if self.where in str(error) else self.refuse(str(error)) from error
        except CalipersError:
            raise
        except Exception as error:
            raise BadModel(f"{self.where}: {self.kind} cannot be read ({typed(error)})") from error


def _told(value: Value | Compared | None) -> Tensor | Shape | None:
    """Return what of a value is known beforehand: a constant, or a shape."""
    if isinstance(value, Compared):
        return torch.zeros((), dtype=torch.bool).expand(value.shape)
    return value.shape if isinstance(value, Held) else value


def ints(value: Value | None, step: Step) -> list[int]:
    """Return a constant's whole numbers."""
    if not isinstance(value, Tensor):
        raise step.refuse(
            "a shape, index or size that depends on the point cannot be bounded; export the "
            "network with constant ones"
        )
    return [int(n) for n in value.reshape(-1).tolist()]
