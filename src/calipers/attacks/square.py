"""Square Attack: random search over windows of the image, scores only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from calipers.attacks.engine import local_moves
from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.query_loop import Memory, Play, PointsInFlight, Queries, run_queries
from calipers.errors import BadInput
from calipers.problem.capabilities import LP, Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

# query numbers, of a budget of 10,000, after which the area of a window is halved
_HALVED_AFTER = (
    10,
    50,
    200,
    500,
    1000,
    2000,
    4000,
    6000,
    8000,
)
_FULL_BUDGET = 10_000
# queries asked one by one even if `ahead` > 1: early on nearly every window helps, so further
# windows asked in the same round would be wasted
_ONE_BY_ONE = 100
# random numbers of a proposal besides its signs: places of two windows, the pattern's direction,
# the share of a small move
_WORDS = 6


@dataclass(frozen=True)
class Square:
    """Square Attack: random search over windows, by scores alone.

    A window of the image changes at once, and the change is kept if it lowers the margin; the
    windows become smaller with time (Andriushchenko et al. 2020; l1 after Croce and Hein 2021).
    Works on any model that can be called. In linf a window takes one corner of the ball per
    channel. In l2 and l1 it takes a pattern of two opposite hills, and the budget of a second
    window. Plain vectors have blocks of neighbouring features with a sign each instead of squares;
    in signals and long images a window grows along the long side once it fills the short one.

    Differs from the paper: each point draws its own windows, from its own random stream; windows
    reach the last row and column; a proposal that would change nothing is flipped, or drawn again
    over a feature that can move, before it costs a query; the first query is the point itself; in
    l2 and l1 the window takes the whole unspent budget, not each channel its part. In l2 every
    other proposal, and in l1 every other one of the last 40 % of the budget, is a small move (see
    the module `shares`): windows that take whole budgets never settle, and on a linear model of 8
    features they broke no point at 1.01 times its distance in 3000 queries; with small moves they
    broke all in 1000. Of 100 digits at 1.5 in l2, 5000 queries break 82 (without small moves: 74),
    and 800 break 58 (50).

    Cost: up to `queries` forward passes per point, until it is broken.

    Args:
        queries: Budget of forward passes per point.
        p: Share of the image that a window covers at first, above 0 and at most 1; it falls later.
        rescale: Fit the paper's schedule for 10,000 queries to the budget. Without it, a smaller
            budget ends among large windows: 2000 queries then break 29 of 40 digits of which a
            gradient attack breaks 34, and with it 33.
        proposals_per_step: Number of windows asked at once, after the first hundred queries, of
            which the best is kept. More than 1 makes fewer and fuller batches, which helps most
            where points are few.

    Raises:
        BadInput: A setting is out of its range, or the norm counts features.

    Example:
        >>> import torch, calipers
        >>> from calipers.attacks import Square
        >>> x, y = torch.tensor([[0.6, 0.2]]), torch.tensor([0])
        >>> ball = calipers.Ball("linf", 0.25)
        >>> calipers.attack(torch.nn.Identity(), x, y, ball, Square(queries=50)).success
        tensor([True])
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "example within the radius",
        "random squares within a budget of queries",
        norms=LP,
        needs="scores",
    )

    queries: int = 5000
    p: float = 0.8
    rescale: bool = True
    proposals_per_step: int = 1

    def __post_init__(self) -> None:
        if self.queries < 1 or not 0 < self.p <= 1 or self.proposals_per_step < 1:
            got = f"{self.queries}, {self.p}, {self.proposals_per_step}"
            raise BadInput(
                "Square takes queries >= 1 (usually 1000 to 10000), p above 0 and at most 1 "
                f"(usually 0.05 to 0.8) and ahead >= 1, got {got}"
            )

    def __call__(
        self, problem: Problem, *, seed: int = 0, batch: int | None = None
    ) -> Iterator[Attempt]:
        """Yield candidates as points are decided.

        `batch` is the number of points in flight; it does not change the result.
        """
        return run_queries(
            problem,
            windowed(problem, self.queries, self.p, self.rescale, self.proposals_per_step),
            seed=seed,
            batch=batch,
        )


def windowed(
    problem: Problem, queries: int, p: float = 0.8, rescale: bool = True, ahead: int = 1
) -> Play:
    """Return the random search over windows as a state machine.

    For attacks that go on from where this search ends.
    """
    norm = problem.region.norm
    if norm.is_count:
        raise BadInput(
            f"Square spreads a budget over windows, which norm {norm.name!r} does not allow; take "
            "'linf', 'l2' or 'l1'"
        )
    windows = _Windows.of(
        tuple(problem.x.shape[1:]),
        p,
        queries / _FULL_BUDGET if rescale else 1.0,
        norm.is_box,
        problem.x,
    )
    return _SquareState(queries, windows, ahead)


