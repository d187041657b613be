"""Receptive fields: the relaxed network, cut to what single elements see.

An element of a second convolution may see a tenth of its image. What is chosen for its bounds, step
by step, then costs a tenth too. It is a relaxed network like any other, with a row for each
element, so searches and confirmation run on it unchanged. Outside the image the input cannot move,
and every activation's lines are 0.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from calipers.bounds.coefficients import WORTH_A_WINDOW
from calipers.bounds.interval import Box
from calipers.bounds.relaxation import Relaxed
from calipers.graph.ir import Graph
from calipers.graph.receptive_field import ReceptiveField, field_of_view
from calipers.graph.relaxations import Lines
from calipers.threats.region import Region


def receptive_field_of(graph: Graph, number: int, region: Region) -> ReceptiveField | None:
    """Return the receptive field of a number's elements.

    None where that would save little, or the graph or the region cannot be cut.
    """
    if (
        type(region) is not Region
        or region.weight is not None
        or field_of_view(graph, number) > WORTH_A_WINDOW
    ):
        return None
    return ReceptiveField.of(graph, number)


def restricted_region(
    field: ReceptiveField, whole: Region, points: Tensor, place: Tensor
) -> Region:
    """Return the windows of the regions, as regions.

    Outside the image nothing moves.
    """
    low, high = (
        field.seen(0, end.view_as(whole.center), points, place).flatten(1)
        for end in (whole.low, whole.high)
    )
    return Region(
        whole.ball,
        whole.norm,
        field.seen(0, whole.center, points, place),
        whole.radius[points],
        low,
        high,
        None,
    )


def restricted(
    field: ReceptiveField, whole: Relaxed, points: Tensor, place: Tensor
) -> tuple[Relaxed, dict[int, Tensor]]:
    """Return the relaxed receptive fields of elements.

    The elements are at `place (P,)` of points (P,). With the fields, for every number, which of its
    elements are inside the image (P, n).
    """
    region, ones = (
        restricted_region(field, whole.region, points, place),
        whole.region.center.new_ones(1, 1),
    )
    state, inside = (
        Relaxed(
            field.graph,
            region,
            whole.arithmetic,
            torch.zeros_like(points),
            reach=whole.reach[points],
        ),
        dict[int, Tensor](),
    )
    for k, origin in enumerate(field.origins):
        seen = partial(field.seen, k, points=points, place=place)
        mask = seen(ones.expand(1, 1, *origin.window.image)).expand(
            -1, field.graph.shape(k)[0], -1, -1
        )
        inside[k] = mask.flatten(1) > 0
        if origin.number in whole.boxes:
            box = whole.boxes[origin.number]
            state.boxes[k] = Box(seen(box.lower), seen(box.upper))
        if k and field.graph.nodes[k - 1].op.elementwise:
            zero = torch.zeros_like(mask)
            state.relaxations[k] = (
                whole.relaxations[origin.number].each(seen)
                if origin.made
                else Lines(mask, zero, mask, zero)
            )
        for held, into in (
            (whole.sizes if k else {}, state.sizes),
            (whole.departures, state.departures),
        ):
            if held:
                into[k] = seen(held[origin.number]) if origin.made else torch.zeros_like(mask)
    return state, inside
