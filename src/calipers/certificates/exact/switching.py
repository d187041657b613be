"""Where is the margin smallest, some letters settled? Linear programs in which a letter is replaced
by shares, and what their multipliers prove of each part.

A part is a set of points: some letters are put in, some others may not come, and so many switches
are left. Replacing the letter of group g by another one j moves the point by e_gj - e_gx, so an
offset is  sum_gj share_gj (e_gj - e_gx)  with shares of 0 or 1, at most one a group and k in all.
The program lets them be any share between; multipliers are turned into a bound by the part's own
fall, which is exact for letters (the k largest falls of the groups), so neither the program's
shares nor its ends are believed. One letter more put in changes that fall in one term: those that
no longer come near 0 are barred at once, all of them by the same multipliers.
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
from calipers.certificates.exact.model import Ends, Floats, Model
from calipers.certificates.exact.proving import Bound
from calipers.certificates.exact.solving import Answer, Linear
from calipers.errors import BadInput
from calipers.problem.neighbours import neighbourhood_size
from calipers.problem.norms import support_rounding
from calipers.problem.substitution_region import NUMERIC_ALONE, SubstitutionRegion

Flags = NDArray[np.bool_]


class Part(NamedTuple):
    """Some of a region's ways of writing: the letters `put` in, group -> letter, those that may
    still come, `options (G, K)`, and how many of them.
    """

    put: dict[int, int]
    options: Flags
    left: int

    @classmethod
    def whole(cls, region: SubstitutionRegion) -> Part:
        """Return all of the first region."""
        left = int(region.budget[0])
        return cls({}, region.options[0].cpu().numpy() & (left > 0), left)

    def with_letter(self, group: int, letter: int) -> Part:
        """Return what is left with a letter put in: one switch less, and the group is settled."""
        options = self.options & (self.left > 1)
        options[group] = False
        return Part({**self.put, group: letter}, options, self.left - 1)

    def without(self, barred: Flags) -> Part:
        """Return what is left where some letters (G, K) may not come."""
        return self._replace(options=self.options & ~barred)

    def without_letter(self, group: int, letter: int) -> Part:
        """Return what is left where one letter may not come."""
        barred = np.zeros_like(self.options)
        barred[group, letter] = True
        return self.without(barred)

    def within(self, other: Part) -> bool:
        """Is every way of writing this part one of the other's? (Where it says no, that may be so
        still.)
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
        """In how many ways can it be written?"""
        return neighbourhood_size(self.options.sum(1).tolist(), self.left)

    def of(self, region: SubstitutionRegion) -> SubstitutionRegion:
        """Return the part as a region of its own, around the point with the letters put in."""
        place = torch.zeros(1, dtype=torch.long, device=region.center.device)
        size, letters = region.options.shape[2], region.letters[:1].clone()
        moves = torch.tensor(
            [[g * size + j for g, j in self.put.items()]], dtype=torch.long, device=place.device
        )
        for g, j in self.put.items():
            letters[0, g] = j
        options = torch.from_numpy(self.options)[None].to(place.device)
        left = max(float(self.left), 0.0 if region.numeric is None else NUMERIC_ALONE)
        radius = torch.full_like(region.radius[:1], left)
        return dataclasses.replace(
            region.take(place),
            center=region.switched(place, moves),
            letters=letters,
            options=options,
            radius=radius,
        )


class Proved(NamedTuple):
    """Lower bounds of a goal over a part: `whole`, and with each further letter put in, `each (G,
    K)` (infinite where it may not come).
    """

    whole: float
    each: Floats


def proved_of(
    bound: Bound, region: SubstitutionRegion, part: Part, arithmetic: Arithmetic
) -> Proved:
    """Return what multipliers prove of a part of the region, the rounding of every sum taken
    off.
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
    other = torch.empty_like(best)  # the largest falls of the other groups, one switch less
    within = torch.arange(len(best)) < part.left - 1
    other[order] = torch.where(within, best[: part.left].sum() - best, best[: part.left - 1].sum())
    numeric = float(fall.value) - float(best[: part.left].sum())
    each = constant - numeric - (loss + other[:, None])
    # As many of the largest terms as there are switches hold those of either sum; twice for the sum
    # that one is taken out of, once more for the letter's own.
    terms = float(fall.terms) + 3 * float(
        size.amax(1).sort(descending=True).values[: part.left].sum()
    )
    return Proved(whole, (each - gamma * (away + terms)).numpy())


def _losses(region: SubstitutionRegion, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far <slope, x'> falls with each letter that may come (G, K), minus infinity for
    the others, and the size of these terms.
    """
    values = slope[region.threat.columns]
    mine = values.gather(1, region.letters[0, :, None])
    options = region.options[0]
    return (mine - values).masked_fill(~options, -torch.inf), (
        mine.abs() + values.abs()
    ).masked_fill(~options, 0.0)


class Switching(Linear):
    """The programs of one model over a region of letters, of which parts and choices change from
    call to call.
    """

    def __init__(self, model: Model, region: SubstitutionRegion) -> None:
        check_numeric(region)
        self.region, self.whole = region, Part.whole(region)
        self.group, self.letter = np.nonzero(self.whole.options)
        self.place = {
            (g, j): i
            for i, (g, j) in enumerate(zip(self.group.tolist(), self.letter.tolist(), strict=True))
        }
        table, own = region.threat.columns.numpy(), region.letters[0].numpy()
        count, width = len(self.group), len(region.low[0])
        rows = np.concatenate([table[self.group, self.letter], table[self.group, own[self.group]]])
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
        """Return the answer of minimising the column `goal` over a part; None where the solver has
        none.
        """
        low, high = np.zeros(len(self.group)), part.options[self.group, self.letter].astype(float)
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
        """Return by how much each letter is put in at an offset, (G, K); 0 for a point's own."""
        found = np.zeros(self.whole.options.shape)
        found[self.group, self.letter] = delta[
            self.region.threat.columns.numpy()[self.group, self.letter]
        ]
        return found


def check_numeric(region: SubstitutionRegion) -> None:
    """Raise `BadInput` unless the numeric columns, if any, move in a set of straight sides."""
    numeric = region.numeric
    if numeric is not None and (numeric.norm.is_euclidean or numeric.norm.is_count):
        raise BadInput(
            "MILP moves numeric columns beside the letters in linf or l1 only: take such a ball as "
            "`numeric`, or bound the threat by BranchAndBound"
        )
    if numeric is not None and getattr(numeric, "cut", None) is not None:
        raise BadInput(
            "MILP knows no constraints on numeric columns beside the letters: leave them out, or "
            "bound the threat by BranchAndBound"
        )


def _numeric(region: SubstitutionRegion) -> tuple[Any, Any, Floats, Floats, list[float]]:
    """Return the ways in which numeric columns move, the row of their budget with its end, and the
    ends of their shares; all empty where there are none.
    """
    numeric, width = region.numeric, len(region.low[0])
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
