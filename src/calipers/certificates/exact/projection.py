"""The nearest point of a linear region at which a margin is 0.

It is a projection onto a polyhedron, found by Newton's method on its dual.

With all choices made every column is an affine function of the perturbation, v = P delta + q, and
what is left of the model is a handful of rows G delta <= h: the ends of the linear pieces, and the
margin. The shortest perturbation that satisfies them inside the box has the dual

    max over lambda >= 0 of   sum_i w_i^2 delta_i^2 / 2 + <lambda, G delta - h>,
    delta = clip(-G^T lambda / w^2),

a concave, piecewise linear-quadratic function, on which Newton's method ends at the solution
itself. The multipliers of the model's own rows follow from lambda by one linear system, so what is
found is proved like every other bound.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

from calipers.certificates.exact.model import Ends, Floats, MIPModel

_STEPS, _HALVINGS = 80, 25
# share of a row's scale by which it may be violated; and where no step improves the dual value
_SETTLED, _NEARLY = 1e-10, 1e-7
_FAR = 4.0  # times the radius squared: points that are farther are of no use


class ShortestPerturbation(NamedTuple):
    """The shortest perturbation, and multipliers that prove its length.

    `columns` are the columns there. The multipliers are those of the model's rows for half of the
    squared length, and `price` is the multiplier of the goal in it.
    """

    delta: Floats
    columns: Floats
    multipliers: Floats
    price: float


class LinearPiece:
    """A model with all choices made, as rows over the perturbation alone."""

    def __init__(self, model: MIPModel, ends: Ends, chosen: list[int]) -> None:
        self.model, self.ends = model, ends
        defined = model.defined.copy()
        for choice, row in zip(model.choices, chosen, strict=True):
            defined[choice.value] = row
        # columns that are affine functions; the column of a case of several margins is not
        self.own = np.flatnonzero(defined >= 0)
        self.rows = defined[self.own]
        self.solver = splu(sparse.csc_matrix(model.columns[self.rows][:, self.own]))
        middle = (ends.low_row[self.rows] + ends.high_row[self.rows]) / 2
        self.slope = self.solver.solve(-model.inputs[self.rows].toarray())
        self.at = self.solver.solve(middle)
        self.place = {int(c): i for i, c in enumerate(self.own)}

    def nearest(
        self, goal: int, square: Floats, low: Floats, high: Floats, radius: float
    ) -> ShortestPerturbation | None:
        """Return the nearest perturbation with a goal of at most 0.

        None if the search did not converge. Where there is no such perturbation within a few radii,
        the multipliers prove either how far the linear region itself is, whatever the goal (`price`
        0), or a distance larger than the length of `delta`.
        """
        members = [goal] if goal in self.place else self._members(goal)
        limits = [(1.0, column, -1, 0.0) for column in members] + self._limits()
        matrix = np.stack([sign * self._affine(column, row)[0] for sign, column, row, _ in limits])
        ends = np.array(
            [sign * (end - self._affine(column, row)[1]) for sign, column, row, end in limits]
        )
        size = np.abs(matrix).max(1)
        scale = np.where(size > 0, size, 1.0)
        found = projected(
            matrix / scale[:, None], ends / scale, square, low, high, _FAR * radius**2
        )
        if found is None:
            return None
        delta, weights = found
        weights = weights / scale
        price = float(weights[: len(members)].sum())
        columns = np.zeros(self.model.columns.shape[1])
        columns[self.own] = self.slope @ delta + self.at
        columns[goal] = columns[members].max()
        return ShortestPerturbation(
            delta, columns, self._multipliers(goal, members, limits, weights, price), price
        )

    def _members(self, goal: int) -> list[int]:
        """Return the columns of the margins above which a case's column lies."""
        rows = self.model.columns[:, [goal]].nonzero()[0]
        return [int(c) for c in np.unique(self.model.columns[rows].nonzero()[1]) if c != goal]

    def _affine(self, column: int, row: int) -> tuple[Floats, float]:
        """Return slope and constant of a column, or of a row."""
        if row < 0:
            return self.slope[self.place[column]], float(self.at[self.place[column]])
        weights = self.model.columns[[row]][:, self.own].toarray()[0]
        return self.model.inputs[[row]].toarray()[0] + weights @ self.slope, float(
            weights @ self.at
        )

    def _limits(self) -> list[tuple[float, int, int, float]]:
        """Return the ends of the linear region.

        Each is (sign, column or -1, row or -1, end) for sign * value <= sign * end. A function's
        relaxation lines, and the ends that a column has over the whole region, hold by themselves
        and are left out.
        """
        model, ends, found = self.model, self.ends, list[tuple[float, int, int, float]]()
        for column in self.own.tolist():
            found += (
                [(-1.0, column, -1, ends.low[column])]
                if ends.low[column] > model.low[column]
                else []
            )
            found += (
                [(1.0, column, -1, ends.high[column])]
                if ends.high[column] < model.high[column]
                else []
            )
        windows = [
            r
            for choice in model.choices
            if len(choice.members) > 1
            for r in range(choice.first, choice.last)
        ]
        for row in sorted(
            {*windows, *range(model.own_rows, len(ends.low_row))} - set(self.rows.tolist())
        ):
            found += [(-1.0, -1, row, ends.low_row[row])] if np.isfinite(ends.low_row[row]) else []
            found += [(1.0, -1, row, ends.high_row[row])] if np.isfinite(ends.high_row[row]) else []
        return found

    def _multipliers(
        self,
        goal: int,
        members: list[int],
        limits: list[tuple[float, int, int, float]],
        weights: Floats,
        price: float,
    ) -> Floats:
        """Return the multipliers y of the model's rows.

        They make  price * goal - y rows - left v  free of columns, where `left` is on the columns
        that end: see `bound_of`.
        """
        y, left = np.zeros(len(self.ends.low_row)), np.zeros(self.model.columns.shape[1])
        left[goal] = price
        for (sign, column, row, _), weight in zip(
            limits[len(members) :], weights[len(members) :], strict=True
        ):
            if row < 0:
                left[column] += sign * weight
            else:
                y[row] -= sign * weight
        if goal not in self.place:
            for row in self.model.columns[:, [goal]].nonzero()[0]:
                (member,) = (c for c in self.model.columns[[row]].nonzero()[1] if c != goal)
                y[row] += weights[members.index(int(member))]
        left -= self.model.columns.T @ y
        y[self.rows] += self.solver.solve(left[self.own], trans="T")
        return y


