"""Names of features, symbols and classes, and what an example changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.record.evidence import Question

_SEPARATORS = "_=:|. -"  # between the name of a category's column and the category
_AROUND = 12  # unchanged symbols shown on either side of a changed one


@dataclass(frozen=True)
class Change:
    """One feature or symbol that differs, by name, before and after.

    >>> str(Change("work", "none", "full"))
    'work: none -> full'
    """

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Piece:
    """A stretch of a sequence; where it was changed, what stood there before.

    >>> str(Piece("A", "T")), str(Piece("ACG"))
    ('[T->A]', 'ACG')
    """

    text: str
    before: str = ""

    def __str__(self) -> str:
        return f"[{self.before}->{self.text}]" if self.before else self.text


@dataclass(frozen=True)
class Names:
    """The names that a question's data and model have; empty where they have none.

    Args:
        features: of the columns of a point, in order.
        classes: of the classes, in order.
        symbols: of the symbols of a one-hot sequence, in order.
        groups: the columns of each one-hot symbol of a `Substitutions` threat.
    """

    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, question: Question) -> Names:
        """Return the names that a record keeps, whatever else stands there."""
        held = question.facts.get("data")
        known: dict[str, Any] = held if isinstance(held, dict) else {}
        threat = (question.data or {}).get("threat")
        threat = threat if isinstance(threat, dict) else {}
        return cls(
            _texts(known.get("features")),
            _texts(known.get("classes")),
            _texts(threat.get("symbols")),
            _groups(threat.get("groups")),
        )

    def of_class(self, label: int) -> str:
        """Return the name of a class, or its number where it has none."""
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)

    @property
    def tell_changes(self) -> bool:
        """Whether an example can be told in words rather than in a picture."""
        return bool(self.features or self.groups)

    def changes(self, clean: NDArray[Any], adversarial: NDArray[Any]) -> tuple[Change, ...]:
        """Return what differs between a point and its example."""
        before, after = np.ravel(clean), np.ravel(adversarial)
        if not self.tell_changes or not self._fit(len(before)):
            return ()
        found = [
            Change(self._group[g][0], self._symbol(g, old), self._symbol(g, new))
            for g, old, new in self._moved(before, after)
        ]
        grouped = {column for group in self.groups for column in group}
        alone = [i for i in np.flatnonzero(before != after).tolist() if i not in grouped]
        return (
            *found,
            *(Change(self._column(i), f"{before[i]:.6g}", f"{after[i]:.6g}") for i in alone),
        )

    def pieces(self, clean: NDArray[Any], adversarial: NDArray[Any]) -> tuple[Piece, ...]:
        """Return a sequence with its changed symbols marked, the rest cut short.

        Empty where the symbols have no names, or the columns have names of their own.
        """
        before, after = np.ravel(clean), np.ravel(adversarial)
        if self.features or not self.symbols or not self._fit(len(before)):
            return ()
        space = "" if all(len(s) == 1 for s in self.symbols) else " "
        found, at = list[Piece](), 0
        for g, old, new in self._moved(before, after):
            found += self._between(before, at, g, space)
            found.append(Piece(self._symbol(g, new), self._symbol(g, old)))
            at = g + 1
        return (*found, *self._between(before, at, len(self.groups), space))

    def _between(self, flat: NDArray[Any], begin: int, end: int, space: str) -> Iterator[Piece]:
        """Yield the unchanged symbols between two changed ones."""
        ahead = 0 if begin == 0 else _AROUND
        behind = 0 if end == len(self.groups) else _AROUND
        shown = [self._symbol(g, self._place(flat, g)) for g in range(begin, end)]
        if len(shown) > ahead + behind + 1:
            shown = [*shown[:ahead], "…", *(shown[-behind:] if behind else [])]
        if shown:
            joined = space.join(shown)
            yield Piece(f"{space if begin else ''}{joined}{space if behind else ''}")

    def _moved(self, before: NDArray[Any], after: NDArray[Any]) -> Iterator[tuple[int, int, int]]:
        """Yield the groups whose symbol differs, with the symbols' places."""
        for g in range(len(self.groups)):
            old, new = self._place(before, g), self._place(after, g)
            if old != new:
                yield g, old, new

    def _place(self, flat: NDArray[Any], group: int) -> int:
        return int(np.argmax(flat[list(self.groups[group])]))

    def _fit(self, size: int) -> bool:
        """Return whether the names are those of points of so many columns."""
        columns = [column for group in self.groups for column in group]
        return (not self.features or len(self.features) == size) and all(
            0 <= column < size for column in columns
        )

    @cached_property
    def _group(self) -> list[tuple[str, list[str]]]:
        """The name of each group, and those of its symbols."""
        return [self._named(g, group) for g, group in enumerate(self.groups)]

    def _named(self, number: int, group: Sequence[int]) -> tuple[str, list[str]]:
        if self.features:
            names = [self.features[column] for column in group]
            end = max(map(_shared(names).rfind, _SEPARATORS)) + 1
            return names[0][:end].rstrip(_SEPARATORS) or f"category {number}", [
                name[end:] or name for name in names
            ]
        symbols = self.symbols if len(self.symbols) >= len(group) else ()
        return f"position {number}", list(symbols or map(str, range(len(group))))

    def _symbol(self, group: int, place: int) -> str:
        return self._group[group][1][place]

    def _column(self, i: int) -> str:
        return self.features[i] if self.features else f"column {i}"


def _shared(names: Sequence[str]) -> str:
    """Return the longest text that all names begin with."""
    first, last = min(names), max(names)
    same = [a == b for a, b in zip(first, last, strict=False)]
    return first[: [*same, False].index(False)]


def _texts(value: Any) -> tuple[str, ...]:
    """Return a list of text as a tuple; () for anything else."""
    if isinstance(value, str):
        return tuple(value)
    is_list = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    return tuple(value) if is_list else ()


def _groups(value: Any) -> tuple[tuple[int, ...], ...]:
    """Return lists of columns as tuples; () for anything else."""
    if not isinstance(value, list | tuple) or not all(isinstance(g, list | tuple) for g in value):
        return ()
    found = tuple(tuple(c for c in group if isinstance(c, int)) for group in value)
    return found if all(found) else ()
