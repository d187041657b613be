"""Linear programs for the smallest margin once some choices are made.

They are over a norm ball, and are solved by HiGHS from where the last one ended (warm start).

Nothing here is trusted: a program returns multipliers, of which `exact.proving` makes bounds by
itself, and points, which are run through the network. An linf ball is a box; an l1 ball is a budget
that rising and falling features share (their perturbation is split in two). A Euclidean ball is no
finite set of linear rows. Where a point is outside of it, the shortest perturbation that the
network's rows cannot tell from it gives a direction, and a row that limits the ball in this
direction is added: it is a combination of the model's few rows, so a dozen are enough where
tangents at the points took thousands. Where all choices are made, the nearest point of margin 0 is
computed instead, by projection (`exact.projection`), whose multipliers serve as well.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from calipers.certificates.exact.model import Ends, Floats, MIPModel
from calipers.certificates.exact.projection import LinearPiece
from calipers.errors import BadInput
from calipers.threats.norms import Support
from calipers.threats.region import Region

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
    30.0  # seconds for one program: most take a hundredth of it, but not a wide network's first
)
_ROUND = 1e-9  # share of the radius by which a point may be outside a Euclidean ball
# of Newton's method to the shortest perturbation; its tolerance, relative to the rows' values
_STEPS, _INSIDE = 15, 1e-11
_ENOUGH, _HELD = 12, 400  # rows added for one program, and held in all


class Answer(NamedTuple):
    """What a program returned.

    `value` is the smallest value of its goal times `sign`; then come the multipliers of the model's
    rows, the perturbation and the columns.

    If the rows contradict each other within the radius, `goal` is None, the multipliers are those
    that show it, and there is a point only if it lies farther out.
    """

    goal: int | None
    value: float
    multipliers: Floats
    delta: Floats | None
    columns: Floats | None
    sign: float = 1.0


class LinearPrograms:
    """Linear programs over a model's rows, in transformed perturbations.

    The perturbation is  delta = ways @ shares: the shares are the columns before the model's own,
    with further rows on them.
    """

    ends: float = float("inf")
    """Time to give up, on the monotonic clock."""

    def __init__(self, model: MIPModel, ways: Any, further: Any) -> None:
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
        """Return a solver that holds the model, and the further rows behind it.

        The shares are fixed at 0 until their limits are set; the further rows have no limits yet.
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
        """Return where the last linear program ended, for `solve` to start from."""
        return self.linear.getBasis(), self.linear.getNumRow()

    def _begin(self, basis: Any) -> None:
        """Start where an earlier program ended.

        Rows that were added since are basic. (To ask a HiGHS basis itself for its length would copy
        it.)
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
        # the solver's clock is never reset
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


class BallPrograms(LinearPrograms):
    """The linear programs of one model over a norm ball.

    Radius and choices change from call to call.
    """

    def __init__(self, model: MIPModel, region: Region) -> None:
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
        ).tocsr()  # rising and falling features share the budget, which is the last row
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
        """Return how far the ball within the box reaches in some directions."""
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
        """Return the weighted norm of a perturbation."""
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
        """Return the answer of minimising the column `goal` within the radius.

        With `sign` -1 the column is maximised. None where the solver has no answer.

        `exact` asks for full accuracy in a Euclidean ball too. There the point is the nearest one
        where the goal is at most 0, not the one where it is smallest.
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
        """Return the nearest point of goal 0 with all choices made.

        The multipliers are for one unit of the goal. None if a choice is open, or if there is no
        answer.
        """
        chosen = self.model.chosen(ends)
        if chosen is None:
            return None
        with np.errstate(all="ignore"):
            found = LinearPiece(self.model, ends, chosen).nearest(
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
        # the goal has no multiplier: what is proved is that the region has no point nearer
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
        """Return the answer with the Euclidean ball limited where it matters.

        Rows are added in the directions of points outside the ball, and the program is solved
        again.
        """
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
        # Not converged: the point of the ball at which the multipliers' bound is attained is near
        # the optimum, if the multipliers are near optimal.
        return answer._replace(
            delta=self._best((self.model.inputs.T @ answer.multipliers)[None]).delta[0].numpy()
            / self.weight
        )

    def beyond(
        self, delta: Floats, radius: float, share: float, goal: int, ends: Ends
    ) -> Floats | None:
        """Return a perturbation of negative goal, a little beyond the radius.

        Its length is larger than the radius by the given share; None if there is no such
        perturbation. `delta` is one of goal 0 at the radius.

        In a Euclidean ball it lies on the segment from `delta` to the point of smallest goal in the
        box around the ball: points between two that satisfy the rows satisfy them too.
        """
        self._set_radius(2 * radius if self.round else radius * (1 + share))
        self._set_ends(ends, goal)
        answer = self._solved()
        if not self.round or answer is None or answer.delta is None:
            return None if answer is None else answer.delta
        way = answer.delta - delta
        return delta + min(1.0, share * radius / max(self.length(way), 1e-300)) * way

    def _nearest(self, delta: Floats) -> tuple[Floats, Floats]:
        """Return the shortest perturbation with the same values in the rows.

        It stays inside the box. Returned with it is its direction A^T lambda: clip(A^T lambda /
        w^2) = delta'. It is found by Newton's method on the dual, sum of <lambda, u> - |w delta'|^2
        / 2, whose gradient is the difference of the rows' values that is left.
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
        """Add a row that limits the ball in the direction of a point.

        Returns whether a row was added: not if the point is inside the ball, or the direction is 0.
        """
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
        """Remove all rows that were added."""
        first, count = len(self.model.low_row), len(self.directions)
        self.linear.deleteRows(count, np.arange(first, first + count, dtype=np.int32))
        self.directions = self.directions[:0]
