"""Linear programs for the smallest margin under substitutions.

Some symbols are settled; the others are relaxed to shares, and the programs' multipliers prove
bounds for each part of the region.

A part is a set of points: some symbols are substituted, some others are excluded, and so many
substitutions are left. Replacing the symbol x of group g by another one j moves the point by e_gj -
e_gx, so a perturbation is  sum_gj share_gj (e_gj - e_gx)  with shares of 0 or 1, at most one in a
group and k in all. The program lets the shares be any number between 0 and 1. Multipliers are
turned into a bound by how far a linear function can fall over the part, which is exact for
substitutions (the k largest falls of the groups), so that neither the program's shares nor its
limits are trusted. One more symbol substituted changes that fall in one term: the symbols with
which the bound stays above 0 are excluded at once, all of them with the same multipliers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from calipers.bounds.rounding import Arithmetic
from calipers.certificates.exact.lp import Answer, LinearPrograms
from calipers.certificates.exact.model import Ends, Floats, MIPModel
from calipers.certificates.exact.tree import MultiplierBound
from calipers.errors import BadInput
from calipers.threats.neighbours import neighbourhood_size
from calipers.threats.norms import support_rounding
from calipers.threats.substitution_region import NUMERIC_ALONE, SubstitutionRegion

Flags = NDArray[np.bool_]


class Part(NamedTuple):
    """A set of admissible inputs of a region.

    `put` are the symbols that are substituted, group -> symbol; `options (G, K)` those that may
    still be; `left` is how many more of them at most.
    """

    put: dict[int, int]
    options: Flags
    left: int

    @classmethod
    def whole(cls, region: SubstitutionRegion) -> Part:
        """Return the part that is the whole of the first region."""
        left = int(region.budget[0])
        return cls({}, region.options[0].cpu().numpy() & (left > 0), left)

    def with_symbol(self, group: int, symbol: int) -> Part:
        """Return the rest of the part with one symbol substituted.

        One substitution less is left, and the group is settled.
        """
        options = self.options & (self.left > 1)
        options[group] = False
        return Part({**self.put, group: symbol}, options, self.left - 1)

    def without(self, barred: Flags) -> Part:
        """Return the rest of the part with some symbols (G, K) excluded."""
        return self._replace(options=self.options & ~barred)

    def without_symbol(self, group: int, symbol: int) -> Part:
        """Return the rest of the part with one symbol excluded."""
        barred = np.zeros_like(self.options)
        barred[group, symbol] = True
        return self.without(barred)

    def within(self, other: Part) -> bool:
        """Return whether every input of this part is known to be in the other.

        Where the answer is no, the part may be inside nevertheless.
        """
        more = self.put.items() - other.put.items()
        fits = other.put.items() <= self.put.items() and all(other.options[move] for move in more)
        return (
            fits
            and self.left + len(more) <= other.left
            and not bool((self.options & ~other.options).any())
        )

    @property
    def ways(self) -> int:
        """Number of admissible inputs in the part."""
        return neighbourhood_size(self.options.sum(1).tolist(), self.left)

    def of(self, region: SubstitutionRegion) -> SubstitutionRegion:
        """Return the part as a region of its own.

        Its center is the point with the symbols of `put` substituted.
        """
        place = torch.zeros(1, dtype=torch.long, device=region.center.device)
        size, symbols = region.options.shape[2], region.symbols[:1].clone()
        moves = torch.tensor(
            [[g * size + j for g, j in self.put.items()]], dtype=torch.long, device=place.device
        )
        for g, j in self.put.items():
            symbols[0, g] = j
        options = torch.from_numpy(self.options)[None].to(place.device)
        left = max(float(self.left), 0.0 if region.continuous is None else NUMERIC_ALONE)
        radius = torch.full_like(region.radius[:1], left)
        return dataclasses.replace(
            region.take(place),
            center=region.substituted(place, moves),
            symbols=symbols,
            options=options,
            radius=radius,
        )


class Proved(NamedTuple):
    """Lower bounds of a goal over a part.

    `whole` holds for the whole part, `each (G, K)` for the rest of the part with one further symbol
    substituted (infinite where it is excluded).
    """

    whole: float
    each: Floats


def proved_of(
    bound: MultiplierBound, region: SubstitutionRegion, part: Part, arithmetic: Arithmetic
) -> Proved:
    """Return what multipliers prove of a part of the region.

    The rounding of every sum is taken off.
    """
    inner, slope = part.of(region), torch.from_numpy(bound.slope)
    fall = inner.fall(slope[None, None], torch.zeros(1, dtype=torch.long))
    moved = slope * (inner.center - region.center).flatten()
    gamma = arithmetic.gamma(4 * support_rounding(len(slope)))
    constant, away = (
        bound.constant + float(moved.sum()),
        float(moved.abs().sum()) + abs(bound.constant),
    )
    whole = constant - float(fall.value) - gamma * (away + float(fall.terms))
    if not part.options.any():
        return Proved(whole, np.full(part.options.shape, np.inf))
    loss, size = _losses(inner, slope)
    best, order = loss.amax(1).clamp(min=0).sort(descending=True, stable=True)
    other = torch.empty_like(best)  # the largest falls of the other groups, one substitution less
    within = torch.arange(len(best)) < part.left - 1
    other[order] = torch.where(within, best[: part.left].sum() - best, best[: part.left - 1].sum())
    numeric = float(fall.value) - float(best[: part.left].sum())
    each = constant - numeric - (loss + other[:, None])
    # The largest terms, as many as there are substitutions, bound those of either sum: they count
    # twice for the sum from which one is taken out, once more for the symbol's own term.
    terms = float(fall.terms) + 3 * float(
        size.amax(1).sort(descending=True).values[: part.left].sum()
    )
    return Proved(whole, (each - gamma * (away + terms)).numpy())


def _losses(region: SubstitutionRegion, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far <slope, x'> falls with each symbol (G, K).

    It is minus infinity for symbols that may not be substituted. The second result is the size of
    the terms, for their rounding.
    """
    values = slope[region.threat.columns]
    mine = values.gather(1, region.symbols[0, :, None])
    options = region.options[0]
    return (mine - values).masked_fill(~options, -torch.inf), (
        mine.abs() + values.abs()
    ).masked_fill(~options, 0.0)


