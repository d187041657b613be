"""Lines of a function of one number as functions of alpha.

And the derivative of a bound by alpha. Every unstable element has two lines; what stands between
planes of several numbers is `Parametrised` in `graph/relaxations.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.graph.kinds import Elementwise
from calipers.graph.relaxations import Lines


class AlphaLines:
    """The lines of one operation's columns as a function of alpha."""

    def __init__(self, op: Elementwise, low: Tensor, high: Tensor) -> None:
        self.op, self.low, self.high = op, low, high
        self.found = op.alpha_lines(low, high)
        self.ends: tuple[Lines, list[Tensor | None]] | None = None
        if op.linear_in_alpha:
            first, last = (op.relax(low, high, torch.full_like(low, a)) for a in (0.0, 1.0))
            rise = [b - a for a, b in zip(first, last, strict=True)]
            self.ends = first, [r if bool(r.any()) else None for r in rise]

    def start(self) -> Tensor:
        """Return the activation's own guess."""
        if self.found is not None:
            return self.found.start
        guess = self.op.guess(self.low, self.high)
        return torch.full_like(self.low, 0.5) if guess is None else guess

    def lines(self, alpha: Tensor) -> Lines:
        """Return the lines at alpha."""
        if self.found is not None:
            return self.found.lines(alpha)
        if self.ends is None:
            return self.op.relax(self.low, self.high, alpha)
        return Lines(
            *(
                a if r is None else torch.addcmul(a, r, alpha)
                for a, r in zip(*self.ends, strict=True)
            )
        )

    def pull(self, alpha: Tensor, a: Tensor, z: Tensor) -> Tensor:
        """Return d bound / d alpha.

        From the coefficients behind the operation and the values before it.
        """
        below, above = a.clamp(min=0), a.clamp(max=0)
        pulls = (below * z, below, above * z, above)
        if self.ends is None:
            with torch.enable_grad():
                free = alpha.detach().requires_grad_()
                lines = self.lines(free)
                moving = [
                    (line, p) for line, p in zip(lines, pulls, strict=True) if line.requires_grad
                ]
                if not moving:
                    return torch.zeros_like(alpha)
                (gradient,) = torch.autograd.grad(
                    [line for line, _ in moving], free, [p for _, p in moving]
                )
            return gradient.nan_to_num(0.0)
        moved = [r * p for r, p in zip(self.ends[1], pulls, strict=True) if r is not None]
        return sum(moved[1:], moved[0]) if moved else torch.zeros_like(alpha)
