"""How does a random search that moves whole windows settle? Every other proposal moves a little: a
bump of adapted size in l2, part of a budget in l1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.attacks.queries import Asked, Look, Memory
from calipers.problem.ball import Region

_FIRST, _LEAST = 0.5, 1e-3  # shares of the radius: the first bump, the smallest
_LATE = 0.6  # share of the budget
# of the bump after a success; four failures take it back, so that one in five bumps succeeds
# (Rechenberg 1973)
_GROWTH = 1.5
# rounds of scaling what the box does not hold; each leaves a small part of the budget unspent
_FILLS = 4


def is_small(region: Region, query: Tensor, queries: int) -> Tensor:
    """Which questions, by their number, are small moves? Every other one; in l1 only late, because
    large windows gain more while much is spread.
    """
    return (query % 2 == 1) & (query > (_LATE * queries if region.norm.is_sparse else 1))


def at_the_start(region: Region) -> Memory:
    """Return what each point remembers: the share `bump` of the radius, and the lowest margin
    `heard`.
    """
    return {
        "bump": torch.full_like(region.radius, _FIRST),
        "heard": torch.full_like(region.radius, torch.inf),
    }


def listen(look: Look, memory: Memory, asked: Asked, answers: Tensor, queries: int) -> None:
    """Let the bump grow with each small move that lowered the margin, and shrink with each that did
    not.
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
    """Return the changes (B, d) after a small move, both in units in which the radius counts every
    feature alike.

    `own (B, d)` are the changes now, `pattern (B, d)` says where and which way to move. In l2 it is
    added with the length `bump (B,)`, and all is scaled to the radius. In l1 the features `giver
    (B, d)` hand the `share (B,)` of what they hold to it, besides what is unspent, as far as the
    box has room.
    """
    weight = (
        torch.ones_like(region.low)
        if region.weight is None
        else region.weight.expand_as(region.low)
    )
    low, high, limit = region.low * weight, region.high * weight, region.radius.to(own.dtype)
    tiny = torch.finfo(own.dtype).tiny
    unit = pattern / region.norm.of(pattern).clamp_min(tiny)[:, None]
    if region.norm.is_euclidean:
        total = own + (bump.to(own.dtype) * limit)[:, None] * unit
        for _ in range(_FILLS):
            total = (total * (limit / region.norm.of(total).clamp_min(tiny))[:, None]).clamp(
                low, high
            )
        return total
    return _handed(own, unit, giver & (pattern == 0), share.to(own.dtype), limit, low, high)


def _handed(
    own: Tensor,
    unit: Tensor,
    giver: Tensor,
    share: Tensor,
    limit: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """Return the changes after the givers handed on what the pattern can take."""
    tiny = torch.finfo(own.dtype).tiny
    held = torch.where(giver, own, 0.0)
    offered, unspent = share * held.abs().sum(1), (limit - own.abs().sum(1)).clamp_min(0)
    taken = (own + unit * (offered + unspent)[:, None]).clamp(low, high)
    cost = taken.abs().sum(1) - own.abs().sum(1)
    given = ((cost - unspent).clamp_min(0) / held.abs().sum(1).clamp_min(tiny)).clamp(max=1)
    return taken - held * given[:, None]