class SubstitutionPrograms(LinearPrograms):
    """The linear programs of one model over a substitution region.

    Parts and choices change from call to call.
    """

    def __init__(self, model: MIPModel, region: SubstitutionRegion) -> None:
        check_numeric(region)
        self.region, self.whole = region, Part.whole(region)
        self.group, self.symbol = np.nonzero(self.whole.options)
        self.place = {
            (g, j): i
            for i, (g, j) in enumerate(zip(self.group.tolist(), self.symbol.tolist(), strict=True))
        }
        table, own = region.threat.columns.numpy(), region.symbols[0].numpy()
        count, width = len(self.group), len(region.low[0])
        rows = np.concatenate([table[self.group, self.symbol], table[self.group, own[self.group]]])
        ways = sparse.csr_matrix(
            (np.repeat([1.0, -1.0], count), (rows, np.tile(np.arange(count), 2))),
            shape=(width, count),
        )
        once = sparse.csr_matrix(
            (np.ones(count), (self.group, np.arange(count))), shape=(len(table), count)
        )
        budgets = sparse.vstack([once, sparse.csr_matrix(np.ones((1, count)))])
        free, spent, self.numeric_low, self.numeric_high, most = _numeric(region)
        super().__init__(
            model, sparse.hstack([ways, free]).tocsr(), sparse.block_diag([budgets, spent]).tocsr()
        )
        first = len(model.low_row)
        for row, end in enumerate(
            [*[1.0] * len(table), float(self.whole.left), *most], start=first
        ):
            self.linear.changeRowBounds(row, -np.inf, end)

    def solve(self, part: Part, goal: int, ends: Ends, basis: Any = None) -> Answer | None:
        """Return the answer of minimising the column `goal` over a part.

        None where the solver has no answer.
        """
        low, high = np.zeros(len(self.group)), part.options[self.group, self.symbol].astype(float)
        for move in part.put.items():
            low[self.place[move]] = high[self.place[move]] = 1.0
        self._set_shares(
            np.concatenate([low, self.numeric_low]), np.concatenate([high, self.numeric_high])
        )
        self._set_ends(ends, goal)
        if basis is not None:
            self._begin(basis)
        return self._solved()

    def shares(self, delta: Floats) -> Floats:
        """Return the share of each symbol in a perturbation, (G, K).

        It is 0 for a point's own symbols.
        """
        found = np.zeros(self.whole.options.shape)
        found[self.group, self.symbol] = delta[
            self.region.threat.columns.numpy()[self.group, self.symbol]
        ]
        return found


def check_numeric(region: SubstitutionRegion) -> None:
    """Raise `BadInput` unless numeric columns, if any, move in a polytope."""
    numeric = region.continuous
    if numeric is not None and (numeric.norm.is_euclidean or numeric.norm.is_count):
        raise BadInput(
            "MILP moves numeric columns beside the symbols in linf or l1 only: take such a ball as "
            "`continuous`, or bound the threat by BranchAndBound"
        )
    if numeric is not None and getattr(numeric, "cut", None) is not None:
        raise BadInput(
            "MILP knows no constraints on numeric columns beside the symbols: leave them out, or "
            "bound the threat by BranchAndBound"
        )


def _numeric(region: SubstitutionRegion) -> tuple[Any, Any, Floats, Floats, list[float]]:
    """Return how numeric columns move, as columns and rows of the program.

    These are the ways in which they move, the row of their budget, the lower and upper limits of
    their shares, and the budget's limit; all are empty where there are no numeric columns.
    """
    numeric, width = region.continuous, len(region.low[0])
    rest = (
        region.threat.rest(region.center).numpy()
        if numeric is not None
        else np.zeros(0, dtype=np.int64)
    )
    each = sparse.csr_matrix(
        (np.ones(len(rest)), (rest, np.arange(len(rest)))), shape=(width, len(rest))
    )
    if numeric is None:
        return each, sparse.csr_matrix((0, 0)), np.zeros(0), np.zeros(0), []
    low, high, radius = numeric.low[0].numpy(), numeric.high[0].numpy(), float(numeric.radius[0])
    weight = np.ones_like(low) if numeric.weight is None else numeric.weight.numpy()
    low, high = np.maximum(low, -radius / weight), np.minimum(high, radius / weight)
    if not numeric.norm.is_sparse:
        return each, sparse.csr_matrix((0, len(rest))), low, high, []
    spent = sparse.csr_matrix(np.concatenate([weight, weight])[None])
    return (
        sparse.hstack([each, -each]),
        spent,
        np.zeros(2 * len(rest)),
        np.concatenate([high, -low]),
        [radius],
    )
