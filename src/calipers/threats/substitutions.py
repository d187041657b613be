"""Threat models that replace one-hot symbols of an input.

At most k symbols are replaced, each by an allowed one, which makes the neighbourhood of a point
finite. A symbol is a one-hot group of columns, so k substitutions move a point by 2k in
the l1 distance: || e_a - e_b ||_1 = 2, and the budget k is the l1 budget 2k.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calipers.errors import BadInput
from calipers.threats.ball import Ball, Region
from calipers.threats.substitution_region import (
    NUMERIC_ALONE,
    SubstitutionCount,
    SubstitutionRegion,
    one_hot,
)


@dataclass(frozen=True, eq=False)
class Substitutions:
    """All inputs that differ from x in at most k one-hot symbols.

    The admissible set is {x' : x'_g in {x_g} + {e_a : a allowed in g}, #{g : x'_g != x_g} <= k}, g
    over the groups of columns. To leave a symbol as it is is always admissible, allowed or not.

    Args:
        groups: the columns of the flattened input that make up each symbol (`one_hot_groups` makes
            this list for sequences); groups may differ in size.
        k: how many symbols may be replaced: one whole number, or one for each point (N,). k
            substitutions are the l1 budget 2k. With `continuous`, k=0.5 lets the numeric columns
            move and keeps all symbols.
        allowed: which symbols may be put in: a list of symbol numbers for each group, a bool mask
            (G, K) with K the size of the largest group, or a bool mask (G, K, K) of what each
            symbol may become; None allows all.
        continuous: a ball for the columns that are in no group, in their order (its box, mask and
            weights have their number); None freezes them. Its radius is part of the question:
            distances count substitutions, and to move numeric columns alone counts as half a
            substitution, so that a bracket can tell such a point from one that is misclassified as
            it is.
        symbols: names of the symbols, in the order of a group's columns, such as "ACGT": reports
            show sequences in them. They change nothing else.

    Raises:
        BadInput: for groups that overlap or have fewer than two columns, a k that is no such
            number, an `allowed` that does not fit the groups, or a `continuous` ball with a grid or
            box="data".

    Example:
        >>> Substitutions(one_hot_groups(60, 4), k=2).k
        2
    """

    groups: Sequence[Sequence[int]]
    k: int | float | Tensor | Sequence[int]
    allowed: Tensor | Sequence[Sequence[int]] | None = None
    continuous: Ball | None = None
    symbols: Sequence[str] | None = None

    norm: ClassVar[str] = "substitutions"
    ends: ClassVar[None] = (
        # symbols have no box: what restricts them is `allowed`, and the box of the numeric
        # columns is in `continuous`
        None
    )
    mask: ClassVar[None] = None
    weights: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.continuous is not None and (self.continuous.grid or self.continuous.box == "data"):
            raise BadInput(
                "the ball of numeric columns takes box=(low, high) or None, and no grid: write "
                "box=(columns.min(0), columns.max(0))"
            )
        groups = tuple(tuple(int(c) for c in group) for group in self.groups)
        object.__setattr__(self, "groups", groups)
        if not groups or any(len(group) < 2 for group in groups):
            raise BadInput(
                "groups must list the columns of each symbol: at least one group, of at least two "
                "columns each"
            )
        flat = [c for group in groups for c in group]
        if min(flat) < 0:
            raise BadInput(
                f"groups name columns of the flattened input, counted from 0, got {min(flat)}"
            )
        if len(set(flat)) < len(flat):
            twice = next(c for c in flat if flat.count(c) > 1)
            raise BadInput(f"groups must not overlap: column {twice} is listed twice")
        k = torch.as_tensor(self.k, dtype=torch.float64)
        if k.dim() > 1:
            raise BadInput(
                "k must be one number or one for each point, got a tensor of shape "
                f"{tuple(k.shape)}"
            )
        whole = (k == k.floor()) | ((k == NUMERIC_ALONE) & (self.continuous is not None))
        bad = torch.nonzero(~((k >= 0) & (k <= len(groups)) & whole).reshape(-1)).flatten()
        if len(bad):
            at = f" at point {int(bad[0])}" if k.dim() else ""
            raise BadInput(
                "k must be a whole number of substitutions from 0 to the number of groups, "
                f"{len(groups)}, got {float(k.reshape(-1)[bad[0]]):g}{at}"
            )
        object.__setattr__(self, "allowed", self._mask_of(groups))
        if self.symbols is not None:
            object.__setattr__(self, "symbols", _symbols(self.symbols, max(map(len, groups))))

    def _mask_of(self, groups: tuple[tuple[int, ...], ...]) -> Tensor | None:
        """Return `allowed` as a checked bool mask, or None."""
        count, size = len(groups), max(map(len, groups))
        if self.allowed is None:
            return None
        if isinstance(self.allowed, Tensor):
            if self.allowed.dtype != torch.bool or self.allowed.shape not in (
                (count, size),
                (count, size, size),
            ):
                shapes = f"({count}, {size}) or ({count}, {size}, {size})"
                raise BadInput(
                    f"allowed must be a bool mask of shape {shapes}, got "
                    f"{tuple(self.allowed.shape)} of {self.allowed.dtype}"
                )
            return self.allowed
        if len(self.allowed) != count:
            raise BadInput(
                f"allowed lists symbols for {len(self.allowed)} groups, but there are {count}"
            )
        mask = torch.zeros(count, size, dtype=torch.bool)
        for g, chosen in enumerate(self.allowed):
            wrong = [a for a in chosen if not 0 <= a < len(groups[g])]
            if wrong:
                raise BadInput(
                    f"group {g} has the symbols 0..{len(groups[g]) - 1}, but allowed names "
                    f"{wrong[0]}"
                )
            mask[g, list(chosen)] = True
        return mask

    @cached_property
    def columns(self) -> Tensor:
        """The column of each symbol, (G, K) int64.

        Groups of fewer symbols repeat their first column (see `exists`).
        """
        size = max(map(len, self.groups))
        return torch.tensor(
            [[*group, *[group[0]] * (size - len(group))] for group in self.groups], dtype=torch.long
        )

    @cached_property
    def exists(self) -> Tensor:
        """The entries of `columns` that are symbols and not padding, (G, K) bool."""
        size = self.columns.shape[1]
        return torch.arange(size) < torch.tensor([len(group) for group in self.groups])[:, None]

    def radii(self, n: int) -> Tensor:
        """Return the substitutions allowed at each of n points, (N,) float64."""
        k = torch.as_tensor(self.k, dtype=torch.float64)
        if k.dim() and len(k) != n:
            raise BadInput(
                f"k has {len(k)} entries, but there are {n} points: give one number, or one for "
                "each point"
            )
        return k.expand(n).clone()

    def at(self, k: float | Tensor) -> Substitutions:
        """Return the same threat with another number of substitutions.

        A search over the budget may ask for any number: it is rounded down, so 1.9 allows one
        substitution.
        """
        asked = torch.as_tensor(k, dtype=torch.float64)
        half = (asked >= NUMERIC_ALONE) & (asked < 1) & (self.continuous is not None)
        return dataclasses.replace(
            self, k=torch.where(half, NUMERIC_ALONE, asked.floor()).clamp(max=len(self.groups))
        )

    def take(self, index: Tensor) -> Substitutions:
        """Return the threat for the chosen points."""
        k = torch.as_tensor(self.k, dtype=torch.float64)
        continuous = None if self.continuous is None else self.continuous.take(index)
        return dataclasses.replace(
            self, k=k[index.to(k.device)] if k.dim() else self.k, continuous=continuous
        )

    def widest(self, x: Tensor) -> Tensor:
        """Return the budget beyond which a larger one adds nothing.

        (N,) float64: the number of groups that have another allowed symbol.
        """
        return self.region(x).options.any(2).sum(1).double()

    def below(
        self, distance: NDArray[np.float64], proved: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the budget at which the search for a certificate begins.

        Under witnesses at these distances: one substitution less, which closes the bracket.
        """
        return np.ceil(distance).clip(1) - 1

    def least(self, radius: Tensor) -> Tensor:
        """Return the smallest budgets (N,) that admit the same as these."""
        asked = self.at(radius).k
        assert isinstance(asked, Tensor)
        return asked

    def next(self, radius: Tensor) -> Tensor:
        """Return the smallest budgets (N,) that admit more than these.

        With numeric columns, the half substitution that moves them alone comes before the first
        whole one.
        """
        first = NUMERIC_ALONE if self.continuous is not None else 1.0
        return torch.where(radius < first, first, radius.floor() + 1)

    def check(self, x: Tensor) -> None:
        """Raise `BadInput` where points x (N, *D) do not fit the threat.

        Every group of every point must be one-hot, and the numeric columns must lie in their ball's
        box.
        """
        radii = self.radii(len(x))
        self.check_symbols(x)
        if self.continuous is None:
            return
        if not len(self.rest(x)):
            raise BadInput(
                "continuous is a ball for the columns in no group, but the groups name every "
                "column: "
                "leave continuous out"
            )
        still = torch.nonzero(radii < NUMERIC_ALONE).flatten()
        if len(still):
            raise BadInput(
                f"k = 0 at point {int(still[0])} lets nothing move: with numeric columns ask for "
                "k=0.5 (they move, all symbols stay) or k >= 1"
            )
        self.continuous.check(x.flatten(1)[:, self.rest(x)])

    def check_symbols(self, x: Tensor) -> None:
        """Raise `BadInput` unless every group of points x (N, *D) is one-hot."""
        width = x[0].numel() if len(x) else 1 + int(self.columns.max())
        if int(self.columns.max()) >= width:
            raise BadInput(
                f"groups name column {int(self.columns.max())}, but a flattened input has {width} "
                f"columns (shape {tuple(x.shape[1:])})"
            )
        bad = torch.nonzero(~one_hot(self.read(x)))
        if len(bad):
            point, group = bad[0].tolist()
            values = x[point].flatten()[list(self.groups[group])].tolist()
            raise BadInput(
                f"group {group} of point {point} is not one-hot: its columns hold {values}, where "
                "exactly one must be 1 and the others 0"
            )

    def region(self, x: Tensor, *, outward: bool = False) -> SubstitutionRegion:
        """Return the admissible set around each point of x (N, *D).

        Every group of x must be one-hot. With `outward` the numeric part is rounded outward;
        symbols are exact anyway.
        """
        self.check_symbols(x)
        symbols = self.read(x).argmax(2)
        options = self.exists.to(x.device).expand(len(x), -1, -1)
        if isinstance(self.allowed, Tensor):
            table, groups = (
                self.allowed.to(x.device),
                torch.arange(len(self.groups), device=x.device),
            )
            options = options & (table[groups, symbols] if table.dim() == 3 else table)
        options = options.scatter(2, symbols[:, :, None], False)
        numeric = (
            None
            if self.continuous is None
            else self.continuous.region(x.flatten(1)[:, self.rest(x)], outward=outward)
        )
        low, high = self._hull(x, options, numeric)
        return SubstitutionRegion(
            self.hull,
            SubstitutionCount(),
            x,
            self.radii(len(x)).to(x.device),
            low,
            high,
            None,
            self,
            symbols,
            options,
            numeric,
        )

    @cached_property
    def hull(self) -> Ball:
        """The l1 ball that contains all admissible substitutions.

        A substitution is || e_a - e_b ||_1 = 2 long.
        """
        return Ball("l1", 2 * torch.as_tensor(self.k, dtype=torch.float64), box=None)

    def _hull(self, x: Tensor, options: Tensor, numeric: Region | None) -> tuple[Tensor, Tensor]:
        """Return how far each column can fall and rise, two of shape (M, d).

        For any number of substitutions: a column that can be left falls by 1, one that can be put
        in rises by 1.
        """
        flat, columns = torch.zeros_like(x.flatten(1)), self.columns.to(x.device).flatten()
        leaves = (self.read(x) == 1) & self.exists.to(x.device) & options.any(2, keepdim=True)
        # Groups of fewer symbols repeat their first column, where the padding adds nothing.
        low, high = (
            flat.index_add(1, columns, -leaves.flatten(1).to(x.dtype)),
            flat.index_add(1, columns, options.flatten(1).to(x.dtype)),
        )
        if numeric is None:
            return low, high
        reach = numeric.norm.alone(numeric.radius.to(x.dtype))[:, None]
        reach = reach if numeric.weight is None else reach / numeric.weight
        reach = torch.nextafter(
            reach * (1 + 4 * torch.finfo(x.dtype).eps), torch.full_like(reach, torch.inf)
        )
        ends = torch.maximum(numeric.low, -reach), torch.minimum(numeric.high, reach)
        return low.index_copy(1, self.rest(x), ends[0]), high.index_copy(1, self.rest(x), ends[1])

    def rest(self, x: Tensor) -> Tensor:
        """Return the columns of the flattened input that are in no group, (R,)."""
        free = torch.ones(
            x[:1].numel() if len(x) else int(math.prod(x.shape[1:])), dtype=torch.bool
        )
        free[self.columns.flatten()] = False
        return torch.nonzero(free).flatten().to(x.device)

    def read(self, points: Tensor) -> Tensor:
        """Return the columns by group, (M, G, K); 0 for padding."""
        return points.flatten(1)[:, self.columns.to(points.device)] * self.exists.to(points)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the threat in a record, JSON-ready.

        k is not part of it: a bracket of the distance answers the question for every k. The radius
        of the numeric ball is: the bracket counts substitutions at that radius.
        """
        allowed = self.allowed.tolist() if isinstance(self.allowed, Tensor) else None
        numeric = (
            None
            if self.continuous is None
            else {
                **self.continuous.identity(),
                "radius": torch.as_tensor(self.continuous.radius).tolist(),
            }
        )
        return {
            "norm": self.norm,
            "groups": [list(group) for group in self.groups],
            "allowed": allowed,
            "numeric": numeric,
        }


def _symbols(names: Sequence[str], size: int) -> tuple[str, ...]:
    """Return the names of symbols, or raise `BadInput`."""
    found = tuple(names)
    if len(found) != size or len(set(found)) < size or not all(map(str, found)):
        raise BadInput(
            f"symbols names each of the {size} columns of a group once, got {len(found)} names "
            f"of which {len(set(found))} differ"
        )
    return tuple(map(str, found))


def one_hot_groups(length: int, size: int, *, symbols_first: bool = False) -> list[list[int]]:
    """Return the groups of columns of one-hot sequences.

    Args:
        length: the number of symbols of a sequence.
        size: the size of the alphabet.
        symbols_first: inputs are (size, length) instead of (length, size).

    Returns:
        For each position its columns in the flattened input, `length` lists of `size`.

    Raises:
        RuntimeError: a size is below 0.

    Example:
        >>> one_hot_groups(2, 3), one_hot_groups(2, 3, symbols_first=True)
        ([[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3, 5]])
    """
    table = (
        torch.arange(length * size).view(size, length).T
        if symbols_first
        else torch.arange(length * size).view(length, size)
    )
    return table.tolist()
