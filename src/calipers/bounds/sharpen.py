"""How narrow can the boxes of intermediate values be made? Every end that matters by its own ascent (alpha-CROWN's intermediate bounds)."""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.bounds.confirm import confirmed
from calipers.bounds.dual import Dual, Root
from calipers.bounds.interval import Box
from calipers.bounds.linear import Relaxed, Tighten, bending
from calipers.bounds.optimise import Ascent
from calipers.problem.ball import Region

_BYTES = 2**25  # of coefficients in flight: a backward and a forward pass hold about one set each


def sharpening(ascent: Ascent, region: Region) -> Tighten:
    """Return a way to tighten boxes: slopes optimised for each end of each bending element; `region` are the regions in the search's dtype.

    The end nearer to zero goes first, and where that settles an element nobody asks for the other. Cost: for every such end `ascent.steps` backward and
    forward passes, and one row to confirm it. Proved in the arithmetic of the state handed in.
    """
    held: dict[int, Root] = {}

    def tighten(state: Relaxed, number: int, box: Box) -> Box:
        if id(state) not in held:
            held.clear()
            held[id(state)] = Root(state, state.graph.to(region.center.dtype), region)
        root = held[id(state)]
        root.grow()
        return _sharpened(root, number, box, ascent)

    return tighten


def _sharpened(root: Root, number: int, box: Box, ascent: Ascent) -> Box:
    shape = root.graph.shape(number)
    ends = torch.stack([-box.upper.flatten(1), box.lower.flatten(1)])  # each the lower end of -+value
    upward = (box.lower + box.upper).flatten(1) > 0
    for side in (upward, ~upward):
        flags = bending(root.graph, number, Box(ends[1].view_as(box.lower), -ends[0].view_as(box.upper)))
        root.state.rows += flags.sum(1)
        point, element = flags.nonzero(as_tuple=True)
        for rows, places in zip(*(t.split(_rows_at_once(root, number)) for t in (point, element)), strict=True):
            if not len(rows):
                continue
            up = side[rows, places]
            low = _ends(root, number, rows, places, up.to(ends.dtype) * 2 - 1, shape, ascent)
            where = (up.long(), rows, places)
            ends[where] = torch.where(low > ends[where], low, ends[where])  # a NaN changes nothing
    return Box(ends[1].view_as(box.lower), -ends[0].view_as(box.upper))


def _rows_at_once(root: Root, number: int) -> int:
    elements = sum(torch.Size(root.graph.shape(i)).numel() for i in range(number + 1))
    return max(1, _BYTES // (4 * elements))


def _ends(root: Root, number: int, rows: Tensor, places: Tensor, sign: Tensor, shape: tuple[int, ...], ascent: Ascent) -> Tensor:
    spec = sign.new_zeros(len(rows), torch.Size(shape).numel()).scatter_(1, places[:, None], sign[:, None]).view(-1, 1, *shape)
    dual = Dual(root, rows, number, spec.to(root.region.center.dtype))
    _, free = ascent(dual, dual.guess())
    return confirmed(dual, free, spec)
