"""Proofs that nothing adversarial lies within a radius.

The tree branches on the model's choices until the multipliers of every linear program prove its
branch, in rounded arithmetic.

A linear program's multipliers y are a proof, whatever computed them: with rows ending at L, U and
columns at l, u

    min c v  >=  sum_i min(y_i L_i, y_i U_i) + sum_j min over [l_j, u_j] of (c - A^T y)_j v_j
        for every y    (Neumaier and Shcherbina 2004),

and the part of the input is how far a linear function can fall over the threat's own region, as for
every other bound. So the sum is a function of the radius, and where it is above 0 the branch is
closed: no tolerance of a solver enters. A branch that is not closed still has a radius up to which
it is proved.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from calipers.bounds.rounding import Arithmetic
from calipers.certificates.exact.lp import Answer, BallPrograms
from calipers.certificates.exact.model import Ends, Floats, MIPModel, ends_of
from calipers.certificates.exact.pseudocosts import PseudoCosts, gaps_of, likely_choices
from calipers.threats.norms import support_rounding
from calipers.threats.region import Region

_LAST = 4  # roundings of the last sums of a bound, which cannot change its sign
_GRID = 8  # radii tried at once, in the search for the largest that is proved
# and more around where the chord is 0, in shares of what is left
_NEAR = np.array([-1e-1, -1e-2, -1e-3, -1e-4, -1e-6, -1e-8, -1e-10, 1e-10, 1e-8, 1e-6])
_STEPS, _SETTLED = 20, 1e-11  # of Newton's method, on a piecewise linear function
_OUT = 1e-6  # share of the radius by which a point found there may be farther
_ABOVE = 1e-9  # a margin that is above 0 by more than the solver's tolerance
# in place of a branch's next choice: all are made; or its program has not been solved yet
_NONE, _UNSEEN = -1, -2
_WIDE = 3  # programs solved for each open branch: with fewer, hardly any branch was closed
_ROUGH, _FINE = 2, 8  # rounds of the search for a radius: to rank branches; to the last digit


@dataclass(frozen=True, eq=False)
class MultiplierBound:
    """A lower bound of the goal that multipliers prove, for any radius.

    Within radius r the goal is at least `constant` minus how far <slope, delta> can fall over the
    region of that radius.
    """

    constant: float
    slope: Floats
    region: Region
    gamma: float

    def at(self, radii: Floats) -> Floats:
        """Return the bounds at some radii, none larger than the model's own."""
        many = self.region.take(torch.zeros(len(radii), dtype=torch.long)).at(
            torch.from_numpy(radii)
        )
        # The plain region's fall: further constraints are already among the model's rows.
        fall = Region.fall(
            many, torch.from_numpy(self.slope).expand(len(radii), 1, -1), torch.arange(len(radii))
        )
        return (self.constant - fall.value[:, 0] - self.gamma * fall.terms[:, 0]).numpy()

    def below(self, radius: float) -> float:
        """Return a bound at a radius that is sound as a number.

        `at` is only meant for its sign; here the rounding of the last sums is taken off too.
        """
        bound = float(self.at(np.array([radius]))[0])
        return bound - _LAST * np.finfo(float).eps * (abs(self.constant) + abs(bound))

    def reach(self, most: float, rounds: int = _FINE) -> tuple[float, float]:
        """Return two close radii between which the bound reaches 0.

        The bound is positive at the smaller one, and not at the larger one unless that is `most`.
        """
        if not self.constant > 0:
            return 0.0, 0.0
        low, high, left, right = 0.0, most, self.constant, float("nan")
        for _ in range(rounds):
            # The bound is convex in the radius, so the zero of the chord is no smaller than that of
            # the bound, and near it where both ends are near.
            guess = low + (high - low) * left / (left - right) if right < 0 else high
            near = guess + (high - low) * _NEAR
            radii = np.unique(
                np.clip(np.concatenate([np.linspace(low, high, _GRID + 1)[1:], near]), low, high)
            )
            values = self.at(radii)
            good = values > 0
            if bool(good.all()):
                return float(radii[-1]), float(radii[-1])
            first = int(np.argmin(good))
            if first:
                low, left = float(radii[first - 1]), float(values[first - 1])
            high, right = float(radii[first]), float(values[first])
            if high - low <= _SETTLED * most:
                break
        return low, high


