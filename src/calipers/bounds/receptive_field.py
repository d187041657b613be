"""Crops: the relaxed network cut down to what single elements see.

An element of a second convolution may see a tenth of its image. What is chosen for its bounds, step
by step, then costs a tenth too. A crop is a relaxed network like any other, with a row for each
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
from calipers.graph.receptive_field import Crop, field_of_view
from calipers.graph.relaxations import Lines
from calipers.threats.region import Region


def crop_of(graph: Graph, number: int, region: Region) -> Crop | None:
    """Return the crop of a number's elements.

    None where that would save little, or the graph or the region cannot be cut.
    """
    if (
        type(region) is not Region
        or region.weight is not None
        or field_of_view(graph, number) > WORTH_A_WINDOW
    ):
        return None
    return Crop.of(graph, number)


def cropped_region(crop: Crop, whole: Region, points: Tensor, place: Tensor) -> Region:
    """Return the windows of the regions, as regions.

    Outside the image nothing moves.
    """
    low, high = (
        crop.seen(0, end.view_as(whole.center), points, place).flatten(1)
        for end in (whole.low, whole.high)
    )
    return Region(
        whole.ball,
        whole.norm,
        crop.seen(0, whole.center, points, place),
        whole.radius[points],
        low,
        high,
        None,
    )


def cropped(
    crop: Crop, whole: Relaxed, points: Tensor, place: Tensor
) -> tuple[Relaxed, dict[int, Tensor]]:
    """Return the relaxed crop around elements at `place (P,)` of points (P,).

    With it, for every number, which of its elements are inside the image (P, n).
    """
    region, ones = (
        cropped_region(crop, whole.region, points, place),
        whole.region.center.new_ones(1, 1),
    )
    state, inside = (
        Relaxed(
            crop.graph,
            region,
            whole.arithmetic,
            torch.zeros_like(points),
            reach=whole.reach[points],
        ),
        dict[int, Tensor](),
    )
    for k, origin in enumerate(crop.origins):
        seen = partial(crop.seen, k, points=points, place=place)
        mask = seen(ones.expand(1, 1, *origin.window.image)).expand(
            -1, crop.graph.shape(k)[0], -1, -1
        )
        inside[k] = mask.flatten(1) > 0
        if origin.number in whole.boxes:
            box = whole.boxes[origin.number]
            state.boxes[k] = Box(seen(box.lower), seen(box.upper))
        if k and crop.graph.nodes[k - 1].op.elementwise:
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
