"""Reading VNN-LIB files: boxes of unsafe inputs with their cases.

Version 1 of the format is read: `declare-const` of X_i and Y_j, and `assert` with and, or, not, <=,
>=, <, >, = of linear terms, in exact rational arithmetic. Every expression is evaluated when its
bracket closes, so deep nesting costs nothing. A formula is a disjunction of conjunctions of atoms.
Files are long because they hold many bounds on single inputs: each of these is one token.
"""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from calipers.errors import BadInput
from calipers.interchange.files import content, existing
from calipers.interchange.vnnlib_cases import (
    Atom,
    Formula,
    InputBound,
    Property,
    Term,
    atom,
    negated,
    sort,
)

_DIGITS = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
_NUMBER = re.compile(_DIGITS)
_NAME = re.compile(r"([XY])_(0|[1-9]\d{0,8})")
_WORD = r"[^\s();|\"]+"
_TOKEN = re.compile(
    rf"\(\s*(<=|>=|<|>)\s+([XY]_\d+)\s+({_DIGITS})\s*\)"  # a plain bound, as one token
    rf"|;[^\n]*|\|[^|]*\||\"[^\"]*\"|[()]|{_WORD}|\S"
)
_IGNORED = {"set-logic", "set-info", "set-option", "check-sat", "get-model", "exit"}
_MOST_DIGITS = 1000
_MOST_BITS = 2 * int(_MOST_DIGITS * 3.33)
_MOST_CASES = 100_000
_MOST_ATOMS = 10_000_000  # in all cases together
_ONE, _MINUS_ONE = Fraction(1), Fraction(-1)

Word = str | Term | Formula
"""What an expression can be while it is read: a word of the language, a term, or a formula."""


