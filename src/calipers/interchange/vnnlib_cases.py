"""The cases of a VNN-LIB property, grouped by the boxes of their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

from calipers.errors import BadInput
from calipers.problem.io_property import Inequality, Query

Term = dict[str, Fraction]
"""A linear term: coefficients by name, its constant under ""."""


class Atom(NamedTuple):
    """The statement that a linear term is <= 0, or < 0 where `strict`."""

    term: Term
    strict: bool = False


class InputBound(NamedTuple):
    """A bound on one input: at most (`upper`) or at least a number.

    The number itself is excluded where `strict`.
    """

    input: int
    upper: bool
    end: Fraction
    strict: bool = False


Formula = tuple[tuple[Atom | InputBound, ...], ...]
"""A disjunction of conjunctions."""


@dataclass(frozen=True)
class Property:
    """What a VNN-LIB file asks, with a query for each box of inputs.

    Args:
        inputs: Number of inputs.
        outputs: Number of outputs.
        queries: One for each box; if there are none, nothing is unsafe.
        notes: Why cases were dropped.
        echoed: Inputs that are compared with others or with outputs. The queries take them as
            further outputs, after the file's own.
    """

    inputs: int
    outputs: int
    queries: tuple[Query, ...]
    notes: tuple[str, ...] = ()
    echoed: tuple[int, ...] = ()


def atom(term: Term, strict: bool) -> Atom | InputBound:
    """Return a term <= 0 (or < 0), as a bound where only one input is in it."""
    names = [name for name in term if name]
    if len(names) != 1 or names[0][0] != "X":
        return Atom(term, strict)
    factor, constant = term[names[0]], term.get("", Fraction(0))
    return InputBound(int(names[0][2:]), factor > 0, -constant / factor, strict)


def negated(one: Atom | InputBound) -> Atom | InputBound:
    """Return the negation of an atom."""
    if isinstance(one, InputBound):
        return InputBound(one.input, not one.upper, one.end, not one.strict)
    return Atom({name: -c for name, c in one.term.items()}, not one.strict)


def sort(
    inputs: int, outputs: int, name: str, common: tuple[Atom | InputBound, ...], cases: Formula
) -> Property:
    """Return the property of these cases, and of what all of them share.

    Raises `BadInput` where an input has no bounds.
    """
    tied = {
        int(n[2:])
        for case in (common, *cases)
        for one in case
        if isinstance(one, Atom)
        for n in one.term
        if n[:1] == "X"
    }
    return _Sorter(inputs, outputs, name, common, tuple(sorted(tied))).sorted(cases)


Box = tuple[tuple[Fraction, ...], tuple[Fraction, ...], frozenset[tuple[int, bool]]]
"""The bounds of all inputs, lower and upper, and which of them are excluded: (input, upper)."""


class _Ends(NamedTuple):
    """The tightest bounds found for each input, and which are strict."""

    low: dict[int, Fraction]
    high: dict[int, Fraction]
    open: set[tuple[int, bool]]

    def narrowed(self, bounds: Sequence[InputBound]) -> _Ends:
        """Return the bounds tightened by some more."""
        low, high, strict = dict(self.low), dict(self.high), set(self.open)
        for i, upper, end, without in bounds:
            side = high if upper else low
            old = side.get(i)
            if old is None or (end < old if upper else end > old):
                side[i] = end
                strict.discard((i, upper))
            elif end != old:
                continue
            if without:
                strict.add((i, upper))
        return _Ends(low, high, strict)


@dataclass
class _Sorter:
    """Groups cases by their boxes.

    What is `common` to all of them is handled once: properties have thousands of such bounds, and
    hundreds of cases.
    """

    inputs: int
    outputs: int
    name: str
    common: tuple[Atom | InputBound, ...]
    echoed: tuple[int, ...]
    notes: list[str] = field(default_factory=list)
    made: dict[int, Inequality] = field(default_factory=dict)
    known: dict[Inequality, Inequality] = field(default_factory=dict)

    def sorted(self, cases: Formula) -> Property:
        """Return the property that these cases make."""
        boxes: dict[Any, tuple[Box, list[tuple[Inequality, ...]]]] = {}
        bounds, atoms = _told_apart(self.common)
        ends = _Ends({}, {}, set()).narrowed(bounds)
        rows, hopeless = self.rows(atoms), any(map(_impossible, atoms))
        usual: tuple[Box | None, list[tuple[Inequality, ...]]] | None = (
            None  # for cases without bounds of their own
        )
        for place, case in enumerate(cases):
            own, atoms = _told_apart(case)
            if hopeless or any(map(_impossible, atoms)):
                self.notes.append(f"case {place} asks for the impossible")
                continue
            if own or usual is None:
                key = self.box(ends.narrowed(own) if own else ends, place)
                held = [] if key is None else boxes.setdefault(_hashable(key), (key, []))[1]
                usual = usual if own else (key, held)
            else:
                key, held = usual
                if key is None:
                    self.notes.append(f"case {place} leaves no input either")
            held.append(tuple({id(row): row for row in (*rows, *self.rows(atoms))}.values()))
        queries = tuple(
            Query(
                low,
                high,
                self.outputs + len(self.echoed),
                tuple({tuple(map(id, case)): case for case in held}.values()),
                left_out,
                self.echoed,
            )
            for (low, high, left_out), held in boxes.values()
        )
        return Property(self.inputs, self.outputs, queries, tuple(self.notes), self.echoed)

    def box(self, ends: _Ends, place: int) -> Box | None:
        """Return a case's box; None, and a note, where it is empty."""
        low, high, strict = ends
        for i in range(self.inputs) if min(len(low), len(high)) < self.inputs else ():
            if i not in low or i not in high:
                side = "lower" if i not in low else "upper"
                raise BadInput(
                    f"{self.name} gives X_{i} no {side} bound: every input needs both, in every "
                    "case"
                )
        empty = next((i for i in range(self.inputs) if low[i] > high[i]), None)
        if empty is None:
            empty = next((i for i, _ in strict if low[i] == high[i]), None)
        if empty is not None:
            self.notes.append(f"case {place} leaves no input: X_{empty} has no value")
            return None
        return (
            tuple(low[i] for i in range(self.inputs)),
            tuple(high[i] for i in range(self.inputs)),
            frozenset(strict),
        )

    def rows(self, atoms: Sequence[Atom]) -> list[Inequality]:
        """Return what atoms require of the outputs.

        Equal rows are one object, since cases that multiply out hold the same few again and again.
        """
        found = []
        for one in atoms:
            if not any(one.term):
                continue
            if id(one) not in self.made:
                row = self.inequality(one)
                self.made[id(one)] = self.known.setdefault(row, row)
            found.append(self.made[id(one)])
        return found

    def inequality(self, one: Atom) -> Inequality:
        """Return an atom as a row over the outputs, followed by echoed inputs."""
        places = {f"X_{i}": self.outputs + k for k, i in enumerate(self.echoed)}
        terms = sorted((places.get(n) or int(n[2:]), c) for n, c in one.term.items() if n)
        return Inequality(tuple(terms), one.term.get("", Fraction(0)), one.strict)


def _hashable(box: Box) -> object:
    """Return the same box in a form that is hashed quickly."""
    return tuple(q.as_integer_ratio() for end in box[:2] for q in end), box[2]


def _told_apart(case: Sequence[Atom | InputBound]) -> tuple[list[InputBound], list[Atom]]:
    """Return the bounds of inputs, and everything else."""
    bounds: list[InputBound] = []
    atoms: list[Atom] = []
    for one in case:
        if isinstance(one, InputBound):
            bounds.append(one)
        else:
            atoms.append(one)
    return bounds, atoms


def _impossible(one: Atom) -> bool:
    """Return whether an atom without variables is false."""
    if any(one.term):
        return False
    constant = one.term.get("", 0)
    return constant >= 0 if one.strict else constant > 0
