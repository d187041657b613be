"""The admissible set of a `Substitutions` threat around each point.

It is finite and exact, and can be enumerated. A symbol is a one-hot group of columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.random_streams import Streams
from calipers.threats.ball import Attained, Fall, Region
from calipers.threats.count_norms import L0
from calipers.threats.neighbours import BATCH, enumerate_substitutions, neighbourhood_size

if TYPE_CHECKING:
    from calipers.threats.substitutions import Substitutions

NUMERIC_ALONE = 0.5
"""The distance of a point whose symbols are unchanged and whose numeric columns moved.

In substitutions: farther than the point itself, nearer than one substitution.
"""


class SubstitutionCount(L0):
    """The norm that bounds see when the radius counts substitutions.

    `low` and `high` already say how far a column can move.
    """

    def alone(self, radius: Tensor) -> Tensor:
        """Return infinity: a column may move anywhere between its ends."""
        return torch.full_like(radius, torch.inf)


@dataclass(frozen=True, eq=False)
class SubstitutionRegion(Region):
    """The admissible set around each of M points.

    `center (M, *D)`, `radius (M,)` float64 substitutions, `low`, `high (M, d)` the ends of the
    smallest box around it, `symbols (M, G)` the point's own symbols, `options (M, G, K)` which
    symbols may replace them, `continuous` the region of the other columns or None. A *move* is the
    number g * K + a of symbol a put into group g; -1 is no move.
    """

    threat: Substitutions
    symbols: Tensor
    options: Tensor
    continuous: Region | None

    def take(self, index: Tensor | slice) -> SubstitutionRegion:
        """Return the regions of the chosen points, repetitions allowed."""
        numeric = None if self.continuous is None else self.continuous.take(index)
        parts = {
            name: getattr(self, name)[index]
            for name in ("center", "radius", "low", "high", "symbols", "options")
        }
        return dataclasses.replace(self, **parts, continuous=numeric)

    def at(self, radius: Tensor) -> SubstitutionRegion:
        """Return the same regions with other numbers of substitutions (M,)."""
        return dataclasses.replace(self, radius=radius.to(self.center.device, torch.float64))

    @property
    def budget(self) -> Tensor:
        """How many groups may change at each point, (M,) int64."""
        return self.radius.floor().clamp(0, self.symbols.shape[1]).long()

    def distance(self, points: Tensor) -> Tensor:
        """Return the number of changed groups of each point, (M,) float64.

        Half the l1 distance where all groups are one-hot and no numeric column moved. Numeric
        columns count only where no symbol changed: `NUMERIC_ALONE`.
        """
        substitutions = (
            (self.threat.read(points) != self.threat.read(self.center)).any(2).sum(1).double()
        )
        moved = (points != self.center).flatten(1).any(1).double()
        return torch.maximum(substitutions, NUMERIC_ALONE * moved)

    def contains(self, points: Tensor) -> Tensor:
        """Return whether each point is admissible, (M,) bool.

        Every group is one-hot, changed symbols are allowed, at most k have changed, and the rest is
        inside its ball (or untouched). Exact comparison, without a tolerance; a NaN is not inside.
        """
        values = self.threat.read(points)
        found = values.argmax(2)
        fine = (found == self.symbols) | self.options.gather(2, found[:, :, None])[:, :, 0]
        inside = (one_hot(values) & fine).all(1) & (self.distance(points) <= self.radius)
        rest = self._rest_of(points)
        return inside & (
            self.continuous.contains(rest)
            if self.continuous is not None
            else (rest == self._rest_of(self.center)).all(1)
        )

    def gains(self, g: Tensor) -> Tensor:
        """Return what each move adds to <g, x'>, (M, G, K): g_a - g_own.

        Minus infinity where the move is not admissible.
        """
        values = self.threat.read(g)
        return (values - values.gather(2, self.symbols[:, :, None])).masked_fill(
            ~self.options, -torch.inf
        )

    def support(self, g: Tensor) -> Attained:
        """Return the exact maximum of <g, x'> and a maximiser, for g (M, *D).

        Groups contribute independently, so the k largest of the groups' best gains max_a (g_a -
        g_own), where positive, give the maximum: <g, x> + sum of the k largest + the support of the
        numeric part.
        """
        gain, moves = self.best_moves(g)
        point = self.substituted(torch.arange(len(moves), device=g.device), moves)
        value = (g * self.center).flatten(1).sum(1) + gain.clamp(min=0).sum(1)
        if self.continuous is None:
            return Attained(value, point)
        offset, _ = self.continuous.offset_support(self._rest_of(g))
        return Attained(
            value + offset, self._with_rest(point, self.continuous.support(self._rest_of(g)).point)
        )

    def step(
        self, points: Tensor, g: Tensor, share: float | Tensor, spread: Tensor | None = None
    ) -> Tensor:
        """Raise `BadInput`: symbols cannot move by steps."""
        raise BadInput(
            "symbols are replaced, not moved by steps: search a Substitutions threat with a tool "
            "that replaces them"
        )

    def fall(self, a: Tensor, points: Tensor) -> Fall:
        """Return how far <a, x'> can fall below <a, x>, exact but for rounding.

        For directions a (P, S, d) at the chosen points (P,). The k largest falls max_b (a_own -
        a_b) of the groups give the maximum, as groups contribute independently.
        """
        columns, width = self.threat.columns.to(a.device), a.shape[1]
        values = a[:, :, columns.flatten()].unflatten(2, columns.shape)
        own = self.symbols[points][:, None, :, None].expand(-1, width, -1, -1)
        options = self.options[points][:, None]
        mine = values.gather(3, own)
        loss = (mine - values).masked_fill(~options, -torch.inf).amax(3).clamp(min=0)
        terms = (mine.abs() + values.abs()).masked_fill(~options, 0.0).amax(3)
        budget = self.budget[points]
        value, size = (_largest(t, budget) for t in (loss, terms))
        if self.continuous is None:
            return Fall(value, size)
        rest = self.continuous.fall(a[:, :, self.threat.rest(self.center)], points)
        return Fall(value + rest.value, size + rest.terms)

    def window_fall(
        self, a: Tensor, points: Tensor, low: Tensor, high: Tensor, weight: Tensor | None
    ) -> Fall:
        """Return an upper bound of the same where rows see only some columns.

        A row cannot tell which of its columns make a symbol. k substitutions turn at most k ones to
        zero and at most k zeros to one: the sum of the k largest falls of each kind. With numeric
        columns, which are not counted, the sum of all of them.
        """
        leaving, coming = (
            (a * low[:, None]).neg().clamp(min=0),
            (a * high[:, None]).neg().clamp(min=0),
        )
        budget = (
            self.budget[points] if self.continuous is None else torch.full_like(points, a.shape[2])
        )
        value = _largest(leaving, budget) + _largest(coming, budget)
        return Fall(value, value)

    def best_moves(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gains of the k best moves along g, and the moves.

        Both (M, max k), largest gain first; move -1 and gain 0 where no other move gains.
        """
        best, symbol = self.gains(g).max(2)
        budget = self.budget
        order = best.argsort(dim=1, descending=True, stable=True)[
            :, : max(1, int(budget.max())) if len(budget) else 1
        ]
        gain = best.gather(1, order)
        use = (torch.arange(order.shape[1], device=g.device) < budget[:, None]) & (gain > 0)
        move = order * self.options.shape[2] + symbol.gather(1, order)
        return torch.where(use, gain, 0.0), torch.where(use, move, -1)

    def substituted(self, rows: Tensor, moves: Tensor, base: Tensor | None = None) -> Tensor:
        """Return the points `rows (C,)` after the moves (C, i), (C, *D).

        `base (M, *D)` replaces the center as the source of all that is not moved.
        """
        group = moves.clamp(min=0).div(self.options.shape[2], rounding_mode="floor")
        symbol = moves.clamp(min=0) - group * self.options.shape[2]
        columns = self.threat.columns.to(moves.device)
        points = (self.center if base is None else base)[rows].flatten(1)
        change = (moves >= 0).to(points.dtype)
        # exact, since 1 - 1 and 0 + 1 are exact in every dtype
        points = points.scatter_add(1, columns[group, self.symbols[rows[:, None], group]], -change)
        return points.scatter_add_(1, columns[group, symbol], change).view(
            -1, *self.center.shape[1:]
        )

    def snap(self, points: Tensor) -> Tensor:
        """Return the nearest admissible point of each.

        Admissible points stay as they are. One-hot points all have the same length, so the nearest
        is the one of largest inner product: the support along the point itself.
        """
        clean = points.nan_to_num(nan=0.0, posinf=1.0, neginf=0.0)
        _, moves = self.best_moves(clean)
        snapped = self.substituted(torch.arange(len(points), device=points.device), moves)
        if self.continuous is None:
            return snapped
        return self._with_rest(
            snapped, self.continuous.snap(self.continuous.project(self._rest_of(clean)))
        )

    def project(self, points: Tensor) -> Tensor:
        """Return the nearest admissible point of each (`snap` is exact already)."""
        return self.snap(points)

    def sample(self, streams: Streams) -> Tensor:
        """Return one admissible point per region.

        k random groups change (or as many as can), each to a uniform choice of its allowed symbols.
        """
        groups, symbols = self.options.shape[1:]
        chance = (
            streams.fork(0).uniform(groups, torch.float64).masked_fill(~self.options.any(2), -1.0)
        )
        order = chance.argsort(dim=1, descending=True, stable=True)[
            :, : int(self.budget.max()) if len(chance) else 0
        ]
        pick = (
            streams.fork(1)
            .uniform(groups * symbols, torch.float64)
            .view(-1, groups, symbols)
            .masked_fill(~self.options, -1.0)
            .argmax(2)
        )
        use = (torch.arange(order.shape[1], device=order.device) < self.budget[:, None]) & (
            chance.gather(1, order) >= 0
        )
        moves = torch.where(use, order * symbols + pick.gather(1, order), -1)
        point = self.substituted(torch.arange(len(moves), device=moves.device), moves)
        return (
            point
            if self.continuous is None
            else self._with_rest(
                point, self.continuous.snap(self.continuous.sample(streams.fork(2)))
            )
        )

    def sizes(self) -> list[int]:
        """Return the number of symbol sequences that each region admits.

        Exact, the point itself included; numeric columns do not count.
        """
        kinds, kind = torch.cat([self.budget[:, None], self.options.sum(2)], 1).unique(
            dim=0, return_inverse=True
        )
        sizes = [neighbourhood_size(counts, k) for k, *counts in kinds.tolist()]
        return [sizes[i] for i in kind.tolist()]

    @cached_property
    def alternatives(self) -> Tensor:
        """The allowed symbols of each group first, in order, (M, G, K) int64.

        Only the first `options.sum(2)` of them mean anything.
        """
        return self.options.int().argsort(dim=2, descending=True, stable=True)

    def numbered(self, rows: Tensor, substitutions: Tensor) -> Tensor:
        """Return the moves (C, i) that given substitutions (C, i, 2) stand for.

        Of the points `rows (C,)`; a substitution is (group, number of the alternative).
        """
        group, nth = substitutions.unbind(2)
        return group * self.options.shape[2] + self.alternatives[rows[:, None], group, nth]

    def neighbours(self, place: int, batch: int = BATCH) -> Iterator[Tensor]:
        """Yield every admissible sequence of symbols of one point once.

        In batches (B, *D): the point itself first, then those with one substitution, two, ..., k.
        """
        for substitutions in enumerate_substitutions(
            self.options[place].sum(1), int(self.budget[place]), batch
        ):
            rows = torch.full((len(substitutions),), place, device=self.center.device)
            yield self.substituted(rows, self.numbered(rows, substitutions))

    def _rest_of(self, points: Tensor) -> Tensor:
        """Return the numeric columns of points, (M, R)."""
        return points.flatten(1)[:, self.threat.rest(self.center)]

    def _with_rest(self, points: Tensor, rest: Tensor) -> Tensor:
        """Return the points with other numeric columns (M, R)."""
        return points.flatten(1).index_copy(1, self.threat.rest(self.center), rest).view_as(points)


def _largest(values: Tensor, count: Tensor) -> Tensor:
    """Return the sum of the `count (P,)` largest of values (P, S, n), (P, S)."""
    most = min(int(count.max()), values.shape[2]) if len(count) else 0
    top = values.topk(most, dim=2).values
    return (top * (torch.arange(most, device=values.device) < count[:, None, None])).sum(2)


def one_hot(values: Tensor) -> Tensor:
    """Return whether each group is exactly one-hot, (M, G) bool.

    A NaN is not.
    """
    return ((values == 0) | (values == 1)).all(2) & ((values == 1).sum(2) == 1)