def projected(
    matrix: Floats, ends: Floats, square: Floats, low: Floats, high: Floats, far: float
) -> tuple[Floats, Floats] | None:
    """Return the smallest perturbation that satisfies rows and box.

    It minimises sum square_i delta_i^2 subject to matrix @ delta <= ends; the rows' multipliers are
    returned too. None if it did not converge. It ends early with a dual value above `far` / 2,
    which shows that no solution is nearer than that. Cost for matrix (m, d): a product (m, d) (d,
    m) a step, seldom more than twenty steps.
    """
    weights, scale = np.zeros(len(ends)), 1 + np.abs(ends)

    def at(w: Floats) -> tuple[Floats, Floats, float]:
        found = np.clip(-(w @ matrix) / square, low, high)
        broken = matrix @ found - ends
        return found, broken, float((square * found**2).sum() / 2 + w @ broken)

    delta, broken, value = at(weights)
    for _ in range(_STEPS):
        if (
            bool((np.where(weights > 0, np.abs(broken), broken) <= _SETTLED * scale).all())
            or value > far / 2
        ):
            return delta, weights
        moves = np.flatnonzero((weights > 0) | (broken > 0))
        part = matrix[moves]
        curve = (part * (((delta > low) & (delta < high)) / square)) @ part.T
        steps = (
            np.linalg.solve(
                curve + 1e-13 * (np.trace(curve) + 1e-300) * np.eye(len(moves)), broken[moves]
            ),
            broken[moves] / max(np.trace(curve), 1e-12),
        )
        for step in steps:
            share, better = 1.0, False
            for _ in range(_HALVINGS):
                tried = weights.copy()
                tried[moves] = np.maximum(tried[moves] + share * step, 0.0)
                new, still, higher = at(tried)
                if better := higher > value:
                    break
                share /= 2
            if better:
                break
        if not better:
            return (delta, weights) if bool((broken <= _NEARLY * scale).all()) else None
        weights, delta, broken, value = tried, new, still, higher
    return None
