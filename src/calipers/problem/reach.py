"""Which is the shortest way to gain so much of a linear function inside a box? The algebra behind `Norm.reach`; which norm asks is known there."""

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
    length = torch.where(speed > 0, torch.minimum(time[:, None] * speed, cap), 0.0)
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


def _sum_before(terms: Tensor) -> Tensor:
    """Return the sums of all earlier terms; not cumsum minus the term, because both may be infinite."""
    return torch.cat([torch.zeros_like(terms[:, :1]), terms.cumsum(-1)[:, :-1]], -1)
