"""Where is the margin smallest, once some choices are made? Linear programs over a ball, solved by HiGHS from where the last one ended.

Nothing here is believed: what a program returns is multipliers, of which `milp_proving` makes bounds by itself, and points, which are asked of the network.
The ball is a box, a budget that rising and falling features share (their offset is split in two), or a round one, cut off by tangents as they are needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from calipers.certificates.milp_model import Ends, Floats, Model
from calipers.errors import BadInput
from calipers.problem.region import Region

_TOLERANCE = 1e-9  # of feasibility, primal and dual: the smallest that the solver takes is 1e-10
_ROUND = 1e-9  # share of the radius that a point may stand out of a round ball
_TANGENTS = 40  # rounds of a program, two tangents each


class Answer(NamedTuple):
    """What a program returned: the multipliers of the model's rows, the offset and the columns. Of an infeasible one (`goal` None) the multipliers of a
    contradiction, and no point."""

    goal: int | None
    multipliers: Floats
    delta: Floats | None
    columns: Floats | None


class Program:
    """The linear programs of one model, at radii and under choices that change from call to call."""

    def __init__(self, model: Model, region: Region) -> None:
        import highspy

        if region.norm.is_count:
            raise BadInput("a norm that counts features has no linear programs: its distances are found by enumeration")
        self.highs: Any
        self.model, self.highs = model, highspy.Highs()  # type: ignore[no-untyped-call]
        self.low, self.high = (end[0].double().numpy() for end in (region.low, region.high))
        self.weight = np.ones_like(self.low) if region.weight is None else region.weight.double().numpy()
        self.round, self.split = region.norm.is_euclidean, region.norm.is_sparse
        self.norm, self.width = region.norm, len(self.low) * (1 + self.split)
        self.cuts = 0
        self.at, self.goal = -1.0, -1
        self.state: Ends | None = None
        self._pass(highspy)

    def _pass(self, highspy: Any) -> None:
        """Hand the model over, with the ball's own row at the end."""
        model, h = self.model, self.highs
        inputs = sparse.hstack([model.inputs, -model.inputs]) if self.split else model.inputs
        matrix = sparse.hstack([inputs, model.columns]).tocsr()
        if self.split:
            budget = sparse.csr_matrix(np.concatenate([self.weight, self.weight, np.zeros(model.columns.shape[1])]))
            matrix = sparse.vstack([matrix, budget]).tocsr()
        lp, extra = highspy.HighsLp(), int(self.split)
        lp.num_col_, lp.num_row_ = matrix.shape[1], matrix.shape[0]
        lp.col_cost_ = np.zeros(matrix.shape[1])
        lp.col_lower_, lp.col_upper_ = (np.concatenate([np.zeros(self.width), end]) for end in (model.low, model.high))
        lp.row_lower_, lp.row_upper_ = np.append(model.low_row, [-np.inf] * extra), np.append(model.high_row, [np.inf] * extra)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = matrix.indptr, matrix.indices, matrix.data
        settings: dict[str, Any] = {"output_flag": False, "threads": 1, "small_matrix_value": 1e-12, "presolve": "off", "solver": "simplex"}
        tolerances = dict.fromkeys(("primal_feasibility_tolerance", "dual_feasibility_tolerance"), _TOLERANCE)
        for name, value in {**settings, **tolerances}.items():
            h.setOptionValue(name, value)
        h.passModel(lp)
        self.rows, self.total = len(model.low_row), lp.num_col_
        self.state = Ends(model.low_row.copy(), model.high_row.copy(), model.low.copy(), model.high.copy())

    # ---- what changes ----------------------------------------------------------------------------------------------------------------------------------

    def _set_radius(self, radius: float) -> None:
        if radius == self.at:
            return
        self.at = radius
        low, high = np.maximum(self.low, -radius / self.weight), np.minimum(self.high, radius / self.weight)
        if self.split:
            low, high = np.zeros(self.width), np.concatenate([high, -low])
        self.highs.changeColsBounds(self.width, np.arange(self.width, dtype=np.int32), low, high)
        for row in range(self.rows, self.rows + self.cuts + int(self.split)):
            self.highs.changeRowBounds(row, -np.inf, radius)

    def _set_ends(self, ends: Ends) -> None:
        old = self.state
        assert old is not None
        rows = np.flatnonzero((old.low_row != ends.low_row) | (old.high_row != ends.high_row)).astype(np.int32)
        columns = np.flatnonzero((old.low != ends.low) | (old.high != ends.high)).astype(np.int32)
        if len(rows):
            self.highs.changeRowsBounds(len(rows), rows, ends.low_row[rows], ends.high_row[rows])
        if len(columns):
            self.highs.changeColsBounds(len(columns), columns + np.int32(self.width), ends.low[columns], ends.high[columns])
        self.state = ends

    def _set_goal(self, goal: int) -> None:
        if goal != self.goal:
            if self.goal >= 0:
                self.highs.changeColCost(self.width + self.goal, 0.0)
            self.highs.changeColCost(self.width + goal, 1.0)
            self.goal = goal

    def basis(self) -> Any:
        """Return where the last program ended, for `solve` to begin from."""
        return self.highs.getBasis()

    # ---- solving ---------------------------------------------------------------------------------------------------------------------------------------

    def solve(self, radius: float, goal: int, ends: Ends, basis: Any = None) -> Answer | None:
        """Return the answer of minimising the column `goal` within the radius; None where the solver has none."""
        self._set_radius(radius)
        self._set_ends(ends)
        self._set_goal(goal)
        if basis is not None and len(basis.row_status) == self.highs.getNumRow():
            self.highs.setBasis(basis)
        answer = self._run()
        for _ in range(_TANGENTS if self.round else 0):
            if answer is None or answer.delta is None or not self._cut(answer):
                break
            answer = self._run()
        return answer

    def _run(self) -> Answer | None:
        import highspy

        self.highs.run()
        status = self.highs.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return self._contradiction()
        if status != highspy.HighsModelStatus.kOptimal:
            self.highs.clearSolver()
            return None
        solution = self.highs.getSolution()
        values = np.array(solution.col_value)
        delta, width = values[: self.width], len(self.low)
        delta = delta[:width] - delta[width:] if self.split else delta
        return Answer(self.goal, np.array(solution.row_dual)[: self.rows], delta, values[self.width :])

    def _contradiction(self) -> Answer | None:
        """Return the multipliers of rows that cannot all hold."""
        found = self.highs.getDualRay()
        ray = np.array(found[2]) if len(found) > 2 and found[1] else None
        return None if ray is None else Answer(None, ray[: self.rows], None, None)

    def _cut(self, answer: Answer) -> bool:
        """Add the tangents of the ball where the point, and where the multipliers' own minimiser, leave it; was it outside?"""
        assert answer.delta is not None
        out = answer.delta * self.weight
        if self._length(out) <= self.at * (1 + _ROUND):
            return False
        pull = -(self.model.inputs.T @ answer.multipliers)
        toward, radius = torch.from_numpy(-pull / self.weight)[None], torch.tensor([self.at], dtype=torch.float64)
        lowest = self.norm.support(toward, radius, *self._sides()).delta[0].numpy()
        for point in (out, lowest):
            length = self._length(point)
            if length > 0:
                normal = point / length * self.weight
                places = np.flatnonzero(normal).astype(np.int32)
                self.highs.addRow(-np.inf, self.at, len(places), places, normal[places])
                self.cuts += 1
        return True

    def _sides(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = (torch.from_numpy(np.clip(end * self.weight, -self.at, self.at))[None] for end in (self.low, self.high))
        return low, high

    def _length(self, delta: NDArray[np.float64]) -> float:
        return float(self.norm.of(torch.from_numpy(delta)))