def bound_of(
    model: MIPModel, answer: Answer, ends: Ends, region: Region, arithmetic: Arithmetic
) -> MultiplierBound:
    """Return what an answer's multipliers prove about its goal.

    The goal is taken times the answer's sign, and the rounding of every sum is taken off. For an
    answer without a goal it is the bound of 0 that the multipliers prove: where that is above 0,
    the rows contradict each other.
    """
    y = answer.multipliers
    y = np.where(
        ((y > 0) & ~np.isfinite(ends.low_row))
        | ((y < 0) & ~np.isfinite(ends.high_row))
        | ~np.isfinite(y),
        0.0,
        y,
    )
    cost = np.zeros(model.columns.shape[1])
    if answer.goal is not None:
        cost[answer.goal] = answer.sign
    size = np.abs(y)
    gamma = arithmetic.gamma(len(y) + 2)
    left, lost = cost - model.columns.T @ y, gamma * (np.abs(cost) + model.sizes[1].T @ size)
    slope, tilt = -(model.inputs.T @ y), gamma * (model.sizes[0].T @ size)
    with np.errstate(invalid="ignore"):
        rows = np.where(y == 0, 0.0, np.where(y > 0, y * ends.low_row, y * ends.high_row))
        parts = np.where(left == 0, 0.0, np.minimum(left * ends.low, left * ends.high))
    reach, far = np.maximum(np.abs(ends.low), np.abs(ends.high)), model.reach
    away = float(lost @ reach + tilt @ far)
    rounding = arithmetic.gamma(len(y) + len(cost)) * float(
        np.abs(rows).sum() + np.abs(parts).sum() + away
    ) + arithmetic.floor * float(reach.sum() + far.sum() + 1)
    constant = float(rows.sum() + parts.sum()) - away * (1 + gamma) - rounding
    return MultiplierBound(constant, slope, region, arithmetic.gamma(support_rounding(len(slope))))


class Zero(NamedTuple):
    """Where a branch's smallest margin reaches 0.

    `proved` is a radius up to which it is proved not to, `near` is nearly the radius where it does,
    and `delta` is a perturbation there.
    """

    proved: float
    near: float
    delta: Floats


def zero_of(
    program: BallPrograms, arithmetic: Arithmetic, region: Region, goal: int, ends: Ends, top: float
) -> Zero | None:
    """Return where the goal of a branch reaches 0, by Newton's method.

    None where it does not within `top`, or the solver has no answer. The smallest goal is a convex
    function of the radius, so the first step lands below the zero and the others rise to it. A
    radius too small for the branch to contain a point is left by the multipliers that prove this.
    """
    radius, proved, delta = top, 0.0, np.zeros(program.model.inputs.shape[1])
    for _ in range(_STEPS):
        answer = program.solve(radius, goal, ends, exact=True)
        if answer is None or (radius == top and answer.value > _ABOVE):
            return None
        low, high = bound_of(program.model, answer, ends, region, arithmetic).reach(top)
        delta = (
            answer.delta
            if answer.delta is not None and program.length(answer.delta) <= radius * (1 + _OUT)
            else delta
        )
        proved, settled = max(proved, low), abs(high - radius) <= _SETTLED * top
        if settled or (high <= radius < top):
            # A linear region may begin beyond where its margin would reach 0: then its nearest
            # point is where it begins.
            return Zero(proved, max(proved, radius if answer.columns is None else high), delta)
        radius = max(high, proved)
    return Zero(proved, radius, delta)


