"""Encoding of a network over a region as a mixed-integer program.

The variables are the input's perturbation delta and, for every operation that is not affine, its
unstable elements over the region: the value z before it and y behind it. Everything between them is
affine and is propagated backward into rows  z - A delta - B y = c,  up to an interval for what
rounding can have changed; stable elements are part of these. Lines of the relaxation tie y to z. On
which linear piece a function is, or which element of a window is the maximum, is a `Choice`: with
all choices made the rows describe the network exactly, with none they are its convex relaxation
(Tjeng et al. 2019). Differs from the paper: there is no big M; an option turns a row into an
equation instead of moving it by a constant, so that no constant can be too large or too small.

Only general facts of operations are read: breakpoints, relaxation lines, members of a window. So
the rows are sound whatever the operation is called, and an operation that is not piecewise linear
is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from calipers.bounds.relaxation import Relaxed
from calipers.certificates.exact.model import Choice, Floats, MIPModel, Option
from calipers.errors import BadInput
from calipers.graph.ir import Node
from calipers.graph.kinds import Elementwise, is_affine, is_elementwise
from calipers.graph.relaxations import Lines, Planes
from calipers.threats.norms import support_rounding
from calipers.threats.region import Region

_BYTES = 2**27  # of coefficients propagated at once
_SPREAD = 16  # roundings allowed for the few operations that compute a line or a limit


def encoded(state: Relaxed, spec: Tensor, offsets: Tensor, cases: dict[int, list[int]]) -> MIPModel:
    """Return the mixed-integer model of the one point of a relaxed network.

    It covers the given cases of the margins `spec (S, K)` plus `offsets (S,)`.

    Raises `BadInput` for an operation that is not piecewise linear. Cost: a row of backward bound
    propagation for each unstable element.
    """
    return _Encoder(state).model(spec, offsets, cases)


class _Encoder:
    """The rows and columns of a model while it is built.

    Column numbers are assigned in the order of the network.
    """

    def __init__(self, state: Relaxed) -> None:
        self.state, self.graph, self.arithmetic = state, state.graph, state.arithmetic
        self.made: dict[int, Tensor] = {}  # by node: the elements that have a column of their own
        self.place: dict[int, dict[int, int]] = {}  # by node: their columns
        # by (number, element): the column of the input of an unstable element
        self.before: dict[tuple[int, int], int] = {}
        self.low: list[float] = []
        self.high: list[float] = []
        self.dense: list[
            tuple[Floats, list[tuple[Floats, NDArray[np.int64]]], int, Floats, Floats]
        ] = []
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.choices: list[Choice] = []
        self.count = 0

    def model(self, spec: Tensor, offsets: Tensor, cases: dict[int, list[int]]) -> MIPModel:
        """Encode the network, then add the margins, and return the model."""
        for k, node in enumerate(self.graph.nodes, start=1):
            if not is_affine(node.op):
                self._through(k, node)
        goals = self._margins(spec, offsets, cases)
        inputs, columns, low, high = self._assembled(self.rows, self.state.region.low.shape[1])
        own_rows, defined, row = len(low), np.full(len(self.low), -1), len(self.rows)
        for a, _, first, _, _ in self.dense:
            defined[first : first + len(a)] = np.arange(row, row + len(a))
            row += len(a)
        inputs, columns, low, high = self._constrained(inputs, columns, low, high)
        sources = {column: source for source, column in self.before.items()}
        ends = np.array(self.low), np.array(self.high)
        return MIPModel(
            self.graph,
            inputs,
            columns,
            low,
            high,
            *ends,
            _farthest(self.state.region),
            goals,
            tuple(self.choices),
            sources,
            defined,
            own_rows,
        )

    def _constrained(
        self, inputs: Any, columns: Any, low: Floats, high: Floats
    ) -> tuple[Any, Any, Floats, Floats]:
        """Return the rows with those of the threat's own constraints A x <= b."""
        cut = getattr(self.state.region, "cut", None)
        if cut is None:
            return inputs, columns, low, high
        a, b = cut
        x = self.state.region.center.flatten()
        room = (
            self.arithmetic.gamma(len(x) + 2) * (a.abs() @ x.abs() + b.abs())
            + self.arithmetic.floor
        )
        inputs, columns = (
            sparse.vstack([inputs, sparse.csr_matrix(a.numpy())]),
            sparse.vstack([columns, sparse.csr_matrix((len(b), columns.shape[1]))]),
        )
        return (
            inputs.tocsr(),
            columns.tocsr(),
            np.append(low, np.full(len(b), -np.inf)),
            np.append(high, (b - a @ x + room).numpy()),
        )

    def _column(self, low: float, high: float) -> int:
        self.low.append(low)
        self.high.append(high)
        return len(self.low) - 1

    def _row(self, terms: dict[int, float], low: float, high: float) -> int:
        self.rows.append((terms, low, high))
        return len(self.rows) - 1

    # ---- operations that are not affine
    # ----------------------------------------------------------------------------------------------

    def _through(self, k: int, node: Node) -> None:
        if is_elementwise(node.op):
            self._elementwise(k, node, node.op)
        elif (members := node.op.members()) is not None:
            self._largest(k, node, members)
        else:
            raise BadInput(_refusal(node))

    def _elementwise(self, k: int, node: Node, op: Elementwise) -> None:
        i = node.inputs[0]
        box, lines = self.state.boxes[i], self.state.lines(k)
        unstable = op.unstable(box.lower, box.upper)[0].flatten()
        if bool(
            (
                (lines.lower_slope != lines.upper_slope)
                | (lines.lower_intercept != lines.upper_intercept)
            )[0]
            .flatten()[~unstable]
            .any()
        ):
            raise BadInput(_refusal(node))
        self.made[k], self.place[k] = unstable, {}
        if not bool(unstable.any()):
            return
        elements = torch.nonzero(unstable).flatten()
        self._bring(i, elements)
        low, high = (end[0].flatten()[elements] for end in (box.lower, box.upper))
        under, over = (
            end[0].flatten()[elements]
            for end in (self.state.boxes[k].lower, self.state.boxes[k].upper)
        )
        pieces, hull = _pieces(op, low, high, node), _hull(op, low, high)
        for n, e in enumerate(elements.tolist()):
            self.place[k][e] = self._column(float(under[n]), float(over[n]))
            self._choice(
                k,
                self.before[i, e],
                self.place[k][e],
                [p.of(n) for p in pieces],
                [line.of(n) for line in hull],
            )

    def _choice(self, k: int, z: int, y: int, pieces: list[_Piece], hull: list[_Line]) -> None:
        """Add the rows of one unstable element, and its choice.

        They are the line of each linear piece, as a bound on the side, if any, on which it bounds
        the whole function, and the lines of the relaxation.
        """
        options, held, first = [], set[tuple[float, float, bool]](), len(self.rows)
        for piece in (p for p in pieces if p.begin < p.end):
            row = self._row(
                {y: 1.0, z: -piece.slope},
                piece.at if piece.under else -np.inf,
                piece.at if piece.over else np.inf,
            )
            held |= {
                (piece.slope, piece.at, above)
                for above, so in ((False, piece.under), (True, piece.over))
                if so
            }
            options.append(Option(row, piece.at, z, piece.begin, piece.end))
        for line in hull:
            if not any(
                line.above == above and np.isclose(line.slope, slope) and np.isclose(line.at, at)
                for slope, at, above in held
            ):
                held.add(line)
                self._row(
                    {y: 1.0, z: -line.slope},
                    -np.inf if line.above else line.at,
                    line.at if line.above else np.inf,
                )
        self.choices.append(Choice(k, y, (z,), tuple(options), first, len(self.rows)))

    def _largest(self, k: int, node: Node, windows: Tensor) -> None:
        i, planes = node.inputs[0], self.state.relaxations[k]
        assert isinstance(planes, Planes)
        open_ = ~planes.exact[0].flatten()
        self.made[k], self.place[k] = open_, {}
        if not bool(open_.any()):
            return
        low, high = (
            end[0].flatten().tolist()
            for end in (self.state.boxes[i].lower, self.state.boxes[i].upper)
        )
        members = {}
        for e in torch.nonzero(open_).flatten().tolist():
            window = [m for m in dict.fromkeys(windows[e].tolist()) if m < len(low)]
            floor = max(low[m] for m in window)
            members[e] = [m for m in window if high[m] >= floor]
        self._bring(i, torch.tensor(sorted({m for window in members.values() for m in window})))
        for e, window in members.items():
            floor, ceiling = max(low[m] for m in window), max(high[m] for m in window)
            y, z = self._column(floor, ceiling), [self.before[i, m] for m in window]
            self.place[k][e] = y
            first_row = len(self.rows)
            options = tuple(
                Option(self._row({y: 1.0, c: -1.0}, 0.0, np.inf), 0.0, -1, 0.0, 0.0) for c in z
            )
            # Each member is at least its lower bound, so the maximum is at most the largest of
            # these bounds plus the sum of all members' excesses over their own.
            room = (
                _SPREAD
                * np.finfo(float).eps
                * (len(window) * max(abs(low[m]) for m in window) + abs(floor))
                * len(window)
            )
            self._row(
                {y: 1.0, **dict.fromkeys(z, -1.0)},
                -np.inf,
                floor - sum(low[m] for m in window) + room,
            )
            self.choices.append(Choice(k, y, tuple(z), options, first_row, len(self.rows)))

    # ---- what is affine in between
    # ----------------------------------------------------------------------------------------------

    def _bring(self, number: int, elements: Tensor) -> None:
        """Add columns for those elements of a number that have none yet.

        With them come the rows that define the elements as affine functions of earlier columns.
        """
        new = [e for e in elements.tolist() if (number, e) not in self.before]
        if not new:
            return
        box, shape = self.state.boxes[number], self.graph.shape(number)
        for e in new:
            self.before[number, e] = self._column(
                float(box.lower[0].flatten()[e]), float(box.upper[0].flatten()[e])
            )
        first, size = self.before[number, new[0]], torch.Size(shape).numel()
        for begin in range(0, len(new), self._at_once):
            part = torch.tensor(new[begin : begin + self._at_once])
            start = torch.zeros(len(part), size, dtype=self.arithmetic.dtype).scatter_(
                1, part[:, None], 1.0
            )
            self._swept(number, start.view(-1, *shape), first + begin)

    @property
    def _at_once(self) -> int:
        return max(1, _BYTES // (8 * self.graph.largest))

    def _margins(
        self, spec: Tensor, offsets: Tensor, cases: dict[int, list[int]]
    ) -> dict[int, int]:
        """Add a column for every margin of these cases, and return the goals.

        A case of several margins gets one more column, which lies above all of them. The result is
        the column that decides each case.
        """
        wanted = sorted({s for members in cases.values() for s in members})
        box, last = self.state.boxes[len(self.graph.nodes)], len(self.graph.nodes)
        place = {}
        for s in wanted:
            size = (spec[s].abs() * box.magnitude[0].flatten()).sum() + offsets[s].abs()
            place[s] = self._column(-2 * float(size) - 1, 2 * float(size) + 1)
        if wanted:
            self._swept(
                last,
                spec[wanted].to(self.arithmetic.dtype).view(-1, *self.graph.shape(last)),
                place[wanted[0]],
                offsets[wanted],
            )
        goals = {}
        for case, members in cases.items():
            goals[case] = place[members[0]]
            if len(members) > 1:
                goals[case] = self._column(
                    min(self.low[place[s]] for s in members),
                    max(self.high[place[s]] for s in members),
                )
                for s in members:
                    self._row({goals[case]: 1.0, place[s]: -1.0}, 0.0, np.inf)
        return goals

    def _swept(self, number: int, start: Tensor, first: int, offsets: Tensor | None = None) -> None:
        """Add the rows  column - A delta - B y = c  of directions of a number.

        The directions are (P, *shape), and their columns begin at `first`.
        """
        a, made, constant, room = _swept_back(self.state, number, start, self.made)
        if offsets is not None:
            constant, room = (
                constant + offsets,
                room + self.arithmetic.gamma(2) * (constant.abs() + offsets.abs()),
            )
        parts = [
            (
                part.numpy(),
                np.array(
                    [self.place[k][e] for e in torch.nonzero(self.made[k]).flatten().tolist()]
                ),
            )
            for k, part in made.items()
        ]
        self.dense.append(
            (a.numpy(), parts, first, (constant - room).numpy(), (constant + room).numpy())
        )

    def _assembled(
        self, rows: list[tuple[dict[int, float], float, float]], width: int
    ) -> tuple[Any, Any, Floats, Floats]:
        """Return all rows as sparse matrices and ends.

        Rows of few terms come first, because choices refer to them by number.
        """
        values, places = (
            [t for row, _, _ in rows for t in row.values()],
            [c for row, _, _ in rows for c in row],
        )
        ends = np.cumsum([0, *(len(row) for row, _, _ in rows)])
        columns = [sparse.csr_matrix((values, places, ends), shape=(len(rows), len(self.low)))]
        inputs = [sparse.csr_matrix((len(rows), width))]
        low, high = [np.array([row[1] for row in rows])], [np.array([row[2] for row in rows])]
        for a, parts, first, down, up in self.dense:
            inputs.append(sparse.csr_matrix(-a))
            count = len(a)
            triplets = [(np.ones(count), np.arange(count), first + np.arange(count))]
            for part, place in parts:
                r, c = np.nonzero(part)
                triplets.append((-part[r, c], r, place[c]))
            data, r, c = (np.concatenate(t) for t in zip(*triplets, strict=True))
            columns.append(sparse.csr_matrix((data, (r, c)), shape=(count, len(self.low))))
            low.append(down)
            high.append(up)
        return (
            sparse.vstack(inputs).tocsr(),
            sparse.vstack(columns).tocsr(),
            np.concatenate(low),
            np.concatenate(high),
        )


class _Line(NamedTuple):
    """The line slope * z + at, above a function or below it."""

    slope: float
    at: float
    above: bool


class _LineRows(NamedTuple):
    """Lines above or below a function, for many elements."""

    slope: Tensor
    at: Tensor
    above: bool

    def of(self, n: int) -> _Line:
        """Return the line of one element."""
        return _Line(float(self.slope[n]), float(self.at[n]), self.above)


class _Piece(NamedTuple):
    """A linear piece of a function over the part [begin, end] of an interval.

    `under` and `over` say whether its line bounds the whole function from below, or from above.
    """

    begin: float
    end: float
    slope: float
    at: float
    under: bool
    over: bool


class _Pieces(NamedTuple):
    """A linear piece for each of many elements.

    Intervals without such a piece have an empty part.
    """

    begin: Tensor
    end: Tensor
    slope: Tensor
    at: Tensor
    under: Tensor
    over: Tensor

    def of(self, n: int) -> _Piece:
        """Return the piece of one element."""
        begin, end, slope, at, under, over = (t[n].item() for t in self)
        return _Piece(begin, end, slope, at, bool(under), bool(over))


def _hull(op: Elementwise, low: Tensor, high: Tensor) -> list[_LineRows]:
    """Return the lines that bound a piecewise linear function.

    The lines of its relaxation move with alpha between two extremes; those at both extremes are
    returned.
    """
    found = []
    for alpha in (0.0, 1.0):
        lines = op.relax(low, high, torch.full_like(low, alpha))
        found += [
            _LineRows(lines.lower_slope, lines.lower_intercept, above=False),
            _LineRows(lines.upper_slope, lines.upper_intercept, above=True),
        ]
    return found


def _pieces(op: Elementwise, low: Tensor, high: Tensor, node: Node) -> list[_Pieces]:
    """Return the linear pieces between the breakpoints inside the intervals.

    Together they cover the intervals.
    """
    ends = [
        low,
        *(
            torch.full_like(low, k).clamp(min=low, max=high)
            for k in op.breakpoints or ()
            if np.isfinite(k)
        ),
        high,
    ]
    corners = torch.stack([op.value(e) for e in ends])
    found = list[_Pieces]()
    for begin, end in pairwise(ends):
        lines = op.relax(begin, end)
        real = end > begin
        if bool(
            (
                (lines.lower_slope != lines.upper_slope)
                | (lines.lower_intercept != lines.upper_intercept)
            )[real].any()
        ):
            raise BadInput(_refusal(node))
        slope, at = lines.lower_slope, lines.lower_intercept
        away = corners - slope * torch.stack(ends)
        # Compared without tolerance: a line that rounding puts on the wrong side of a breakpoint
        # is not taken as a bound of the function.
        found.append(_Pieces(begin, end, slope, at, (away >= at).all(0), (away <= at).all(0)))
    return found


def _swept_back(
    state: Relaxed, number: int, start: Tensor, made: dict[int, Tensor]
) -> tuple[Tensor, dict[int, Tensor], Tensor, Tensor]:
    """Return directions of a number as affine functions of the columns.

    For directions (P, *shape) these are A (P, d) for the perturbation, coefficients (P, U) by node
    of the elements that have columns, the constants (P,), and the rounding errors that these can
    have suffered, (P,).
    """
    graph, arithmetic = state.graph, state.arithmetic
    pending, own = {number: start}, dict[int, Tensor]()
    constant, room, size = (start.new_zeros(len(start)) for _ in range(3))
    for k in range(number, 0, -1):
        if k not in pending:
            continue
        a, node = pending.pop(k).reshape(len(start), -1), graph.nodes[k - 1]
        if k in made:
            own[k] = a[:, made[k]]
            a = a.masked_fill(made[k], 0.0)
        if node.op.rounds:
            room = room + arithmetic.gamma(a.shape[1]) * (a.abs() @ state.sizes[k][0].flatten())
        for offset, i, back in _back(state, k, node, a):
            constant, size = constant + offset, size + offset.abs()
            pending[i] = pending[i] + back if i in pending else back
    x = state.region.center.flatten()
    a = pending[0].reshape(len(start), -1) if 0 in pending else start.new_zeros(len(start), len(x))
    gamma = arithmetic.gamma(support_rounding(len(x)) + len(graph.nodes))
    size = size + a.abs() @ x.abs()
    return (
        a,
        own,
        constant + a @ x,
        room + gamma * size + arithmetic.floor * state.reach.flatten()[0],
    )


def _back(state: Relaxed, k: int, node: Node, a: Tensor) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield a node's coefficients (P, n), propagated to its inputs.

    Each is (constant, number, coefficients). Elements that have columns must be left out of the
    coefficients.
    """
    graph = state.graph
    if is_affine(node.op):
        nothing = (torch.zeros(1, *graph.shape(i), dtype=a.dtype) for i in node.inputs)
        offset = a @ node.op.value(*nothing).flatten()
        for i, back in zip(node.inputs, node.op.adjoint(a.view(-1, *node.shape)), strict=True):
            yield offset, i, back.reshape(len(a), *graph.shape(i))
            offset = torch.zeros_like(offset)
        return
    i, relaxation = node.inputs[0], state.relaxations[k]
    if isinstance(relaxation, Lines):
        slope, at = relaxation.lower_slope[0].flatten(), relaxation.lower_intercept[0].flatten()
        yield a @ at, i, (a * slope).view(-1, *graph.shape(i))
        return
    assert isinstance(relaxation, Planes)
    back = a.new_zeros(len(a), torch.Size(graph.shape(i)).numel()).index_add(
        1, relaxation.pick[0].flatten(), a
    )
    yield a.new_zeros(len(a)), i, back.view(-1, *graph.shape(i))


def _farthest(region: Region) -> Floats:
    radius = region.norm.alone(region.radius.to(region.low.dtype))[:, None] * (
        1 + _SPREAD * torch.finfo(region.low.dtype).eps
    )
    reach = (
        radius
        if region.weight is None
        else radius / region.weight * (1 + _SPREAD * torch.finfo(region.low.dtype).eps)
    )
    far: Floats = torch.minimum(torch.maximum(-region.low, region.high), reach)[0].numpy()
    return far


def _refusal(node: Node) -> str:
    return (
        f"{node.op.label} at {node.where or 'an unnamed place'} is not piecewise linear, "
        "so no mixed-integer program describes it: prove its distance from below by "
        "CertifiedRadius(AlphaCROWN()), or decide radii by BranchAndBound"
    )
