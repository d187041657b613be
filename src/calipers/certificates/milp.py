"""Exact distances by mixed-integer programming, every bound proved.

A linear program for each branch says where the relaxed network is weakest (exact.solving); its
multipliers prove a bound in arithmetic that accounts for rounding, so a solver that is wrong makes
a search slow, never its answer false (exact.proving); its solution is evaluated by the model, and
the nearest example of that linear piece is the radius left to prove (exact.examples). The search
ends where the proof meets the example.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from calipers.bounds.rounding import CHECKED
from calipers.certificates.alpha_crown import Start
from calipers.certificates.exact.beta_bounds import Until, ascended
from calipers.certificates.exact.bound_tightening import tightened
from calipers.certificates.exact.encoding import encoded
from calipers.certificates.exact.incumbents import SHORT, Examples
from calipers.certificates.exact.scip_hints import check_scip, covering, hinted
from calipers.certificates.exact.search import PointSearch
from calipers.certificates.exact.substitution_search import SubstitutionTreeSearch
from calipers.certificates.exact.tree import Tree
from calipers.errors import BadInput
from calipers.graph.capture import graph_of
from calipers.problem.capabilities import LP, Capabilities
from calipers.problem.interrupts import flattened, over
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim, Startable
from calipers.threats.ball import Ball

# times the nearest example's distance: the program is made over a region that just holds it
_ROOM = 1 + 1e-3
# share of the region's radius: an example nearer than that is worth a smaller region, whose rows
# are tighter
_AGAIN = 0.9
# share of an example's distance by which the next must be nearer for ascents to begin anew
_STEP = 1e-5
_ASCENTS = 0.7  # share of the time that is left, for branches by ascents
_TIGHTENED = 2  # linear programs for each choice: as many as tightening costs
_FEWER = 0.85  # begin anew only if tightening leaves at most this share of the choices
_MANY = 2  # a case's boxes are tightened once its branches, times this, are as many as the choices
_HINTED = 0.5  # share of the time that is left, for hints
# radii tried for a first proof, where less than that share of the distance is proved
_RISES, _LOW = 6, 0.7

Watch = Callable[[str, float, float], None]
"""(name of the point, distance proved, distance of the nearest example)."""


@dataclass(frozen=True)
class MILP:
    """Exact distances of small piecewise linear networks, by MILP.

    For every point whose nearest adversarial example lies within the problem's radius: the example,
    and a proof of its distance; for the others a proof that there is none. Tjeng, Xiao and Tedrake
    (2019) verify networks by such programs; here the package searches the branches itself and
    proves every bound again. Up to a few hundred unstable neurons within the radius; linf, l2, l1,
    with box, mask, weights and constraints. The smaller the radius, the fewer neurons are unstable:
    give an attack, or a radius just above a known example's distance.

    Branching: one of `look` likely choices is made, those never looked at being tried first. If the
    first `lp_budget` linear programs (l2: none) do not settle the point and most of them closed
    nothing, gradient ascents (as in `BranchAndBound`) take over, and leave to programs only the
    branches that they are slow to close. Otherwise programs go on, with boxes tightened by programs
    for each case. For a `Substitutions` threat substitutions are allowed one more at a time, and a
    claim is a whole number of them; numeric columns beside them may move in linf or l1,
    unconstrained.

    Claims are float64-checked; they stop 2e-7 of the distance short of the nearest example of real
    arithmetic. The example found stands as much farther out as the model's own rounding asks. What
    is proved and found when time is up is claimed.

    Cost: AlphaCROWN's, a row of backward propagation for each unstable neuron, and linear programs:
    exponentially many at worst.

    Args:
        seconds: Time limit for each point.
        steps: Steps of ascent on slopes, as for `AlphaCROWN`, whose boxes the program is made of.
        intermediate: Steps of ascent for each end of intermediate boxes, as for `AlphaCROWN`; 0:
            none.
        look: Likely choices compared, of which one is branched on.
        lp_budget: Linear programs solved before gradient ascents may take over.
        hints: "SCIP" (the extra `scip`) begins the search from the branches that SCIP's tree ended
            in and from the points that it met, all of which are proved and evaluated again: a
            second opinion, seldom the faster one. "none": no hints.
        attack: An attack that finds the first example; None: the search finds its own.
        progress: Called with a point's name, the distance proved and the distance of the nearest
            example, whenever these move.

    Raises:
        BadInput: If `seconds` <= 0, `steps` or `look` < 1, `intermediate` or `lp_budget` < 0, or
            `hints` is unknown; when called, if the network is not piecewise linear, or hints are
            asked for where symbols are substituted or pyscipopt is not installed.

    Example:
        >>> import torch
        >>> import calipers
        >>> from calipers.certificates import MILP
        >>> _ = torch.manual_seed(5)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> x = torch.tensor([[0.2, 0.7]])
        >>> problem = calipers.Problem.pose(model, x, None, calipers.Ball("linf", 1.0))
        >>> *examples, claim = MILP(seconds=10)(problem)
        >>> f"{claim.radius.item():.4f}", f"{(examples[0].candidate - x).abs().max():.4f}"
        ('0.2965', '0.2965')
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "decision at the radius",
        "mixed-integer programs for small piecewise linear networks: exact distances",
        norms=LP,
        substitutions=True,
        inner=("attack",),
        needs="operations",
    )

    seconds: float = 60.0
    steps: int = 20
    intermediate: int = 10
    look: int = 8
    lp_budget: int = 600
    hints: Literal["none", "SCIP"] = "none"
    attack: Startable | None = None
    progress: Watch | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (
            self.seconds <= 0
            or min(self.steps, self.look) < 1
            or min(self.intermediate, self.lp_budget) < 0
        ):
            raise BadInput(
                f"MILP takes seconds > 0, steps and look >= 1, intermediate and lp_budget >= 0, "
                f"got {self}"
            )
        if self.hints not in ("none", "SCIP"):
            raise BadInput(f"MILP takes hints of 'SCIP' or 'none', got {self.hints!r}")

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim | Attempt]:
        """Yield a claim for every point, and the nearest examples found.

        After an interrupt, what is known of the points begun is yielded before it is raised again.
        """
        # The model is captured and evaluated here, before there are threads: export and copies are
        # not thread-safe.
        graph_of(problem.classifier, problem.x)
        assert problem.size is not None
        if self.hints == "SCIP":
            check_scip()
            if not isinstance(problem.threat, Ball):
                raise BadInput("MILP takes no hints where symbols are replaced: leave `hints` out")
        search_of = _PointSearch if isinstance(problem.threat, Ball) else SubstitutionTreeSearch
        searches: list[PointSearch] = [
            search_of(self, problem.take([i]), torch.tensor([i], device=problem.x.device))
            for i in range(len(problem))
        ]
        try:
            yield from flattened(problem.executor.map(PointSearch.run, searches))
        except KeyboardInterrupt:
            for search in searches:
                for answer in search.results() if search.begun and not search.ended else ():
                    yield replace(answer, final=False) if isinstance(answer, Claim) else answer
            raise


