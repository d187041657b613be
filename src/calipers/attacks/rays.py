"""RayS: ray search over sign vectors in linf, by labels alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calipers.attacks.engine.batches import per_job
from calipers.attacks.engine.query_loop import (
    Memory,
    PointsInFlight,
    Queries,
    one_each,
    run_queries,
    unbounded,
)
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.ball import Region

_FLIP, _SHORTEN, _BISECT = 0, 1, 2
_TOLERANCE = 2e-3  # relative: what a flip has to save, and where the bisection ends
# shares of the distance by which a ray is shortened at once: the first, and the largest; the share
# doubles as long as the ray stays adversarial
_FIRST_CUT, _LARGEST_CUT = 0.01, 0.5


@dataclass(frozen=True)
class RayS:
    """RayS: the nearest adversarial corner in linf, by labels alone.

    Chen and Gu 2020; the problem's radius is ignored. A ray is a sign for each feature. The search
    asks whether flipping one block of signs is adversarial a little nearer than the ray so far; if
    so, the ray is shortened. The blocks are halves, quarters and so on down to single features.

    Differs from the paper: a search that saved nothing in a whole pass over all sizes of blocks, or
    has spent its share of the budget, starts over, `starts` times in all (the first from all
    features up, the others from random signs in runs); a ray is shortened by growing cuts before it
    is bisected; box, mask and weights come from the threat model. Measured on 100 digits of
    mnist-plain at linf 0.1, where 100 steps of gradients with 5 restarts break 88: 82 at 10,000
    queries, 78 at 3000 from one start.

    Cost: `queries` forward passes per point, fewer where all starts end in a corner that no flip
    improves, 1 where it is wrong already.

    Args:
        queries: Budget of forward passes per point.
        starts: Searches from different sign vectors, which share the budget.

    Raises:
        BadInput: A setting is out of its range, or the norm is not linf.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "attack",
        "nearest example",
        "rays from corner to corner (RayS)",
        norms=("linf",),
        needs="labels",
    )

    queries: int = 10_000
    starts: int = 3

    def __post_init__(self) -> None:
        if min(self.queries, self.starts) < 1:
            raise BadInput(
                "RayS takes queries >= 1 (usually 1000 to 10000) and starts >= 1 (usually "
                f"3), got {self.queries}, {self.starts}"
            )

    def __call__(
        self, problem: Problem, *, seed: int = 0, batch: int | None = None
    ) -> Iterator[Attempt]:
        """Yield the nearest candidates as points are decided.

        `batch` is the number of points in flight; it does not change the result.
        """
        norm = problem.region.norm
        if not norm.is_box:
            raise BadInput(
                f"RayS goes from corner to corner, which norm {norm.name!r} does not have; "
                "take 'linf', or HopSkipJump"
            )
        return run_queries(
            unbounded(problem), _Flips(self.queries, self.starts), seed=seed, batch=batch
        )