@dataclass(frozen=True, eq=False)
class _Windows:
    """The windows of one image shape.

    `sides (L, 2)` holds height and width by level, `patterns (2, L, rows, columns)` the patterns of
    the windows, upright and turned.
    """

    channels: int
    rows: int
    columns: int
    vector: bool
    sides: Tensor
    patterns: Tensor
    halved_after: Tensor

    @classmethod
    def of(
        cls, shape: tuple[int, ...], p: float, pace: float, flat: bool, like: Tensor
    ) -> _Windows:
        vector = len(shape) == 1
        channels, rows, columns = (
            (1, shape[0], 1)
            if vector
            else (math.prod(shape[:-2]), *shape[-2:])
            if len(shape) > 2
            else (shape[0], 1, shape[1])
        )
        sides = [
            _sides(rows, columns, p / 2**level, odd=not (flat or vector))
            for level in range(len(_HALVED_AFTER) + 1)
        ]
        patterns = torch.zeros(2, len(sides), rows, columns, dtype=torch.float64)
        for level, (height, width) in enumerate(sides):
            for turn, pattern in enumerate((_hills(height, width), _hills(width, height).T)):
                patterns[turn, level, :height, :width] = 1.0 if flat or vector else pattern
        halved = (
            (torch.tensor(_HALVED_AFTER, dtype=torch.float64, device=like.device) * pace)
            .round()
            .long()
        )
        return cls(
            channels,
            rows,
            columns,
            vector,
            torch.tensor(sides, device=like.device),
            patterns.to(like),
            halved,
        )

    @property
    def signs(self) -> int:
        """The number of signs that a proposal needs."""
        return self.rows if self.vector else self.channels

    def level(self, query: Tensor) -> Tensor:
        """Return the level of each query number."""
        return torch.searchsorted(self.halved_after, query)

    def place(
        self, level: Tensor, row: Tensor, column: Tensor, turn: Tensor | None = None
    ) -> Tensor:
        """Return the patterns placed at the given first row and column.

        Shape (B, 1, rows, columns), zero outside the window.
        """
        r = torch.arange(self.rows, device=row.device) - row[:, None]
        c = torch.arange(self.columns, device=row.device) - column[:, None]
        height, width = self.sides[level].unbind(1)
        inside = ((r >= 0) & (r < height[:, None]))[:, :, None] & ((c >= 0) & (c < width[:, None]))[
            :, None, :
        ]
        way = torch.zeros_like(level) if turn is None else turn
        value = self.patterns[
            way[:, None, None],
            level[:, None, None],
            r.clamp(0, self.rows - 1)[:, :, None],
            c.clamp(0, self.columns - 1)[:, None, :],
        ]
        return torch.where(inside, value, 0.0)[:, None]


def _sides(rows: int, columns: int, p: float, odd: bool) -> tuple[int, int]:
    """Return height and width of a window that covers the share p.

    A square where one fits, else the whole short side and as much of the long one as needed.
    """
    area = p * rows * columns
    side = max(1, round(math.sqrt(area)))
    side += 1 if odd and side % 2 == 0 else 0
    if side <= min(rows, columns):
        return side, side
    height, width = min(side, rows), min(side, columns)
    if rows > columns:
        return min(rows, max(1, round(area / width))), width
    return height, min(columns, max(1, round(area / height)))


