"""Is there an input in this box whose output is unsafe? The question in exact numbers, and as a
problem for the two jaws.

A model reads decimals as its own floats, so a written input is unsafe iff the floats it is read as
are. The box that both jaws search is the exact one and its ends as they are read, rounded outward:
a certificate covers both, and every float inside can be written as a decimal inside the exact box.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.ball import Ball
from calipers.problem.boxes import Boxes
from calipers.problem.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.specification import Specification

_DIGITS = 60
_LARGEST_WEIGHT = 1e12  # of a side that is fixed but for rounding


@dataclass(frozen=True)
class Inequality:
    """sum of c * output_j over `terms` (j, c), plus `constant`, is <= 0, or < 0 if `strict`.

    Bounds take strict ones for the others: what is proved safe then is safe in either reading.
    """

    terms: tuple[tuple[int, Fraction], ...]
    constant: Fraction
    strict: bool = False

    def holds(self, outputs: Sequence[Fraction]) -> bool:
        """Does it hold, exactly?"""
        total = sum((c * outputs[j] for j, c in self.terms), self.constant)
        return total < 0 if self.strict else total <= 0

    def floats(self) -> tuple[dict[int, float], float]:
        """Return float64 coefficients, exact up to a positive common factor, and the constant
        rounded down.
        """
        factor = Fraction(1)
        if any(not _is_float(c) for _, c in self.terms):
            factor = Fraction(
                math.lcm(*(c.denominator for _, c in self.terms)),
                math.gcd(*(c.numerator for _, c in self.terms)) or 1,
            )
        scaled = {j: c * factor for j, c in self.terms}
        if any(not _is_float(c) for c in scaled.values()):
            raise BadInput(
                f"the coefficients {', '.join(str(below(c)) for _, c in self.terms)} have too many "
                "digits to be held exactly: write fewer"
            )
        return {j: float(c) for j, c in scaled.items()}, below(self.constant * factor)


@dataclass(frozen=True)
class Query:
    """Is some output unsafe for an input with `low <= x <= high`, numbered as in the flattened
    input? Unsafe: all inequalities of one of the `cases` hold.

    `left_out`: ends (input, upper) that are not in the box themselves; bounds look at the closed
    one. `echoed`: the last outputs are these inputs, for inequalities that tie inputs to each other
    or to outputs.
    """

    low: tuple[Fraction, ...]
    high: tuple[Fraction, ...]
    outputs: int
    cases: tuple[tuple[Inequality, ...], ...]
    left_out: frozenset[tuple[int, bool]] = frozenset()
    echoed: tuple[int, ...] = ()

    def posed(self, classifier: Classifier, shape: tuple[int, ...]) -> Problem:
        """Return the problem of one point, the middle of the box, in a ball that holds the box
        whole; a single output is the second of two logits.
        """
        low, high, x = self.middle(classifier.dtype, shape)
        radius, weights = _reach(low, high, x.double())
        ball = Ball("linf", radius, (low, high), weights=weights)
        return Problem.pose(
            classifier, x[None], torch.zeros(1, dtype=torch.long), ball, self.goal()
        )

    def middle(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the float64 box, and a point of a model of this dtype in its middle."""
        low, high = (
            torch.tensor(end, dtype=torch.float64).reshape(shape) for end in self.box(dtype)
        )
        inner = [_inward(low, dtype, torch.inf), _inward(high, dtype, -torch.inf)]
        return low, high, ((low + high) / 2).to(dtype).clamp(*inner)

    def box(self, dtype: torch.dtype) -> tuple[list[float], list[float]]:
        """Return the float64 box that holds every input, exact or as a model of this dtype reads
        it; never of width 0.
        """
        down = [math.nextafter(min(below(q), read(q, dtype)), -math.inf) for q in self.low]
        up = [math.nextafter(max(-below(-q), read(q, dtype)), math.inf) for q in self.high]
        if not all(map(math.isfinite, down + up)):
            raise BadInput("a bound of an input is larger than the largest float")
        return down, up

    def goal(self) -> Specification:
        """Return what decides, in floats that say no less."""
        width, first = max(2, self.outputs), int(self.outputs == 1)
        rows, shifts, belongs, none = [], [], [], Inequality((), Fraction(0))
        known = {id(one): one for case in self.cases for one in (*case, none)}
        floats = {place: one.floats() for place, one in known.items()}
        for number, case in enumerate(self.cases):
            for inequality in case or (none,):
                terms, constant = floats[id(inequality)]
                rows.append([terms.get(j - first, 0.0) for j in range(width)])
                shifts.append(constant)
                belongs.append(number)
        return Specification(
            torch.tensor(rows, dtype=torch.float64),
            torch.tensor(shifts, dtype=torch.float64),
            torch.tensor(belongs),
        )

    def alone(self) -> tuple[Query, ...]:
        """Return the same box with each case by itself, none where there is one only."""
        return (
            tuple(dataclasses.replace(self, cases=(case,)) for case in self.cases)
            if len(self.cases) > 1
            else ()
        )

    def unsafe(self, outputs: Tensor, inputs: Sequence[str] | None = None) -> bool:
        """Are these outputs unsafe? Exactly; anything that is not finite is not. With the inputs
        as they are written, echoed ones are these decimals, not what a model made of them.
        """
        values = outputs.detach().double().reshape(-1)[-self.outputs :].tolist()
        if not all(map(math.isfinite, values)):
            return False
        exact = [Fraction(v) for v in values]
        if inputs is not None and self.echoed:
            exact[-len(self.echoed) :] = [Fraction(inputs[i]) for i in self.echoed]
        return any(all(inequality.holds(exact) for inequality in case) for case in self.cases)

    def written(self, point: Tensor) -> tuple[str, ...] | None:
        """Return decimals inside the exact box that the model reads as this point, or None where
        there are none.
        """
        values = point.detach().cpu().reshape(-1)
        texts = [
            _decimal(v, low, high, values.dtype)
            for v, low, high in zip(values.double().tolist(), self.low, self.high, strict=True)
        ]
        if None in texts or any(
            Fraction(texts[i] or 0) == (self.high if upper else self.low)[i]
            for i, upper in self.left_out
        ):
            return None
        return tuple(t for t in texts if t is not None)


