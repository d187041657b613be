"""Queries in exact numbers whether an input box has unsafe outputs.

A query (of a VNN-LIB file, say) becomes a problem for attacks and certifiers. A model reads
decimals as its own floats, so a written input is unsafe iff the floats that it is read as are. The
box that both search is the exact one and its ends as they are read, rounded outward: a certificate
covers both, and every float inside can be written as a decimal inside the exact box.
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
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.specification import Specification
from calipers.threats.ball import Ball
from calipers.threats.boxes import Boxes

_DIGITS = 60
_LARGEST_WEIGHT = 1e12  # the weight of a side that is constant but for rounding


@dataclass(frozen=True)
class Inequality:
    """A linear inequality of outputs with rational coefficients.

    sum of c * output_j over `terms` (j, c), plus `constant`, is <= 0, or < 0 if `strict`. Bounds
    treat strict inequalities as the others: what is proved safe then is safe in either reading.
    """

    terms: tuple[tuple[int, Fraction], ...]
    constant: Fraction
    strict: bool = False

    def holds(self, outputs: Sequence[Fraction]) -> bool:
        """Return whether it holds, exactly."""
        total = sum((c * outputs[j] for j, c in self.terms), self.constant)
        return total < 0 if self.strict else total <= 0

    def floats(self) -> tuple[dict[int, float], float]:
        """Return float64 coefficients, and the constant rounded down.

        The coefficients are exact up to a positive common factor. Raises `BadInput` where they are
        not representable.
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
    """An input box, and the unsafe outputs.

    The query asks whether some output is unsafe for an input with `low <= x <= high`, numbered as
    in the flattened input. An output is unsafe if all inequalities of one of the `cases` hold.

    `left_out`: ends (input, upper) that are not in the box themselves; bounds use the closed box.
    `echoed`: the last outputs are these inputs, for inequalities that relate inputs to each other
    or to outputs.
    """

    low: tuple[Fraction, ...]
    high: tuple[Fraction, ...]
    outputs: int
    cases: tuple[tuple[Inequality, ...], ...]
    left_out: frozenset[tuple[int, bool]] = frozenset()
    echoed: tuple[int, ...] = ()

    def posed(self, classifier: Classifier, shape: tuple[int, ...]) -> Problem:
        """Return the problem of one point, the middle of the box.

        Its ball contains the whole box; a single output is the second of two logits.
        """
        low, high, x = self.middle(classifier.dtype, shape)
        radius, weights = _reach(low, high, x.double())
        ball = Ball("linf", radius, (low, high), weights=weights)
        return Problem.pose(
            classifier, x[None], torch.zeros(1, dtype=torch.long), ball, self.goal()
        )

    def middle(self, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the float64 box, and a point in its middle of a given dtype."""
        low, high = (
            torch.tensor(end, dtype=torch.float64).reshape(shape) for end in self.box(dtype)
        )
        inner = [_inward(low, dtype, torch.inf), _inward(high, dtype, -torch.inf)]
        return low, high, ((low + high) / 2).to(dtype).clamp(*inner)

    def box(self, dtype: torch.dtype) -> tuple[list[float], list[float]]:
        """Return the float64 box that contains every input.

        Inputs may be exact or as a model of this dtype reads them; no side has width 0.
        """
        down = [math.nextafter(min(below(q), read(q, dtype)), -math.inf) for q in self.low]
        up = [math.nextafter(max(-below(-q), read(q, dtype)), math.inf) for q in self.high]
        if not all(map(math.isfinite, down + up)):
            raise BadInput("a bound of an input is larger than the largest float")
        return down, up

    def goal(self) -> Specification:
        """Return the specification, in floats that exclude no unsafe output."""
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
        """Return the same box with each case by itself; none for a single case."""
        return (
            tuple(dataclasses.replace(self, cases=(case,)) for case in self.cases)
            if len(self.cases) > 1
            else ()
        )

    def unsafe(self, outputs: Tensor, inputs: Sequence[str] | None = None) -> bool:
        """Return whether these outputs are unsafe, exactly.

        Outputs that are not finite are not. With the inputs as they are written, echoed outputs are
        these decimals, and not what a model computed from them.
        """
        values = outputs.detach().double().reshape(-1)[-self.outputs :].tolist()
        if not all(map(math.isfinite, values)):
            return False
        exact = [Fraction(v) for v in values]
        if inputs is not None and self.echoed:
            exact[-len(self.echoed) :] = [Fraction(inputs[i]) for i in self.echoed]
        return any(all(inequality.holds(exact) for inequality in case) for case in self.cases)

    def written(self, point: Tensor) -> tuple[str, ...] | None:
        """Return decimals inside the exact box that are read as this point.

        None where there are none.
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
    """Return problems that contain the boxes of many queries.

    Each query is a point of a problem; its place among the queries is returned too. Queries whose
    specifications are the same up to constants make one problem.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, Specification]]] = {}
    for place, query in enumerate(queries):
        goal = query.goal()
        alike = (tuple(goal.matrix.flatten().tolist()), tuple(goal.case_of.tolist()))
        groups.setdefault(alike, []).append((place, goal))
    found = []
    for members in groups.values():
        places, first = [place for place, _ in members], members[0][1]
        boxes = [queries[place].middle(classifier.dtype, shape) for place in places]
        low, high, x = (
            torch.stack(part).to(classifier.device) for part in zip(*boxes, strict=True)
        )
        shifts = torch.stack([goal.offset for _, goal in members])
        goal = Specification(first.matrix, shifts, first.case_of)
        labels = torch.zeros(len(x), dtype=torch.long)
        problem = Problem.pose(classifier, x, labels, Boxes.around(x, low, high), goal)
        found.append((places, problem))
    return found


def below(q: Fraction) -> float:
    """Return the largest float64 that is not above a rational number."""
    try:
        f = float(q)
    except OverflowError:
        return math.inf if q > 0 else -math.inf
    return f if math.isfinite(f) and Fraction(f) <= q else math.nextafter(f, -math.inf)


def read(q: Fraction | str, dtype: torch.dtype) -> float:
    """Return what a model of this dtype reads for a number.

    The number is exact or written; it is read as the nearest float64, then the nearest float of the
    dtype.
    """
    try:
        f = float(q)
    except OverflowError:
        return math.inf
    with np.errstate(over="ignore"):
        return float(np.float32(f)) if dtype == torch.float32 else f


def _is_float(q: Fraction) -> bool:
    """Return whether a rational number is a float64."""
    try:
        return Fraction(float(q)) == q
    except OverflowError:
        return False


def _inward(end: Tensor, dtype: torch.dtype, direction: float) -> Tensor:
    """Return the nearest float of a dtype that is not outside an end."""
    near = end.to(dtype)
    outside = near.double() < end if direction > 0 else near.double() > end
    return torch.where(outside, torch.nextafter(near, torch.full_like(near, direction)), near)


def _reach(low: Tensor, high: Tensor, x: Tensor) -> tuple[float, Tensor | None]:
    """Return a radius, and weights that scale a step to each side.

    With the weights, a step is the same fraction of every side. The ball must contain the box, and
    its radius must not exceed the diameter of the box. A side that spans only a few floats has no
    middle among them, and the point lies at its end; where that is so for all sides the radius is
    the longest reach, for all features.
    """
    side, reach = high - low, torch.maximum(high - x, x - low)
    # a fraction of a subnormal side cannot be represented
    longest, ends = side.max(), (reach > 0.7 * side) | (side < torch.finfo(side.dtype).tiny)
    if bool(ends.all()):
        return float(longest), None
    weights = torch.where(ends, 0.5, 1.0) * (longest / side).clamp(max=_LARGEST_WEIGHT)
    longest = side[~ends].max()
    return float(0.75 * longest), weights * (longest / side.max())


def _decimal(value: float, low: Fraction, high: Fraction, dtype: torch.dtype) -> str | None:
    """Return a decimal between exact ends that is read as a value, or None."""
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
    """Return a rational as a decimal, exact where few digits are enough."""
    return str(
        Context(prec=_DIGITS, rounding=rounding).divide(
            Decimal(q.numerator), Decimal(q.denominator)
        )
    )