class Subproblem(NamedTuple):
    """An open branch of the search tree.

    It holds the radius up to which it is proved, the goal's case, the choices made and the next one
    to make, and how its program ended: its basis, the smallest goal, and what the relaxation loses
    there at the next choice.
    """

    reach: float
    number: int
    case: int
    made: dict[int, int]
    next: int
    basis: Any
    value: float = 0.0
    gap: float = 0.0


Meet = Callable[[Floats, dict[int, int] | None], float | None]
"""Called with a program's solution delta, and with the choices if all are made.

It returns a smaller radius to prove if an example was found, else None.
"""


@dataclass(eq=False)
class Tree:
    """The search tree of one point's model.

    `target` is the radius to prove; it may fall during the search, when nearer examples are found.
    """

    model: MIPModel
    region: Region
    arithmetic: Arithmetic
    target: float
    meet: Meet | None = None
    look: int = 8
    ends: float = np.inf
    """When programs give up, until `grow` sets another time."""
    open: list[tuple[float, int, Subproblem]] = field(default_factory=list)
    stuck: float = np.inf
    """Least radius proved of a branch with no choice left that could not be closed."""
    doing: float = np.inf
    """Radius proved of the branch that is being divided, so that an interrupt does not lose it."""
    programs: int = 0
    costs: PseudoCosts = field(default_factory=PseudoCosts)
    _numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.program = BallPrograms(self.model, self.region)
        self.program.ends = self.ends
        self.begin([(case, {}, 0.0) for case in self.model.goals])

    def begin(self, branches: list[tuple[int, dict[int, int], float]]) -> None:
        """Restart from the given branches, which are all that is not closed.

        Each is (case, choices made, radius up to which it is proved).
        """
        self.open.clear()
        self.stuck = np.inf
        for case, made, proved in branches:
            self._keep(Subproblem(proved, next(self._numbers), case, made, _UNSEEN, None))

    @property
    def unsettled(self) -> bool:
        """Whether a branch is open that is not proved up to the target.

        The target may have fallen below the radii to which other branches are proved.
        """
        return bool(self.open) and self.open[0][0] < self.target

    @property
    def branches(self) -> list[tuple[int, dict[int, int]]] | None:
        """The open branches, (case, choices made).

        None where one that has no choice left could not be proved by programs.
        """
        return (
            [(node.case, node.made) for _, _, node in self.open if node.reach < self.target]
            if self.stuck >= self.target
            else None
        )

    @property
    def left(self) -> dict[int, tuple[float, int]]:
        """For each case with open branches: the radius proved, and their number."""
        held: dict[int, list[float]] = {}
        for reach, _, node in self.open:
            held.setdefault(node.case, []).append(reach)
        return {case: (min(reaches), len(reaches)) for case, reaches in held.items()}

    def raise_to(self, case: int, reach: float) -> None:
        """Take over a radius that was proved elsewhere for a whole case.

        Branches that are still not proved up to the target stay open.
        """
        raised = [
            node._replace(reach=max(node.reach, reach)) if node.case == case else node
            for _, _, node in self.open
        ]
        self.open = [(node.reach, node.number, node) for node in raised if node.reach < self.target]
        heapq.heapify(self.open)

    @property
    def wide(self) -> bool:
        """Whether a large share of the branches with solved programs is open."""
        return len(self.open) * _WIDE >= self.programs

    @property
    def proved(self) -> float:
        """The radius proved by all branches together, closed and open."""
        return min([self.target, self.stuck, self.doing, *(reach for reach, _, _ in self.open[:1])])

    def grow(self, ends: float, stop: Callable[[], bool] = lambda: False) -> float:
        """Branch until all is closed up to the target; return the radius proved.

        It ends before when the time `ends` has come, or `stop` says so.
        """
        self.program.ends = ends
        while self.unsettled and time.monotonic() < ends and not stop():
            self.doing = self.open[0][0]
            _, _, node = heapq.heappop(self.open)
            if node.next == _UNSEEN:
                self._visit(node.case, node.made, node.reach, node.basis)
            else:
                for chosen in range(len(self.model.choices[node.next].options)):
                    value = self._visit(
                        node.case, {**node.made, node.next: chosen}, node.reach, node.basis
                    )
                    self.costs.note(node.next, chosen, node.value, value, node.gap)
            self.doing = np.inf
        return self.proved

    def _visit(self, case: int, made: dict[int, int], reach: float, basis: Any) -> float:
        """Solve one branch's program, and keep the branch if it is not closed.

        The program is solved again where its solution leads to a nearer example. Returns its
        smallest goal, or NaN.
        """
        ends, whole, nearer = ends_of(self.model, made), len(made) == len(self.model.choices), True
        while nearer:
            answer = self.program.solve(
                self.target, self.model.goals[case], ends, basis, exact=whole
            )
            self.programs += 1
            if answer is None:
                break
            bound = bound_of(self.model, answer, ends, self.region, self.arithmetic)
            if bool(bound.at(np.array([self.target]))[0] > 0):
                return answer.value
            basis = self.program.basis()
            nearer = self._met(answer, made if whole else None)
        if answer is not None:
            reach = max(reach, bound.reach(self.target, _FINE if whole else _ROUGH)[0])
        if reach < self.target:
            split, gap = (_NONE, 0.0) if whole else self._split(answer, case, made, basis)
            if whole or not made:
                zero = zero_of(
                    self.program,
                    self.arithmetic,
                    self.region,
                    self.model.goals[case],
                    ends,
                    self.target,
                )
                reach = reach if zero is None else max(reach, zero.proved)
            self._keep(
                Subproblem(
                    reach,
                    next(self._numbers),
                    case,
                    made,
                    split,
                    basis,
                    0.0 if answer is None else answer.value,
                    gap,
                )
            )
        return np.nan if answer is None else answer.value

    def _met(self, answer: Answer, made: dict[int, int] | None) -> bool:
        """Report a program's solution; return whether the target fell for it."""
        radius = (
            None if self.meet is None or answer.delta is None else self.meet(answer.delta, made)
        )
        if radius is None or radius >= self.target:
            return False
        self.target = radius
        return True

    def _keep(self, node: Subproblem) -> None:
        if node.next == _NONE:
            self.stuck = min(self.stuck, node.reach)
        elif node.reach < self.target:
            heapq.heappush(self.open, (node.reach, node.number, node))

    def _split(
        self, answer: Answer | None, case: int, made: dict[int, int], basis: Any
    ) -> tuple[int, float]:
        """Return the next choice to make, and the relaxation's loss at it.

        Of the likely choices it is the one whose programs rise most as far as is known.
        """
        # programs over Euclidean balls take too long for strong branching
        likely = likely_choices(self.model, answer, made, 1 if self.program.round else self.look)
        if answer is None or answer.columns is None or not np.isfinite(answer.value):
            return likely[0], 0.0
        gaps = gaps_of(self.model, answer.columns).tolist()
        for choice in likely if len(likely) > 1 else []:
            if not self.costs.knows(choice):
                self._look(answer, case, made, choice, basis, gaps[choice])
        best = (
            max(likely, key=lambda choice: self.costs.worth(choice, answer.value, gaps[choice]))
            if len(likely) > 1
            else likely[0]
        )
        return best, gaps[best]

    def _look(
        self, answer: Answer, case: int, made: dict[int, int], choice: int, basis: Any, gap: float
    ) -> None:
        """Solve the programs of a choice's options, and record their rises."""
        for chosen in range(len(self.model.choices[choice].options)):
            self.programs += 1
            found = self.program.solve(
                self.target,
                self.model.goals[case],
                ends_of(self.model, {**made, choice: chosen}),
                basis,
            )
            self.costs.note(
                choice, chosen, answer.value, 0.0 if found is None else found.value, gap
            )
