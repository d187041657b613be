"""The graph of a network: a list of operations, each on earlier results."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from calipers.graph.kinds import Op, is_affine


@dataclass(frozen=True, eq=False)
class Node:
    """An operation on the results of earlier nodes.

    `inputs` are the numbers of these results, `shape` is without the batch, `where` names the
    model's module and source line.
    """

    op: Op
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    where: str


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as a list of nodes with numbered results.

    Number 0 is the input of shape `input_shape`, number i + 1 the result of `nodes[i]`, and the
    last one the logits.
    """

    input_shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    apart: Graph | None = None
    """The same network before neighbouring layers were merged.

    This is what is executed, one operation after the other.
    """
    computed: str = ""
    """The place where the model computes a constant float32 does not hold.

    The executed model has another constant there. Empty where there is no such place.
    """

    def values(self, x: Tensor) -> list[Tensor]:
        """Return all results, the input first, for a batch x (M, *input_shape)."""
        results = [x]
        for node in self.nodes:
            results.append(node.op.value(*(results[i] for i in node.inputs)))
        return results

    def shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of a result, without the batch."""
        return self.nodes[number - 1].shape if number else self.input_shape

    def to(self, dtype: torch.dtype) -> Graph:
        """Return the graph with constants in another dtype; cached per dtype."""
        if dtype not in self._copies:
            self._copies[dtype] = self._converted(dtype)
        return self._copies[dtype]

    @cached_property
    def _copies(self) -> dict[torch.dtype, Graph]:
        return {}

    def _converted(self, dtype: torch.dtype) -> Graph:
        nodes = tuple(dataclasses.replace(n, op=n.op.to(dtype)) for n in self.nodes)
        return Graph(self.input_shape, nodes)

    @cached_property
    def ways(self) -> dict[int, tuple[int, ...]]:
        """Return which result to bound in place of each non-affine op's input.

        The keys are the numbers that non-affine operations read. The value is the chain of numbers
        from the one that is bounded instead up to the key itself; intervals are propagated along
        it.

        Elements that are only moved, copied, or passed through an elementwise function are bounded
        before that, once. Where sums multiply the number of elements (the differences of all
        pairs), the fewer elements they are computed from are bounded, and intervals are used from
        there on.
        """
        found = {}
        for last in sorted({i for n in self.nodes if not is_affine(n.op) for i in n.inputs}):
            way, plain = [last], True
            while way[0] and self._carried(node := self.nodes[way[0] - 1]):
                plain = plain and node.op.diagonal
                way.insert(0, node.inputs[0])
            found[last] = (last,) if plain else tuple(way)  # reshaping alone gains nothing
        return found

    def _carried(self, node: Node) -> bool:
        return node.op.carries([self.shape(i) for i in node.inputs], node.shape)

    @cached_property
    def nonlinear(self) -> tuple[int, ...]:
        """Return, in order, the numbers of the results that must be bounded.

        They are the inputs of non-affine operations, or what stands in for them (`ways`).
        """
        return tuple(sorted({way[0] for way in self.ways.values()}))

    @cached_property
    def stem(self) -> int:
        """Return the last result of the affine chain at the start of the network.

        Every later node depends on the input only through this result. 0 where there is no such
        chain.
        """
        for k, node in enumerate(self.nodes):
            if (
                not is_affine(node.op)
                or node.inputs != (k,)
                or any(min(n.inputs) <= k for n in self.nodes[k + 1 :])
            ):
                return k
        return len(self.nodes)

    @cached_property
    def largest(self) -> int:
        """Return the number of elements of the largest result."""
        return max(torch.Size(self.shape(i)).numel() for i in range(len(self.nodes) + 1))

    def behind(self, number: int) -> list[int]:
        """Return the results a result depends on, itself included, not the input."""
        needed = {number}
        for k in range(number, 0, -1):
            if k in needed:
                needed.update(self.nodes[k - 1].inputs)
        return sorted(needed - {0})

    def up_to(self, number: int) -> Graph:
        """Return the graph that ends at a result, numbered anew."""
        kept = self.behind(number)
        place = {0: 0, **{old: new for new, old in enumerate(kept, start=1)}}
        nodes = (self.nodes[k - 1] for k in kept)
        moved = (dataclasses.replace(n, inputs=tuple(place[i] for i in n.inputs)) for n in nodes)
        return dataclasses.replace(self, nodes=tuple(moved))
