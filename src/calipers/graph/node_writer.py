"""The writer that appends operations to the nodes of a graph.

It is used by the code that translates a network and by the rewrites called from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calipers.errors import CaptureError
from calipers.graph.generic import Generic
from calipers.graph.ir import Node
from calipers.graph.kinds import Op


@dataclass(frozen=True)
class NodeResult:
    """A numbered result of the graph, with its shape for one point."""

    number: int
    shape: tuple[int, ...]


@dataclass(eq=False)
class Writer:
    """A list of nodes under construction.

    `where` names the place in the model that is being translated. `lead` is the number of axes of
    the graph's tensors (batch included) that stand before the axes the model's calls count: 0 where
    the model's own batch axis is the graph's; 1 where the model was exported for a single point and
    its batch axis of size 1 is kept as an axis like any other.
    """

    dtype: torch.dtype
    device: torch.device
    lead: int = 0
    nodes: list[Node] = field(default_factory=list)
    where: str = "the input"

    def write(self, op: Op, *inputs: NodeResult) -> NodeResult:
        """Append an operation; its shape is found by running it."""
        with torch.no_grad():
            shape = tuple(
                op.value(
                    *(torch.ones(1, *v.shape, dtype=self.dtype, device=self.device) for v in inputs)
                ).shape[1:]
            )
        self.nodes.append(Node(op, tuple(v.number for v in inputs), shape, self.where))
        return NodeResult(len(self.nodes), shape)

    def move(
        self,
        name: str,
        run: Callable[..., Tensor],
        *inputs: NodeResult,
        absolute: Callable[..., Tensor] | None = None,
        diagonal: bool = False,
    ) -> NodeResult:
        """Append an affine operation given as a function on batches.

        See `Generic`. A result of one number per point becomes a vector of length 1.
        """
        run, absolute = _vector(run), None if absolute is None else _vector(absolute)
        return self.write(
            Generic(run, name, tuple(v.shape for v in inputs), diagonal, absolute), *inputs
        )

    def reshape(self, x: NodeResult, shape: tuple[int, ...]) -> NodeResult:
        """Append a reshape of the elements, where the shape differs."""
        return (
            x
            if x.shape == shape
            else self.move("reshape", lambda t: t.reshape(len(t), *shape), x, diagonal=True)
        )

    def expand(self, x: NodeResult, shape: tuple[int, ...]) -> NodeResult:
        """Append copies along axes of size 1 and along new leading axes."""
        if x.shape == shape:
            return x
        own = (1,) * (len(shape) - len(x.shape)) + x.shape
        return self.move("expand", lambda t: t.reshape(len(t), *own).expand(len(t), *shape), x)

    def broadcast(self, *inputs: NodeResult) -> tuple[NodeResult, ...]:
        """Append copies that give all inputs their common broadcast shape."""
        shape = tuple(torch.broadcast_shapes(*(x.shape for x in inputs)))
        return tuple(self.expand(x, shape) for x in inputs)

    def axis(self, x: NodeResult, dim: int) -> int:
        """Return the axis of a batch (M, *shape) that a call means by `dim`.

        Raises `CaptureError` where that is the batch axis.
        """
        place = dim % (len(x.shape) + 1 - self.lead) + self.lead
        if place == 0:
            raise CaptureError(
                f"the model mixes points of a batch at {self.where} (it works along the first "
                "axis). Keep the batch as the first axis."
            )
        return place


def _vector(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def whole(*inputs: Tensor) -> Tensor:
        made = run(*inputs)
        return made if made.dim() > 1 else made[:, None]

    return whole
