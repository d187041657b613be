"""Can the question be decided? Branch and bound on intermediate values, for every point that
optimised slopes leave open, a search for each (branch_search).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from calipers.bounds.rounding import Guarantee, arithmetic_of
from calipers.certificates.alpha import Start
from calipers.certificates.branch_search import Effort, Search
from calipers.certificates.crown import batches, spread
from calipers.certificates.guaranteed import check_proofs, stated
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.interrupts import Limit, OutOfTime, give_way, limited
from calipers.problem.problem import Problem
from calipers.problem.tools import Attempt, Claim, Startable


@dataclass(frozen=True)
class BranchAndBound:
    """Decide every point within `seconds` of its own: certify the whole radius, or find a
    counterexample.

    `steps` of ascent for each branch, `batch` branches at once, `look` candidates by each of two
    scores to look ahead at, `sharpen` steps of ascent for each box of the root. `attack` is tried
    from the minimisers of the lowest branches, now and then. With `proofs` every claim comes with a
    proof file. Plain bounds and slopes of points that are bounded together may take their `seconds`
    together.

    Complete for piecewise linear networks but for time and memory; for smooth activations intervals
    are halved. Where letters are replaced, a search that goes on for long, or has nothing left to
    split, fixes a letter in every way it can be written, and goes on in each part. `guarantee` as
    for `CROWN`, leaf by leaf. Cost: `steps` backward and forward passes and one confirming row a
    branch.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "decision at the radius",
        "branch and bound on intermediate values, or an example",
        substitutions=True,
        inner=("attack",),
        needs="operations",
    )

    seconds: float = 30.0
    steps: int = 12
    sharpen: int = 10
    batch: int = 128
    look: int = 2
    attack: Startable | None = None
    proofs: bool = field(default=False, repr=False)
    guarantee: Guarantee = field(default="float64-checked", repr=False)

    __repr__ = stated

    def __post_init__(self) -> None:
        check_proofs(arithmetic_of(self.guarantee), proofs=self.proofs)
        if self.seconds <= 0 or min(self.steps, self.batch, self.look) < 1 or self.sharpen < 0:
            raise BadInput(
                "BranchAndBound takes seconds > 0, steps, batch and look >= 1 and sharpen >= 0, "
                f"got {self}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim | Attempt]:
        """Yield a claim for every point, and a candidate for each where a counterexample was met on
        the way.
        """
        for index in batches(problem):
            part, limit = (
                problem.take(index),
                Limit(time.monotonic, time.monotonic() + self.seconds * len(index)),
            )
            try:
                with limited(limit):
                    start = Start.tightened(
                        part,
                        arithmetic_of(self.guarantee),
                        steps=self.steps,
                        sharpen=self.sharpen,
                        noted=self.proofs,
                    )
            except OutOfTime as up:
                if up.limit is not limit:
                    raise
                yield self._unbounded(problem, index)
                continue
            decided = start.worst() > 0
            yield self._claim(
                problem,
                index[decided],
                start.worst()[decided],
                start.rows[decided],
                self._written(start, decided),
            )
            effort = Effort(self.steps, self.sharpen, self.batch, self.look, self.attack)
            # the time was up before there were slopes to branch from
            if start.root is None or start.pending is None:
                yield self._claim(
                    problem,
                    index[~decided],
                    start.worst()[~decided],
                    start.rows[~decided],
                    self._written(start, ~decided),
                )
                give_way()
                continue
            trees = [
                Search(effort, part, start, place)
                for place in range(len(start.open))
                if not bool(decided[start.open[place]])
            ]
            for tree, verdict in zip(
                trees, spread(self._grown, trees, problem.x.device), strict=True
            ):
                here = index[tree.point].reshape(1)
                if verdict is not None:
                    spent = torch.full_like(here, tree.rows)
                    yield Attempt(here, verdict, spent, spent)
                mine = torch.arange(len(part), device=index.device) == tree.point
                yield self._claim(
                    problem,
                    here,
                    tree.proved,
                    torch.full_like(here, tree.rows),
                    self._written(start, mine & bool(tree.proved > 0)) or (None,),
                )

    def _unbounded(self, problem: Problem, index: Tensor) -> Claim:
        """Return the claim that nothing is known of these points."""
        worst = torch.full((len(index),), -torch.inf, dtype=torch.float64, device=index.device)
        return self._claim(problem, index, worst, torch.zeros_like(index), (None,) * len(index))

    def _grown(self, tree: Search) -> Tensor | None:
        return tree.grow(time.monotonic() + self.seconds)

    def _written(self, start: Start, points: Tensor) -> tuple[bytes | None, ...]:
        """Return the proofs of the flagged points, in order."""
        with torch.no_grad():
            return tuple(
                None if start.notes is None else start.notes.written(i, self)
                for i in torch.nonzero(points).flatten().tolist()
            )

    def _claim(
        self,
        problem: Problem,
        index: Tensor,
        worst: Tensor,
        rows: Tensor,
        proofs: tuple[bytes | None, ...],
    ) -> Claim:
        radius = problem.threat.radii(len(problem)).to(worst.device)[index]
        return Claim(
            index,
            torch.where(worst > 0, radius, torch.zeros_like(radius)),
            worst,
            self.guarantee,
            torch.zeros_like(rows),
            rows,
            proofs,
        )