def _hills(height: int, width: int) -> Tensor:
    """Return two neighbouring hills of concentric rectangles.

    One goes up and one down; shape (height, width).
    """
    left, right = _hill(height, width // 2), _hill(height, width - width // 2)
    return torch.cat([left, -right], 1)


def _hill(height: int, width: int) -> Tensor:
    """Return a hill of concentric rectangles, (height, width).

    Its height at ring m is the sum of 1 / (k + 1)^2 over the rings k >= m.
    """
    r, c = (torch.arange(n, dtype=torch.float64) - n // 2 for n in (height, width))
    ring = torch.maximum(r.abs()[:, None], c.abs()[None, :]).long()
    steps = 1 / torch.arange(1, max(height, width) + 2, dtype=torch.float64).square()
    return steps.flip(0).cumsum(0).flip(0)[ring]


class _Drawn(NamedTuple):
    """What a proposal draws its two windows from.

    `level (B,)` is the size of the windows, `words (B, W)` are uniform draws in [0, 1), two for the
    place of each window first, and `room (B, 2)` counts the rows and columns a window may begin at.
    """

    level: Tensor
    words: Tensor
    room: Tensor

    def take(self, index: Tensor) -> _Drawn:
        """Return the draws of some points."""
        return _Drawn(self.level[index], self.words[index], self.room[index])

    def place(self, window: int) -> Tensor:
        """Return the draws (B, 2) for the place of window 0 or 1."""
        return self.words[:, 2 * window : 2 * window + 2]

    def corner(self, window: int) -> Tensor:
        """Return the first row and column (B, 2) of a window placed anywhere."""
        return (self.place(window) * self.room).long()


@dataclass(frozen=True, eq=False)
class _SquareState:
    queries: int
    windows: _Windows
    width: int = 1
    labels_only: bool = False

    def start(self, region: Region, streams: Streams) -> Memory:
        lowest, highest = (
            region.snap(region.support(torch.full_like(region.center, sign)).point)
            for sign in (-1.0, 1.0)
        )
        movable = (
            (lowest != highest).flatten(1)
            if region.norm.is_box
            else (region.low < region.high) & (region.radius > 0)[:, None]
        )
        return {
            "lowest": lowest,
            "highest": highest,
            "movable": movable,
            "stuck": ~movable.any(1),
            **local_moves.at_the_start(region),
        }

    def ask(self, look: PointsInFlight, memory: Memory) -> Queries:
        count = torch.where(
            look.spent < _ONE_BY_ONE, 1, (self.queries - look.spent).clamp(1, self.width)
        )
        slot = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
        if len(slot) > len(count):
            number = torch.arange(len(slot), device=slot.device) - (count.cumsum(0) - count)[slot]
            look = look.take(slot)
            look = replace(look, spent=look.spent + number)
            memory = {name: value[slot] for name, value in memory.items()}
        points = self._proposals(look, memory, 0)
        # A proposal equal to the present point would waste a query: try the opposite signs, then a
        # window over a feature that can move.
        for attempt in (1, 2, 3):
            same = torch.nonzero(
                (points == look.best).flatten(1).all(1) & (look.spent > 0)
            ).flatten()
            if not len(same):
                break
            again = self._proposals(
                look.take(same), {name: value[same] for name, value in memory.items()}, attempt
            )
            points = points.index_copy(0, same, again)
        return Queries(
            slot, torch.where(per_job(look.spent == 0, points), look.region.center, points)
        )

    def hear(self, look: PointsInFlight, memory: Memory, asked: Queries, answers: Tensor) -> Tensor:
        local_moves.listen(look, memory, asked, answers, self.queries)
        return memory["stuck"]

    def _proposals(self, look: PointsInFlight, memory: Memory, attempt: int) -> Tensor:
        """Return a changed copy of the best point of every slot.

        Odd attempts flip the signs of the attempt before; from attempt 2 on, windows are placed to
        cover a feature that can move.
        """
        windows, region = self.windows, look.region
        shape = (-1, windows.channels, windows.rows, windows.columns)
        level = windows.level(look.spent)
        draws = (
            look.streams.fork(look.spent)
            .fork(attempt // 2)
            .uniform(_WORDS + windows.signs, torch.float64)
        )
        size = torch.tensor([windows.rows, windows.columns], device=level.device)
        drawn = _Drawn(level, draws, size - windows.sides[level] + 1)
        first, second = (drawn.corner(k) for k in (0, 1))
        if attempt >= 2:
            # Where the whole budget is spent, a window can only change something if the other
            # window holds some of it.
            first = self._anchored(look, memory["movable"], drawn, 0)
            second = self._anchored(look, (look.best != region.center).flatten(1), drawn, 1)
        turn = (draws[:, 4] < 0.5).long()
        signs = torch.where(draws[:, _WORDS:] < 0.5, -1.0, 1.0).to(region.center.dtype) * (
            -1.0 if attempt % 2 else 1.0
        )
        signs = (
            signs.view(-1, 1, windows.rows, 1)
            if windows.vector
            else signs.view(-1, windows.channels, 1, 1)
        )
        pattern = windows.place(level, first[:, 0], first[:, 1], turn) * signs
        begins = per_job(look.spent == 1, pattern)
        if bool(begins.any()):
            pattern = torch.where(begins, self._first(look).to(pattern.dtype), pattern)
        if region.norm.is_box:
            # Each corner is admissible feature by feature, so any mixture of them is: nothing to
            # project.
            low, high, best = (
                t.reshape(shape) for t in (memory["lowest"], memory["highest"], look.best)
            )
            return torch.where(pattern == 0, best, torch.where(pattern > 0, high, low)).view_as(
                region.center
            )
        pattern = pattern * memory["movable"].view(shape)
        other = windows.place(level, second[:, 0], second[:, 1])
        points = self._spend(look, pattern, torch.where(begins, torch.ones_like(other), other))
        small = torch.nonzero(local_moves.is_small(region, look.spent, self.queries)).flatten()
        if not len(small):
            return points
        moved = self._small(look, memory, pattern, drawn, small)
        # the small move changes nothing (no budget to hand over, or no room): propose the window
        idle = (moved == look.best[small]).flatten(1).all(1)
        return points.index_copy(0, small, torch.where(per_job(idle, moved), points[small], moved))

    def _small(
        self,
        look: PointsInFlight,
        memory: Memory,
        pattern: Tensor,
        drawn: _Drawn,
        chosen: Tensor,
    ) -> Tensor:
        """Return the chosen points after a small move."""
        part, drawn = look.take(chosen), drawn.take(chosen)
        region, weight = part.region, part.region.weight
        offset = (part.best - region.center).flatten(1)
        place = self._anchored(part, offset != 0, drawn, 1)
        giver = self.windows.place(drawn.level, place[:, 0], place[:, 1]) != 0
        giver = giver.expand(-1, self.windows.channels, -1, -1).flatten(1)
        own = offset if weight is None else offset * weight
        share = torch.where(drawn.words[:, 5] < 0.5, 1.0, 2 * drawn.words[:, 5] - 1)
        delta = local_moves.moved(
            region, own, pattern[chosen].flatten(1), giver, memory["bump"][chosen], share
        )
        delta = (delta if weight is None else delta / weight).clamp(region.low, region.high)
        return region.snap(region.center + delta.view_as(region.center))

    def _anchored(self, look: PointsInFlight, wanted: Tensor, drawn: _Drawn, window: int) -> Tensor:
        """Return first rows and columns of one window over a wanted feature.

        Each window covers a random one of the `wanted (B, d)` features.
        """
        luck = look.streams.fork(look.spent).fork(-1).uniform(wanted.shape[1], torch.float64) + 1
        pixel = (luck * wanted).argmax(1) % (self.windows.rows * self.windows.columns)
        place = torch.stack([pixel // self.windows.columns, pixel % self.windows.columns], 1)
        back = (drawn.place(window) * self.windows.sides[drawn.level]).long()
        return torch.minimum((place - back).clamp_min(0), drawn.room - 1)

    def _first(self, look: PointsInFlight) -> Tensor:
        """Return the signs of the first change.

        Vertical stripes where the ball is a box (linf), else tiles of hills; for a vector, one sign
        per feature.
        """
        w = self.windows
        if look.region.norm.is_box or w.vector:
            count = w.rows if w.vector else w.channels * w.columns
            draws = look.streams.fork(-1).uniform(count, torch.float64)
            return torch.where(
                draws.view(-1, w.channels, w.rows if w.vector else 1, w.columns) < 0.5, -1.0, 1.0
            ).expand(-1, -1, w.rows, -1)
        side = max(1, min(w.rows, w.columns) // 5)
        tall, wide = -(-w.rows // side), -(-w.columns // side)
        draws = look.streams.fork(-1).uniform(w.channels * tall * wide, torch.float64)
        signs = torch.where(draws.view(-1, w.channels, tall, wide) < 0.5, -1.0, 1.0)
        tiles = signs.repeat_interleave(side, 2).repeat_interleave(side, 3) * _hill(
            side, side
        ).repeat(tall, wide).to(signs)
        return tiles[:, :, : w.rows, : w.columns]

    def _spend(self, look: PointsInFlight, pattern: Tensor, other: Tensor) -> Tensor:
        """Return the points whose window takes all the unspent budget.

        The pattern is added to the window's own change, and the window gets all the budget that the
        rest leaves; the other window is emptied.
        """
        region, tiny = look.region, torch.finfo(pattern.dtype).tiny
        of, weight = region.norm.of, region.weight
        offset = (look.best - region.center).flatten(1)
        own = (offset if weight is None else offset * weight).view(pattern.shape)
        inside = pattern != 0
        rest = torch.where(inside | (other != 0), 0.0, own)
        kept = torch.where(inside, own, 0.0)
        both = [
            part / of(part.flatten(2)).clamp_min(tiny)[:, :, None, None] for part in (pattern, kept)
        ]
        change = both[0] + both[1]
        spent, limit = of(rest.flatten(1)), region.radius.to(pattern.dtype)
        left = (
            (limit.square() - spent.square()).clamp_min(0).sqrt()
            if region.norm.is_euclidean
            else (limit - spent).clamp_min(0)
        )
        delta = (
            rest + change * (left / of(change.flatten(1)).clamp_min(tiny)).view(-1, 1, 1, 1)
        ).flatten(1)
        # The length cannot exceed the radius, and the box only shortens it.
        delta = (delta if weight is None else delta / weight).clamp(region.low, region.high)
        return region.snap(region.center + delta.view_as(region.center))
