"""Gradient ascent on the slopes and multipliers of a lower bound.

A bad choice makes a bound loose, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.bounds.dual_bound import Dual, Free, Sight
from calipers.problem.interrupts import give_way

Watch = Callable[[Tensor, Sight], None]

_LAST = 0.2  # share of the step's length that is left at the end
# decay rates of Adam's two averages (Kingma and Ba 2015): smaller than usual, because the steps are
# few and without noise
_FIRST, _SECOND = 0.7, 0.9
_WORTH_LEAVING = 0.25  # share of rows that must have passed `enough` before they are dropped


@dataclass(frozen=True)
class Ascent:
    """Adam on slopes and multipliers, the best step kept for each row.

    It begins from the given choices; rows whose bound passes `enough` are done. `beta_step` is in
    units of each number's average coefficient, so scaled logits change nothing.
    """

    steps: int = 20
    alpha_step: float = 0.1
    beta_step: float = 0.1
    enough: float = 0.0

    def __call__(self, dual: Dual, free: Free, watch: Watch | None = None) -> tuple[Tensor, Free]:
        """Return the best bounds (P,) and the choices that gave them.

        `watch` is called at every step with the rows that are left and what was found for them.
        """
        best, kept = torch.full_like(dual.offsets[:, 0], -torch.inf), free
        left = torch.arange(len(best), device=best.device)
        moments, unit = _Moments(), dict[int, Tensor]()
        for step in range(self.steps + 1):
            give_way()
            sight = dual.see(free, forward=step < self.steps)
            if watch is not None:
                watch(left, sight)
            better = sight.bound > best[left]
            best[left] = torch.where(better, sight.bound, best[left])
            kept = kept.written(left, kept.take(left).replaced(better, free))
            if step == self.steps:
                break
            over = best[left] > self.enough
            if step % 4 == 0 and float(over.float().mean()) > _WORTH_LEAVING:
                stay = torch.nonzero(~over).flatten()
                if not len(stay):
                    break
                left, dual, free, sight = (
                    left[stay],
                    dual.take(stay),
                    free.take(stay),
                    sight.take(stay),
                )
                moments.take(stay)
                unit = {k: t[stay] for k, t in unit.items()}
            unit = unit or _units(dual, sight)
            free = dual.clamped(
                moments.moved(free, dual.gradient(free, sight), self._lengths(step, unit))
            )
        return best, kept

    def _lengths(self, step: int, unit: dict[int, Tensor]) -> Callable[[str, int], Tensor | float]:
        decay = _LAST ** (step / self.steps)
        return lambda kind, k: (
            decay * (self.beta_step * unit[k] if kind == "beta" else self.alpha_step)
        )


def _units(dual: Dual, sight: Sight) -> dict[int, Tensor]:
    """Return the average size of each number's coefficients, (P, 1).

    Of the coefficients behind its operations.
    """
    unit = {}
    for k, a in sight.coefficients.items():
        i = dual.graph.nodes[k - 1].inputs[0]
        if i in dual.weigh and k in dual.alpha_lines:
            weigh = dual.weigh[i]
            unit[i] = (
                (a.abs() * weigh).sum(1, keepdim=True) / weigh.sum(1, keepdim=True).clamp(min=1)
            ).clamp_min(1e-12)
    return {i: unit.get(i, torch.ones_like(w[:, :1])) for i, w in dual.weigh.items()}


class _Moments:
    """Adam's averages of the gradient and its square, for every tensor."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.count = 0

    def moved(
        self, free: Free, gradient: Free, length: Callable[[str, int], Tensor | float]
    ) -> Free:
        """Return the choices one step uphill."""
        self.count += 1
        return free.each(
            lambda kind, k, t: self._step(kind, k, t, gradient.of(kind, k), length(kind, k))
        )

    def _step(self, kind: str, k: int, value: Tensor, g: Tensor, length: Tensor | float) -> Tensor:
        if value.shape[1] == 1 and kind == "mix":
            return value
        g = g.nan_to_num(0.0, 0.0, 0.0)
        first, second = self.held.get((kind, k), (torch.zeros_like(g), torch.zeros_like(g)))
        first, second = first.lerp(g, 1 - _FIRST), second.lerp(g.square(), 1 - _SECOND)
        self.held[kind, k] = first, second
        up = (
            first / (1 - _FIRST**self.count) / ((second / (1 - _SECOND**self.count)).sqrt() + 1e-12)
        )
        return value + length * up

    def take(self, rows: Tensor) -> None:
        """Keep the chosen rows."""
        self.held = {key: (m[rows], v[rows]) for key, (m, v) in self.held.items()}