@dataclass(frozen=True)
class _Flips:
    """The search from ray to ray.

    `outer` is a distance that is adversarial along the signs `ray`, `inner` one that is not, and
    `trial` are the signs asked about next.
    """

    queries: int
    starts: int
    width: int = 1
    labels_only: bool = True

    def start(self, region: Region, streams: Streams) -> Memory:
        zero, ray = torch.zeros_like(region.radius, dtype=torch.long), torch.ones_like(region.low)
        counts = {name: zero.clone() for name in ("phase", "begun", "level", "block", "since")}
        ends = {
            "outer": region.radius.clone(),
            "inner": torch.zeros_like(region.radius),
            "cut": torch.zeros_like(region.radius),
        }
        return {**counts, **ends, "ray": ray, "trial": ray.clone(), "asked": region.radius.clone()}

    def ask(self, look: PointsInFlight, memory: Memory) -> Queries:
        phase, outer = memory["phase"], memory["outer"]
        flipping = phase == _FLIP
        # The first question of every start is its own ray, at the largest radius.
        flipped = torch.where(
            (memory["since"] == 0)[:, None],
            memory["ray"],
            memory["ray"] * (1 - 2 * self._block(memory).to(outer.dtype)),
        )
        memory["trial"] = torch.where(
            flipping[:, None], flipped.to(memory["ray"].dtype), memory["trial"]
        )
        nearer = torch.where(outer < look.region.radius, outer * (1 - _TOLERANCE), outer)
        along = torch.where(
            phase == _SHORTEN, outer * (1 - memory["cut"]), (memory["inner"] + outer) / 2
        )
        memory["asked"] = torch.where(flipping, nearer, along)
        points = look.region.at(memory["asked"]).support(memory["trial"].view_as(look.best)).point
        return one_each(torch.where(per_job(look.spent == 0, points), look.region.center, points))

    def hear(self, look: PointsInFlight, memory: Memory, asked: Queries, answers: Tensor) -> Tensor:
        broken, first = answers < 0, look.spent == 1
        phase, flipping = memory["phase"], memory["phase"] == _FLIP
        better, worse = broken & ~first, ~broken & ~first
        memory["ray"] = torch.where((flipping & better)[:, None], memory["trial"], memory["ray"])
        memory["outer"] = torch.where(better, memory["asked"], memory["outer"])
        memory["inner"] = torch.where(~flipping & worse, memory["asked"], memory["inner"])
        longer = (2 * memory["cut"]).clamp(max=_LARGEST_CUT)
        memory["cut"] = torch.where(
            flipping & better, _FIRST_CUT, torch.where(phase == _SHORTEN, longer, memory["cut"])
        )
        short = memory["outer"] - memory["inner"] <= _TOLERANCE * memory["outer"]
        ended = torch.where(short, _FLIP, _BISECT)
        after = torch.where(
            phase == _SHORTEN,
            torch.where(better, _SHORTEN, ended),
            torch.where(phase == _BISECT, ended, torch.where(better, _SHORTEN, _FLIP)),
        )
        memory["phase"] = torch.where(first, phase, after)
        self._advance(memory, flipping & ~first, better)
        return self._begin(look, memory)

    def _block(self, memory: Memory) -> Tensor:
        """Return the features of each point's present block, (B, d) bool."""
        d = memory["ray"].shape[1]
        size = self._sizes(d, memory["level"])
        first = (memory["block"] * size)[:, None]
        place = torch.arange(d, device=size.device)
        return (place >= first) & (place < first + size[:, None])

    def _sizes(self, d: int, level: Tensor) -> Tensor:
        return (d + 2**level - 1) // 2**level

    def _advance(self, memory: Memory, flipped: Tensor, better: Tensor) -> None:
        """Go on to the next block, to the next size, or to the largest again.

        `since` counts the questions since a flip saved something.
        """
        d = memory["ray"].shape[1]
        own = memory["since"] == 0  # the ray itself was asked about, no flipped block
        next_block = torch.where(flipped & ~own, memory["block"] + 1, memory["block"])
        through = next_block * self._sizes(d, memory["level"]) >= d
        memory["block"] = torch.where(through, 0, next_block)
        memory["level"] = torch.where(through, (memory["level"] + 1) % _levels(d), memory["level"])
        memory["since"] = torch.where(
            flipped, torch.where(better, 1, memory["since"] + 1), memory["since"]
        )

    def _begin(self, look: PointsInFlight, memory: Memory) -> Tensor:
        """Start over where the present start is exhausted.

        Return where it was the last one, (B,) bool.
        """
        d = memory["ray"].shape[1]
        passed = sum(-(-d // (-(-d // 2**level))) for level in range(_levels(d)))
        share = (memory["begun"] + 1) * self.queries // self.starts
        over = (look.spent > share) | ((memory["phase"] == _FLIP) & (memory["since"] > passed))
        memory["begun"] = memory["begun"] + over
        run = max(1, round(math.sqrt(d)))
        draws = look.streams.fork(memory["begun"]).uniform(-(-d // run), torch.float64)
        fresh = (
            torch.where(draws < 0.5, -1.0, 1.0)
            .repeat_interleave(run, 1)[:, :d]
            .to(memory["ray"].dtype)
        )
        memory["ray"] = torch.where(over[:, None], fresh, memory["ray"])
        for name, value in (
            ("phase", _FLIP),
            ("level", 0),
            ("block", 0),
            ("since", 0),
            ("inner", 0),
            ("outer", look.region.radius),
        ):
            memory[name] = torch.where(over, value, memory[name])
        return memory["begun"] >= self.starts


def _levels(d: int) -> int:
    """Return the number of sizes of blocks, from all features to a single one."""
    return math.ceil(math.log2(d)) + 1
