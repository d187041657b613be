"""What is a network, to a bound? A list of nodes in order, each an operation on earlier nodes.
Nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from calipers.graph.kinds import Op, is_affine


@dataclass(frozen=True, eq=False)
class Node:
    """An operation on the results of earlier nodes; `shape` is without the batch, `where` names the
    model's module and source line.
    """

    op: Op
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    where: str


@dataclass(frozen=True, eq=False)
class Graph:
    """The network: number 0 is the input of shape `input_shape`, number i + 1 the result of
    `nodes[i]`, the last one the logits.
    """

    input_shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    apart: Graph | None = None
    """The same network before neighbouring layers were merged: what is executed, one operation
    after the other.
    """
    computed: str = ""
    """Where the model computes a constant that float32 does not hold, so that its execution has
    another one; empty where it does not.
    """

    def values(self, x: Tensor) -> list[Tensor]:
        """Return the result of every number, the input first, for a batch x (M, *input_shape)."""
        results = [x]
        for node in self.nodes:
            results.append(node.op.value(*(results[i] for i in node.inputs)))
        return results

    def shape(self, number: int) -> tuple[int, ...]:
        """Return the shape of a number's result, without the batch."""
        return self.nodes[number - 1].shape if number else self.input_shape

    def to(self, dtype: torch.dtype) -> Graph:
        """Return the graph with its constants in another dtype; made once for each."""
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
        """By number that a non-affine operation reads: the numbers from the one to bound in its
        place, up to itself.

        Elements that are moved about, copied or bent are bounded before that, once; and where sums
        multiply their number (the differences of all pairs), the few that they are made of, with
        intervals from there on.
        """
        found = {}
        for last in sorted({i for n in self.nodes if not is_affine(n.op) for i in n.inputs}):
            way, plain = [last], True
            while way[0] and self._carried(node := self.nodes[way[0] - 1]):
                plain = plain and node.op.diagonal
                way.insert(0, node.inputs[0])
            found[last] = (last,) if plain else tuple(way)  # a mere change of shape is no gain
        return found

    def _carried(self, node: Node) -> bool:
        return node.op.carries([self.shape(i) for i in node.inputs], node.shape)

    @cached_property
    def bent(self) -> tuple[int, ...]:
        """The numbers whose bounds matter: inputs of non-affine operations, or what these are made
        of, in order.
        """
        return tuple(sorted({way[0] for way in self.ways.values()}))

    @cached_property
    def stem(self) -> int:
        """The last number that is made from the input by a chain of affine operations on which all
        else hangs; 0 where there is none.
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
        """The number of elements of the largest result."""
        return max(torch.Size(self.shape(i)).numel() for i in range(len(self.nodes) + 1))

    def behind(self, number: int) -> list[int]:
        """Return the numbers that a number is made of, itself included, the input not."""
        needed = {number}
        for k in range(number, 0, -1):
            if k in needed:
                needed.update(self.nodes[k - 1].inputs)
        return sorted(needed - {0})

    def up_to(self, number: int) -> Graph:
        """Return the graph of what a number is made of, numbered anew: that one is the last."""
        kept = self.behind(number)
        place = {0: 0, **{old: new for new, old in enumerate(kept, start=1)}}
        nodes = (self.nodes[k - 1] for k in kept)
        moved = (dataclasses.replace(n, inputs=tuple(place[i] for i in n.inputs)) for n in nodes)
        return dataclasses.replace(self, nodes=tuple(moved))
