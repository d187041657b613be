"""Alpha-CROWN: linear bounds with optimised slopes, where CROWN fails.

Points that plain CROWN proves are done. Of the others each open margin gets optimised slopes of its
own, then the boxes of intermediate values are tightened and the margins bounded again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from calipers.bounds.backward import joined_bounds, margin_bounds, relax
from calipers.bounds.dual_bound import Dual, Free, Root
from calipers.bounds.float64_check import confirmed
from calipers.bounds.intermediate import sharpening
from calipers.bounds.interval import Box
from calipers.bounds.optimise import Ascent
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import SEARCH, Arithmetic, Guarantee, arithmetic_of, plain_sums
from calipers.certificates.cost import sweeps_forecast
from calipers.certificates.crown import Bound, claims, shifted
from calipers.certificates.guaranteed import check_proofs, posed, stated
from calipers.certificates.proof_writer import Noted, Notes
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import by_case
from calipers.problem.interrupts import OutOfTime, give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim, Forecast
from calipers.threats.ball import Region

ALPHA_STEP = 0.3  # share of a slope's range: larger than usual, because the steps are few


@dataclass(frozen=True)
class AlphaCROWN:
    """CROWN with optimised lower slopes where plain CROWN is inconclusive.

    Alpha-CROWN (Xu et al. 2021, "Fast and Complete"), run only on margins that plain CROWN leaves
    open. Points that plain CROWN proves cost no more than that. The others get `steps` of ascent on
    their open margins; those still open then get `intermediate` steps for each end of each unstable
    intermediate value, and their margins are optimised again. Every bound is confirmed in the
    arithmetic of `guarantee` with the slopes found.

    Cost: CROWN's, and for each open margin `steps` backward and forward passes, and `intermediate`
        of
    these for each end of each unstable neuron.

    Args:
        steps: Steps of ascent on the slopes of each open margin; at least 1.
        intermediate: Steps of ascent for each end of the box of each unstable intermediate value; 0
            leaves the boxes as plain CROWN made them.
        proofs: Write a proof file with every claim. Only for "float64-checked", and for norm balls
            without constraints, l0 and other counts excepted (`BadInput` otherwise).
        guarantee: "float64-checked" (real arithmetic) or "float32-executed" (the network as float32
            runs it), as for `CROWN`.

    Raises:
        BadInput: If `steps` < 1 or `intermediate` < 0, if `guarantee` is unknown, or if proof files
            are asked for together with "float32-executed".
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "certificate at the radius",
        "linear bounds with optimised slopes, for what CROWN leaves open",
        substitutions=True,
        needs="operations",
    )

    steps: int = 20
    intermediate: int = 10
    proofs: bool = field(default=False, repr=False)
    guarantee: Guarantee = field(default="float64-checked", repr=False)

    __repr__ = stated

    def __post_init__(self) -> None:
        check_proofs(arithmetic_of(self.guarantee), proofs=self.proofs)
        if self.steps < 1 or self.intermediate < 0:
            raise BadInput(
                "AlphaCROWN takes steps >= 1 (usually 20) and intermediate >= 0 (usually 10), got "
                f"{self.steps}, {self.intermediate}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        """Yield a claim for every point."""
        yield from claims(self, problem)
        # When time runs out during the optimisation, what plain bounds proved is claimed first;
        # only now is the interruption raised.
        give_way()

    def forecast(self, problem: Problem) -> Forecast:
        """Forecast the cost and whether the bound has a chance.

        Every row of plain backward propagation is counted as two passes for each step of
        sharpening, as if plain bounds did not prove the point before.
        """
        told = sweeps_forecast(problem, arithmetic_of(self.guarantee), refine=True)
        return replace(told, seconds=told.seconds * (1 + 2 * self.intermediate))

    def bound(
        self, problem: Problem, arithmetic: Arithmetic, known: dict[int, Box] | None = None
    ) -> Bound:
        """Bound the worst margin over the problem's regions (see `Bounder`)."""
        noted = self.proofs and known is None
        start = Start.tightened(
            problem,
            arithmetic,
            known,
            steps=self.steps,
            intermediate=self.intermediate,
            noted=noted,
        )
        notes = start.notes
        return Bound(
            start.worst(),
            start.boxes,
            start.rows,
            None if notes is None else lambda i: notes.written(i, self),
        )


@dataclass(eq=False)
class Start:
    """What is proved of a batch of points before any branching.

    `margins (N, S)` are lower bounds; `root` is what the branches of the open points are built on.

    A case is a set of margins of which one has to be positive; every case has to be settled. `root`
    holds only the points `open (M,)`. `pending` holds the open cases of these points: their places
    in the root and their cases, each (P,), and `Free`, the slopes and multipliers chosen for them.
    """

    problem: Problem
    arithmetic: Arithmetic
    margins: Tensor
    spec: Tensor
    offsets: Tensor
    boxes: dict[int, Box]
    rows: Tensor
    state: Relaxed
    open: Tensor
    case_bounds: Tensor
    cases: Tensor
    root: Root | None = None
    pending: tuple[Tensor, Tensor, Free] | None = None
    notes: Notes | None = None

    @classmethod
    def of(
        cls,
        problem: Problem,
        arithmetic: Arithmetic,
        known: dict[int, Box] | None,
        *,
        noted: bool = False,
    ) -> Start:
        """Bound all margins by plain CROWN.

        With `noted` everything that is chosen is recorded, for proof files.
        """
        graph, region = posed(problem, arithmetic)
        state = relax(graph, region, arithmetic, known)
        spec = problem.goal.rows(problem.y, problem.classes).to(arithmetic.dtype)
        offsets = (
            torch.as_tensor(problem.goal.offsets(problem.y, problem.classes))
            .to(spec)
            .expand(spec.shape[:2])
        )
        margins = shifted(
            (margin_bounds if noted else joined_bounds)(state, spec),
            problem.goal,
            problem.y,
            problem.classes,
        ).nan_to_num(nan=-torch.inf)
        cases = problem.goal.cases(problem.classes).to(spec.device)
        bounds = by_case(margins, cases)
        left = torch.nonzero(~(bounds.amin(1) > 0)).flatten()
        start = cls(
            problem,
            arithmetic,
            margins,
            spec,
            offsets,
            state.boxes,
            state.rows + spec.shape[1],
            state,
            left,
            bounds,
            cases,
        )
        start.notes = Notes.of(problem, state, margins) if noted else None
        return start

    @classmethod
    def tightened(
        cls,
        problem: Problem,
        arithmetic: Arithmetic,
        known: dict[int, Box] | None = None,
        *,
        steps: int,
        intermediate: int,
        noted: bool = False,
    ) -> Start:
        """Bound by plain CROWN, then with optimised slopes and sharper boxes.

        Margins that plain CROWN leaves open get slopes of their own; then (with `intermediate`
        steps) boxes are tightened and the margins optimised again.

        When time runs out after plain CROWN, what is proved by then is returned.
        """
        with torch.no_grad(), plain_sums():
            start = cls.of(problem, arithmetic, known, noted=noted)
            with contextlib.suppress(OutOfTime):
                start.optimise(Ascent(steps, ALPHA_STEP))
                if intermediate:
                    start.intermediate(Ascent(intermediate, ALPHA_STEP))
                    start.optimise(Ascent(steps, ALPHA_STEP))
        return start

    def worst(self) -> Tensor:
        """Return the lower bound of each point's worst case, (N,)."""
        return self.case_bounds.amin(1)

    def optimise(self, ascent: Ascent) -> None:
        """Optimise the slopes of every open case, and confirm what they prove."""
        self._close()
        if not len(self.open):
            return
        if self.root is None:
            self.root = Root.of(self.state.take(self.open), SEARCH.dtype, self._region(self.open))
        dual, rows, case = self.dual()
        _, free = ascent(dual, dual.guess())
        proved = confirmed(dual, free, *self.directions(rows, case))
        index = (self.open[rows], case)
        self.case_bounds[index] = torch.where(
            proved > self.case_bounds[index], proved, self.case_bounds[index]
        )
        self.rows[self.open] += ascent.steps * 2
        done, left = (
            torch.nonzero(flags).flatten()
            for flags in (self.case_bounds[index] > 0, ~(self.case_bounds[index] > 0))
        )
        if self.notes is not None:
            self.notes.leaf(dual.take(done), free.take(done), case[done], self.open[rows[done]])
        self.pending = rows[left], case[left], free.take(left)

    def intermediate(self, ascent: Ascent) -> None:
        """Tighten the boxes of the points still open."""
        self._close()
        self.root = self.pending = None
        if not len(self.open):
            return
        part, region = self.problem.take(self.open), self._region(self.open)
        known = {k: box.take(self.open) for k, box in self.boxes.items()}
        wide = part.threat.region(part.x.to(self.arithmetic.dtype), outward=True)
        noted = (
            None if self.notes is None else Noted(ascent.steps, ascent.alpha_step, ascent.beta_step)
        )
        state = relax(
            self.state.graph,
            wide,
            self.arithmetic,
            known,
            tighten=sharpening(noted or ascent, region, restrict=noted is None),
        )
        if self.notes is not None and noted is not None:
            self.notes.sharpened(state, self.open, noted.notes)
        self.rows[self.open] += state.rows
        for k, box in state.boxes.items():
            self.boxes[k].lower[self.open], self.boxes[k].upper[self.open] = box.lower, box.upper
        self.root = Root.of(state, SEARCH.dtype, region)

    def dual(self) -> tuple[Dual, Tensor, Tensor]:
        """Return the dual functions of all open cases of the root's points.

        With them the place in the root and the case of each, (P,).
        """
        rows, case = torch.nonzero(~(self.case_bounds[self.open] > 0), as_tuple=True)
        assert self.root is not None
        spec, offsets = self.directions(rows, case)
        return (
            Dual(
                self.root,
                rows,
                len(self.state.graph.nodes),
                spec.to(SEARCH.dtype),
                offsets.to(SEARCH.dtype),
            ),
            rows,
            case,
        )

    def directions(self, rows: Tensor, case: Tensor) -> tuple[Tensor, Tensor]:
        """Return the margins of each row's case: (P, S', K) and (P, S').

        The first are the rows over the logits, the second their offsets. A case of fewer margins
        than others repeats its first.
        """
        members = [
            torch.nonzero(self.cases == c).flatten() for c in range(int(self.cases.max()) + 1)
        ]
        width = max(len(m) for m in members)
        table = torch.stack([torch.cat([m, m[:1].expand(width - len(m))]) for m in members])[case]
        points = self.open[rows][:, None]
        return self.spec[points, table], self.offsets[points, table]

    def _close(self) -> None:
        """Drop the points that are settled by now."""
        stay = torch.nonzero(~(self.case_bounds[self.open].amin(1) > 0)).flatten()
        if len(stay) == len(self.open):
            return
        self.open = self.open[stay]
        self.pending = None
        if self.root is not None:
            self.root = Root.of(
                self.root.state.take(stay), SEARCH.dtype, self.root.region.take(stay)
            )

    def _region(self, index: Tensor) -> Region:
        part = self.problem.take(index)
        return part.threat.region(part.x.to(SEARCH.dtype))
