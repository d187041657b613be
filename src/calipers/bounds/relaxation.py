"""The relaxation of a network over regions.

A box for every number, and lines or planes over it for every operation that is not affine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from calipers.bounds.float32_execution import departure
from calipers.bounds.interval import Box, terms
from calipers.bounds.rounding import Arithmetic
from calipers.graph.ir import Graph
from calipers.graph.kinds import Op, is_affine, is_elementwise
from calipers.graph.relaxations import Lines, Relaxation
from calipers.threats.ball import Region


@dataclass(eq=False)
class Relaxed:
    """The network relaxed over the regions of N points.

    A box for every number, and a relaxation for every operation that is not affine. `sizes` are the
    M of the rounding allowance, filled where rounding is accounted for; `rows (N,)` counts the
    directions bounded for each point.
    """

    graph: Graph
    region: Region
    arithmetic: Arithmetic
    rows: Tensor
    boxes: dict[int, Box] = field(default_factory=dict)
    relaxations: dict[int, Relaxation] = field(default_factory=dict)
    sizes: dict[int, Tensor] = field(default_factory=dict)
    reach: Tensor = field(default_factory=lambda: torch.ones(()))
    """(N,) the sum of all magnitudes so far, with which coefficients lost to underflow are
    multiplied.
    """
    multipliers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By number: what a branch's constraints subtract from the coefficients there, (N, *shape), and
    what that adds to the bound, (N,).
    """
    departures: dict[int, Tensor] = field(default_factory=dict)
    """By number: how far the network as executed can depart from real arithmetic in that operation,
    filled where bounds are about its execution.
    """

    def slice(self, begin: int, end: int) -> Relaxed:
        """Return the view of a run of points.

        Enough for backward propagation from numbers settled so far.
        """
        part = slice(begin, end)
        relaxations = {k: v.take(part) for k, v in self.relaxations.items()}
        sizes, departures = (
            {k: v[part] for k, v in held.items()} for held in (self.sizes, self.departures)
        )
        region, reach = self.region.take(part), self.reach[part]
        return Relaxed(
            self.graph,
            region,
            self.arithmetic,
            self.rows[part],
            {},
            relaxations,
            sizes,
            reach,
            departures=departures,
        )

    def take(self, index: Tensor) -> Relaxed:
        """Return the chosen points' relaxation, complete."""
        boxes = {k: box.take(index) for k, box in self.boxes.items()}
        relaxations = {k: v.take(index) for k, v in self.relaxations.items()}
        sizes, departures = (
            {k: v[index] for k, v in held.items()} for held in (self.sizes, self.departures)
        )
        region, reach = (
            self.region.take(index),
            self.reach[index] if self.reach.dim() else self.reach,
        )
        return Relaxed(
            self.graph,
            region,
            self.arithmetic,
            self.rows[index],
            boxes,
            relaxations,
            sizes,
            reach,
            departures=departures,
        )

    def lines(self, number: int) -> Lines:
        """Return the lines of a function of one number."""
        lines = self.relaxations[number]
        assert isinstance(lines, Lines)
        return lines

    def sloped(self, slope: Callable[[Tensor, Tensor], Tensor]) -> Relaxed:
        """Return the same boxes with other free slopes.

        `slope(lower, upper)` is the alpha in [0, 1] of every element; any choice is sound.
        """
        relaxations = dict(self.relaxations)
        for number, node in enumerate(self.graph.nodes, start=1):
            if number in relaxations and is_elementwise(node.op):
                box = self.boxes[node.inputs[0]]
                relaxations[number] = node.op.relax(
                    box.lower, box.upper, slope(box.lower, box.upper)
                )
        return replace(self, relaxations=relaxations)

    def settle(self, number: int, box: Box, swept: Box | None = None) -> None:
        """Store a number's final box, and derive what later passes need of it.

        `swept` is the box that backward propagation alone gave, not intersected with others: where
        an activation's slope is a guess from its box, it is guessed from this one. So slopes are
        plain CROWN's, while lines and stable elements profit from the tighter box. (Guessed from
        the intersection they loosened bounds by 2e-3.)
        """
        box = box.mended()
        self.boxes[number] = box
        self.reach = self.reach + box.magnitude.flatten(1).sum(1)
        for later, node in enumerate(self.graph.nodes, start=1):
            if max(node.inputs) != number:
                continue
            op, inputs = node.op, [self.boxes[i] for i in node.inputs]
            if not is_affine(op):
                self.relaxations[later] = _relaxation(op, inputs, swept)
            if self.arithmetic.checked:
                self.sizes[later] = (
                    terms(op, inputs)
                    if is_affine(op)
                    else self.relaxations[later].size(*(b.magnitude for b in inputs))
                )
            if self.arithmetic.executed is not None:
                self.departures[later] = departure(op, inputs, self.arithmetic)


def _relaxation(op: Op, inputs: list[Box], swept: Box | None) -> Relaxation:
    guess = op.guess(*swept.ends) if swept is not None and is_elementwise(op) else None
    return op.relaxation(*(b.ends for b in inputs), alpha=guess)
