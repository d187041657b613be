"""Mixed-integer programs: rows, columns, and choices between options.

The network satisfies the rows and columns; the choices make the relaxation exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calipers.graph.ir import Graph

Floats = NDArray[np.float64]


class Option(NamedTuple):
    """One option of a choice.

    With it the row becomes an equation with `at` on the right, and column `z` lies between `low`
    and `high` (no column where z < 0).
    """

    row: int
    at: float
    z: int
    low: float
    high: float


class Choice(NamedTuple):
    """A choice between linear pieces, or between the elements of a window.

    `value` is the column of the result, `members` are the columns from which it is made; the rows
    from `first` to `last` (exclusive) tie them together.
    """

    node: int
    value: int
    members: tuple[int, ...]
    options: tuple[Option, ...]
    first: int
    last: int


@dataclass(eq=False)
class MIPModel:
    """The mixed-integer program of a network over a region.

    It has the rows  low_row <= inputs @ delta + columns @ v <= high_row  and the columns  low <= v
    <= high, which hold for every admissible perturbation delta in real arithmetic.

    `inputs` is (R, d), `columns` is (R, C), both sparse; `reach (d,)` is how far each feature can
    move. `goals` gives for each case the column that decides it: where its minimum is positive, the
    case is safe.
    """

    graph: Graph
    inputs: Any
    columns: Any
    low_row: Floats
    high_row: Floats
    low: Floats
    high: Floats
    reach: Floats
    goals: dict[int, int]
    choices: tuple[Choice, ...]
    sources: dict[int, tuple[int, int]]
    """For the columns of choices' members: the value's number in the graph, and the element."""
    defined: NDArray[np.int64]
    """The row that defines each column as an affine function, (C,).

    It is -1 for results of choices, and for cases of several margins.
    """
    own_rows: int
    """Number of rows that describe the network.

    Those behind them are the threat's own constraints.
    """

    @cached_property
    def sizes(self) -> tuple[Any, Any]:
        """Absolute values of `inputs` and `columns`."""
        return abs(self.inputs), abs(self.columns)

    def chosen(self, ends: Ends) -> list[int] | None:
        """Return each choice's row that is an equation, or None if one is open."""
        rows = [
            [o.row for o in c.options if ends.low_row[o.row] == ends.high_row[o.row]]
            for c in self.choices
        ]
        return [r[0] for r in rows] if all(rows) else None

    def of_values(self, values: list[Tensor]) -> Floats:
        """Return the columns at one point, given the network's values there.

        Only the columns of the choices' members are set; the others are 0.
        """
        v = np.zeros(self.columns.shape[1])
        for column, (number, element) in self.sources.items():
            v[column] = float(values[number][0].flatten()[element])
        return v

    def values_of(self, v: Floats) -> Floats:
        """Return the choices' results in the network, (choices,).

        They are computed from the columns of the choices' members.
        """
        found = np.empty(len(self.choices))
        for node, places, members in self._groups:
            z = torch.from_numpy(v[members])
            op = self.graph.nodes[node - 1].op
            found[places] = op.value(z[:, 0]).numpy() if op.elementwise else z.amax(1).numpy()
        return found

    def pattern(self, v: Floats) -> list[int]:
        """Return for each choice the option in which its members lie."""
        chosen = []
        for choice in self.choices:
            z = v[list(choice.members)]
            apart = (
                [max(o.low - z[0], z[0] - o.high) for o in choice.options]
                if len(z) == 1
                else list(-z)
            )
            chosen.append(int(np.argmin(apart)))
        return chosen

    def results(self) -> NDArray[np.int64]:
        """Return the columns of the choices' results."""
        return np.array([c.value for c in self.choices], dtype=np.int64)

    @property
    def _groups(self) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """The choices grouped by node: their places, and their members.

        A shorter list of members is padded with its first.
        """
        if not self._grouped:
            for node in dict.fromkeys(c.node for c in self.choices):
                mine = [(i, c) for i, c in enumerate(self.choices) if c.node == node]
                width = max(len(c.members) for _, c in mine)
                members = [
                    [*c.members, *[c.members[0]] * (width - len(c.members))] for _, c in mine
                ]
                self._grouped.append((node, np.array([i for i, _ in mine]), np.array(members)))
        return self._grouped

    _grouped: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = field(
        default_factory=list, repr=False
    )


class Ends(NamedTuple):
    """Lower and upper ends of all rows and columns under some choices."""

    low_row: Floats
    high_row: Floats
    low: Floats
    high: Floats


def ends_of(model: MIPModel, made: Mapping[int, int]) -> Ends:
    """Return the ends of rows and columns after choices: choice -> option."""
    ends = Ends(model.low_row.copy(), model.high_row.copy(), model.low.copy(), model.high.copy())
    for place, chosen in made.items():
        option = model.choices[place].options[chosen]
        ends.low_row[option.row] = ends.high_row[option.row] = option.at
        if option.z >= 0:
            ends.low[option.z] = max(ends.low[option.z], option.low)
            ends.high[option.z] = min(ends.high[option.z], option.high)
    return ends