def exact_within(seconds: float) -> MILP:
    """Return the tool that closes brackets whose upper ends are known.

    `seconds` is its time limit for each point.
    """
    return MILP(seconds=seconds)


class _PointSearch(PointSearch):
    """The search for one point: `lower` is proved, `examples` are found."""

    def __init__(self, tool: MILP, problem: Problem, index: Tensor) -> None:
        self.examples = Examples(problem)
        super().__init__(tool, problem, index, self.examples)
        self.radius = float(problem.threat.radii(1)[0])
        self.tree: Tree | None = None

    def climb(self, ends: float) -> None:
        """Search over smaller and smaller regions."""
        while self._smaller(ends):
            pass

    def _smaller(self, ends: float) -> bool:
        """Search over a region that just holds the nearest example known.

        Return whether to search again, over a much smaller region.
        """
        radius = min(self.radius, self.examples.edge * _ROOM)
        part = self.problem.at(radius)
        start = Start.tightened(
            part, CHECKED, steps=self.tool.steps, intermediate=self.tool.intermediate
        )
        self.rows += int(start.rows[0])
        if not len(start.open) or start.root is None:
            self.lower = radius
            return False
        state, left = (
            start.root.state,
            torch.nonzero(~(start.case_bounds[0] > 0)).flatten().tolist(),
        )
        cases = {case: torch.nonzero(start.cases == case).flatten().tolist() for case in left}
        model = encoded(state, start.spec[0], start.offsets[0], cases)
        examples = self.examples.within(state, model, ends)
        target = min(radius, examples.edge * (1 - SHORT))
        self.tree = tree = Tree(
            model, state.region, CHECKED, target, examples.meet, self.tool.look, ends=ends
        )
        # programs over l2 balls are slow
        first = 0 if state.region.norm.is_euclidean else self.tool.lp_budget
        if self.tool.hints == "SCIP":
            self._hinted(tree, radius, ends)
        worth = max(first, _TIGHTENED * len(model.choices))
        self.lower = max(
            self.lower,
            tree.grow(
                ends,
                lambda: (
                    self._pause(radius)
                    or (tree.programs >= first and (tree.wide or tree.programs >= worth))
                ),
            ),
        )
        if tree.unsettled and not self._worth_it(radius):
            if not tree.wide:
                self._by_case(start, tree, cases, radius, ends)
            elif self._nearer(start, tree, ends):
                return time.monotonic() < ends
        self.lower = max(self.lower, tree.proved, tree.grow(ends, lambda: self._pause(radius)))
        examples.settle()
        return time.monotonic() < ends and not over() and self._worth_it(radius)

    def _hinted(self, tree: Tree, radius: float, ends: float) -> None:
        """Begin from the branches that SCIP ended in.

        The points that it met are looked at as examples.
        """
        cases, sizes = (
            {goal: case for case, goal in tree.model.goals.items()},
            [len(c.options) for c in tree.model.choices],
        )
        branches: dict[int, list[dict[int, int]]] = {case: [{}] for case in tree.model.goals}
        now = time.monotonic()
        for hints in hinted(
            tree.model, tree.region, radius, _HINTED * (ends - now), lambda: self._pause(radius)
        ):
            branches[cases[hints.goal]] = covering(sizes, hints.branches)
            nearer = None if hints.delta is None else self.examples.beside(hints.delta)
            tree.target = min(tree.target, nearer or tree.target)
        tree.begin([(case, made, 0.0) for case, held in branches.items() for made in held])

    def _by_case(
        self, start: Start, tree: Tree, cases: dict[int, list[int]], radius: float, ends: float
    ) -> None:
        """Search each open case by itself, over tightened boxes.

        These need to hold only where the case fails.
        """
        assert start.root is not None
        old = start.root.state
        for case, (reach, count) in tree.left.items():
            if count * _MANY < len(tree.model.choices):
                continue  # its few branches are closed sooner as they are
            only = {case: cases[case]}
            state = tightened(
                old, encoded(old, start.spec[0], start.offsets[0], only), tree.target, ends
            )
            if state is None:
                tree.raise_to(case, tree.target)
                continue
            model = encoded(state, start.spec[0], start.offsets[0], only)
            if len(model.choices) > _FEWER * len(tree.model.choices):
                continue  # the branches made so far are worth more
            self.examples.settle()
            own = Tree(
                model,
                state.region,
                CHECKED,
                tree.target,
                self.examples.within(state, model, ends).meet,
                self.tool.look,
                ends=ends,
            )
            own.begin([(case, {}, reach)])

            def pause(own: Tree = own) -> bool:
                tree.target = min(tree.target, own.target)
                return self._pause(radius)

            own.grow(ends, pause)
            tree.target = min(tree.target, own.target)
            tree.raise_to(case, own.proved)
            tree.programs += own.programs
            self.examples.settle()
            self.examples.within(old, tree.model, ends)

    def _nearer(self, start: Start, tree: Tree, ends: float) -> bool:
        """Close by gradient ascents what they can close of the tree.

        Return whether an example was met that is worth beginning anew. Otherwise the branches left
        go back to the tree, for linear programs.
        """
        self._rise(tree.target, ends)
        before, now = self.examples.edge, time.monotonic()
        # Without hints ascents begin from the root: they need fewer branches than programs made.
        branches = tree.branches if self.tool.hints == "SCIP" else None
        left = ascended(
            self.problem,
            start,
            tree.model,
            tree.target,
            Until(now + _ASCENTS * (ends - now), over),
            branches,
        )
        self.rows += left.rows
        if left.example is not None:
            self.examples.propose(left.example)
            self.examples.descend(left.example.double().cpu())
            self.examples.settle()
            tree.target = min(tree.target, self.examples.edge * (1 - SHORT))
            # If the gain is too small programs go on: ascents would meet the next one as near.
            return self.examples.edge < (1 - _STEP) * before
        tree.begin(left.branches)
        return False

    def _rise(self, target: float, ends: float) -> None:
        """Prove what slopes alone prove, within smaller radii.

        Over the whole region relaxations may be too loose to prove anything if time runs out.
        """
        high = target
        for _ in range(_RISES if self.lower < _LOW * target else 0):
            middle = (self.lower + high) / 2
            start = Start.tightened(
                self.problem.at(middle), CHECKED, steps=self.tool.steps, intermediate=0
            )
            self.rows += int(start.rows[0])
            self.lower, high = (
                (middle, high) if bool(start.worst()[0] > 0) else (self.lower, middle)
            )
            if time.monotonic() > ends or over():
                break

    def _worth_it(self, radius: float) -> bool:
        return self.tree is not None and self.tree.unsettled and self.tree.target < _AGAIN * radius

    def _pause(self, radius: float) -> bool:
        assert self.tree is not None
        self.lower = max(self.lower, self.tree.proved)
        self.tell()
        return over() or self._worth_it(radius)

    def results(self) -> Iterator[Attempt | Claim]:
        """Yield the examples found and the claim."""
        for point in self.examples.points:
            yield self.attempt(point)
        yield self.claim(
            0,
            self.rows + self.examples.programs + (0 if self.tree is None else self.tree.programs),
        )
