"""Distances to the hyperplanes that bound a linear region.

A linear region ends where some operation leaves its linear piece: a value meets a breakpoint, or
another member of a window becomes its maximum. Within the region each of these borders is a
hyperplane. Its distance from the point is gap / dual norm of its normal
where nothing else limits the adversary, and no less inside a box.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.geometry.linear_pieces import Pieces
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball
from calipers.threats.region import Region, distance_to

# hyperplanes of a point that are measured together, at first and later
_AT_ONCE, _MOST_AT_ONCE = 32, 1024
_ROUNDED_DOWN = 1 - 1e-9  # more than the rounding of sums of a hundred thousand terms


@dataclass(frozen=True, eq=False)
class Hyperplane:
    """The nearest bounding hyperplane of each of M linear regions.

    `distance (M,)` is how far it is, `node` is the number of the operation that leaves its linear
    piece there and `element` the element of that operation's input (infinite, -1 and -1 where there
    is none). `normal (M, d)` is the direction in which the value moves towards its breakpoint.
    """

    distance: Tensor
    node: Tensor
    element: Tensor
    normal: Tensor


def check_ball(problem: Problem) -> None:
    """Raise `BadInput` for threats in which hyperplanes have no distance.

    Those are all threats but norm balls in linf, l2 and l1, and balls with constraints between
    features.
    """
    if not isinstance(problem.threat, Ball) or problem.region.norm.is_count:
        raise BadInput(
            "linear regions are measured in linf, l2 or l1: replacing symbols and counting "
            "features do not move along a line"
        )
    if problem.threat.constraints is not None:
        raise BadInput(
            "linear regions are measured without constraints between features: leave them out, the "
            "distances stay lower bounds"
        )


def free_distance(region: Region, g: Tensor, gap: Tensor) -> Tensor:
    """Return gap / dual norm for normals g (P, d), as (P,).

    That is the distance of a hyperplane without the box, and a lower bound on it inside the box. A
    hyperplane that no movable feature brings nearer is infinitely far.
    """
    flat = torch.where((region.low == 0) & (region.high == 0), 0.0, g)
    size = region.norm.dual(flat if region.weight is None else flat / region.weight)
    return torch.where(size > 0, gap / size, torch.inf)


def nearest_hyperplane(pieces: Pieces, region: Region) -> Hyperplane:
    """Return the nearest bounding hyperplane of each point's linear region.

    No hyperplane is nearer than gap / (the l1 norm of its normal, or more where paths cancel), and
    one forward pass gives this bound for all of them. Hyperplanes are measured in the order of
    these bounds, until the next one cannot be nearer than the nearest so far. Cost: a backward
    product for each hyperplane measured; memory is bounded.
    """
    blocks = [
        block for number in pieces.nonlinear_nodes() for block in _hyperplanes(pieces, number)
    ]
    if not blocks:
        nothing = torch.full((len(region.center),), -1, device=region.center.device)
        return Hyperplane(
            torch.full_like(nothing, torch.inf, dtype=torch.float64),
            nothing,
            nothing,
            torch.zeros_like(region.low),
        )
    ranked, order = _at_least(pieces, region, blocks).sort(1)
    found = torch.full_like(ranked, torch.inf)
    begin, count = 0, _AT_ONCE
    while begin < ranked.shape[1]:
        best = found.amin(1)
        worth = ranked[:, begin : begin + count] < best[:, None]
        if not bool(worth.any()):
            break
        point, place = worth.nonzero(as_tuple=True)
        column = order[:, begin : begin + count][point, place]
        for block, first in _beginning(blocks):
            mine = (column >= first) & (column < first + block.gap.shape[1])
            chosen = _Chosen(point[mine], column[mine] - first)
            _measure(pieces, region, block, found[:, first:], best, chosen)
        begin, count = begin + count, min(2 * count, _MOST_AT_ONCE)
    return _nearest(pieces, blocks, found)


def _at_least(pieces: Pieces, region: Region, blocks: list[_Block]) -> Tensor:
    """Return lower bounds (M, W) of all hyperplanes' distances.

    They are sound because no dual norm of a normal is above its l1 norm.
    """
    scale = (
        torch.ones_like(region.low)
        if region.weight is None
        else (1 / region.weight).expand_as(region.low)
    )
    still = (region.low == 0) & (region.high == 0)
    size = pieces.steepest(torch.where(still, 0.0, scale).view_as(region.center))
    return torch.cat(
        [block.gap * _ROUNDED_DOWN / block.both(size[block.number].flatten(1)) for block in blocks],
        1,
    ).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _beginning(blocks: list[_Block]) -> Iterator[tuple[_Block, int]]:
    """Yield each block with the column of its first hyperplane.

    The columns are those of all blocks side by side.
    """
    first = 0
    for block in blocks:
        yield block, first
        first += block.gap.shape[1]


def _measure(
    pieces: Pieces, region: Region, block: _Block, found: Tensor, best: Tensor, chosen: _Chosen
) -> None:
    """Write the distances of chosen hyperplanes (R,) into `found (M, W)`.

    They are of one block, and measured inside the box only where the distance without the box is
    below `best (M,)`.
    """
    for part in chosen.split(pieces.rows):
        at, place = part
        g, gap = _normal(pieces, block, part), block.gap[at, place]
        near = torch.nonzero(free_distance(region.take(at), g, gap) < best[at]).flatten()
        found[at[near], place[near]] = distance_to(
            region.take(at[near]), g[near], gap[near]
        ).distance


def _nearest(pieces: Pieces, blocks: list[_Block], found: Tensor) -> Hyperplane:
    distance, column = found.min(1)
    node, element = torch.full_like(column, -1), torch.full_like(column, -1)
    normal = torch.zeros(
        len(found), pieces.values[0][0].numel(), dtype=found.dtype, device=found.device
    )
    for block, first in _beginning(blocks):
        mine = torch.nonzero(
            distance.isfinite() & (column >= first) & (column < first + block.gap.shape[1])
        ).flatten()
        chosen = _Chosen(mine, column[mine] - first)
        node[mine], element[mine] = block.node, block.element(chosen)
        for part in chosen.split(pieces.rows):
            normal[part.point] = _normal(pieces, block, part)
    return Hyperplane(distance, node, element, normal)


class _Chosen(NamedTuple):
    """Some hyperplanes (R,) of a block: of which point, and which ones."""

    point: Tensor
    hyperplane: Tensor

    def split(self, rows: int) -> Iterator[_Chosen]:
        """Yield them in parts of at most so many."""
        parts = (end.split(rows) for end in self)
        return (_Chosen(*part) for part in zip(*parts, strict=True))


@dataclass(frozen=True, eq=False)
class _Block:
    """Hyperplanes of one operation that all points have in common.

    `gap (M, W)` is the gap of each; its normal is the gradient of the row that `rows` returns.
    `plus (W,)` or `(M, W)` is the element whose rise closes the gap, `minus` the one whose fall
    does; the index `size`, one past the last element, stands for none.
    """

    node: int
    number: int
    gap: Tensor
    plus: Tensor
    minus: Tensor
    size: int

    def rows(self, chosen: _Chosen) -> Tensor:
        """Return the rows (R, size) of chosen hyperplanes."""
        point, hyperplane = chosen
        rows = self.gap.new_zeros(len(point), self.size + 1)
        for place, sign in ((self.plus, 1.0), (self.minus, -1.0)):
            at = place.expand(self.gap.shape)[point, hyperplane]
            rows[torch.arange(len(point), device=rows.device), at] += sign
        return rows[:, :-1]

    def both(self, size: Tensor) -> Tensor:
        """Return the sum of a value over each hyperplane's elements, (M, W).

        The value is (M, size); a hyperplane has one or two elements.
        """
        padded = torch.cat([size, torch.zeros_like(size[:, :1])], 1)
        return padded.gather(1, self.plus.expand(self.gap.shape)) + padded.gather(
            1, self.minus.expand(self.gap.shape)
        )

    def element(self, chosen: _Chosen) -> Tensor:
        """Return the input element to which each chosen hyperplane belongs."""
        rising, falling = (
            place.expand(self.gap.shape)[chosen.point, chosen.hyperplane]
            for place in (self.plus, self.minus)
        )
        return torch.where(rising < self.size, rising, falling)


def _hyperplanes(pieces: Pieces, node: int) -> Iterator[_Block]:
    number = pieces.graph.nodes[node - 1].inputs[0]
    size = torch.Size(pieces.graph.shape(number)).numel()
    if node in pieces.slopes:
        every, nowhere = (
            torch.arange(size, device=pieces.values[0].device),
            torch.full((size,), size, device=pieces.values[0].device),
        )
        gaps = pieces.gaps(node)
        for gap, plus, minus in ((gaps.above, every, nowhere), (gaps.below, nowhere, every)):
            if bool(gap.isfinite().any()):
                yield _Block(node, number, gap, plus, minus, size)
        return
    behind, windows = pieces.trailing(node)
    first = pieces.picks[node].flatten(1)[..., None].expand_as(behind)
    yield _Block(node, number, behind.flatten(1), windows.flatten(), first.flatten(1), size)


def _normal(pieces: Pieces, block: _Block, chosen: _Chosen) -> Tensor:
    rows = block.rows(chosen).view(-1, *pieces.graph.shape(block.number))
    return pieces.pull(block.number, rows, chosen.point).flatten(1)
