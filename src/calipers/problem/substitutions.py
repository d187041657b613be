"""What may an adversary do to letters? Replace at most k of them, each by an allowed one; and the finite neighbourhood that this makes around each point.

A letter is a one-hot group of columns, so k switches move a point by 2k in the l1 distance: || e_a - e_b ||_1 = 2, and the budget k is the l1 budget 2k.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.ball import Attained, Ball, Region
from calipers.problem.neighbours import BATCH, enumerate_switches, neighbourhood_size
from calipers.problem.streams import Streams


@dataclass(frozen=True, eq=False)
class Substitutions:
    """All x' that differ from x in at most k one-hot groups: {x' : x'_g in {x_g} + {e_a : a allowed in g}, #{g : x'_g != x_g} <= k}.

    `groups` lists the columns of the flattened input that make up each letter (`letters` makes that list for sequences); sizes may differ. `k` is one
    whole number, or one for each point (N,); k switches are the l1 budget 2k. `allowed` says which letters may be put in: a list of letter numbers for each
    group, a mask (G, K) with K the largest group's size, or a mask (G, K, K) of the letters that each letter may become; None allows all. Leaving a letter
    as it is is always admissible, allowed or not. `numeric` is a ball for the columns in no group, in their order (its box, mask and weights have their
    number); None freezes them.

    >>> Substitutions(letters(60, 4), k=2).k
    2
    """

    groups: Sequence[Sequence[int]]
    k: int | float | Tensor | Sequence[int]
    allowed: Tensor | Sequence[Sequence[int]] | None = None
    numeric: Ball | None = None

    norm: ClassVar[str] = "substitutions"
    box: ClassVar[None] = None  # letters have no ends, and their restrictions are in `allowed`; the numeric columns' own are in `numeric`
    mask: ClassVar[None] = None
    weights: ClassVar[None] = None

    def __post_init__(self) -> None:
        groups = tuple(tuple(int(c) for c in group) for group in self.groups)
        object.__setattr__(self, "groups", groups)
        if not groups or any(len(group) < 2 for group in groups):
            raise BadInput("groups must list the columns of each letter: at least one group, of at least two columns each")
        flat = [c for group in groups for c in group]
        if min(flat) < 0:
            raise BadInput(f"groups name columns of the flattened input, counted from 0, got {min(flat)}")
        if len(set(flat)) < len(flat):
            twice = next(c for c in flat if flat.count(c) > 1)
            raise BadInput(f"groups must not overlap: column {twice} is listed twice")
        k = torch.as_tensor(self.k, dtype=torch.float64)
        if k.dim() > 1:
            raise BadInput(f"k must be one number or one for each point, got a tensor of shape {tuple(k.shape)}")
        bad = torch.nonzero(~((k.reshape(-1) >= 0) & (k.reshape(-1) <= len(groups)) & (k.reshape(-1) == k.reshape(-1).floor()))).flatten()
        if len(bad):
            at = f" at point {int(bad[0])}" if k.dim() else ""
            raise BadInput(f"k must be a whole number of switches from 0 to the number of groups, {len(groups)}, got {float(k.reshape(-1)[bad[0]]):g}{at}")
        object.__setattr__(self, "allowed", self._mask_of(groups))

    def _mask_of(self, groups: tuple[tuple[int, ...], ...]) -> Tensor | None:
        """Return `allowed` as a mask, checked."""
        count, size = len(groups), max(map(len, groups))
        if self.allowed is None:
            return None
        if isinstance(self.allowed, Tensor):
            if self.allowed.dtype != torch.bool or self.allowed.shape not in ((count, size), (count, size, size)):
                shapes = f"({count}, {size}) or ({count}, {size}, {size})"
                raise BadInput(f"allowed must be a bool mask of shape {shapes}, got {tuple(self.allowed.shape)} of {self.allowed.dtype}")
            return self.allowed
        if len(self.allowed) != count:
            raise BadInput(f"allowed lists letters for {len(self.allowed)} groups, but there are {count}")
        mask = torch.zeros(count, size, dtype=torch.bool)
        for g, chosen in enumerate(self.allowed):
            wrong = [a for a in chosen if not 0 <= a < len(groups[g])]
            if wrong:
                raise BadInput(f"group {g} has the letters 0..{len(groups[g]) - 1}, but allowed names {wrong[0]}")
            mask[g, list(chosen)] = True
        return mask

    @cached_property
    def columns(self) -> Tensor:
        """The column of each letter, (G, K) int64; groups of fewer letters repeat their first column (see `exists`)."""
        size = max(map(len, self.groups))
        return torch.tensor([[*group, *[group[0]] * (size - len(group))] for group in self.groups], dtype=torch.long)

    @cached_property
    def exists(self) -> Tensor:
        """Which entries of `columns` are letters, (G, K) bool?"""
        size = self.columns.shape[1]
        return torch.arange(size) < torch.tensor([len(group) for group in self.groups])[:, None]

    def radii(self, n: int) -> Tensor:
        """Return the number of switches allowed at each of n points, (N,) float64."""
        k = torch.as_tensor(self.k, dtype=torch.float64)
        if k.dim() and len(k) != n:
            raise BadInput(f"k has {len(k)} entries, but there are {n} points: give one number, or one for each point")
        return k.expand(n).clone()

    def at(self, k: float | Tensor) -> Substitutions:
        """Return the same threat with another number of switches; a search for the least may ask for any number, and 1.9 allows one switch."""
        return dataclasses.replace(self, k=torch.as_tensor(k, dtype=torch.float64).floor().clamp(max=len(self.groups)))

    def take(self, index: Tensor) -> Substitutions:
        """Return the threat for the chosen points."""
        k = torch.as_tensor(self.k, dtype=torch.float64)
        numeric = None if self.numeric is None else self.numeric.take(index)
        return dataclasses.replace(self, k=k[index.to(k.device)] if k.dim() else self.k, numeric=numeric)

    def widest(self, x: Tensor) -> Tensor:
        """Return the number of switches beyond which more add nothing, (N,) float64: the groups that have another letter to offer."""
        return self.region(x).options.any(2).sum(1).double()

    def check(self, x: Tensor) -> None:
        """Raise `BadInput` unless every group of every point x (N, *D) is one-hot."""
        width = x[0].numel() if len(x) else 1 + int(self.columns.max())
        if int(self.columns.max()) >= width:
            raise BadInput(f"groups name column {int(self.columns.max())}, but a flattened input has {width} columns (shape {tuple(x.shape[1:])})")
        bad = torch.nonzero(~_one_hot(self._read(x)))
        if len(bad):
            point, group = bad[0].tolist()
            values = x[point].flatten()[list(self.groups[group])].tolist()
            raise BadInput(f"group {group} of point {point} is not one-hot: its columns hold {values}, where exactly one must be 1 and the others 0")

    def region(self, x: Tensor, *, outward: bool = False) -> SubstitutionRegion:
        """Return the admissible set around each point of x (N, *D), which must be one-hot in every group.

        With `outward` the numeric part is rounded outward; letters are exact anyway.
        """
        self.check(x)
        letters = self._read(x).argmax(2)
        options = self.exists.to(x.device).expand(len(x), -1, -1)
        if isinstance(self.allowed, Tensor):
            table, groups = self.allowed.to(x.device), torch.arange(len(self.groups), device=x.device)
            options = options & (table[groups, letters] if table.dim() == 3 else table)
        options = options.scatter(2, letters[:, :, None], False)
        numeric = None if self.numeric is None else self.numeric.region(x.flatten(1)[:, self.rest(x)], outward=outward)
        return SubstitutionRegion(self, x, self.radii(len(x)).to(x.device), letters, options, numeric)

    def rest(self, x: Tensor) -> Tensor:
        """Return the columns of the flattened input that are in no group, (R,)."""
        free = torch.ones(x[:1].numel() if len(x) else int(math.prod(x.shape[1:])), dtype=torch.bool)
        free[self.columns.flatten()] = False
        return torch.nonzero(free).flatten().to(x.device)

    def _read(self, points: Tensor) -> Tensor:
        """Return the columns group by group, (M, G, K); 0 where a group has fewer letters."""
        return points.flatten(1)[:, self.columns.to(points.device)] * self.exists.to(points)

    def identity(self) -> dict[str, Any]:
        """Return what makes two threats the same question, JSON-ready; k is not part of it (a verdict is a reading of a bracket).

        The numeric ball's radius is: a bracket measures switches, at that radius.
        """
        allowed = self.allowed.tolist() if isinstance(self.allowed, Tensor) else None
        numeric = None if self.numeric is None else {**self.numeric.identity(), "radius": torch.as_tensor(self.numeric.radius).tolist()}
        return {"norm": self.norm, "groups": [list(group) for group in self.groups], "allowed": allowed, "numeric": numeric}


@dataclass(frozen=True, eq=False)
class SubstitutionRegion:
    """The admissible set around each of M points.

    `center (M, *D)`, `radius (M,)` float64 switches, `letters (M, G)` the point's own, `options (M, G, K)` which letters may replace them, `numeric` the
    region of the other columns or None. A *move* is the number g * K + a of letter a put into group g; -1 is no move.
    """

    threat: Substitutions
    center: Tensor
    radius: Tensor
    letters: Tensor
    options: Tensor
    numeric: Region | None

    def take(self, index: Tensor | slice) -> SubstitutionRegion:
        """Return the regions of the chosen points, repetitions allowed."""
        numeric = None if self.numeric is None else self.numeric.take(index)
        return SubstitutionRegion(self.threat, self.center[index], self.radius[index], self.letters[index], self.options[index], numeric)

    def at(self, radius: Tensor) -> SubstitutionRegion:
        """Return the same regions with other numbers of switches (M,)."""
        return dataclasses.replace(self, radius=radius.to(self.center.device, torch.float64))

    @property
    def budget(self) -> Tensor:
        """How many groups may change at each point, (M,) int64."""
        return self.radius.floor().clamp(0, self.letters.shape[1]).long()

    def distance(self, points: Tensor) -> Tensor:
        """Return the number of changed groups of each point, (M,) float64; half the l1 distance where all are one-hot. The numeric part does not count."""
        return (self.threat._read(points) != self.threat._read(self.center)).any(2).sum(1).double()

    def contains(self, points: Tensor) -> Tensor:
        """Is each point admissible, (M,) bool? Every group one-hot, changed letters allowed, at most k changed, the rest inside its ball (or untouched).

        Exact comparison, no tolerance; a NaN is not inside.
        """
        values = self.threat._read(points)
        found = values.argmax(2)
        fine = (found == self.letters) | self.options.gather(2, found[:, :, None])[:, :, 0]
        inside = (_one_hot(values) & fine).all(1) & (self.distance(points) <= self.radius)
        rest = self._rest_of(points)
        return inside & (self.numeric.contains(rest) if self.numeric is not None else (rest == self._rest_of(self.center)).all(1))

    def gains(self, g: Tensor) -> Tensor:
        """Return what each move adds to <g, x'>, (M, G, K): g_a - g_own; minus infinity where it is not admissible."""
        values = self.threat._read(g)
        return (values - values.gather(2, self.letters[:, :, None])).masked_fill(~self.options, -torch.inf)

    def support(self, g: Tensor) -> Attained:
        """Return the exact maximum of <g, x'> and where it is attained, for one direction g (M, *D) a point.

        Groups contribute independently, so the best k of the groups' best gains max_a (g_a - g_own), where positive, are the maximum:
        <g, x> + sum of the k largest + the numeric part's own support.
        """
        gain, moves = self.best_moves(g)
        point = self.switched(torch.arange(len(moves), device=g.device), moves)
        value = (g * self.center).flatten(1).sum(1) + gain.clamp(min=0).sum(1)
        if self.numeric is None:
            return Attained(value, point)
        offset, _ = self.numeric.offset_support(self._rest_of(g))
        return Attained(value + offset, self._with_rest(point, self.numeric.support(self._rest_of(g)).point))

    def best_moves(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the k best moves along g, largest gain first, and their gains, both (M, max k); move -1 and gain 0 where none of the rest gains."""
        best, letter = self.gains(g).max(2)
        budget = self.budget
        order = best.argsort(dim=1, descending=True, stable=True)[:, : max(1, int(budget.max())) if len(budget) else 1]
        gain = best.gather(1, order)
        use = (torch.arange(order.shape[1], device=g.device) < budget[:, None]) & (gain > 0)
        move = order * self.options.shape[2] + letter.gather(1, order)
        return torch.where(use, gain, 0.0), torch.where(use, move, -1)

    def switched(self, rows: Tensor, moves: Tensor, base: Tensor | None = None) -> Tensor:
        """Return the points `rows (C,)` after the moves (C, i), (C, *D); `base (M, *D)` replaces the center as the source of all that is not moved."""
        group = moves.clamp(min=0).div(self.options.shape[2], rounding_mode="floor")
        letter = moves.clamp(min=0) - group * self.options.shape[2]
        columns = self.threat.columns.to(moves.device)
        points = (self.center if base is None else base)[rows].flatten(1)
        change = (moves >= 0).to(points.dtype)
        points = points.scatter_add(1, columns[group, self.letters[rows[:, None], group]], -change)  # 1 - 1 and 0 + 1 are exact in every dtype
        return points.scatter_add_(1, columns[group, letter], change).view(-1, *self.center.shape[1:])

    def snap(self, points: Tensor) -> Tensor:
        """Return the nearest admissible point of each; admissible ones stay as they are.

        One-hot points all have the same length, so the nearest is the one of largest inner product: the support along the point itself.
        """
        clean = points.nan_to_num(nan=0.0, posinf=1.0, neginf=0.0)
        _, moves = self.best_moves(clean)
        snapped = self.switched(torch.arange(len(points), device=points.device), moves)
        if self.numeric is None:
            return snapped
        return self._with_rest(snapped, self.numeric.snap(self.numeric.project(self._rest_of(clean))))

    def project(self, points: Tensor) -> Tensor:
        """Return the nearest admissible point of each (`snap` is exact already)."""
        return self.snap(points)

    def sample(self, streams: Streams) -> Tensor:
        """Return one admissible point per region: k random groups (as many as can change), each with a uniform choice of its allowed letters."""
        groups, letters = self.options.shape[1:]
        chance = streams.fork(0).uniform(groups, torch.float64).masked_fill(~self.options.any(2), -1.0)
        order = chance.argsort(dim=1, descending=True, stable=True)[:, : int(self.budget.max())]
        pick = streams.fork(1).uniform(groups * letters, torch.float64).view(-1, groups, letters).masked_fill(~self.options, -1.0).argmax(2)
        use = (torch.arange(order.shape[1], device=order.device) < self.budget[:, None]) & (chance.gather(1, order) >= 0)
        moves = torch.where(use, order * letters + pick.gather(1, order), -1)
        point = self.switched(torch.arange(len(moves), device=moves.device), moves)
        return point if self.numeric is None else self._with_rest(point, self.numeric.snap(self.numeric.sample(streams.fork(2))))

    def sizes(self) -> list[int]:
        """Return how many ways of writing letters each region admits, exactly, the point itself included; numeric columns do not count."""
        kinds, kind = torch.cat([self.budget[:, None], self.options.sum(2)], 1).unique(dim=0, return_inverse=True)
        sizes = [neighbourhood_size(counts, k) for k, *counts in kinds.tolist()]
        return [sizes[i] for i in kind.tolist()]

    @cached_property
    def alternatives(self) -> Tensor:
        """The allowed letters of each group first, in order, (M, G, K) int64; only the first `options.sum(2)` of them mean anything."""
        return self.options.int().argsort(dim=2, descending=True, stable=True)

    def numbered(self, rows: Tensor, switches: Tensor) -> Tensor:
        """Return the moves (C, i) of the points `rows (C,)` for switches (C, i, 2): (group, number of the alternative)."""
        group, nth = switches.unbind(2)
        return group * self.options.shape[2] + self.alternatives[rows[:, None], group, nth]

    def neighbours(self, place: int, batch: int = BATCH) -> Iterator[Tensor]:
        """Yield every admissible way of writing the letters of one point once, in batches (B, *D): itself first, then one switch, two, ..., k."""
        for switches in enumerate_switches(self.options[place].sum(1), int(self.budget[place]), batch):
            rows = torch.full((len(switches),), place, device=self.center.device)
            yield self.switched(rows, self.numbered(rows, switches))

    def _rest_of(self, points: Tensor) -> Tensor:
        return points.flatten(1)[:, self.threat.rest(self.center)]

    def _with_rest(self, points: Tensor, rest: Tensor) -> Tensor:
        """Return the points with other numeric columns (M, R)."""
        return points.flatten(1).index_copy(1, self.threat.rest(self.center), rest).view_as(points)


def letters(length: int, size: int, *, letters_first: bool = False) -> list[list[int]]:
    """Return the groups of a sequence of `length` letters from an alphabet of `size`: inputs (length, size), or (size, length) with `letters_first`."""
    table = torch.arange(length * size).view(size, length).T if letters_first else torch.arange(length * size).view(length, size)
    return table.tolist()


def _one_hot(values: Tensor) -> Tensor:
    """Is each group exactly one-hot, (M, G) bool? A NaN is not."""
    return ((values == 0) | (values == 1)).all(2) & ((values == 1).sum(2) == 1)
