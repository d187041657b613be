"""CROWN: backward propagation of linear relaxations.

A backward pass carries A h + b <= target from the target to the input. At an activation each
coefficient takes the lower line where it is positive and the upper line where it is negative, so an
upper bound is the lower bound of the negative, and one kind of pass gives both ends (Zhang et al.
2018, arXiv:1811.00866; here with the input box intersected in the last step).

Bounds of intermediate values are refined in order, and only elements that are unstable *for that
point* get rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from calipers.bounds.coefficients import WORTH_A_WINDOW, Coefficients, Dense, unit_rows
from calipers.bounds.float32_execution import input_departure, widened
from calipers.bounds.interval import Box, input_box, propagate
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import Arithmetic
from calipers.bounds.unstable import carried, unstable_elements
from calipers.bounds.unstable_columns import Columns
from calipers.graph.ir import Graph
from calipers.graph.kinds import Affine, is_affine
from calipers.graph.receptive_field import field_of_view
from calipers.problem.interrupts import give_way
from calipers.threats.ball import Region
from calipers.threats.norms import support_rounding

# bytes of input coefficients processed at once: with their temporaries they fit a core's cache
_CACHED = 2**21
_TOGETHER = 2**28  # bytes of coefficients of margins; more are processed in parts
# bytes of coefficients processed at once, measured: less costs calls, more costs cache misses and
# fresh pages
MEMORY = 2**24


Tighten = Callable[[Relaxed, int, Box], Box]
"""A box of a number made smaller, given all that is settled before it."""


def relax(
    graph: Graph,
    region: Region,
    arithmetic: Arithmetic,
    known: dict[int, Box] | None = None,
    *,
    refine: bool = True,
    tighten: Tighten | None = None,
) -> Relaxed:
    """Return the network relaxed over each region.

    `known` are boxes that are valid already (those of a larger radius are): they are intersected
    with, and what they settle is not bounded again. Without `refine` all boxes are plain intervals;
    `tighten` takes the place of plain backward propagation.

    Cost: a row of backward propagation for every unstable element, and another one if it is still
    unstable.
    """
    state = Relaxed(
        graph,
        region,
        arithmetic,
        torch.zeros(len(region.center), dtype=torch.long, device=region.center.device),
    )
    box = input_box(region, arithmetic)
    if arithmetic.executed is not None:
        state.departures[0] = input_departure(box, arithmetic)
        box = widened(box, state.departures[0])
    state.settle(0, box)
    refined = refined_numbers(graph, region) if refine else frozenset()
    values, sweeps = (
        graph.values(region.center) if refine and tighten is None else [],
        dict[int, Box](),
    )
    for number in range(1, len(graph.nodes) + 1):
        give_way()
        box = propagate(graph, number, state.boxes, arithmetic)
        box = widened(box, state.departures[number]) if arithmetic.executed is not None else box
        box = box if known is None else box.meet(known[number])
        if number in refined:
            if tighten is None:
                box, sweeps[number] = _refined(state, number, box, values[number])
            else:
                box = tighten(state, number, box)
        elif number in graph.ways and graph.ways[number][0] in sweeps:
            sweeps[number] = carried(graph, graph.ways[number], sweeps[graph.ways[number][0]])
        state.settle(number, box, sweeps.get(number))
    return state


def refined_numbers(graph: Graph, region: Region) -> frozenset[int]:
    """Return the numbers whose boxes backward propagation can tighten.

    Those with an unstable reader, but for what intervals bound exactly.
    """
    return frozenset(graph.nonlinear) - (
        _exact_numbers(graph) if region.norm.is_box else frozenset()
    )


def in_windows(graph: Graph, number: int) -> bool:
    """Return whether rows that begin at a number are carried as patches."""
    op = graph.nodes[number - 1].op if number else None
    windowed = op is not None and is_affine(op) and op.windowed() is not None
    return windowed and field_of_view(graph, number) <= WORTH_A_WINDOW


def _exact_numbers(graph: Graph) -> frozenset[int]:
    """Return the numbers whose interval over a box is exact already.

    One affine operation on independent coordinates.
    """
    independent, exact = {0}, set[int]()
    for number, node in enumerate(graph.nodes, start=1):
        if len(node.inputs) == 1 and node.inputs[0] in independent:
            exact.add(number)
            if node.op.diagonal or node.op.elementwise:
                independent.add(number)
    return frozenset(exact)


def _refined(state: Relaxed, number: int, box: Box, likely: Tensor) -> tuple[Box, Box]:
    """Return the box of a number tightened by backward propagation.

    Elements that are unstable for a point get rows. The second box holds what these rows alone
    found, not intersected with intervals.

    `likely (N, *shape)` is the value at the centre. The end nearer to zero on its side is bounded
    first: where that makes an element stable, the other end gets no row.
    """
    graph, shape = state.graph, state.graph.shape(number)
    # both as lower ends: of -value, then of value
    ends, swept = (torch.stack([-box.upper.flatten(1), box.lower.flatten(1)]) for _ in range(2))
    upward = likely.flatten(1) > 0
    windowed = in_windows(graph, number)
    for side in (upward, ~upward):
        lower, upper = ends[1].view_as(box.lower), -ends[0].view_as(box.upper)
        unstable = unstable_elements(graph, number, Box(lower, upper))
        state.rows += unstable.sum(1)
        budget = MEMORY // (torch.finfo(state.arithmetic.dtype).bits // 8 * graph.largest)
        for part, rows, points, elements, real in (
            _runs(state, unstable) if windowed else _groups(state, unstable, budget)
        ):
            place = (points[:, None], elements.view(len(points), -1))
            up = side[place]
            start = unit_rows(elements, rows, shape, up.to(lower.dtype) * 2 - 1, windowed=windowed)
            low = lower_bounds(part, number, start)
            # Written so that a NaN changes nothing. Padding repeats an element, and writes the same
            # numbers twice.
            where = (up.long(), *place)
            swept[where] = _once(low, real)
            ends[where] = _once(torch.where(low > ends[where], low, ends[where]), real)
    return tuple(
        Box(low.view_as(box.lower), -negative.view_as(box.upper)) for negative, low in (ends, swept)
    )  # type: ignore[return-value]


def _once(values: Tensor, real: Tensor | None) -> Tensor:
    """Return the values, those of padding detached from the gradient.

    Each repetition would count in the derivative of what is written.
    """
    if real is None or not values.requires_grad:
        return values
    return torch.where(real, values, values.detach())


_Batch = tuple[Relaxed, Tensor, Tensor, Tensor, Tensor | None]
"""The state the rows run in, their points' places in it, their points' places in the whole (P,),
their elements (P,) or (P, S), and which of these are not padding; None: all.
"""

_ROWS_OF_WINDOWS = 4096
_FEW = 4096  # rows that run together however many of them are padding: a call costs more


def _runs(state: Relaxed, flags: Tensor) -> Iterator[_Batch]:
    """Yield single rows in runs of neighbouring points, for patches.

    Nothing is padded.
    """
    counts = flags.sum(1).cumsum(0).tolist()
    begin, done = 0, 0
    while begin < len(counts):
        end = begin + 1
        while end < len(counts) and counts[end] - done <= _ROWS_OF_WINDOWS:
            end += 1
        point, element = flags[begin:end].nonzero(as_tuple=True)
        part = state.slice(begin, end)
        for rows, elements in zip(
            point.split(2 * _ROWS_OF_WINDOWS), element.split(2 * _ROWS_OF_WINDOWS), strict=True
        ):
            if len(rows):
                yield part, rows, rows + begin, elements, None
        begin, done = end, counts[end - 1]


def _groups(state: Relaxed, flags: Tensor, budget: int) -> Iterator[_Batch]:
    """Yield groups of points (P,) and elements (P, S) for all set flags.

    At most `budget` rows at once. Points of similar count stand together, so little is padded; a
    short row repeats its first element.
    """
    counts = flags.sum(1)
    order = counts.argsort(descending=True)
    ranked = counts[order].tolist()
    begin = 0
    while begin < len(ranked) and ranked[begin]:
        widest, end = ranked[begin], begin + 1
        while (
            end < len(ranked)
            and ranked[end]
            and (ranked[end] * 2 > widest or (end + 1 - begin) * widest <= _FEW)
            and (end + 1 - begin) * widest <= budget
        ):
            end += 1
        points = order[begin:end]
        columns = Columns.of(flags[points], widest)
        shares = (t.split(max(1, budget), 1) for t in columns)
        for place, real in zip(*shares, strict=True):
            yield state, points, points, place, real
        begin = end


def lower_bounds(state: Relaxed, number: int, start: Coefficients) -> Tensor:
    """Return lower bounds (P, S) of <start, value of the number>.

    Over the regions. Proved in the state's arithmetic: checked float64 subtracts its rounding
    allowance.
    """
    return _known(_BackwardPass(state, number, start).run())


def margin_bounds(state: Relaxed, rows: Tensor) -> Tensor:
    """Return lower bounds (N, S) of rows (N, S, K) @ logits, by CROWN."""
    return _in_shares(state, rows, lambda start: lower_bounds(state, len(state.graph.nodes), start))


def _in_shares(state: Relaxed, rows: Tensor, bound: Callable[[Dense], Tensor]) -> Tensor:
    """Return the bounds (N, S) of rows (N, S, K), a few rows at a time.

    So that their coefficients fit in memory: those of a thousand classes may not.
    """
    size = len(rows) * state.graph.largest * torch.finfo(state.arithmetic.dtype).bits // 8
    parts = rows.to(state.region.center.dtype).split(max(1, _TOGETHER // size), 1)
    bounds = [bound(Dense(part, None)) for part in parts]
    return bounds[0] if len(bounds) == 1 else torch.cat(bounds, 1)


def margin_lines(state: Relaxed, rows: Tensor) -> Tensor:
    """Return the linear lower bounds' coefficients (N, S, *D).

    Of the lines in the input that bound rows (N, S, K) @ logits from below over each region.
    """
    return _BackwardPass(
        state, len(state.graph.nodes), Dense(rows.to(state.region.center.dtype), None)
    ).line()


def interval_margin_bounds(state: Relaxed, rows: Tensor) -> Tensor:
    """Return lower bounds (N, S) of rows (N, S, K) @ logits, from boxes.

    The affine operations at the end are merged with the rows, which are then bounded over the boxes
    before them.
    """
    return _in_shares(
        state,
        rows,
        lambda start: _known(_BackwardPass(state, len(state.graph.nodes), start).run_to_boxes()),
    )


def joined_bounds(state: Relaxed, rows: Tensor) -> Tensor:
    """Return the better of `margin_bounds` and `interval_margin_bounds`.

    Backward propagation may be the looser one: between the planes of a product, or below a clip of
    a maximum. The boxes cost the affine operations at the network's end.
    """
    return torch.maximum(margin_bounds(state, rows), interval_margin_bounds(state, rows))


def _known(bounds: Tensor) -> Tensor:
    """Return the bounds, useless ones as -infinity.

    Useless are those that are NaN or have overflown.
    """
    return torch.where(bounds < torch.inf, bounds, torch.full_like(bounds, -torch.inf))


class _BackwardPass:
    """One backward pass.

    `pending` holds the coefficients of numbers still to be replaced by their inputs.
    """

    def __init__(self, state: Relaxed, number: int, start: Coefficients) -> None:
        self.state, self.number = state, number
        self.pending: dict[int, Coefficients] = {number: start}
        self.offset: Tensor = torch.zeros(
            (), dtype=state.arithmetic.dtype, device=state.rows.device
        )
        self.rounding = self.offset

    def run(self) -> Tensor:
        """Return the bounds."""
        stem = min(self.number, self.state.graph.stem)
        self._back_to(stem)
        if stem not in self.pending:
            return self.offset - self.rounding
        # Coefficients of the input are the widest: made for a few rows at a time, they are summed
        # up and dropped while still in the cache.
        width = (
            max(torch.Size(self.state.graph.shape(k)).numel() for k in range(stem + 1))
            * self.offset.element_size()
        )
        lowest = [
            self._share(stem, part, a)._concretise()
            for part, a in self.pending[stem].shares(_CACHED // width)
        ]
        return lowest[0] if len(lowest) == 1 else torch.cat(lowest)

    def line(self) -> Tensor:
        """Return the coefficients of the input, before they are summed up."""
        self._back_to(0)
        return self.pending[0].dense().a

    def _back_to(self, stem: int) -> None:
        for number in range(self.number, stem, -1):
            if number in self.pending:
                self._replace(number)

    def _share(self, stem: int, part: slice, a: Coefficients) -> _BackwardPass:
        """Return the backward pass of some rows, continued to the input."""
        share = _BackwardPass(self.state, stem, a)
        share.offset, share.rounding = (
            t[part] if t.dim() else t for t in (self.offset, self.rounding)
        )
        share._back_to(0)
        return share

    def run_to_boxes(self) -> Tensor:
        """Return the bounds that the boxes give.

        The pass goes back only as far as operations are affine.
        """
        for number in range(self.number, 0, -1):
            if number in self.pending and self.state.graph.nodes[number - 1].op.affine:
                self._replace(number)
        bound, arithmetic = self.offset, self.state.arithmetic
        for number, a in self.pending.items():
            box = self.state.boxes[number]
            wide, middle = (
                a.size_dot((box.upper - box.lower) / 2),
                a.dot((box.upper + box.lower) / 2),
            )
            bound = bound + middle - wide
            self.rounding = self.rounding + arithmetic.gamma(
                a.terms + len(self.state.graph.nodes)
            ) * (wide + a.size_dot(box.magnitude) + self.offset.abs())
            self.rounding = self.rounding + arithmetic.floor * self.state.reach[:, None]
        return bound - self.rounding

    def _replace(self, number: int) -> None:
        give_way()
        node = self.state.graph.nodes[number - 1]
        a = self.pending.pop(number)
        taken = self.state.multipliers.get(number)
        if taken is not None:
            a = a.dense().minus(taken[0])
            self.offset = (
                self.offset + (taken[1] if a.points is None else taken[1][a.points])[:, None]
            )
        if self.state.arithmetic.checked and (taken is not None or node.op.rounds):
            self.rounding = self.rounding + self.state.arithmetic.gamma(a.terms) * a.size_dot(
                self.state.sizes[number]
            )
        self._depart(number, a)
        if is_affine(node.op):
            self._through_affine(node.op, a, node.inputs)
            return
        shapes = [self.state.graph.shape(i) for i in node.inputs]
        backs, offset = a.through(self.state.relaxations[number], shapes)
        self.offset = self.offset + offset
        for i, back in zip(node.inputs, backs, strict=True):
            self._add(i, back)

    def _depart(self, number: int, a: Coefficients) -> None:
        """Subtract what the execution of one operation can change."""
        if self.state.arithmetic.executed is not None:
            self.rounding = self.rounding + a.size_dot(self.state.departures[number])

    def _add(self, number: int, a: Coefficients) -> None:
        self.pending[number] = self.pending[number].plus(a) if number in self.pending else a

    def _through_affine(self, op: Affine, a: Coefficients, inputs: tuple[int, ...]) -> None:
        shapes = [self.state.graph.shape(i) for i in inputs]
        centre = self.state.region.center
        constant = op.value(
            *(torch.zeros(1, *shape, dtype=centre.dtype, device=centre.device) for shape in shapes)
        )
        if bool(constant.any()):
            self.offset = self.offset + a.dot(constant)
        for i, back in zip(inputs, a.back(op, shapes), strict=True):
            self._add(i, back)

    def _concretise(self) -> Tensor:
        """Return the bounds: the last step, over the region.

        The value at the centre, minus the support of -A over the region, by its dual bound where
        there are constraints, minus the rounding.
        """
        a, region, arithmetic = self.pending[0], self.state.region, self.state.arithmetic
        fall = a.fall(region)
        self._depart(0, a)
        if arithmetic.checked:
            reach = self.state.reach if a.points is None else self.state.reach[a.points]
            self.rounding = self.rounding + arithmetic.floor * reach[:, None]
            gamma = arithmetic.gamma(support_rounding(a.terms) + len(self.state.graph.nodes))
            self.rounding = self.rounding + gamma * (
                a.size_dot(region.center.abs()) + fall.terms + self.offset.abs()
            )
        return self.offset + a.dot(region.center) - fall.value - self.rounding
