"""What does a VNN-LIB file ask? Its assertions describe the unsafe inputs and outputs; they come
out as boxes with cases, in exact arithmetic.

Version 1 of the format: `declare-const` of X_i and Y_j, `assert` with and, or, <=, >=, = of linear
terms. Every expression is worked out when its bracket closes, so depth costs nothing. A formula is
a disjunction of conjunctions of atoms, an atom a linear term that is <= 0.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from calipers.errors import BadInput
from calipers.interchange.files import content, existing
from calipers.problem.query import Inequality, Query

_TOKEN = re.compile(r";[^\n]*|\|[^|]*\||\"[^\"]*\"|[()]|[^\s();|\"]+|\S")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_NAME = re.compile(r"([XY])_(0|[1-9]\d{0,8})")
_IGNORED = {"set-logic", "set-info", "set-option", "check-sat", "get-model", "exit"}
_MOST_DIGITS = 1000
_MOST_BITS = 2 * int(_MOST_DIGITS * 3.33)
_MOST_CASES = 100_000
_MOST_ATOMS = 10_000_000  # of all cases together

Atom = dict[str, Fraction]
"""A linear term, coefficients by name, its constant under "": as an atom of a formula, it is <=
0.
"""

Formula = tuple[tuple[Atom, ...], ...]
"""One of these conjunctions holds."""

Word = str | Atom | Formula
"""What an expression can be while it is read: a word of the language, a term, or a formula."""


@dataclass(frozen=True)
class Property:
    """What a file asks: numbers of inputs and outputs, and a query for each box. No query: nothing
    is unsafe; `notes` say why cases were dropped.
    """

    inputs: int
    outputs: int
    queries: tuple[Query, ...]
    notes: tuple[str, ...] = ()


def load_vnnlib(source: str | Path) -> Property:
    """Return what a .vnnlib or .vnnlib.gz file asks; raises `BadInput` with file and line for
    anything that is not read in full.
    """
    path = existing(source, "a property")
    try:
        text = content(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path.name} is not text ({error.reason} at byte {error.start}): give a .vnnlib or "
            ".vnnlib.gz file"
        ) from error
    return parse_vnnlib(text, path.name)


def parse_vnnlib(text: str, name: str = "the property") -> Property:
    """Return what the text asks."""
    reader = _Reader(name)
    for line, token in _tokens(text):
        reader.take(token, line)
    return reader.finish()


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    line, place = 1, 0
    for found in _TOKEN.finditer(text):
        line, place = line + text.count("\n", place, found.start()), found.start()
        if not found[0].startswith(";"):
            yield line, found[0]


@dataclass
class _Reader:
    """Holds the open brackets, what is declared, and what is asserted."""

    name: str
    line: int = 1
    stack: list[list[Word]] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)
    declared: set[str] = field(default_factory=set)
    asserted: list[Formula] = field(default_factory=list)
    atoms: int = 0

    def fail(self, why: str) -> BadInput:
        return BadInput(f"{self.name}, line {self.line}: {why}")

    def take(self, token: str, line: int) -> None:
        """Read one token."""
        self.line = line
        if token == "(":
            self.stack.append([])
            self.opened.append(line)
        elif token == ")":
            if not self.stack:
                raise self.fail("a bracket is closed that was never opened")
            self.opened.pop()
            self.close(self.stack.pop())
        elif not self.stack:
            raise self.fail(
                f"{token[:40]!r} stands outside of all brackets; is this a VNN-LIB file?"
            )
        else:
            self.stack[-1].append(token)

    def close(self, words: list[Word]) -> None:
        if self.stack:
            self.stack[-1].append(self.expression(words))
        else:
            self.command(words)

    def command(self, words: list[Word]) -> None:
        head = words[0] if words and isinstance(words[0], str) else "(...)"
        if head in ("declare-const", "declare-fun"):
            self.declare(words)
        elif head == "assert":
            if len(words) != 2:
                raise self.fail(f"assert takes one formula, got {len(words) - 1}")
            self.asserted.append(self.formula(words[1]))
        elif head in ("vnnlib-version", "declare-network"):
            raise self.fail(
                "this is VNN-LIB 2, which is not read: write the property in version 1 "
                "(declare-const X_0 Real, assert ...)"
            )
        elif head not in _IGNORED:
            raise self.fail(
                f"the command {head[:40]!r} is not part of VNN-LIB 1 (declare-const, assert)"
            )

    def declare(self, words: list[Word]) -> None:
        plain = [word for word in words[1:] if word != ()]
        if len(plain) != 2 or not isinstance(plain[0], str) or plain[1] != "Real":
            raise self.fail("a declaration reads (declare-const X_0 Real)")
        if not _NAME.fullmatch(plain[0]):
            raise self.fail(
                f"{plain[0][:40]!r} is neither an input X_0, X_1, ... nor an output Y_0, Y_1, ..."
            )
        if plain[0] in self.declared:
            raise self.fail(f"{plain[0]} is declared twice")
        self.declared.add(plain[0])

    def expression(self, words: list[Word]) -> Word:
        """Return the worth of a bracket inside another one."""
        if not words:
            return ()
        head, rest = words[0], words[1:]
        if not isinstance(head, str):
            raise self.fail("a bracket begins with and, or, <=, >=, =, +, - or *")
        if head in ("and", "or"):
            formulas = [self.formula(word) for word in rest]
            if not formulas:
                raise self.fail(f"({head}) holds nothing")
            return (
                self.conjunction(formulas)
                if head == "and"
                else tuple(itertools.chain.from_iterable(formulas))
            )
        if head in ("<=", ">=", "="):
            return self.comparison(head, [self.term(word) for word in rest])
        if head in ("+", "-", "*", "/"):
            return self.arithmetic(head, [self.term(word) for word in rest])
        raise self.fail(
            f"{head[:40]!r} is not read: only and, or, <=, >=, =, +, -, * and / are (a strict < "
            "has no witness on its border)"
        )

    def conjunction(self, formulas: Sequence[Formula]) -> Formula:
        """Return the disjunction of all choices of one conjunction from each formula."""
        plain = tuple(itertools.chain.from_iterable(f[0] for f in formulas if len(f) == 1))
        choices, count = [f for f in formulas if len(f) != 1], 1
        for formula in choices:
            count *= len(formula)
            if count > _MOST_CASES:
                raise self.fail(f"the disjunctions multiply to more than {_MOST_CASES} cases")
        self.atoms += count * (len(plain) + sum(max(map(len, formula)) for formula in choices))
        if self.atoms > _MOST_ATOMS:
            raise self.fail(f"the disjunctions multiply to more than {_MOST_ATOMS} comparisons")
        return tuple(
            plain + tuple(itertools.chain.from_iterable(choice))
            for choice in itertools.product(*choices)
        )

    def comparison(self, sign: str, terms: list[Atom]) -> Formula:
        if len(terms) != 2:
            raise self.fail(f"({sign} ...) compares two terms, got {len(terms)}")
        below = self.combined(terms, (1, -1))
        above = {name: -c for name, c in below.items()}
        return ((below,),) if sign == "<=" else ((above,),) if sign == ">=" else ((below, above),)

    def arithmetic(self, sign: str, terms: list[Atom]) -> Atom:
        if not terms:
            raise self.fail(f"({sign}) adds nothing up")
        if sign in "+-":
            first = -1 if sign == "-" and len(terms) == 1 else 1
            return self.combined(terms, (first, *[1 if sign == "+" else -1] * (len(terms) - 1)))
        total = terms[0]
        for term in terms[1:]:
            fixed = term if set(term) <= {""} else total
            other = total if fixed is term else term
            factor = fixed.get("", Fraction(0))
            if set(fixed) - {""} or (sign == "/" and (fixed is not term or factor == 0)):
                raise self.fail(f"({sign} ...) of two variables, or by zero, is not linear")
            total = {name: c * factor if sign == "*" else c / factor for name, c in other.items()}
            self.check_size(total)
        return total

    def combined(self, terms: Sequence[Atom], signs: Sequence[int]) -> Atom:
        """Return the sum of terms by their signs, without what cancels."""
        total: Atom = {}
        for term, sign in zip(terms, signs, strict=True):
            for name, c in term.items():
                total[name] = total[name] + sign * c if name in total else c if sign == 1 else -c
            self.check_size({name: total[name] for name in term})
        return {name: c for name, c in total.items() if c}

    def check_size(self, term: Atom) -> None:
        """Raise `BadInput` where numbers grow without end."""
        if any(
            max(c.numerator.bit_length(), c.denominator.bit_length()) > _MOST_BITS
            for c in term.values()
        ):
            raise self.fail(f"a number of more than {_MOST_DIGITS} digits")

    def formula(self, word: Word) -> Formula:
        if isinstance(word, tuple) and word:
            return word
        raise self.fail("a formula is expected here: and, or, <=, >= or =")

    def term(self, word: Word) -> Atom:
        if isinstance(word, dict):
            return word
        if not isinstance(word, str):
            raise self.fail("a term is expected here: a number, a variable, or +, -, * of them")
        if _NUMBER.fullmatch(word) and len(word) <= _MOST_DIGITS:
            return {"": Fraction(word)}
        if word in self.declared:
            return {word: Fraction(1)}
        known = (
            "is not declared before it is used"
            if _NAME.fullmatch(word)
            else "is neither a number nor a variable"
        )
        raise self.fail(f"{word[:40]!r} {known}")

    def finish(self) -> Property:
        """Return the property, once the text has ended."""
        if self.stack:
            raise BadInput(
                f"{self.name} ends inside the bracket that was opened in line {self.opened[0]}: is "
                "the file complete?"
            )
        inputs, outputs = (self.count(letter) for letter in "XY")
        if not any(
            name.startswith("Y")
            for f in self.asserted
            for conjunction in f
            for atom in conjunction
            for name in atom
        ):
            raise BadInput(f"{self.name} asserts nothing about the outputs: is the file complete?")
        common = itertools.chain.from_iterable(f[0] for f in self.asserted if len(f) == 1)
        return _Sorter(inputs, outputs, self.name, tuple(common)).sorted(
            self.conjunction([f for f in self.asserted if len(f) != 1])
        )

    def count(self, letter: str) -> int:
        numbers = sorted(int(name[2:]) for name in self.declared if name.startswith(letter))
        what = {"X": "inputs", "Y": "outputs"}[letter]
        if not numbers or numbers != list(range(len(numbers))):
            raise BadInput(
                f"{self.name} declares {len(numbers)} {what}; they are numbered {letter}_0, "
                f"{letter}_1, ... without gaps, and there is at least one"
            )
        return len(numbers)


Ends = tuple[dict[int, Fraction], dict[int, Fraction]]
"""The greatest lower and the least upper bound found of each input."""

Key = tuple[tuple[Fraction, ...], tuple[Fraction, ...]]


@dataclass
class _Sorter:
    """Sorts cases by their boxes. What is `common` to all of them is looked at once: properties
    have thousands of such bounds, and hundreds of cases.
    """

    inputs: int
    outputs: int
    name: str
    common: tuple[Atom, ...]
    notes: list[str] = field(default_factory=list)
    made: dict[int, Inequality] = field(default_factory=dict)
    known: dict[Inequality, Inequality] = field(default_factory=dict)

    def sorted(self, formula: Formula) -> Property:
        """Return the property that these cases make."""
        boxes: dict[Key, list[tuple[Inequality, ...]]] = {}
        ends = self.narrowed(({}, {}), self.common)
        rows, hopeless = self.rows(self.common), any(map(_impossible, self.common))
        usual: tuple[Key | None, list[tuple[Inequality, ...]]] | None = (
            None  # of cases without bounds of their own
        )
        for place, conjunction in enumerate(formula):
            if hopeless or any(map(_impossible, conjunction)):
                self.notes.append(f"case {place} asks for the impossible")
                continue
            own = [atom for atom in conjunction if any(n.startswith("X") for n in atom)]
            if own or usual is None:
                key = self.box(self.narrowed(ends, own) if own else ends, place)
                held = [] if key is None else boxes.setdefault(key, [])
                usual = usual if own else (key, held)
            else:
                key, held = usual
                if key is None:
                    self.notes.append(f"case {place} leaves no input either")
            held.append(tuple({id(row): row for row in (*rows, *self.rows(conjunction))}.values()))
        alone = {
            key: tuple({tuple(map(id, case)): case for case in cases}.values())
            for key, cases in boxes.items()
        }
        queries = tuple(
            Query(low, high, self.outputs, cases) for (low, high), cases in alone.items()
        )
        return Property(self.inputs, self.outputs, queries, tuple(self.notes))

    def narrowed(self, ends: Ends, atoms: Sequence[Atom]) -> Ends:
        """Return the bounds of inputs, with those of some atoms among them."""
        low, high = dict(ends[0]), dict(ends[1])
        for atom in atoms:
            variables = [n for n in atom if n.startswith("X")]
            if not variables:
                continue
            if len(atom) - ("" in atom) > 1:
                tied = " and ".join(sorted(n for n in atom if n)[:3])
                raise BadInput(
                    f"{self.name} ties {tied} together: only bounds of single inputs are read"
                )
            (variable,) = variables
            i, end = int(variable[2:]), -atom.get("", Fraction(0)) / atom[variable]
            if atom[variable] > 0:
                high[i] = end if i not in high else min(high[i], end)
            else:
                low[i] = end if i not in low else max(low[i], end)
        return low, high

    def box(self, ends: Ends, place: int) -> Key | None:
        """Return a case's box; none, and a note, where it is empty."""
        low, high = ends
        for i in range(self.inputs) if min(len(low), len(high)) < self.inputs else ():
            if i not in low or i not in high:
                side = "lower" if i not in low else "upper"
                raise BadInput(
                    f"{self.name} gives X_{i} no {side} bound: every input needs both, in every "
                    "case"
                )
        empty = next((i for i in range(self.inputs) if low[i] > high[i]), None)
        if empty is not None:
            self.notes.append(f"case {place} leaves no input: X_{empty} has no value")
            return None
        return tuple(low[i] for i in range(self.inputs)), tuple(high[i] for i in range(self.inputs))

    def rows(self, atoms: Sequence[Atom]) -> list[Inequality]:
        """Return what atoms ask of the outputs. Equal ones are one object: cases that multiply hold
        the same few again and again.
        """
        for atom in (
            atom
            for atom in atoms
            if id(atom) not in self.made and any(n.startswith("Y") for n in atom)
        ):
            row = _inequality(atom)
            self.made[id(atom)] = self.known.setdefault(row, row)
        return [self.made[id(atom)] for atom in atoms if id(atom) in self.made]


def _impossible(atom: Atom) -> bool:
    return set(atom) <= {""} and atom.get("", 0) > 0


def _inequality(atom: Atom) -> Inequality:
    return Inequality(
        tuple(sorted((int(n[2:]), c) for n, c in atom.items() if n)), atom.get("", Fraction(0))
    )
