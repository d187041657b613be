"""The exact number of substitutions that fool the model.

The number of substitutions is raised one by one until an example is found or the time is up.
Whether k substitutions suffice is a decision problem. Its choices are the network's, as for norm
balls, and the symbols: one is substituted, or is excluded. A branch is closed by what its program's
multipliers prove of its part of the region (`substitution_lp`). Where few admissible inputs are
left, all of them are run through the model itself, so that with every symbol settled the model's
own numbers decide. All nearer points are proved by then, so whatever example is found is a nearest
one.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.rounding import CHECKED
from calipers.certificates.alpha_crown import Start
from calipers.certificates.enumeration import cleared
from calipers.certificates.exact.encoding import encoded
from calipers.certificates.exact.lp import Answer
from calipers.certificates.exact.model import Floats, MIPModel, ends_of
from calipers.certificates.exact.pseudocosts import likely_choices, worth_of
from calipers.certificates.exact.search import PointSearch, Settings
from calipers.certificates.exact.substitution_lp import (
    Part,
    SubstitutionPrograms,
    check_numeric,
    proved_of,
)
from calipers.certificates.exact.tree import bound_of
from calipers.certificates.examples import judged
from calipers.problem.goals import is_adversarial
from calipers.problem.interrupts import over
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim
from calipers.threats.substitution_region import SubstitutionRegion

# inputs that are run through the model rather than divided: the programs that choose how to divide
# them cost as much
_LISTED = 2**14
# inputs that are run for each program so far and each choice that it had: this costs not many times
# what the programs took
_PACE = 16
_SHARE = 1e-6  # a smaller share of a symbol counts as none
_TRIED = 16  # points tried as examples whose margins are not beyond rounding, lowest first


class Words:
    """The nearest example found near one point, by running the model.

    `asked` counts the inputs that were run.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.asked = problem, 0
        self.example: Tensor | None = None
        self.nearest = np.inf

    def resist(self, points: Tensor) -> bool:
        """Return whether all points (P, *D) keep a margin beyond rounding.

        A point that is an adversarial example is kept.
        """
        self.asked += len(points)
        least = cleared(
            self.problem,
            torch.zeros(len(points), dtype=torch.long, device=self.problem.x.device),
            points.to(self.problem.x),
        )
        for place in least.argsort()[: min(_TRIED, int((~(least > 0)).sum()))].tolist():
            if self.propose(points[place : place + 1]):
                break
        return bool((least > 0).all())

    def propose(self, point: Tensor) -> bool:
        """Keep a point (1, *D) if it is an example nearer than the one known.

        It must be admissible with some number of substitutions and fool the model. Returns whether
        it was kept.
        """
        point = point.to(self.problem.x)
        distance = self.problem.region.distance(point)
        inside, worst = judged(self.problem.at(distance), point)
        exact = self.problem.goal.worst(
            self.problem.margins(self.problem.classifier.logits64(inside))
        )
        distance = self.problem.region.distance(inside)
        if (
            not bool(is_adversarial(worst) & is_adversarial(exact))
            or not 0 < float(distance) < self.nearest
        ):
            return False
        self.example, self.nearest = inside, float(distance)
        return True


class Branch(NamedTuple):
    """An open branch of the decision tree.

    It holds its lower bound, the goal's case, the choices of the network that are made, its part of
    the region, and the branches into which to divide it.
    """

    bound: float
    case: int
    made: dict[int, int]
    part: Part
    next: list[tuple[dict[int, int], Part]]
    basis: Any


