"""Optimal division of a perturbation budget among bounded features.

The algebra behind norms.py: solutions are piecewise in one scalar unknown, and the methods find the
piece in which the solution lies and solve there.

Masks are multiplied with rather than used for selection: a selection between tensors by an
irregular mask costs ten to thirty products on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# rounds of the search for the linear piece; three to eight have been enough, and the result of each
# round is admissible
_ROUNDS = 24
# relative to the largest direction: smaller ones are raised to this, whose square float32 still
# holds
_FAINT = 1e-15
_FEW = 64  # features: in l1 and l0 a nearest example changes a dozen
_ENDLESS = 1e30  # in the scaled units: farther than any box reaches


class Support(NamedTuple):
    """The maximum of <g, delta>, (M,), and a maximiser, (M, d)."""

    value: Tensor
    delta: Tensor


def rise_together(g: Tensor, speed: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return delta with |delta_i| = min(t speed_i, cap_i) of a given gain.

    The one t is chosen such that <g, delta> = gain; all features are at their caps where even these
    gain less. The gain is concave and piecewise linear in t, with a breakpoint where a feature
    reaches its cap. Newton steps from 0 never pass the solution, and once no more features reach
    their caps the iterate is the solution. Computed in units of the largest gradient, because
    products of a saturated model's float32 gradients underflow otherwise.
    """
    sign, tiny = g.sign(), torch.finfo(g.dtype).tiny
    cap = toward(sign, low, high)
    moves = (cap > 0).to(g.dtype)
    unit = g.abs().amax(-1, keepdim=True).clamp_min(tiny)
    size, wanted = g.abs() / unit, (gain / unit[:, 0]).clamp(0, _ENDLESS)
    speed = (speed / speed.amax(-1, keepdim=True).clamp_min(tiny)).clamp_min(_FAINT) * moves
    slope, full, free, time = size * speed, size * cap, moves, torch.zeros_like(wanted)
    for _ in range(_ROUNDS):
        missing = (wanted - (full * (moves - free)).sum(-1)).clamp_min(0)
        time = torch.maximum(
            time, (missing / (slope * free).sum(-1).clamp_min(tiny)).clamp(max=_ENDLESS)
        )
        still = free * (speed * time[:, None] < cap)
        if _settled(still, free):
            break
        free = still
    return (torch.minimum(speed * time[:, None], cap) * sign).clamp(low, high)