def load_vnnlib(source: str | Path) -> Property:
    """Return the property in a VNN-LIB file.

    Args:
        source: A .vnnlib or .vnnlib.gz file, version 1 of the format.

    Returns:
        The property: numbers of `inputs` and `outputs`, and a query for each box of unsafe inputs.

    Raises:
        BadInput: With file and line, for anything that is not read in full.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "safe.vnnlib"
        >>> box = "(declare-const X_0 Real) (assert (>= X_0 0)) (assert (<= X_0 1))"
        >>> _ = path.write_text(box + "(declare-const Y_0 Real) (assert (>= Y_0 2))")
        >>> found = load_vnnlib(path)
        >>> found.inputs, found.outputs, len(found.queries)
        (1, 1, 1)
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
    """Return the property that a text describes; `name` is for messages."""
    reader = _Assertions(name, text)
    with _uncollected():
        for found in _TOKEN.finditer(text):
            reader.place = found.start()
            if found[1] is not None:
                reader.bound(found[1], found[2], found[3])
            elif not found[0].startswith(";"):
                reader.take(found[0])
        return reader.finish()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turn off garbage collection while many small objects are made."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@dataclass
class _Assertions:
    """Holds the open brackets, the declarations and the assertions."""

    name: str
    text: str
    place: int = 0
    stack: list[list[Word]] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)
    declared: set[str] = field(default_factory=set)
    asserted: list[Formula] = field(default_factory=list)
    numbers: dict[str, Fraction] = field(default_factory=dict)
    atoms: int = 0

    def fail(self, why: str) -> BadInput:
        """Return the error for the current line."""
        return BadInput(f"{self.name}, line {self.line(self.place)}: {why}")

    def line(self, place: int) -> int:
        """Return the number of the line that a place in the text is in."""
        return self.text.count("\n", 0, place) + 1

    def take(self, token: str) -> None:
        """Read one token."""
        if token == "(":
            self.stack.append([])
            self.opened.append(self.place)
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

    def bound(self, sign: str, name: str, number: str) -> None:
        """Read a comparison of a variable with a number, a single token."""
        if not self.stack:
            self.command([sign])
        end = self.numbers.get(number)
        if end is None or name not in self.declared:
            self.term(name)
            end = self.numbers[number] = self.term(number)[""]
        strict, upper = len(sign) == 1, sign[0] == "<"
        if name[0] == "X":
            self.stack[-1].append(((InputBound(int(name[2:]), upper, end, strict),),))
            return
        term = {name: _ONE, "": -end} if upper else {name: _MINUS_ONE, "": end}
        self.stack[-1].append(((Atom(term if end else {name: term[name]}, strict),),))

    def close(self, words: list[Word]) -> None:
        """Evaluate the bracket that closes."""
        if self.stack:
            self.stack[-1].append(self.expression(words))
        else:
            self.command(words)

    def command(self, words: list[Word]) -> None:
        """Carry out a command, an outermost bracket."""
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
        """Declare an input or an output."""
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
        """Return the value of a bracket inside another one."""
        if not words:
            return ()
        head, rest = words[0], words[1:]
        if not isinstance(head, str):
            raise self.fail("a bracket begins with and, or, not, <=, >=, <, >, =, +, - or *")
        if head in ("and", "or"):
            formulas = [self.formula(word) for word in rest]
            if not formulas:
                raise self.fail(f"({head}) holds nothing")
            return (
                self.conjunction(formulas)
                if head == "and"
                else tuple(itertools.chain.from_iterable(formulas))
            )
        if head == "not":
            if len(rest) != 1:
                raise self.fail(f"(not ...) takes one formula, got {len(rest)}")
            return self.negation(self.formula(rest[0]))
        if head in ("<=", ">=", "=", "<", ">"):
            return self.comparison(head, [self.term(word) for word in rest])
        if head in ("+", "-", "*", "/"):
            return self.arithmetic(head, [self.term(word) for word in rest])
        raise self.fail(
            f"{head[:40]!r} is not read: only and, or, not, <=, >=, <, >, =, +, -, * and / are"
        )

    def negation(self, formula: Formula) -> Formula:
        """Return the negation of a formula.

        It is every choice of one negated atom of each conjunction.
        """
        return self.conjunction([tuple((negated(a),) for a in case) for case in formula])

    def conjunction(self, formulas: Sequence[Formula]) -> Formula:
        """Return the conjunction of formulas.

        It is every choice of one conjunction from each formula. Raises `BadInput` for too many
        cases.
        """
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

    def comparison(self, sign: str, terms: list[Term]) -> Formula:
        """Return the formula of a comparison of two terms."""
        if len(terms) != 2:
            raise self.fail(f"({sign} ...) compares two terms, got {len(terms)}")
        term, strict = self.combined(terms, (1, -1)), len(sign) == 1 and sign != "="
        below, above = (atom({n: k * c for n, c in term.items()}, strict) for k in (1, -1))
        return ((below, above),) if sign == "=" else ((below if sign[0] == "<" else above,),)

    def arithmetic(self, sign: str, terms: list[Term]) -> Term:
        """Return the value of a sum, difference, product or quotient of terms."""
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

    def combined(self, terms: Sequence[Term], signs: Sequence[int]) -> Term:
        """Return the sum of terms with these signs, without what cancels."""
        total: Term = {}
        for term, sign in zip(terms, signs, strict=True):
            for name, c in term.items():
                total[name] = total[name] + sign * c if name in total else c if sign == 1 else -c
            self.check_size({name: total[name] for name in term})
        return {name: c for name, c in total.items() if c}

    def check_size(self, term: Term) -> None:
        """Raise `BadInput` for numbers of too many digits."""
        if any(
            max(c.numerator.bit_length(), c.denominator.bit_length()) > _MOST_BITS
            for c in term.values()
        ):
            raise self.fail(f"a number of more than {_MOST_DIGITS} digits")

    def formula(self, word: Word) -> Formula:
        """Return what has to be a formula, or raise `BadInput`."""
        if isinstance(word, tuple) and word:
            return word
        raise self.fail("a formula is expected here: and, or, <=, >= or =")

    def term(self, word: Word) -> Term:
        """Return what has to be a term, or raise `BadInput`."""
        if isinstance(word, dict):
            return word
        if not isinstance(word, str):
            raise self.fail("a term is expected here: a number, a variable, or +, -, * of them")
        if _NUMBER.fullmatch(word) and len(word) <= _MOST_DIGITS:
            return {"": Fraction(Decimal(word))}
        if word in self.declared:
            return {word: _ONE}
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
                f"{self.name} ends inside the bracket that was opened in line "
                f"{self.line(self.opened[0])}: is the file complete?"
            )
        inputs, outputs = (self.count(prefix) for prefix in "XY")
        if not any(
            isinstance(one, Atom) and any(name.startswith("Y") for name in one.term)
            for formula in self.asserted
            for case in formula
            for one in case
        ):
            raise BadInput(
                f"{self.name} asserts nothing about the outputs, so that every input would be "
                "unsafe: is the file complete?"
            )
        common = itertools.chain.from_iterable(f[0] for f in self.asserted if len(f) == 1)
        cases = self.conjunction([f for f in self.asserted if len(f) != 1])
        return sort(inputs, outputs, self.name, tuple(common), cases)

    def count(self, prefix: str) -> int:
        """Return the number of inputs (X) or outputs (Y), numbered without gaps."""
        numbers = sorted(int(name[2:]) for name in self.declared if name.startswith(prefix))
        what = {"X": "inputs", "Y": "outputs"}[prefix]
        if not numbers or numbers != list(range(len(numbers))):
            raise BadInput(
                f"{self.name} declares {len(numbers)} {what}; they are numbered {prefix}_0, "
                f"{prefix}_1, ... without gaps, and there is at least one"
            )
        return len(numbers)
