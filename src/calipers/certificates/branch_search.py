"""The branch-and-bound search for one point.

Each round splits the branches of the lowest bounds, bounds their halves by gradient ascent on the
dual, and closes those whose bound is confirmed above 0.

A branch fixes on which side of a value some elements lie. Its bound is one dual function of slopes
and multipliers (Wang et al. 2021, beta-CROWN), ascended from where its parent's ascent ended; the
boxes of intermediate values stay those of the root, cut by the branch. Elements are chosen by what
their relaxation loses at the bound's own minimiser, and by the height of their relaxation (Bunel et
al. 2020, BaBSR); of the best of both, one look ahead at the children decides (De Palma et al. 2021,
FSB). A branch is closed only by a bound confirmed in checked float64. Minimisers are tried as
adversarial examples.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from calipers.bounds.dual_bound import Dual, Free, Root, Sight
from calipers.bounds.float64_check import confirmed
from calipers.bounds.optimise import Ascent
from calipers.bounds.rounding import SEARCH, plain_sums
from calipers.certificates.alpha_crown import ALPHA_STEP, Start
from calipers.certificates.examples import judged
from calipers.certificates.subproblems import Branches, candidates, chosen, uncut
from calipers.problem.branching import divided, most_wanted
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Startable

_HELD = 2**30  # bytes of branches of one point held at once; beyond them the search gives up
# of the ascent in branches with nothing left to split, where the exact bound is wanted
_LINEAR_STEPS, _LINEAR_STEP = 100, 0.03
# an attack every so many rounds (and in rounds that are powers of two), from so many minimisers
_ATTACK_EVERY, _ATTACKED = 16, 32
# shares of what the root's bound lacks to 0, and of what it lacked before a split (`Search._near`)
_NEAR, _STALLED, _GAIN = 0.0015, 0.05, 0.07
# rounds; then a symbol is settled, which gains more than splitting one more neuron
_SYMBOLS_AFTER = 8


@dataclass(frozen=True)
class Effort:
    """How much is spent on a branch, and how many are bounded at once.

    The fields are those of `BranchAndBound`.
    """

    steps: int = 12
    intermediate: int = 10
    batch: int = 128
    look: int = 2
    attack: Startable | None = None


class BranchSearch:
    """The search for one point.

    `proved` is the lower bound that holds over all branches so far.

    With `lacking (cases,)`, the root's bounds below 0, branches that gradient ascent is slow to
    close are put into `handed`, for a caller with a better method: those whose bound is nearly 0,
    and those with nothing left to split.
    """

    def __init__(
        self,
        effort: Effort,
        problem: Problem,
        start: Start,
        place: int,
        lacking: Tensor | None = None,
    ) -> None:
        assert start.root is not None and start.pending is not None
        self.lacking, self.handed = lacking, list[Branches]()
        self.effort, self.start, self.place = effort, start, place
        self.point = start.open[place]
        self.problem = problem.take(self.point.reshape(1))
        self.root: Root = start.root
        self.number = len(self.root.graph.nodes)
        self.rows = 0
        rows, case, free = start.pending
        mine = torch.nonzero(rows == place).flatten()
        cuts = uncut(self.root, rows[mine])
        self.open = Branches(
            start.case_bounds[self.point, case[mine]].to(SEARCH.dtype),
            rows[mine],
            case[mine],
            cuts,
            free.take(mine),
        )
        self.open.free.beta.update({k: torch.zeros_like(box.lower) for k, box in cuts.items()})
        self.proved = start.worst()[self.point].reshape(1)
        self.ascent = Ascent(effort.steps, ALPHA_STEP)
        self.round, self.stuck, self.symbol = 0, False, most_wanted(self.problem, self.problem.x)
        self.found: Tensor | None = None
        # of the mean minimisers of the last round, those of the smallest margins of the model
        self.near = self.problem.x

    def grow(self, ends: float) -> Tensor | None:
        """Split until nothing is open, a witness is found, or time is up.

        `ends` is a time of the monotonic clock. Return the adversarial example (1, *D), or None.
        """
        with torch.no_grad(), plain_sums():
            while len(self.open) and time.monotonic() < ends and not self.full:
                found = self._round()
                if found is not None:
                    return found
                if (
                    len(self.open)
                    and (self.stuck or self.round >= _SYMBOLS_AFTER)
                    and self.symbol is not None
                ):
                    return self._by_symbols(self.symbol, ends)
        if not len(self.open):
            # every leaf has a positive bound
            self.proved = torch.full_like(self.proved, torch.finfo(self.proved.dtype).tiny)
        return None

    def enter(self, ends: float) -> None:
        """Ascend in all open branches and drop those that this closes.

        Stops at the time `ends` of the monotonic clock.
        """
        with torch.no_grad(), plain_sums():
            left = self.open.take(self.open.rows[:0])
            for part in torch.arange(len(self.open), device=self.open.rows.device).split(
                self.effort.batch
            ):
                branches = self.open.take(part)
                left = left.plus(
                    branches
                    if time.monotonic() > ends or self.found is not None
                    else self._left(branches)
                )
            self.open = left

    def _by_symbols(self, group: int, ends: float) -> Tensor | None:
        """Decide each way of writing one group of one-hot columns on its own.

        Return an adversarial example (1, *D), or None.
        """
        part = divided(self.problem, group)
        start = Start.tightened(
            part,
            self.start.arithmetic,
            steps=self.effort.steps,
            intermediate=self.effort.intermediate,
        )
        self.rows += int(start.rows.sum())
        trees = [
            BranchSearch(self.effort, part, start, place)
            for place in range(len(start.open))
            if not bool(start.worst()[start.open[place]] > 0)
        ]
        for tree in sorted(trees, key=lambda tree: float(tree.proved)):
            found = tree.grow(ends)
            self.rows += tree.rows
            if found is not None or not bool(tree.proved > 0):
                return found
        self.open = self.open.take(torch.zeros(0, dtype=torch.long, device=self.point.device))
        self.proved = torch.full_like(self.proved, torch.finfo(self.proved.dtype).tiny)
        return None

    @property
    def full(self) -> bool:
        """Whether the branches take as much memory as they may."""
        tensors = [
            *self.open.free.alpha.values(),
            *self.open.free.beta.values(),
            *(end for box in self.open.cuts.values() for end in (box.lower, box.upper)),
        ]
        return sum(t.numel() * t.element_size() for t in tensors) >= _HELD

    def _round(self) -> Tensor | None:
        """Split the branches of the lowest bounds once."""
        order = self.open.bound.argsort()
        parents, rest = (
            self.open.take(order[: self.effort.batch]),
            self.open.take(order[self.effort.batch :]),
        )
        dual = self._dual(parents)
        sight = dual.see(parents.free)
        found = self._counterexample(sight.point)
        self.symbol = most_wanted(self.problem, sight.point)
        self.round += 1
        if (
            found is None
            and self.effort.attack is not None
            and (self.round % _ATTACK_EVERY == 0 or self.round & (self.round - 1) == 0)
        ):
            found = self._attacked(
                self.effort.attack,
                torch.cat([self.near, judged(self.problem, sight.point[:_ATTACKED])[0]]),
            )
        if found is not None:
            return found
        splits = candidates(dual, sight, self.effort.look)
        split = (
            chosen(splits, torch.stack([self._worth(s.children(parents)) for s in splits]))
            if splits
            else None
        )
        can = torch.zeros_like(parents.bound, dtype=torch.bool) if split is None else split.can
        self.stuck = not bool(can.all())
        if self.stuck and self.symbol is not None:
            return None
        whole, found = parents.take(torch.nonzero(~can).flatten()), None
        if self.lacking is not None:
            self._hand(whole)
            children = whole.take(whole.rows[:0])
        else:
            children, found = self._linear(whole)
        if found is not None:
            return found
        if split is not None:
            pair = split.children(parents)
            children = pair.take(torch.nonzero(can.repeat(2)).flatten()).plus(children)
        self.open = rest.plus(self._left(children))
        return self.found

    def _linear(self, branches: Branches) -> tuple[Branches, Tensor | None]:
        """Ascend in branches with nothing left to split.

        Their bounds are linear programs, of which the exact value and the solution are wanted.
        """
        if not len(branches):
            return branches, None
        bound, free, mean = self._ascended(
            Ascent(_LINEAR_STEPS, ALPHA_STEP, _LINEAR_STEP), self._dual(branches), branches
        )
        found = self._counterexample(mean)
        return Branches(
            torch.maximum(bound, branches.bound), branches.rows, branches.case, branches.cuts, free
        ), found

    def _ascended(
        self, ascent: Ascent, dual: Dual, branches: Branches
    ) -> tuple[Tensor, Free, Tensor]:
        """Return bounds, choices, and the mean of the minimisers on the way.

        The mean comes near the solution of the relaxation, as the last minimiser does not (Shor
        1985).
        """
        total, count = torch.zeros_like(dual.region.center), torch.zeros_like(branches.bound)

        def add(rows: Tensor, sight: Sight) -> None:
            total[rows] += sight.point
            count[rows] += 1

        bound, free = ascent(dual, branches.free, add)
        self.rows += len(branches) * (2 * ascent.steps + 1)
        return bound, free, total / count.view(-1, *[1] * (total.dim() - 1))

    def _left(self, branches: Branches) -> Branches:
        """Return the branches that remain open after their ascent."""
        if not len(branches):
            return branches
        dual = self._dual(branches)
        bound, free, mean = self._ascended(self.ascent, dual, branches)
        likely = torch.nonzero(bound > 0).flatten()
        closed = torch.zeros_like(bound, dtype=torch.bool)
        if len(likely):
            spec, offsets = self._directions(branches.case[likely])
            closed[likely] = confirmed(dual.take(likely), free.take(likely), spec, offsets) > 0
        left = torch.nonzero(~closed).flatten()
        if len(left) and self.found is None:
            inside, worst = judged(self.problem, mean[left])
            nearest = worst.argsort()[:_ATTACKED]
            self.near = inside[nearest]
            self.found = self.near[:1] if bool(is_adversarial(worst[nearest[:1]])) else None
        if self.start.notes is not None:
            done = torch.nonzero(closed).flatten()
            self.start.notes.leaf(
                dual.take(done), free.take(done), branches.case[done], self.point.expand(len(done))
            )
        kept = branches.take(left)
        kept = Branches(
            torch.maximum(kept.bound, bound[left]), kept.rows, kept.case, kept.cuts, free.take(left)
        )
        if self.lacking is None:
            return kept
        near = self._near(kept, branches.bound[left])
        self._hand(kept.take(torch.nonzero(near).flatten()))
        return kept.take(torch.nonzero(~near).flatten())

    def _near(self, branches: Branches, before: Tensor) -> Tensor:
        """Return which branches to hand over (P,): nearly closed, or stalled.

        A branch is handed over if its bound lacks almost nothing to 0, or if it lacks little and
        its last split gained too little.
        """
        assert self.lacking is not None
        lacking = self.lacking[branches.case]
        return (branches.bound > _NEAR * lacking) | (
            (branches.bound > _STALLED * lacking) & (branches.bound - before < _GAIN * before.abs())
        )

    def _hand(self, branches: Branches) -> None:
        """Add branches to those handed over."""
        if len(branches):
            self.handed.append(branches)

    def left(self) -> Branches:
        """Return what is handed over and what is open."""
        left = self.open
        for branches in self.handed:
            left = left.plus(branches)
        return left

    def _worth(self, children: Branches) -> Tensor:
        """Return how good each pair of children is, at their parents' choices.

        The smaller bound of the two, with a small weight on the larger one to decide between ties.
        """
        bound = self._dual(children).see(children.free, forward=False).bound
        self.rows += len(children)
        below, above = bound.chunk(2)
        # Bounds above 0 count as 0: what is proved already needs no better bound.
        return torch.minimum(below.clamp(max=0), above.clamp(max=0)) + 1e-3 * torch.maximum(
            below.clamp(max=0), above.clamp(max=0)
        )

    def _dual(self, branches: Branches) -> Dual:
        spec, offsets = self._directions(branches.case)
        return Dual(
            self.root,
            branches.rows,
            self.number,
            spec.to(SEARCH.dtype),
            offsets.to(SEARCH.dtype),
            branches.cuts,
        )

    def _directions(self, case: Tensor) -> tuple[Tensor, Tensor]:
        return self.start.directions(torch.full_like(case, self.place), case)

    def _counterexample(self, points: Tensor) -> Tensor | None:
        """Return one of the points that the model gets wrong, or None."""
        inside, worst = judged(self.problem, points)
        hit = torch.nonzero(is_adversarial(worst)).flatten()
        return inside[hit[:1]] if len(hit) else None

    def _attacked(self, attack: Startable, points: Tensor) -> Tensor | None:
        """Return an example that the attack finds from one of the points."""
        copies = self.problem.take([0] * len(points))
        starts = points.to(self.problem.x.dtype)[:, None, None].expand(
            -1, 1, self.start.spec.shape[1], *points.shape[1:]
        )
        for attempt in attack(copies, seed=self.round, starts=starts):
            found = self._counterexample(attempt.candidate)
            if found is not None:
                return found
        return None
