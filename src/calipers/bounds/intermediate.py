"""Intermediate bounds tightened by gradient ascent, as in alpha-CROWN.

Every end that matters gets an ascent of its own.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from calipers.bounds.backward import Tighten
from calipers.bounds.dual_bound import Dual, Root
from calipers.bounds.float64_check import confirmed
from calipers.bounds.interval import Box
from calipers.bounds.optimise import Ascent
from calipers.bounds.receptive_field import receptive_field_of, restricted, restricted_region
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.unstable import unstable_elements
from calipers.graph.receptive_field import ReceptiveField
from calipers.threats.ball import Region

# of coefficients at once: a backward and a forward pass hold about one set each
_BYTES = 2**25


def sharpening(ascent: Ascent, region: Region, *, restrict: bool = True) -> Tighten:
    """Return a function that tightens boxes by optimised slopes.

    Slopes are optimised for each end of each unstable element; `region` are the regions in the
    search's dtype. With `restrict` elements of images are bounded in the part of the network that
    they see; without, what the ascent chooses is about the whole of it.

    The end nearer to zero goes first, and where that makes an element stable the other is not
    bounded. Cost: for every such end `ascent.steps` backward and forward passes, and one row to
    confirm it. Proved in the arithmetic of the state handed in.
    """
    held: dict[int, Root] = {}

    def tighten(state: Relaxed, number: int, box: Box) -> Box:
        if id(state) not in held:
            held.clear()
            held[id(state)] = Root(state, state.graph.to(region.center.dtype), region)
        root = held[id(state)]
        root.grow()
        field = receptive_field_of(state.graph, number, root.region) if restrict else None
        return _sharpened(root, number, box, ascent, field)

    return tighten


def _sharpened(
    root: Root, number: int, box: Box, ascent: Ascent, field: ReceptiveField | None
) -> Box:
    shape = root.graph.shape(number)
    readers = [
        n.op
        for n in root.graph.nodes
        for i in n.inputs
        if i in root.graph.ways and root.graph.ways[i][0] == number
    ]
    if not all(op.affine or op.breakpoints is not None for op in readers):
        # The sign of a value settles a function that is linear on both sides of 0; a curve remains
        # nonlinear, so its ascent does not stop there.
        ascent = dataclasses.replace(ascent, enough=torch.inf)
    elements = (
        sum(torch.Size(root.graph.shape(i)).numel() for i in range(number + 1))
        if field is None
        else field.elements
    )
    # both as lower ends: of -value, then of value
    ends = torch.stack([-box.upper.flatten(1), box.lower.flatten(1)])
    upward = (box.lower + box.upper).flatten(1) > 0
    for side in (upward, ~upward):
        flags = unstable_elements(
            root.graph, number, Box(ends[1].view_as(box.lower), -ends[0].view_as(box.upper))
        )
        root.state.rows += flags.sum(1)
        point, element = flags.nonzero(as_tuple=True)
        for rows, places in zip(
            *(t.split(max(1, _BYTES // (4 * elements))) for t in (point, element)), strict=True
        ):
            if not len(rows):
                continue
            up = side[rows, places]
            sign = up.to(ends.dtype) * 2 - 1
            dual, spec = (
                _whole(root, number, rows, places, sign, shape)
                if field is None
                else _restricted(root, field, rows, places, sign, shape)
            )
            _, free = ascent(dual, dual.guess())
            low = confirmed(dual, free, spec)
            where = (up.long(), rows, places)
            ends[where] = torch.where(low > ends[where], low, ends[where])  # a NaN changes nothing
    return Box(ends[1].view_as(box.lower), -ends[0].view_as(box.upper))


def _whole(
    root: Root, number: int, rows: Tensor, places: Tensor, sign: Tensor, shape: tuple[int, ...]
) -> tuple[Dual, Tensor]:
    """Return the bounds of +-elements over the whole network.

    With what is bounded, (P, 1, *shape) float64.
    """
    spec = (
        sign.new_zeros(len(rows), torch.Size(shape).numel())
        .scatter_(1, places[:, None], sign[:, None])
        .view(-1, 1, *shape)
    )
    return Dual(root, rows, number, spec.to(root.region.center.dtype)), spec


def _restricted(
    root: Root,
    field: ReceptiveField,
    rows: Tensor,
    places: Tensor,
    sign: Tensor,
    shape: tuple[int, ...],
) -> tuple[Dual, Tensor]:
    """Return the bounds of +-elements over what each element sees.

    With what is bounded, (P, 1, C, 1, 1).
    """
    channel, place = places // (shape[1] * shape[2]), places % (shape[1] * shape[2])
    state, inside = restricted(field, root.state, rows, place)
    cut = Root.of(
        state, root.region.center.dtype, restricted_region(field, root.region, rows, place), inside
    )
    spec = (functional.one_hot(channel, shape[0]) * sign[:, None]).view(-1, 1, shape[0], 1, 1)
    return Dual(
        cut,
        torch.arange(len(rows), device=rows.device),
        len(field.graph.nodes),
        spec.to(root.region.center.dtype),
    ), spec