@dataclass(eq=False)
class SubstitutionTree:
    """The branches of one decision problem.

    `stuck` says that a branch could neither be closed nor divided: what is left is within rounding
    of 0, or the time was up.
    """

    model: MIPModel
    region: SubstitutionRegion
    words: Words
    level: float
    look: int
    ends: float
    stop: Callable[[], bool]
    open: list[tuple[float, int, Branch]] = field(default_factory=list)
    stuck: bool = False
    asked: list[Part] = field(default_factory=list)
    programs: int = 0
    _numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.program = SubstitutionPrograms(self.model, self.region)
        self.program.ends = self.ends

    def grow(self) -> bool:
        """Branch until the decision is made, and return whether all is closed.

        It also ends when an example within `level` substitutions is found, the time is up, or
        `stop` says so.
        """
        for case in self.model.goals:
            self._visit(case, {}, self.program.whole, None)
        while self.open and not self._over():
            _, _, branch = heapq.heappop(self.open)
            for made, part in branch.next:
                self._visit(branch.case, made, part, branch.basis, branch.bound)
        return not self.open and not self.stuck and not self._settled()

    def _over(self) -> bool:
        return self._settled() or time.monotonic() >= self.ends or self.stop()

    def _settled(self) -> bool:
        return self.words.nearest <= self.level

    def _visit(
        self, case: int, made: dict[int, int], part: Part, basis: Any, bound: float = -np.inf
    ) -> None:
        """Bound one branch, and keep it if it is not closed.

        Its linear program is solved, or its inputs are run through the model where few of them are
        left.
        """
        if self._settled() or self._listed(part):
            return
        goal, ends = self.model.goals[case], ends_of(self.model, made)
        answer = self.program.solve(part, goal, ends, basis)
        self.programs += 1
        if answer is not None:
            proved = proved_of(
                bound_of(self.model, answer, ends, self.region, CHECKED), self.region, part, CHECKED
            )
            if proved.whole > 0:
                return
            bound, basis = max(bound, proved.whole), self.program.basis()
            if answer.delta is not None:
                self.words.propose(part.of(self.region).snap(self._point(answer.delta)))
            part = part.without(proved.each > 0)
            if self._settled() or self._listed(part):
                return
        divided = self._divided(answer, goal, made, part, basis)
        if not divided:
            self.stuck = True
        else:
            heapq.heappush(
                self.open,
                (bound, next(self._numbers), Branch(bound, case, made, part, divided, basis)),
            )

    def _listed(self, part: Part) -> bool:
        """Run the model on a part's inputs if they are few.

        Numeric columns must not move besides. Returns whether the part is settled by this, or
        belongs to a part that already is.
        """
        if any(part.within(other) for other in self.asked):
            # branches that differ only in the network's choices hold the same points
            return True
        if not self._few(part):
            return False
        for points in part.of(self.region).neighbours(0):
            if self._over():
                self.stuck = True
                return True
            self.stuck |= not self.words.resist(points)
        self.asked.append(part)
        self.open = [entry for entry in self.open if not entry[2].part.within(part)]
        heapq.heapify(self.open)
        return True

    def _few(self, part: Part) -> bool:
        """Return whether a part has few enough inputs to run them all.

        More are allowed the more programs were solved so far: where programs make no progress,
        running the inputs costs no more than they did.
        """
        return self.region.continuous is None and part.ways <= max(
            _LISTED, _PACE * len(self.model.choices) * self.programs - self.words.asked
        )

    def _point(self, delta: Floats) -> Tensor:
        return self.region.center + torch.from_numpy(delta).view_as(self.region.center)

    # ---- dividing
    # ----------------------------------------------------------------------------------------------

    def _divided(
        self, answer: Answer | None, goal: int, made: dict[int, int], part: Part, basis: Any
    ) -> list[tuple[dict[int, int], Part]]:
        """Return the branches of the most promising choice.

        The choice is one of the network or of a symbol: of the likely ones, that whose programs
        rise most.
        """
        ways = [
            [({**made, i: c}, part) for c in range(len(self.model.choices[i].options))]
            for i in likely_choices(self.model, answer, made, self.look)
        ]
        ways += [
            [(made, part.with_symbol(g, j)), (made, part.without_symbol(g, j))]
            for g, j in self._symbols(answer, part)
        ]
        if len(ways) < 2 or answer is None or not np.isfinite(answer.value):
            return ways[-1] if ways else []
        return ways[int(np.argmax([self._worth(answer.value, goal, way, basis) for way in ways]))]

    def _symbols(self, answer: Answer | None, part: Part) -> list[tuple[int, int]]:
        """Return the symbols whose shares in the solution move the goal most.

        Where no symbol has a share, it is the first that is allowed.
        """
        shares = (
            np.zeros_like(part.options, dtype=float)
            if answer is None or answer.delta is None
            else self.program.shares(answer.delta)
        )
        shares = np.where(part.options, shares, 0.0)
        if not bool((shares > _SHARE).any()):
            return [(int(g), int(j)) for g, j in np.argwhere(part.options)[:1]]
        assert answer is not None
        slope = self.model.inputs.T @ answer.multipliers
        pull = slope[self.region.threat.columns.numpy()]
        pull = np.abs(pull - np.take_along_axis(pull, self.region.symbols[0, :, None].numpy(), 1))
        order = np.argsort(-(shares * pull), axis=None, kind="stable")[: self.look]
        found = [divmod(int(i), shares.shape[1]) for i in order]
        return [(g, j) for g, j in found if shares[g, j] > _SHARE]

    def _worth(
        self, value: float, goal: int, way: list[tuple[dict[int, int], Part]], basis: Any
    ) -> float:
        """Return the product of the two smallest gains of a choice's branches.

        Gains beyond what closes a branch do not count.
        """
        answers = [
            None
            if self._few(part)
            else self.program.solve(part, goal, ends_of(self.model, made), basis)
            for made, part in way
        ]
        self.programs += sum(answer is not None for answer in answers)
        return worth_of(value, [0.0 if answer is None else answer.value for answer in answers])