def rise_in_order(g: Tensor, rank: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return delta that moves the features of highest rank to their ends.

    The last of them moves only as far as <g, delta> = gain asks.
    """
    return (
        spend_in_order(rank, g.abs(), torch.where(g > 0, high, -low), gain.clamp_min(0)) * g.sign()
    ).clamp(low, high)


def spend_in_order(rank: Tensor, price: Tensor, cap: Tensor, budget: Tensor) -> Tensor:
    """Return lengths in [0, cap_i] whose prices add up to the budget (M,).

    Features of highest rank come first, each as far as it can move; features of price 0 stay put.
    Few features are enough as a rule, and to find them costs a fifth of sorting all; rows for which
    they are too few are sorted whole.
    """
    lengths, enough = _spend_on(
        rank.topk(min(_FEW, rank.shape[-1]), dim=-1).indices, price, cap, budget
    )
    if rank.shape[-1] > _FEW:
        more = torch.nonzero(~enough).flatten()
        if len(more):
            order = rank[more].argsort(dim=-1, descending=True, stable=True)
            lengths = lengths.index_copy(
                0, more, _spend_on(order, price[more], cap[more], budget[more])[0]
            )
    return lengths


def _spend_on(order: Tensor, price: Tensor, cap: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Return lengths (M, d) of the features in `order (M, k)`.

    Also returns whether they spend the budget. In float64, whose range holds every product.
    """
    ranked, room, limit = (
        price.gather(-1, order).double(),
        cap.gather(-1, order).double(),
        budget.double(),
    )
    cost = torch.where(ranked > 0, ranked * room, 0.0)
    spent_before = _sum_before(cost)
    missing = (limit[:, None] - spent_before).clamp_min(0)
    length = torch.where(
        ranked > 0,
        torch.minimum(missing / ranked.clamp_min(torch.finfo(torch.float64).tiny), room),
        0.0,
    )
    return torch.zeros_like(price).scatter(-1, order, length.to(price.dtype)), spent_before[
        :, -1
    ] + cost[:, -1] >= limit


def toward(sign: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return how far each feature can move in the direction of its sign.

    low <= 0 <= high; 0 where the sign is 0.
    """
    top = torch.finfo(low.dtype).max
    return torch.maximum(low.clamp_min(-top) * sign, high.clamp_max(top) * sign)


def caps(direction: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return how far each feature can move in the direction's sign.

    Never farther than the radius, so that it is finite, and 0 where the direction is 0.
    """
    return toward(direction.sign(), low, high).minimum(radius[:, None])


def share_out(size: Tensor, cap: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Return lengths min(s size, cap) whose l2 length is the radius, and s.

    Shapes (M, d) and (M,); all caps and s = infinity where even the caps are shorter than the
    radius. The s of the features that still move, the others at their caps, rises from round to
    round and never passes the solution; once no more features reach their caps it is the solution.
    Computed in units of the largest size and of the radius, because squares of float32 gradients of
    a saturated model underflow otherwise.
    """
    tiny = torch.finfo(size.dtype).tiny
    moves = ((size > 0) & (cap > 0)).to(size.dtype)
    unit, whole = (size * moves).amax(-1).clamp_min(tiny), radius.clamp_min(tiny)
    share, room = (size / unit[:, None]).clamp_min(_FAINT), cap * moves / whole[:, None]
    squared_share, squared_room, free, scale = (
        share.square(),
        room.square(),
        moves,
        torch.zeros_like(radius),
    )
    for _ in range(_ROUNDS):
        left = 1 - (squared_room * (moves - free)).sum(-1)
        # where no feature moves, the scale stays as it was
        scale = torch.maximum(
            scale, (left.clamp_min(0) / (squared_share * free).sum(-1).clamp_min(tiny)).sqrt()
        )
        still = free * (share * scale[:, None] < room)
        if _settled(still, free):
            break
        free = still
    enough = squared_room.sum(-1) >= 1
    length = torch.minimum(share * (scale * whole)[:, None], cap) * moves
    scale = torch.where(enough, (scale / unit * whole).clamp_min(tiny), torch.inf)
    return torch.where(enough[:, None], length, cap), scale


def soft_threshold(size: Tensor, cap: Tensor, w: Tensor, radius: Tensor) -> Tensor:
    """Return the threshold t (M,) at which the weighted budget is spent.

    It solves sum_i w_i clip(size_i - t w_i, 0, cap_i) = radius for t >= 0, and is 0 where t = 0
    already spends no more than the radius. The sum is piecewise linear and falls with t. Newton
    steps inside a bracket that they narrow, or its middle where they would leave it: the first step
    that starts on the linear piece of the solution lands on the solution. The t returned spends no
    more than the radius.
    """
    eps, tiny = torch.finfo(size.dtype).eps, torch.finfo(size.dtype).tiny
    low, high = torch.zeros_like(radius), (size / w).amax(-1)
    t, most, done = low, radius * (1 + 4 * eps), torch.zeros_like(radius, dtype=torch.bool)
    for _ in range(_ROUNDS):
        over = size - t[:, None] * w
        length = torch.minimum(over.clamp_min(0), cap)
        spent, unstable = (w * length).sum(-1), (w.square() * ((over > 0) & (over <= cap))).sum(-1)
        fits = spent <= most
        high, low = torch.where(fits & ~done, t, high), torch.where(fits, low, t)
        # a point that is solved keeps its result, however many rounds the others in the batch take
        done = (
            done
            | (fits & ((spent >= radius * (1 - 16 * eps)) | (t == 0)))
            | (high - low <= eps * high)
        )
        if _settled(done):
            break
        step = t + (spent - radius) / unstable.clamp_min(tiny)
        t = torch.where((step > low) & (step < high), step, (low + high) / 2)
    return high


def _settled(now: Tensor, before: Tensor | None = None) -> bool:
    """Return whether a search may end before its last round.

    Only on a CPU: elsewhere the synchronisation costs more than the rounds that it saves.
    """
    return now.device.type == "cpu" and (
        bool(now.all()) if before is None else torch.equal(now, before)
    )


def largest(rank: Tensor, values: Tensor, count: Tensor) -> Tensor:
    """Return the values of the `count` (M,) largest ranks, and 0 elsewhere.

    Counts are rounded down; of equal ranks the first come first.
    """
    few, most = min(_FEW, rank.shape[-1]), count.floor()
    last = (most.long() - 1).clamp(0, few - 1)
    least = rank.topk(few, dim=-1).values.gather(-1, last[:, None])
    kept = values * (rank >= least) * (most > 0)[:, None]
    # ties at the last rank, or more than the few that were found: those rows are sorted whole
    doubt = torch.nonzero((most > few) | ((kept != 0).sum(-1) > most)).flatten()
    return (
        kept.index_copy(0, doubt, _largest_of_all(rank[doubt], values[doubt], most[doubt]))
        if len(doubt)
        else kept
    )


def _largest_of_all(rank: Tensor, values: Tensor, count: Tensor) -> Tensor:
    """Return the same by a stable sort of whole rows."""
    order = rank.argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(rank.shape[-1], device=rank.device) < count[:, None]
    return torch.where(
        torch.zeros_like(kept.expand_as(rank)).scatter(-1, order, kept.expand_as(rank)),
        values,
        torch.zeros_like(values),
    )


def _sum_before(terms: Tensor) -> Tensor:
    """Return the sums of all earlier terms.

    Not the cumulative sum minus the term, because both may be infinite.
    """
    return torch.cat([torch.zeros_like(terms[:, :1]), terms.cumsum(-1)[:, :-1]], -1)
