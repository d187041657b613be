"""Where is the margin smallest, once some choices are made? Linear programs over a ball, solved by
HiGHS from where the last one ended.

Nothing here is believed: what a program returns is multipliers, of which `exact.proving` makes
bounds by itself, and points, which are asked of the network. A ball is a box, or a budget that
rising and falling features share (their offset is split in two). A round one has no linear rows.
Where a point stands outside it, the shortest offset that the network cannot tell from it says in
which direction, and a row that ends the ball there is added: a combination of the model's few rows,
so a dozen do where tangents at the points took thousands. Where all choices are made the nearest
point of margin 0 is asked for instead, by projection (exact.projection), whose multipliers are as
good.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from calipers.certificates.exact.model import Ends, Floats, Model
from calipers.certificates.exact.projection import Piece
from calipers.errors import BadInput
from calipers.problem.norms import Support
from calipers.problem.region import Region

_SETTINGS: dict[str, Any] = {
    "output_flag": False,
    "threads": 1,
    "presolve": "off",
    "solver": "choose",
    "small_matrix_value": 1e-12,
    "primal_feasibility_tolerance": 1e-9,  # the smallest that the solver takes is 1e-10
    "dual_feasibility_tolerance": 1e-9,
}
_PATIENCE = (
    30.0  # seconds for one program: most take a hundredth of that, but the first of a wide network
)
_ROUND = 1e-9  # share of the radius that a point may stand out of a round ball
_STEPS, _INSIDE = 15, 1e-11  # Newton's, to the shortest offset; of what the rows see
_ENOUGH, _HELD = 12, 400  # rows added for one program, and held in all


class Answer(NamedTuple):
    """What a program returned: the smallest of its goal times `sign`, the multipliers of the
    model's rows, the offset and the columns.

    Of rows that contradict each other within the radius (`goal` None) the multipliers that show it,
    and a point only if it lies farther out.
    """

    goal: int | None
    value: float
    multipliers: Floats
    delta: Floats | None
    columns: Floats | None
    sign: float = 1.0


class Linear:
    """Linear programs over a model's rows, for offsets  delta = ways @ shares: the shares come
    before the model's columns, with further rows of their own.
    """

    ends: float = float("inf")
    """When to give up, on the monotonic clock."""

    def __init__(self, model: Model, ways: Any, further: Any) -> None:
        self.model, self.ways, self.width, self.goal, self.sign = (
            model,
            ways,
            ways.shape[1],
            -1,
            1.0,
        )
        self.state = Ends(
            model.low_row.copy(), model.high_row.copy(), model.low.copy(), model.high.copy()
        )
        self.linear = self._passed(further)

    def _passed(self, further: Any) -> Any:
        """Return a solver that holds the model, and the further rows behind its own; shares have no
        ends yet but 0, these rows none.
        """
        import highspy

        model, h, lp = self.model, highspy.Highs(), highspy.HighsLp()  # type: ignore[no-untyped-call]
        below = sparse.csr_matrix((further.shape[0], model.columns.shape[1]))
        matrix = sparse.vstack(
            [
                sparse.hstack([model.inputs @ self.ways, model.columns]),
                sparse.hstack([further, below]),
            ]
        ).tocsr()
        none = np.full(further.shape[0], np.inf)
        lp.num_row_, lp.num_col_ = matrix.shape
        lp.col_cost_ = np.zeros(matrix.shape[1])
        lp.col_lower_, lp.col_upper_ = (
            np.concatenate([np.zeros(self.width), end]) for end in (model.low, model.high)
        )
        lp.row_lower_, lp.row_upper_ = (
            np.append(model.low_row, -none),
            np.append(model.high_row, none),
        )
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = (
            matrix.indptr,
            matrix.indices,
            matrix.data,
        )
        for name, value in _SETTINGS.items():
            h.setOptionValue(name, value)
        h.passModel(lp)
        return h

    def _set_shares(self, low: Floats, high: Floats) -> None:
        self.linear.changeColsBounds(self.width, np.arange(self.width, dtype=np.int32), low, high)

    def _set_ends(self, ends: Ends, goal: int, sign: float = 1.0) -> None:
        old, self.state = self.state, ends
        rows = np.flatnonzero(
            (old.low_row != ends.low_row) | (old.high_row != ends.high_row)
        ).astype(np.int32)
        columns = np.flatnonzero((old.low != ends.low) | (old.high != ends.high)).astype(np.int32)
        if len(rows):
            self.linear.changeRowsBounds(len(rows), rows, ends.low_row[rows], ends.high_row[rows])
        if len(columns):
            self.linear.changeColsBounds(
                len(columns), columns + np.int32(self.width), ends.low[columns], ends.high[columns]
            )
        if goal != self.goal and self.goal >= 0:
            self.linear.changeColCost(self.width + self.goal, 0.0)
        self.linear.changeColCost(self.width + goal, sign)
        self.goal, self.sign = goal, sign

    def basis(self) -> Any:
        """Return where the last linear program ended, for `solve` to begin from."""
        return self.linear.getBasis(), self.linear.getNumRow()

    def _begin(self, basis: Any) -> None:
        """Begin where an earlier program ended; rows added since do not hold there. (To ask a basis
        itself for its length is to copy it.)
        """
        import highspy

        held, rows = basis
        missing = self.linear.getNumRow() - rows
        if missing > 0:
            held.row_status = [*held.row_status, *[highspy.HighsBasisStatus.kBasic] * missing]
        if missing >= 0:
            self.linear.setBasis(held)

    def _solved(self) -> Answer | None:
        import highspy

        h, patience = self.linear, min(_PATIENCE, self.ends - time.monotonic())
        # its clock is never set back
        h.setOptionValue("time_limit", h.getRunTime() + max(0.01, patience))
        h.run()
        status = h.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return self._contradiction(h)
        if status != highspy.HighsModelStatus.kOptimal:
            h.clearSolver()
            return None
        solution, count = h.getSolution(), len(self.model.low_row)
        values, multipliers = np.array(solution.col_value), np.array(solution.row_dual)[:count]
        shares, columns = values[: self.width], values[self.width :]
        return Answer(
            self.goal,
            self.sign * float(columns[self.goal]),
            multipliers,
            self.ways @ shares,
            columns,
            self.sign,
        )

    def _contradiction(self, h: Any) -> Answer | None:
        """Return the multipliers of rows that cannot all hold."""
        found = h.getDualRay()
        ray = np.array(found[2]) if len(found) > 2 and found[1] else None
        return (
            None
            if ray is None
            else Answer(None, np.inf, ray[: len(self.model.low_row)], None, None)
        )


class Program(Linear):
    """The programs of one model over a ball, at radii and under choices that change from call to
    call.
    """

    def __init__(self, model: Model, region: Region) -> None:
        if region.norm.is_count:
            raise BadInput(
                "a norm that counts features has no linear programs: attack it, and bound it by "
                "CROWN"
            )
        self.norm = region.norm
        self.low, self.high = (end[0].double().numpy() for end in (region.low, region.high))
        self.weight = (
            np.ones_like(self.low) if region.weight is None else region.weight.double().numpy()
        )
        self.round, self.split, self.at = region.norm.is_euclidean, region.norm.is_sparse, -1.0
        self.directions = np.zeros((0, len(self.low)))
        self.seen = (
            model.inputs[np.diff(model.inputs.indptr) > 0].toarray()
            if self.round
            else np.zeros((0, len(self.low)))
        )
        each = sparse.identity(len(self.low), format="csr")
        both = sparse.hstack(
            [each, -each]
        ).tocsr()  # rising and falling share the budget, which is the last row
        budget = sparse.csr_matrix(
            np.concatenate([self.weight, self.weight])
            if self.split
            else np.zeros((0, len(self.low)))
        )
        super().__init__(model, both if self.split else each, budget)

    # ---- what changes
    # ----------------------------------------------------------------------------------------------

    def _set_radius(self, radius: float) -> None:
        if radius == self.at:
            return
        self.at = radius
        low, high = (
            np.maximum(self.low, -radius / self.weight),
            np.minimum(self.high, radius / self.weight),
        )
        if self.split:
            low, high = np.zeros(self.width), np.concatenate([high, -low])
        self._set_shares(low, high)
        if self.split:
            self.linear.changeRowBounds(len(self.model.low_row), -np.inf, radius)
        for k, end in enumerate(self._support(self.directions)):
            self.linear.changeRowBounds(len(self.model.low_row) + k, -np.inf, end)

    def _support(self, directions: Floats) -> list[float]:
        """Return how far the ball, and the box, reach in some directions."""
        ends: list[float] = self._best(directions).value.tolist()
        return ends

    def _best(self, directions: Floats) -> Support:
        low, high = (
            torch.from_numpy(np.broadcast_to(end * self.weight, directions.shape).copy())
            for end in (self.low, self.high)
        )
        radius = torch.full((len(directions),), self.at, dtype=torch.float64)
        return self.norm.support(torch.from_numpy(directions / self.weight), radius, low, high)

    def length(self, delta: Floats) -> float:
        """Return the length of an offset."""
        return float(self.norm.of(torch.from_numpy(delta * self.weight)))

    # ---- solving
    # ----------------------------------------------------------------------------------------------

    def solve(
        self,
        radius: float,
        goal: int,
        ends: Ends,
        basis: Any = None,
        *,
        exact: bool = False,
        sign: float = 1.0,
    ) -> Answer | None:
        """Return the answer of minimising the column `goal`, or of maximising it (`sign` -1),
        within the radius; None where the solver has none.

        `exact`: to the last digit, in a round ball too. There the point is the nearest one where
        the goal is at most 0, not the lowest.
        """
        if (
            exact
            and self.round
            and (nearest := self._nearest_of_piece(radius, goal, ends)) is not None
        ):
            return nearest
        if len(self.directions) > _HELD:
            self._forget()
        self._set_radius(radius)
        self._set_ends(ends, goal, sign)
        if basis is not None:
            self._begin(basis)
        answer = self._solved()
        return self._rounded(answer) if self.round else answer

    def _nearest_of_piece(self, radius: float, goal: int, ends: Ends) -> Answer | None:
        """Return the nearest point of goal 0 in a piece, with multipliers for one unit of the goal;
        None if a choice is open, or for want of an answer.
        """
        chosen = self.model.chosen(ends)
        if chosen is None:
            return None
        with np.errstate(all="ignore"):
            found = Piece(self.model, ends, chosen).nearest(
                goal, self.weight**2, self.low, self.high, radius
            )
        if found is None:
            return None
        length = self.length(found.delta)
        # the margin may be 0 at the point itself: nothing is proved at any radius
        if not length > 0:
            return Answer(
                goal, -np.inf, np.zeros_like(found.multipliers), found.delta, found.columns
            )
        # the goal costs nothing: what is proved is that the piece has no point nearer than that
        if not found.price > 0:
            return Answer(
                None, -np.inf, found.multipliers, found.delta if length <= radius else None, None
            )
        return Answer(
            goal,
            (length - radius) * length / found.price,
            found.multipliers / found.price,
            found.delta,
            found.columns,
        )

    def _rounded(self, answer: Answer | None) -> Answer | None:
        """Return the answer with the ball's end in the directions that matter."""
        for _ in range(_ENOUGH):
            if answer is None or answer.delta is None or answer.value > 0:
                break
            nearest, direction = self._nearest(answer.delta)
            answer = answer._replace(delta=nearest)
            if not self._ended(nearest, direction):
                break
            answer = self._solved()
        if (
            answer is None
            or answer.delta is None
            or self.length(answer.delta) <= self.at * (1 + _ROUND)
        ):
            return answer
        # Not settled: the point of the ball where the multipliers' bound is attained is near the
        # best one, if these are near the best.
        return answer._replace(
            delta=self._best((self.model.inputs.T @ answer.multipliers)[None]).delta[0].numpy()
            / self.weight
        )

    def beyond(
        self, delta: Floats, radius: float, share: float, goal: int, ends: Ends
    ) -> Floats | None:
        """Return an offset of negative goal whose length is larger than the radius by that share,
        if there is one; `delta` is one of goal 0 at the radius.

        In a round ball from there on towards the lowest one in the box around it: what lies between
        two points keeps to the rows as they do.
        """
        self._set_radius(2 * radius if self.round else radius * (1 + share))
        self._set_ends(ends, goal)
        answer = self._solved()
        if not self.round or answer is None or answer.delta is None:
            return None if answer is None else answer.delta
        way = answer.delta - delta
        return delta + min(1.0, share * radius / max(self.length(way), 1e-300)) * way

    def _nearest(self, delta: Floats) -> tuple[Floats, Floats]:
        """Return the shortest offset of the box from which the rows see the same, and its direction
        A^T lambda: clip(A^T lambda / w^2) = delta'.

        Newton's method on the dual, sum of <lambda, u> - |w delta'|^2 / 2, whose gradient is what
        the rows still see apart.
        """
        square, a = self.weight**2, self.seen
        low, high = (
            np.maximum(self.low, -self.at / self.weight),
            np.minimum(self.high, self.at / self.weight),
        )
        seen, multiplier = a @ delta, np.zeros(len(a))

        def at(m: Floats) -> tuple[Floats, float]:
            pull = a.T @ m
            found = np.clip(pull / square, low, high)
            return found, float(m @ seen - pull @ found + (square * found**2).sum() / 2)

        found, value = at(multiplier)
        for _ in range(_STEPS):
            apart = seen - a @ found
            if np.abs(apart).max(initial=0.0) <= _INSIDE * (1 + np.abs(seen).max(initial=0.0)):
                break
            free = ((found > low) & (found < high)) / square
            curve = (a * free) @ a.T
            step = np.linalg.solve(
                curve + 1e-12 * max(np.trace(curve), 1e-30) * np.eye(len(a)), apart
            )
            share = 1.0
            while share > 1e-6:
                new, higher = at(multiplier + share * step)
                if higher > value:
                    break
                share /= 2
            else:
                break
            multiplier, found, value = multiplier + share * step, new, higher
        return found, a.T @ multiplier

    def _ended(self, point: Floats, direction: Floats) -> bool:
        """Add the row that ends the ball in the direction of a point; was the point outside?"""
        length, scale = self.length(point), float(np.abs(direction).max(initial=0.0))
        if length <= self.at * (1 + _ROUND) or not scale > 0:
            return False
        direction = direction / scale
        (end,) = self._support(direction[None])
        places = np.flatnonzero(direction).astype(np.int32)
        self.linear.addRow(-np.inf, end, len(places), places, direction[places])
        self.directions = np.vstack([self.directions, direction])
        return True

    def _forget(self) -> None:
        """Take out all rows that were added."""
        first, count = len(self.model.low_row), len(self.directions)
        self.linear.deleteRows(count, np.arange(first, first + count, dtype=np.int32))
        self.directions = self.directions[:0]