class SubstitutionTreeSearch(PointSearch):
    """The search for one point under a `Substitutions` threat.

    Within `lower` substitutions nothing is adversarial, and `words` holds the example found.
    """

    def __init__(self, tool: Settings, problem: Problem, index: Tensor) -> None:
        region = problem.region
        assert isinstance(region, SubstitutionRegion)
        check_numeric(region)
        self.words = Words(problem)
        super().__init__(tool, problem, index, self.words)

    def climb(self, ends: float) -> None:
        """Raise the proved number of substitutions, one at a time."""
        for level in self._levels():
            if over() or time.monotonic() >= ends or not self._proved(level, ends):
                break
            self.lower = level

    def _levels(self) -> Iterator[float]:
        """Yield the numbers of substitutions to prove, fewest first.

        They stay below the example known by then. The last number that adds any input stands for
        all numbers up to the radius asked.
        """
        threat, level = self.problem.threat, torch.zeros(1, dtype=torch.float64)
        asked, widest = (
            float(threat.radii(1)[0]),
            max(float(threat.widest(self.problem.x)[0]), float(threat.next(level)[0])),
        )
        while float(level) < asked:
            level = threat.next(level)
            within = asked if float(level) >= widest else float(level)
            if within >= self.words.nearest:
                return
            yield within
            level = torch.full_like(level, within)

    def _proved(self, level: float, ends: float) -> bool:
        """Return whether nothing within so many substitutions fools the model."""
        start = Start.tightened(
            self.problem.at(level),
            CHECKED,
            steps=self.tool.steps,
            intermediate=self.tool.intermediate,
        )
        self.rows += int(start.rows[0])
        if not len(start.open) or start.root is None:
            return True
        state, left = (
            start.root.state,
            torch.nonzero(~(start.case_bounds[0] > 0)).flatten().tolist(),
        )
        assert isinstance(state.region, SubstitutionRegion)
        cases = {case: torch.nonzero(start.cases == case).flatten().tolist() for case in left}
        tree = SubstitutionTree(
            encoded(state, start.spec[0], start.offsets[0], cases),
            state.region,
            self.words,
            level,
            self.tool.look,
            ends,
            self._pause,
        )
        closed = tree.grow()
        self.rows += tree.programs
        return closed

    def _pause(self) -> bool:
        self.tell()
        return over()

    def results(self) -> Iterator[Attempt | Claim]:
        """Yield the example found and the claim."""
        if self.words.example is not None:
            yield self.attempt(self.words.example)
        yield self.claim(self.words.asked, self.rows)
