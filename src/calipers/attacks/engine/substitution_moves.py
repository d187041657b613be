"""Evaluation of sets of substitutions, the best of each point kept.

The model judges them as discrete symbols. A set is a list of moves, -1 for none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.attacks.engine.batches import backwards_of
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.random_streams import Streams
from calipers.threats.substitution_region import SubstitutionRegion

_ROWS = 4096  # candidates in one forward pass


class Ways:
    """One block of points, with the best set of substitutions of each.

    Each set is a row of moves (N, k), with -1 for none; its worst margin is kept beside it.
    """

    def __init__(self, problem: Problem, region: SubstitutionRegion) -> None:
        self.problem, self.region = problem, region
        self.n, device = len(problem), problem.x.device
        self.k = max(1, int(region.budget.max()))
        self.base = region.center  # the points without substitutions; numeric columns change here
        self.best = torch.full((self.n, self.k), -1, dtype=torch.long, device=device)
        self.forwards, self.backwards = (
            torch.zeros(self.n, dtype=torch.long, device=device) for _ in range(2)
        )
        self.score = self._evaluate(torch.arange(self.n, device=device), self.best[:, None])[:, 0]
        # The sum of one random number per move names a set of moves, whatever their order.
        self.names = Streams(torch.arange(region.options[0].numel(), device=device)).fork(0).keys

    def attempt(self, block: Tensor) -> Attempt:
        """Return the best candidates so far."""
        candidate = self.region.substituted(
            torch.arange(self.n, device=block.device), self.best, self.base
        )
        # one-hot symbols need no snapping
        candidate = candidate if self.region.continuous is None else self.region.snap(candidate)
        return Attempt(block, candidate, self.forwards, self.backwards)

    def _open(self) -> Tensor:
        """Return the points that still resist, and may be changed."""
        return torch.nonzero(~is_adversarial(self.score) & (self.region.budget > 0)).flatten()

    def _open_among(self, rows: Tensor) -> Tensor:
        return rows[~is_adversarial(self.score[rows])]

    def _evaluate(self, rows: Tensor, moves: Tensor, real: Tensor | None = None) -> Tensor:
        """Return the worst margins (P, T) of sets (P, T, i) at `rows (P,)`.

        NaN counts as broken, and what is not `real (P, T)` is never evaluated.
        """
        count, ways, _ = moves.shape
        asked = (
            torch.ones(count, ways, dtype=torch.bool, device=rows.device) if real is None else real
        )
        places = torch.nonzero(asked.flatten()).flatten()
        flat, owner = moves.flatten(0, 1)[places], rows.repeat_interleave(ways)[places]
        parts = [
            self._margins(o, self.region.substituted(o, m, self.base))
            for o, m in zip(owner.split(_ROWS), flat.split(_ROWS), strict=True)
        ]
        worst = torch.full(
            (count * ways,), torch.inf, dtype=self.problem.x.dtype, device=rows.device
        )
        if parts:
            worst[places] = torch.cat(parts).nan_to_num(nan=-torch.inf)
        self.forwards.index_add_(0, rows, asked.sum(1))
        return worst.view(count, ways)

    def _margins(self, rows: Tensor, points: Tensor) -> Tensor:
        logits = self.problem.classifier.logits(points)
        goal = self.problem.goal.take(rows)
        return goal.worst(goal.margins(logits, self.problem.y[rows]))

    def _slope(self, rows: Tensor, moves: Tensor) -> Tensor:
        """Return the gradient of minus the worst margin at one set (P, i) each.

        Zero where the model has none.
        """
        self.forwards.index_add_(0, rows, torch.ones_like(rows))
        back = backwards_of(self.problem)
        self.backwards.index_add_(0, rows, torch.full_like(rows, back))
        classifier = self.problem.classifier
        slopes = []
        for r, m in zip(rows.split(_ROWS), moves.split(_ROWS), strict=True):
            x = self.region.substituted(r, m, self.base).requires_grad_()
            classifier.passes.add(forwards=len(x), backwards=len(x) * back)
            with classifier.frozen():
                goal = self.problem.goal.take(r)
                loss = -goal.worst(goal.margins(classifier.network(x), self.problem.y[r])).sum()
                (slope,) = (
                    torch.autograd.grad(loss, x, allow_unused=True)
                    if loss.requires_grad
                    else (None,)
                )
            slopes.append(
                torch.zeros_like(x)
                if slope is None
                else slope.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            )
        return torch.cat(slopes)

    def _keep(self, rows: Tensor, moves: Tensor, worst: Tensor) -> Tensor:
        """Keep the best of the sets (P, T, i) of each point where it improves.

        Return where it did, (P,) bool. Best is the fewest substitutions among the sets that break
        the point, the lowest margin where none does.
        """
        broken, number = is_adversarial(worst), torch.arange(len(rows), device=rows.device)
        fewest = (moves >= 0).sum(2).masked_fill(~broken, self.k + 1).argmin(1)
        place = torch.where(broken.any(1), fewest, worst.argmin(1))
        lowest, chosen = worst[number, place], moves[number, place]
        better = lowest < self.score[rows]
        padded = torch.full((len(rows), self.k), -1, dtype=torch.long, device=rows.device)
        padded[:, : chosen.shape[1]] = chosen
        self.best[rows[better]], self.score[rows[better]] = padded[better], lowest[better]
        return better
