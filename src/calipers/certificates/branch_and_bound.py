"""Branch and bound on intermediate values: a complete certifier.

Every point that optimised slopes leave open gets a search of its own (`branch_search`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from calipers.bounds.rounding import Guarantee, arithmetic_of
from calipers.certificates.alpha_crown import Start
from calipers.certificates.branch_search import BranchSearch, Effort
from calipers.certificates.crown import batches, spread
from calipers.certificates.guaranteed import check_proofs, stated
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.interrupts import Limit, OutOfTime, give_way, limited
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim, Startable


@dataclass(frozen=True)
class BranchAndBound:
    """Branch and bound: certify each point's radius, or find a witness.

    Points that alpha-CROWN leaves open are searched one by one: unstable neurons are split at a
    breakpoint, and every branch is bounded by beta-CROWN (Wang et al. 2021) with the branching
    rules of BaBSR (Bunel et al. 2020) and FSB (De Palma et al. 2021). Minimisers of the bounds are
    tried as adversarial examples on the way.

    Complete for piecewise linear networks but for time and memory; for smooth activations the
    intervals of pre-activations are halved. For a `Substitutions` threat, a search that goes on for
    long, or has nothing left to split, fixes one position to each of its symbols in turn, and goes
    on in each part.

    Cost: `steps` backward and forward passes and one confirming row for each branch.

    Args:
        seconds: Time limit for each point. Points that are bounded together by plain bounds and
            optimised slopes may take their limits together.
        steps: Steps of ascent on slopes and multipliers for each branch.
        intermediate: Steps of ascent for each end of each intermediate box of the root; 0: none.
        batch: Branches bounded at once.
        look: Candidate splits by each of two scores whose children are bounded before one is
            chosen.
        attack: An attack tried now and then from the minimisers of the lowest branches; None: only
            the minimisers themselves are tried.
        proofs: Write a proof file with every claim. Only for "float64-checked", and for norm balls
            without constraints, l0 and other counts excepted (`BadInput` otherwise).
        guarantee: What every leaf is confirmed for: "float64-checked" or "float32-executed", as for
            `CROWN`.

    Raises:
        BadInput: If `seconds` <= 0, `steps`, `batch` or `look` < 1 or `intermediate` < 0, if
            `guarantee` is unknown, or if proof files are asked for together with
            "float32-executed".

    Example:
        >>> import torch
        >>> import calipers
        >>> from calipers.certificates import BranchAndBound
        >>> _ = torch.manual_seed(5)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> x = torch.tensor([[0.2, 0.7]])
        >>> problem = calipers.Problem.pose(model, x, None, calipers.Ball("linf", 0.3))
        >>> answers = list(BranchAndBound(seconds=10)(problem))
        >>> [type(answer).__name__ for answer in answers if len(answer.index)]  # a witness
        ['Attempt', 'Claim']
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
    intermediate: int = 10
    batch: int = 128
    look: int = 2
    attack: Startable | None = None
    proofs: bool = field(default=False, repr=False)
    guarantee: Guarantee = field(default="float64-checked", repr=False)

    __repr__ = stated

    def __post_init__(self) -> None:
        check_proofs(arithmetic_of(self.guarantee), proofs=self.proofs)
        if self.seconds <= 0 or min(self.steps, self.batch, self.look) < 1 or self.intermediate < 0:
            raise BadInput(
                "BranchAndBound takes seconds > 0, steps, batch and look >= 1 and intermediate >= "
                "0, "
                f"got {self}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim | Attempt]:
        """Yield a claim for every point, and the adversarial examples found.

        An `Attempt` precedes the claim of a point where an adversarial example was met on the way.
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
                        intermediate=self.intermediate,
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
            effort = Effort(self.steps, self.intermediate, self.batch, self.look, self.attack)
            # time ran out before there were optimised slopes to branch from
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
                BranchSearch(effort, part, start, place)
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

    def _grown(self, tree: BranchSearch) -> Tensor | None:
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
