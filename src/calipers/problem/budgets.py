"""How is a budget shared out among features that end at a box? Sort once, sum up, solve in one piece: the algebra behind the norms, which alone know p."""

from __future__ import annotations

import torch
from torch import Tensor


def rise_together(g: Tensor, speed: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return delta with |delta_i| = min(t speed_i, cap_i) and the one t at which <g, delta> = gain; all caps where even they gain less.

    The gain is increasing in t and linear between the breakpoints cap / speed: sort once, then solve in the one piece. In float64, because sums of squares
    of float32 gradients of a saturated model vanish.
    """
    tiny = torch.finfo(torch.float64).tiny
    unit = g.abs().amax(-1, keepdim=True).double().clamp_min(tiny)
    size, wanted = g.abs().double() / unit, (gain.double() / unit[:, 0]).clamp_min(0)
    speed = torch.where(size > 0, speed.double() / speed.amax(-1, keepdim=True).double().clamp_min(tiny), 0.0)
    cap = torch.where(g > 0, high, -low).double().masked_fill(size == 0, 0.0)
    breakpoint, order = torch.where(speed > 0, cap / speed.clamp_min(tiny), 0.0).sort(dim=-1)
    slope, full = (size * speed).gather(-1, order), (size * cap).gather(-1, order)
    free = slope.flip(-1).cumsum(-1).flip(-1)  # of the features not yet at their ends before this breakpoint
    before = _sum_before(full)
    gained = torch.where(free > 0, before + breakpoint * free, before)
    reached = gained >= wanted[:, None]
    first = reached.to(torch.int8).argmax(-1, keepdim=True)
    time = (wanted - before.gather(-1, first)[:, 0]).clamp_min(0) / free.gather(-1, first)[:, 0].clamp_min(tiny)
    time = torch.where(reached.any(-1) & (wanted > 0), time, torch.where(wanted > 0, torch.inf, 0.0))
    length = torch.where(speed > 0, time[:, None] * speed, 0.0)  # cut off by the box below
    return (length * g.sign()).to(g.dtype).clamp(low, high)


def rise_in_order(g: Tensor, rank: Tensor, gain: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return delta that moves the features of highest rank to their ends of the box, the last one only as far as <g, delta> = gain asks."""
    tiny = torch.finfo(torch.float64).tiny
    size, wanted = g.abs().double(), gain.double().clamp_min(0)
    cap = torch.where(g > 0, high, -low).double()
    order = rank.argsort(dim=-1, descending=True, stable=True)
    ranked = size.gather(-1, order)
    full = torch.where(ranked > 0, ranked * cap.gather(-1, order), 0.0)
    missing = (wanted[:, None] - _sum_before(full)).clamp_min(0)
    length = torch.where(ranked > 0, torch.minimum(missing / ranked.clamp_min(tiny), cap.gather(-1, order)), 0.0)
    return (torch.zeros_like(size).scatter(-1, order, length) * g.sign()).to(g.dtype).clamp(low, high)


def caps(direction: Tensor, radius: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far each feature can go in the direction's sign; never farther than the radius, so that it is finite, and 0 where the direction is 0."""
    reach = torch.where(direction > 0, high, -low).minimum(radius[:, None])
    return torch.where(direction == 0, torch.zeros_like(reach), reach)


def share_out(size: Tensor, cap: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lengths min(s size, cap) whose l2 length is the radius, (M, d), and s (M,); all caps and s = infinity where even they are shorter.

    The squared length is increasing in s and quadratic between the breakpoints cap / size: sort once, then solve in the one piece. In float64 and in units of
    the largest size and of the radius: squares of float32 gradients of a saturated model vanish otherwise.
    """
    tiny = torch.finfo(torch.float64).tiny
    unit = torch.where(cap > 0, size, torch.zeros_like(size)).amax(-1).double().clamp_min(tiny)
    whole = radius.double().clamp_min(tiny)
    share, room = size.double() / unit[:, None], cap.double() / whole[:, None]
    breakpoint, order = torch.where(share > 0, room / share.clamp_min(tiny), torch.zeros_like(share)).sort(dim=-1)
    squared_room, squared_share = room.gather(-1, order).square(), share.gather(-1, order).square()
    clipped = squared_room.cumsum(-1)
    free = squared_share.flip(-1).cumsum(-1).flip(-1)
    reached = clipped + (breakpoint * (free - squared_share).clamp_min(0).sqrt()).square() >= 1
    first = reached.to(torch.int8).argmax(-1, keepdim=True)
    left = 1 - (clipped - squared_room).gather(-1, first)[:, 0]
    scale = (left.clamp_min(0) / free.gather(-1, first)[:, 0].clamp_min(tiny)).sqrt()
    enough = reached.any(-1)
    length = torch.where(enough[:, None], torch.minimum(share * scale[:, None], room) * whole[:, None], cap.double())
    scale = torch.where(enough, (scale * (whole / unit)).clamp_min(torch.finfo(size.dtype).tiny), torch.inf)
    return torch.minimum(length.to(size.dtype), cap), scale.to(size.dtype)


def soft_threshold(size: Tensor, cap: Tensor, w: Tensor, radius: Tensor) -> Tensor:
    """Return t >= 0 (M,) with sum_i w_i clip(size_i - t w_i, 0, cap_i) = radius, or 0 where t = 0 already spends no more.

    The sum is piecewise linear and falling in t. Walk the breakpoints downwards: at size/w a feature starts to count (slope w^2), at (size - cap)/w it is full.
    """
    starts, fulls = size / w, ((size - cap) / w).clamp_min(0)
    breakpoint, order = torch.cat([starts, fulls], -1).sort(dim=-1, descending=True)
    slope = torch.cat([w.square(), -w.square()], -1).gather(-1, order).cumsum(-1)
    gap = breakpoint[:, :-1] - breakpoint[:, 1:]
    spent = torch.cat([torch.zeros_like(radius)[:, None], (slope[:, :-1] * gap).cumsum(-1)], -1)
    enough = spent >= radius[:, None]
    after = enough.to(torch.int8).argmax(-1, keepdim=True).clamp_min(1)
    before = after - 1
    missing = radius - spent.gather(-1, before)[:, 0]
    threshold = breakpoint.gather(-1, before)[:, 0] - missing / slope.gather(-1, before)[:, 0].clamp_min(torch.finfo(size.dtype).tiny)
    return torch.where((w * torch.minimum(size, cap)).sum(-1) <= radius, torch.zeros_like(threshold), threshold.clamp_min(0))


def largest(rank: Tensor, values: Tensor, count: Tensor) -> Tensor:
    """Return the values of the `count` (M,) largest ranks, rounded down, and 0 elsewhere; of equal ranks the first come first."""
    order = rank.argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(rank.shape[-1], device=rank.device) < count.floor()[:, None]
    return torch.where(torch.zeros_like(kept.expand_as(rank)).scatter(-1, order, kept.expand_as(rank)), values, torch.zeros_like(values))


def _sum_before(terms: Tensor) -> Tensor:
    """Return the sums of all earlier terms; not cumsum minus the term, because both may be infinite."""
    return torch.cat([torch.zeros_like(terms[:, :1]), terms.cumsum(-1)[:, :-1]], -1)
