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
from calipers.certificates.crown import batches
from calipers.certificates.guaranteed import check_proofs, stated
from calipers.certificates.proof_writer import Notes
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.interrupts import Limit, OutOfTime, flattened, give_way, limited
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
        >>> [type(answer).__name__ for answer in answers]  # a witness
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
            yield from self._decided(problem.take(index), index)

    def _decided(self, part: Problem, index: Tensor) -> Iterator[Claim | Attempt]:
        """Yield the answers about points at `index (N,)` of the whole problem."""
        limit = Limit(time.monotonic, time.monotonic() + self.seconds * len(index))
        everywhere = torch.arange(len(index), device=index.device)
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
            worst = torch.full((len(index),), -torch.inf, dtype=torch.float64, device=index.device)
            yield self._claim(part, index, everywhere, worst, torch.zeros_like(index), None)
            return
        decided = start.worst() > 0
        # without slopes to branch from, time ran out before there were any
        branching = start.root is not None and start.pending is not None
        settled = everywhere[decided] if branching else everywhere
        if len(settled):
            yield self._claim(
                part, index, settled, start.worst()[settled], start.rows[settled], start.notes
            )
        if not branching:
            give_way()
            return
        effort = Effort(self.steps, self.intermediate, self.batch, self.look, self.attack)
        trees = [
            BranchSearch(effort, part, start, place)
            for place in range(len(start.open))
            if not bool(decided[start.open[place]])
        ]
        yield from flattened(
            part.executor.map(
                lambda tree: self._grown(tree, part, index), trees, device=part.x.device
            )
        )

    def _grown(self, tree: BranchSearch, part: Problem, index: Tensor) -> list[Claim | Attempt]:
        """Search for one point, and return the answers about it."""
        found = tree.grow(time.monotonic() + self.seconds)
        place = tree.point.reshape(1)
        rows = torch.full_like(place, tree.rows)
        claim = self._claim(part, index, place, tree.proved, rows, tree.start.notes)
        return [claim] if found is None else [Attempt(claim.index, found, rows, rows), claim]

    def _claim(
        self,
        part: Problem,
        index: Tensor,
        places: Tensor,
        worst: Tensor,
        rows: Tensor,
        notes: Notes | None,
    ) -> Claim:
        """Return what `worst (P,)` proves of a batch's points at `places (P,)`."""
        radius, proved = part.threat.radii(len(part)).to(worst.device)[places], worst > 0
        with torch.no_grad():
            files = tuple(
                notes.written(i, self) if notes is not None and good else None
                for i, good in zip(places.tolist(), proved.tolist(), strict=True)
            )
        return Claim(
            index[places],
            torch.where(proved, radius, torch.zeros_like(radius)),
            worst,
            self.guarantee,
            torch.zeros_like(rows),
            rows,
            files,
        )
