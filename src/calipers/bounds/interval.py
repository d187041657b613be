"""Interval arithmetic through the graph, one operation at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.bounds.rounding import Arithmetic
from calipers.graph.ir import Graph
from calipers.graph.kinds import Affine, is_affine
from calipers.graph.relaxations import Ends
from calipers.threats.ball import Region


@dataclass(frozen=True, eq=False)
class Box:
    """An interval for each element: lower <= value <= upper, (N, *shape)."""

    lower: Tensor
    upper: Tensor

    @property
    def ends(self) -> Ends:
        """Both ends, as an operation takes them."""
        return self.lower, self.upper

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value inside."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def meet(self, other: Box) -> Box:
        """Return the intersection.

        An end that is NaN allows everything, so the other box's end stands.
        """
        lower = torch.where(other.lower > self.lower, other.lower, self.lower)
        upper = torch.where(other.upper < self.upper, other.upper, self.upper)
        return Box(lower, upper)

    def mended(self) -> Box:
        """Return the box with useless ends replaced by infinity.

        Ends that are NaN, or have overflown to the wrong side, bound nothing.
        """
        everything = torch.full_like(self.lower, torch.inf)
        return Box(
            torch.where(self.lower < everything, self.lower, -everything),
            torch.where(self.upper > -everything, self.upper, everything),
        )

    def take(self, index: Tensor) -> Box:
        """Return the chosen points' boxes."""
        return Box(self.lower[index], self.upper[index])


def halves(low: Tensor, high: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of both halves of boxes `low`, `high (P, *D)`.

    Each is cut in the middle of its flat element `place (P,)`; lower halves first.
    """
    flat_low, flat_high, at = low.flatten(1), high.flatten(1), place[:, None]
    middle = flat_low.gather(1, at) / 2 + flat_high.gather(1, at) / 2
    lows, highs = (
        torch.cat([flat_low, flat_low.scatter(1, at, middle)]),
        torch.cat([flat_high.scatter(1, at, middle), flat_high]),
    )
    return lows.view(-1, *low.shape[1:]), highs.view(-1, *high.shape[1:])


def input_box(region: Region, arithmetic: Arithmetic) -> Box:
    """Return the smallest box around each region, rounded outward."""
    x = region.center.flatten(1)
    reach = region.norm.alone(region.radius.to(x.dtype))[:, None]
    reach = reach if region.weight is None else reach / region.weight * (1 + arithmetic.gamma(4))
    low, high = torch.maximum(region.low, -reach), torch.minimum(region.high, reach)
    lower, upper = (
        x + end + sign * arithmetic.gamma(4) * (x.abs() + end.abs())
        for end, sign in ((low, -1), (high, 1))
    )
    return Box(lower.view_as(region.center), upper.view_as(region.center))


def propagate(graph: Graph, number: int, boxes: dict[int, Box], arithmetic: Arithmetic) -> Box:
    """Return the box of one number from the boxes of its inputs.

    Affine: centre and radius, W c + b -+ |W| r. Any other: its own interval.
    """
    node = graph.nodes[number - 1]
    inputs = [boxes[i] for i in node.inputs]
    if is_affine(node.op):
        return _affine(node.op, inputs, arithmetic)
    return Box(*node.op.interval(*(b.ends for b in inputs)))


def _affine(op: Affine, inputs: list[Box], arithmetic: Arithmetic) -> Box:
    centres = [(b.lower + b.upper) / 2 for b in inputs]
    middle = op.value(*centres)
    # The radius is measured from the computed centre, so centre -+ radius covers the box however
    # the centre was rounded.
    reach = op.absolute(
        *(torch.maximum(b.upper - c, c - b.lower) for b, c in zip(inputs, centres, strict=True))
    )
    room = (
        arithmetic.gamma(max(b.lower[0].numel() for b in inputs)) * terms(op, inputs)
        + arithmetic.floor
        if arithmetic.checked
        else torch.zeros_like(middle)
    )
    return Box(middle - reach - room, middle + reach + room)


def terms(op: Affine, inputs: list[Box]) -> Tensor:
    """Return |W||x| + |b| over the boxes, (N, *out).

    The size of everything that an affine operation adds up.
    """
    constant = op.constant_terms
    if constant is None:
        constant = op.value(*(torch.zeros_like(b.lower[:1]) for b in inputs)).abs()
    # a term that underflows has a size too
    return op.absolute(*(b.magnitude for b in inputs)) + constant + torch.finfo(constant.dtype).tiny
