"""Branches of branch and bound, and the choice of their splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.bounds.dual_bound import Dual, Free, Root, Sight
from calipers.bounds.interval import Box
from calipers.graph.kinds import Elementwise
from calipers.graph.relaxations import Lines

_NARROW = 1e-6  # of the largest end: narrower intervals are not split


@dataclass(eq=False)
class Branches:
    """P branches as a structure of arrays.

    `bound (P,)`; `rows (P,)` their places in the root; `case (P,)` the case that each bounds;
    `cuts`, the ends that branching has set; and `free`, the slopes and multipliers chosen.
    """

    bound: Tensor
    rows: Tensor
    case: Tensor
    cuts: dict[int, Box]
    free: Free

    def __len__(self) -> int:
        return len(self.bound)

    def take(self, index: Tensor) -> Branches:
        """Return the chosen branches."""
        cuts = {k: box.take(index) for k, box in self.cuts.items()}
        return Branches(
            self.bound[index], self.rows[index], self.case[index], cuts, self.free.take(index)
        )

    def plus(self, other: Branches) -> Branches:
        """Return the branches of both."""
        cuts = {
            k: Box(
                torch.cat([box.lower, other.cuts[k].lower]),
                torch.cat([box.upper, other.cuts[k].upper]),
            )
            for k, box in self.cuts.items()
        }
        free = self.free.each(lambda kind, k, t: torch.cat([t, other.free.of(kind, k)]))
        joined = (
            torch.cat(pair)
            for pair in (
                (self.bound, other.bound),
                (self.rows, other.rows),
                (self.case, other.case),
            )
        )
        bound, rows, case = joined
        return Branches(bound, rows, case, cuts, free)


def uncut(root: Root, rows: Tensor) -> dict[int, Box]:
    """Return empty cuts for every number that can be cut.

    These are all but the input itself.
    """
    cuts = {}
    for k, columns in root.columns.items():
        if k:
            everything = torch.full(
                (len(rows), columns.place.shape[1]),
                torch.inf,
                dtype=root.region.center.dtype,
                device=rows.device,
            )
            cuts[k] = Box(-everything, everything)
    return cuts


@dataclass(frozen=True)
class Split:
    """The element to split in each of P branches.

    `which (P,)` is its number (as a place in `numbers`), `column` its column, `at` the value to
    split at; `can (P,)` says whether the branch can be split.
    """

    numbers: tuple[int, ...]
    which: Tensor
    column: Tensor
    at: Tensor
    can: Tensor

    def children(self, parents: Branches) -> Branches:
        """Return the branches above the split values, then those below."""
        cuts = {}
        for place, k in enumerate(self.numbers):
            box, mine = parents.cuts[k], (self.which == place)[:, None]
            here = mine & (
                torch.arange(box.lower.shape[1], device=mine.device) == self.column[:, None]
            )
            at = self.at[:, None]
            lower = torch.cat(
                [torch.where(here, torch.maximum(box.lower, at), box.lower), box.lower]
            )
            upper = torch.cat(
                [box.upper, torch.where(here, torch.minimum(box.upper, at), box.upper)]
            )
            cuts[k] = Box(lower, upper)
        twice = torch.arange(len(parents), device=self.which.device).repeat(2)
        free = parents.free.take(twice)
        return Branches(
            parents.bound[twice],
            parents.rows[twice],
            parents.case[twice],
            {**parents.cuts, **cuts},
            free,
        )


def _gap(lines: Lines, a: Tensor, z: Tensor, low: Tensor, high: Tensor, op: Elementwise) -> Tensor:
    """Return what the relaxation loses at the minimiser, |A| |line(z) - f(z)|.

    At a breakpoint this is the smaller gain of both children, if the minimiser stayed where it is.
    """
    line = torch.where(
        a > 0,
        lines.lower_slope * z + lines.lower_intercept,
        lines.upper_slope * z + lines.upper_intercept,
    )
    return a.abs() * (line - op.value(z)).abs()


def _height(
    lines: Lines, a: Tensor, z: Tensor, low: Tensor, high: Tensor, op: Elementwise
) -> Tensor:
    """Return the most that the relaxation can lose at the breakpoint.

    The distance there between the function and the line that is taken, times |A|: |A-| times the
    intercept for a ReLU, as in BaBSR (Bunel et al. 2020).
    """
    at = _split_point(op, low, high)
    line = torch.where(
        a > 0,
        lines.lower_slope * at + lines.lower_intercept,
        lines.upper_slope * at + lines.upper_intercept,
    )
    return a.abs() * (line - op.value(at)).abs() + 1e-3 * a.abs() * torch.minimum(-low, high).clamp(
        min=0
    )


def _split_point(op: Elementwise, low: Tensor, high: Tensor) -> Tensor:
    """Return the breakpoint nearest to the interval's middle, or the middle.

    Only breakpoints inside the interval count.
    """
    middle = (low + high) / 2
    best, nearest = middle, torch.full_like(low, torch.inf)
    for breakpoint in op.breakpoints or ():
        away = (middle - breakpoint).abs()
        takes = (low < breakpoint) & (breakpoint < high) & (away < nearest)
        best, nearest = torch.where(takes, breakpoint, best), torch.where(takes, away, nearest)
    return best


def candidates(dual: Dual, sight: Sight, each: int) -> list[Split]:
    """Return up to 2 * `each` ways to split every branch.

    Half are the elements of the largest gaps at the minimiser, half those of the largest heights of
    a relaxation.
    """
    numbers = tuple(
        k
        for k in dual.cuts
        if any(
            dual.graph.nodes[n - 1].inputs[0] == k and n in sight.coefficients
            for n in dual.alpha_lines
        )
    )
    places: list[list[Tensor]] = [[], [], [], [], []]  # gap, height, which, column, at
    for place, number in enumerate(numbers):
        node = next(
            n
            for n in dual.alpha_lines
            if dual.graph.nodes[n - 1].inputs[0] == number and n in sight.coefficients
        )
        op, ends, z = (
            dual.alpha_lines[node].op,
            dual.ends(number),
            dual.columns[number].get(sight.values[number]),
        )
        wide = (ends.upper - ends.lower) > _NARROW * torch.maximum(
            ends.upper.abs(), ends.lower.abs()
        )
        may = dual.columns[number].real & wide & op.unstable(ends.lower, ends.upper)
        args = (sight.lines[node], sight.coefficients[node], z, ends.lower, ends.upper, op)
        for held, measure in zip(places, (_gap, _height), strict=False):
            held.append(torch.where(may, measure(*args).nan_to_num(0.0), torch.full_like(z, -1.0)))
        places[2].append(torch.full_like(z, place, dtype=torch.long))
        places[3].append(torch.arange(z.shape[1], device=z.device).expand_as(z))
        places[4].append(_split_point(op, ends.lower, ends.upper))
    if not numbers:
        return []
    gap, height, which, column, at = (torch.cat(held, 1) for held in places)
    found = []
    for score in (gap, height):
        best = score.topk(min(each, score.shape[1]), dim=1)
        for value, index in zip(best.values.unbind(1), best.indices.unbind(1), strict=True):
            own = index[:, None]
            found.append(
                Split(
                    numbers,
                    which.gather(1, own)[:, 0],
                    column.gather(1, own)[:, 0],
                    at.gather(1, own)[:, 0],
                    value >= 0,
                )
            )
    return found


def chosen(splits: list[Split], worth: Tensor) -> Split:
    """Return for each branch the split of the largest worth (C, P)."""
    best = torch.where(torch.stack([s.can for s in splits]), worth, -torch.inf).argmax(0)
    pick = (best, torch.arange(worth.shape[1], device=worth.device))
    which, column, at, can = (
        torch.stack([getattr(s, name) for s in splits])[pick]
        for name in ("which", "column", "at", "can")
    )
    return Split(splits[0].numbers, which, column, at, can)
