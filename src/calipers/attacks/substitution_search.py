"""Search over at most k substitutions of symbols.

First order, greedy, beam, or exhaustive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from calipers.attacks.engine.substitution_moves import Ways
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.threats.neighbours import enumerate_substitutions
from calipers.threats.substitution_region import NUMERIC_ALONE, SubstitutionRegion

SearchName = Literal["auto", "exhaustive", "gradient", "greedy", "beam"]

_POINTS = 64  # points in flight: their candidates fill the batches
_WAYS = 512  # substitution candidates tried on every open point before broken points leave
_CLIMBS = 10  # rounds of the gradient search beyond two per substitution
_NUMERIC_STEPS = 10


@dataclass(frozen=True)
class SubstitutionSearch:
    """Replace at most k symbols (a `Substitutions` threat model).

    Whatever is proposed was evaluated exactly, as discrete symbols.  Numeric columns, where the
    threat model frees them, are moved by steepest steps before the symbols are searched and after;
    nothing is exact then.

    Args:
        search: The method. "gradient" ranks moves by their first-order gain g_a - g_own, evaluates
            the best 1..k of them together and the `width` best exchanges, and goes on from the best
            (like HotFlip, Ebrahimi et al. 2018). "greedy" evaluates every single substitution,
            keeps the best and repeats. "beam" keeps the best `width` candidates at each number of
            substitutions, then exchanges single symbols of the best while that helps. "exhaustive"
            evaluates all candidates, fewest substitutions first: if it finds nothing, nothing
            exists, and what it finds is nearest. "auto" is gradient, and for what resists
            exhaustive where that costs at most `limit` evaluations, beam elsewhere.
        width: Beam width, and number of exchanges tried by "gradient".
        limit: Evaluations that a point may cost in one search; greedy and beam keep to the moves of
            largest first-order gain where all are too many.
        nearest: Go on from each success with one substitution less, until nothing is found: with an
            exhaustive last search that is the exact least number. Points that resist all k are
            searched with twice as many substitutions, and again, until they break or every symbol
            may change.

    Raises:
        BadInput: A setting is out of its range, the threat model is no `Substitutions` (at the
            call), or an exhaustive search is asked over numeric columns or over more than `limit`
            candidates.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "symbols replaced, every candidate evaluated",
        norms=(),
        substitutions=True,
        needs="scores",
    )

    search: SearchName = "auto"
    width: int = 16
    limit: int = 100_000
    nearest: bool = False

    def __post_init__(self) -> None:
        if self.search not in get_args(SearchName):
            raise BadInput(
                f"unknown search {self.search!r}; choose one of "
                f"{', '.join(map(repr, get_args(SearchName)))}"
            )
        if self.width < 1 or self.limit < 1:
            raise BadInput(
                "SubstitutionSearch takes width >= 1 and limit >= 1, got "
                f"{self.width}, {self.limit}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield candidates in blocks of points; the seed is not used."""
        region: object = problem.region
        if not isinstance(region, SubstitutionRegion):
            raise BadInput(
                "SubstitutionSearch answers a Substitutions threat; for a Ball use a gradient "
                "attack"
            )
        if self.search == "exhaustive":
            _refuse_large(region, self.limit)
        for block in torch.arange(len(problem), device=problem.x.device).split(_POINTS):
            yield from self._block(problem.take(block), region.take(block), block)

    def _block(
        self, problem: Problem, region: SubstitutionRegion, block: Tensor
    ) -> Iterator[Attempt]:
        """Yield the candidates of one block of points.

        An interrupt yields what is found, and is passed on.
        """
        search, attempt = _BeamState(problem, region, self), None
        try:
            search.run()
            attempt = search.attempt(block)
            if self.nearest:
                self._narrow(problem, region, attempt, is_adversarial(search.score))
        except KeyboardInterrupt:
            yield attempt or search.attempt(block)
            raise
        yield attempt

    def _narrow(
        self, problem: Problem, region: SubstitutionRegion, attempt: Attempt, broken: Tensor
    ) -> None:
        """Search for the least number of substitutions of each point.

        Points without a success are searched with more substitutions, points with one with fewer;
        what is found is put into the attempt.
        """
        most = region.options.any(2).sum(1).double()
        left, count = torch.nonzero(~broken).flatten(), region.radius[~broken]
        while len(left := left[(wider := count < most[left])]):
            count = torch.minimum(2 * count[wider].clamp(min=NUMERIC_ALONE), most[left])
            found = self._again(problem, region, attempt, left, count)
            broken[left[found]] = True
            left, count = left[~found], count[~found]
        left = torch.nonzero(broken).flatten()
        while True:
            count = region.take(left).distance(attempt.candidate[left])
            left, count = left[count > 1], count[count > 1]
            if not len(left):
                return
            left = left[self._again(problem, region, attempt, left, count - 1)]

    def _again(
        self,
        problem: Problem,
        region: SubstitutionRegion,
        attempt: Attempt,
        left: Tensor,
        count: Tensor,
    ) -> Tensor:
        """Search the points `left` with other numbers of substitutions.

        Add the cost and what is found to the attempt, and return where something was found, (M,)
        bool.
        """
        # Neighbourhoods too large to be listed are searched heuristically; then the number found
        # need not be the least.
        tool = dataclasses.replace(self, search="auto") if self.search == "exhaustive" else self
        search = _BeamState(problem.take(left), region.take(left).at(count), tool)
        search.run()
        attempt_now = search.attempt(left)
        attempt.forwards.index_add_(0, left, attempt_now.forwards)
        attempt.backwards.index_add_(0, left, attempt_now.backwards)
        found = is_adversarial(search.score)
        attempt.candidate[left[found]] = attempt_now.candidate[found]
        return found


def _refuse_large(region: SubstitutionRegion, limit: int) -> None:
    if region.continuous is not None:
        raise BadInput(
            "an exhaustive search needs symbols only: the numeric columns can move in infinitely "
            "many ways. Use search='auto'."
        )
    sizes = region.sizes()
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    if sizes[largest] > limit:
        raise BadInput(
            f"point {largest} has {sizes[largest]} neighbours, more than limit={limit}: raise the "
            "limit, or use search='auto'"
        )


class _BeamState(Ways):
    """The searches of one block of points."""

    def __init__(
        self, problem: Problem, region: SubstitutionRegion, settings: SubstitutionSearch
    ) -> None:
        self.settings = settings
        super().__init__(problem, region)

    def run(self) -> None:
        """Run the chosen searches."""
        name = self.settings.search
        if self.region.continuous is not None:
            self._move_numeric()
        if name in ("auto", "gradient"):
            self._gradient(self._open())
        if name in ("auto", "exhaustive"):
            left = self._open()
            sizes = torch.tensor(
                [
                    self.region.continuous is None and size <= self.settings.limit
                    for size in self.region.take(left).sizes()
                ],
                dtype=torch.bool,
            )
            small = sizes.to(left.device) if len(left) else torch.zeros_like(left, dtype=torch.bool)
            self._exhaustive(left[small])
            if name == "auto":
                self._beam(left[~small], self.settings.width)
        if name in ("greedy", "beam"):
            self._beam(self._open(), 1 if name == "greedy" else self.settings.width)
        if self.region.continuous is not None:
            self._move_numeric()
        self._shorten()

    # ---- searching
    # ----------------------------------------------------------------------------------------------

    def _exhaustive(self, rows: Tensor) -> None:
        """Evaluate all candidates, fewest substitutions first.

        The first that breaks a point is its result. Points with equally many choices share the
        enumeration.
        """
        if not len(rows):
            return
        kinds = torch.cat([self.region.budget[rows, None], self.region.options[rows].sum(2)], 1)
        unique, kind = kinds.unique(dim=0, return_inverse=True)
        for i in range(len(unique)):
            left = rows[kind == i]
            for substitutions in enumerate_substitutions(unique[i, 1:], int(unique[i, 0]), _WAYS):
                ways = len(substitutions)
                moves = self.region.numbered(
                    left.repeat_interleave(ways), substitutions.repeat(len(left), 1, 1)
                ).view(len(left), ways, -1)
                worst = self._evaluate(left, moves)
                self._keep(left, moves, worst)
                left = self._open_among(left)
                if not len(left):
                    break

    def _gradient(self, rows: Tensor) -> None:
        """Go to the best candidate that the gradient suggests, while it improves."""
        for _ in range(2 * self.k + _CLIMBS):
            if not len(rows):
                return
            region, present = self.region.take(rows), self.best[rows]
            slope = self._slope(rows, present)
            ways = torch.cat(
                [
                    _prefixes(region.best_moves(slope)[1], self.k),
                    self._exchanges(region, slope, present),
                ],
                1,
            )
            better = self._keep(rows, ways, self._evaluate(rows, ways, (ways >= 0).any(2)))
            rows = rows[better & ~is_adversarial(self.score[rows])]

    def _exchanges(self, region: SubstitutionRegion, slope: Tensor, present: Tensor) -> Tensor:
        """Return the present candidate with one more substitution, (P, width, k).

        These are the `width` most promising ones. At the full budget, the least useful substitution
        gives way.
        """
        gains = region.gains(slope).flatten(1)
        symbols = region.options.shape[2]
        own = gains.gather(1, present.clamp(min=0)).masked_fill(present < 0, -torch.inf)
        # Free places come first; at a full budget, the substitution of least gain gives way.
        room = torch.arange(self.k, device=present.device) < region.budget[:, None]
        place = own.masked_fill(~room, torch.inf).argmin(1)
        kept = present.scatter(1, place[:, None], -1)
        taken = (kept[:, :, None] >= 0) & (
            kept[:, :, None].div(symbols, rounding_mode="floor")
            == torch.arange(region.options.shape[1], device=kept.device)
        )
        gains = gains.masked_fill(taken.any(1).repeat_interleave(symbols, 1), -torch.inf)
        order = gains.argsort(dim=1, descending=True, stable=True)[:, : self.settings.width]
        order = torch.where(gains.gather(1, order) > -torch.inf, order, -1)
        ways = kept[:, None].repeat(1, order.shape[1], 1)
        return ways.scatter(
            2, place[:, None, None].expand(-1, order.shape[1], 1), order[:, :, None]
        )

    def _beam(self, rows: Tensor, width: int) -> None:
        """Keep the best `width` candidates of 1, 2, ..., k substitutions.

        All extensions are evaluated; then single symbols of the best candidate are exchanged while
        that helps.
        """
        everyone = rows
        ways, worst = (
            torch.empty(len(rows), 1, 0, dtype=torch.long, device=rows.device),
            self.score[rows, None],
        )
        for i in range(self.k):
            alive = ~is_adversarial(self.score[rows]) & (self.region.budget[rows] > i)
            rows, ways, worst = rows[alive], ways[alive], worst[alive]
            if not len(rows):
                break
            room = max(1, self.settings.limit // (2 * self.k * width))
            ways, worst = self._extend(rows, ways, torch.isfinite(worst), room)
            self._keep(rows, ways, worst)
            worst, order = worst.sort(dim=1, stable=True)
            worst, order = worst[:, :width], order[:, :width]
            ways = ways.gather(1, order[:, :, None].expand(-1, -1, ways.shape[2]))
        # all single substitutions have been tried
        rows = self._open_among(everyone[self.region.budget[everyone] > 1])
        for _ in range(self.k if width > 1 else 0):
            if not len(rows):
                return
            present = self.best[rows]
            # each substitution left out once
            short = torch.stack(
                [present[:, [j for j in range(self.k) if j != i]] for i in range(self.k)], 1
            )
            real = present >= 0
            ways, worst = self._extend(
                rows, short, real, max(1, self.settings.limit // (2 * self.k * self.k))
            )
            better = self._keep(rows, ways, worst)
            rows = self._open_among(rows[better])

    def _extend(self, rows: Tensor, ways: Tensor, real: Tensor, room: int) -> tuple[Tensor, Tensor]:
        """Return each candidate with one substitution more.

        The candidates (P, W, i) become (P, W * M, i + 1); also return their worst margins, infinite
        where there is no such candidate. M is all moves, or the `room` of largest first-order gain.
        The same set of substitutions is evaluated once.
        """
        count, beams, done = ways.shape
        options = self.region.options[rows]
        symbols = options.shape[2]
        free = options.flatten(1)[:, None].expand(-1, beams, -1)
        if done:
            groups = torch.where(
                ways >= 0, ways.div(symbols, rounding_mode="floor"), options.shape[1]
            )
            taken = torch.zeros(
                count, beams, options.shape[1] + 1, dtype=torch.bool, device=rows.device
            ).scatter(2, groups, True)[:, :, :-1]
            free = free & ~taken.repeat_interleave(symbols, 2)
        if room < free.shape[2]:
            slope = self._slope(rows.repeat_interleave(beams), ways.flatten(0, 1))
            gains = (
                self.region.take(rows.repeat_interleave(beams))
                .gains(slope)
                .view(count, beams, -1)
                .masked_fill(~free, -torch.inf)
            )
            move = gains.argsort(dim=2, descending=True, stable=True)[:, :, :room]
        else:
            move = torch.arange(free.shape[2], device=rows.device).expand(count, beams, -1)
        admissible = free.gather(2, move) & real[:, :, None]
        wider = torch.cat(
            [ways[:, :, None].expand(-1, -1, move.shape[2], -1), move[..., None]], 3
        ).flatten(1, 2)
        name = (self.names[wider.clamp(min=0)] * (wider >= 0)).sum(2)
        name, order = name.masked_fill(~admissible.flatten(1), 0).sort(dim=1, stable=True)
        fresh = admissible.flatten(1).gather(1, order)
        fresh[:, 1:] &= name[:, 1:] != name[:, :-1]
        fresh = torch.zeros_like(fresh).scatter(1, order, fresh)
        return wider, self._evaluate(rows, wider, fresh)

    def _shorten(self) -> None:
        """Take back substitutions that a broken point does not need.

        One by one, as long as the point stays broken: fewer substitutions are a smaller distance.
        """
        rows = torch.nonzero(is_adversarial(self.score)).flatten()
        for _ in range(self.k - 1):
            rows = rows[(self.best[rows] >= 0).sum(1) > 1]
            if not len(rows):
                return
            present = self.best[rows]
            without = (
                torch.eye(self.k, dtype=torch.bool, device=rows.device) & (present >= 0)[:, :, None]
            )
            ways = present[:, None].masked_fill(without, -1)
            worst = self._evaluate(rows, ways, present >= 0)
            good, number = is_adversarial(worst), torch.arange(len(rows), device=rows.device)
            place, some = good.int().argmax(1), good.any(1)
            self.best[rows[some]], self.score[rows[some]] = (
                ways[number, place][some],
                worst[number, place][some],
            )
            rows = rows[some]

    def _move_numeric(self) -> None:
        """Climb by steepest steps in the numeric columns, symbols kept.

        The best place is kept.
        """
        rows = torch.nonzero(~is_adversarial(self.score)).flatten()
        region = self.region.take(rows)
        if not len(rows) or region.continuous is None:
            return
        columns = self.region.threat.rest(self.base)
        best = self.base
        try:
            for _ in range(_NUMERIC_STEPS):
                slope = self._slope(rows, self.best[rows]).flatten(1)[:, columns]
                rest = self.base[rows].flatten(1)[:, columns]
                moved = region.continuous.snap(
                    region.continuous.project(
                        region.continuous.step(rest, slope, 2.5 / _NUMERIC_STEPS)
                    )
                )
                now = self.base.flatten(1).index_copy(
                    0, rows, self.base[rows].flatten(1).index_copy(1, columns, moved)
                )
                self.base = now.view_as(self.base)
                worst = self._evaluate(rows, self.best[rows][:, None])[:, 0]
                better = rows[worst < self.score[rows]]
                self.score[better] = worst[worst < self.score[rows]]
                best = best.index_copy(0, better, self.base[better])
        finally:  # after an interrupt, too
            self.base = best


def _prefixes(moves: Tensor, k: int) -> Tensor:
    """Return the first 1, 2, ..., k of the moves.

    The moves (P, <= k) become (P, k, k), each row filled up with -1.
    """
    padded = torch.cat([moves, moves.new_full((len(moves), k - moves.shape[1]), -1)], 1)
    keep = torch.ones(k, k, dtype=torch.bool, device=moves.device).tril()
    return torch.where(keep, padded[:, None], -1)