def posed_together(
    queries: Sequence[Query], classifier: Classifier, shape: tuple[int, ...]
) -> list[tuple[list[int], Problem]]:
    """Return problems that hold the boxes of many queries, a point for each, and the places of
    these queries: those that weigh the outputs alike, up to constants, make one problem.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, Specification]]] = {}
    for place, query in enumerate(queries):
        goal = query.goal()
        alike = (tuple(goal.matrix.flatten().tolist()), tuple(goal.belongs.tolist()))
        groups.setdefault(alike, []).append((place, goal))
    found = []
    for members in groups.values():
        places, first = [place for place, _ in members], members[0][1]
        boxes = [queries[place].middle(classifier.dtype, shape) for place in places]
        low, high, x = (
            torch.stack(part).to(classifier.device) for part in zip(*boxes, strict=True)
        )
        shifts = torch.stack([goal.shifts for _, goal in members])
        goal = Specification(first.matrix, shifts, first.belongs)
        labels = torch.zeros(len(x), dtype=torch.long)
        problem = Problem.pose(classifier, x, labels, Boxes.around(x, low, high), goal)
        found.append((places, problem))
    return found


def below(q: Fraction) -> float:
    """Return the largest float64 that is not above."""
    try:
        f = float(q)
    except OverflowError:
        return math.inf if q > 0 else -math.inf
    return f if math.isfinite(f) and Fraction(f) <= q else math.nextafter(f, -math.inf)


def read(q: Fraction | str, dtype: torch.dtype) -> float:
    """Return what a model of this dtype makes of an exact number or a written one: the nearest
    float64, then the nearest of its own.
    """
    try:
        f = float(q)
    except OverflowError:
        return math.inf
    with np.errstate(over="ignore"):
        return float(np.float32(f)) if dtype == torch.float32 else f


def _is_float(q: Fraction) -> bool:
    try:
        return Fraction(float(q)) == q
    except OverflowError:
        return False


def _inward(end: Tensor, dtype: torch.dtype, direction: float) -> Tensor:
    """Return the nearest float of a dtype that is not outside."""
    near = end.to(dtype)
    outside = near.double() < end if direction > 0 else near.double() > end
    return torch.where(outside, torch.nextafter(near, torch.full_like(near, direction)), near)


def _reach(low: Tensor, high: Tensor, x: Tensor) -> tuple[float, Tensor | None]:
    """Return a radius, and weights by which a step is as long a share of every side; the ball must
    hold the box, and be no wider than it.

    A side of a few floats has no middle among them, and the point lies at its end; where all sides
    are so the radius is the longest, for all features.
    """
    side, reach = high - low, torch.maximum(high - x, x - low)
    # no share of a subnormal side can be held
    longest, ends = side.max(), (reach > 0.7 * side) | (side < torch.finfo(side.dtype).tiny)
    if bool(ends.all()):
        return float(longest), None
    weights = torch.where(ends, 0.5, 1.0) * (longest / side).clamp(max=_LARGEST_WEIGHT)
    longest = side[~ends].max()
    return float(0.75 * longest), weights * (longest / side.max())


def _decimal(value: float, low: Fraction, high: Fraction, dtype: torch.dtype) -> str | None:
    shortest = str(np.float32(value)) if dtype == torch.float32 else repr(value)
    candidates = (
        shortest,
        format(Decimal(value), "f"),
        _rounded(low, ROUND_CEILING),
        _rounded(high, ROUND_FLOOR),
    )
    return next(
        (
            text
            for text in candidates
            if low <= Fraction(text) <= high and read(text, dtype) == value
        ),
        None,
    )


def _rounded(q: Fraction, rounding: str) -> str:
    """Return a decimal, exact where few digits are enough."""
    return str(
        Context(prec=_DIGITS, rounding=rounding).divide(
            Decimal(q.numerator), Decimal(q.denominator)
        )
    )
