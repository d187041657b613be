"""Small moves that let a random search over windows converge.

Every other proposal moves a little: a change of adapted length in l2, part of a budget in l1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from calipers.attacks.engine.query_loop import Memory, PointsInFlight, Queries
from calipers.threats.ball import Region

_FIRST, _LEAST = 0.5, 1e-3  # lengths of a small move as shares of the radius: the first, the least
_LATE = 0.6  # share of the budget from which on small moves are made in l1
# factor on the length after a success; four failures undo it, so that one in five small moves
# succeeds (Rechenberg 1973)
_GROWTH = 1.5
# rounds of scaling to the radius and clipping to the box; each leaves less of the budget unspent
_FILLS = 4


class _Bounds(NamedTuple):
    """What limits changes.

    In units in which the radius counts every feature alike: `radius (B,)` is that of the ball,
    `low` and `high (B, d)` are the ends of the box.
    """

    radius: Tensor
    low: Tensor
    high: Tensor


def is_small(region: Region, query: Tensor, queries: int) -> Tensor:
    """Return which questions, by their number, are small moves, (B,) bool.

    Every other one; in l1 only late, because large windows gain more while much is spread over the
    image.
    """
    return (query % 2 == 1) & (query > (_LATE * queries if region.norm.is_sparse else 1))


def at_the_start(region: Region) -> Memory:
    """Return what each point remembers at its start.

    The length `bump` of small moves as a share of the radius, and the lowest margin `heard`.
    """
    return {
        "bump": torch.full_like(region.radius, _FIRST),
        "heard": torch.full_like(region.radius, torch.inf),
    }


def listen(
    look: PointsInFlight, memory: Memory, asked: Queries, answers: Tensor, queries: int
) -> None:
    """Adapt the length of small moves to their success.

    It grows with each small move that lowered the margin, and shrinks with each that did not.
    """
    count = torch.bincount(asked.slot, minlength=len(look.spent))
    number = (look.spent - count.cumsum(0))[asked.slot] + torch.arange(
        len(asked.slot), device=count.device
    )
    small, better = is_small(look.region, number, queries), answers < memory["heard"][asked.slot]
    hits, misses = (
        torch.zeros_like(count).index_add(0, asked.slot, (small & kind).long())
        for kind in (better, ~better)
    )
    memory["bump"] = (memory["bump"] * _GROWTH ** (hits - misses / 4.0)).clamp(_LEAST, 1.0)
    memory["heard"] = look.score


def moved(
    region: Region, own: Tensor, pattern: Tensor, giver: Tensor, bump: Tensor, share: Tensor
) -> Tensor:
    """Return the changes (B, d) after a small move.

    All changes are in units in which the radius counts every feature alike. `own (B, d)` are the
    present ones; `pattern (B, d)` says where and in which direction to move. In l2 the pattern is
    added with the length `bump (B,)`, and the sum is scaled to the radius. In l1 the features
    `giver (B, d)` hand the `share (B,)` of their budget to the pattern, besides what is unspent, as
    far as the box has room.
    """
    weight = (
        torch.ones_like(region.low)
        if region.weight is None
        else region.weight.expand_as(region.low)
    )
    limit = _Bounds(region.radius.to(own.dtype), region.low * weight, region.high * weight)
    tiny = torch.finfo(own.dtype).tiny
    unit = pattern / region.norm.of(pattern).clamp_min(tiny)[:, None]
    if region.norm.is_euclidean:
        total = own + (bump.to(own.dtype) * limit.radius)[:, None] * unit
        for _ in range(_FILLS):
            total = (total * (limit.radius / region.norm.of(total).clamp_min(tiny))[:, None]).clamp(
                limit.low, limit.high
            )
        return total
    return _handed(own, unit, giver & (pattern == 0), share.to(own.dtype), limit)


def _handed(own: Tensor, unit: Tensor, giver: Tensor, share: Tensor, limit: _Bounds) -> Tensor:
    """Return the changes after the givers handed on what the pattern can take."""
    tiny = torch.finfo(own.dtype).tiny
    held = torch.where(giver, own, 0.0)
    offered, unspent = share * held.abs().sum(1), (limit.radius - own.abs().sum(1)).clamp_min(0)
    taken = (own + unit * (offered + unspent)[:, None]).clamp(limit.low, limit.high)
    cost = taken.abs().sum(1) - own.abs().sum(1)
    given = ((cost - unspent).clamp_min(0) / held.abs().sum(1).clamp_min(tiny)).clamp(max=1)
    return taken - held * given[:, None]
