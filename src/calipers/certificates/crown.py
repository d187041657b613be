"""Interval bound propagation and CROWN: certificates at one radius."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from calipers.bounds.backward import interval_margin_bounds, joined_bounds, margin_bounds, relax
from calipers.bounds.interval import Box
from calipers.bounds.rounding import SEARCH, Arithmetic, Guarantee, arithmetic_of, plain_sums
from calipers.certificates.cost import boxes_forecast, held_bytes, sweeps_forecast
from calipers.certificates.guaranteed import check_proofs, posed, stated
from calipers.certificates.proof_writer import Notes, level
from calipers.graph.capture import graph_of
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import Goal
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim, Forecast

_POINTS = 64  # points bounded together at most: their boxes and relaxations are held at once
_HELD_BYTES = 2**28


class Bound(NamedTuple):
    """The result of one evaluation: lower bounds of the worst margins.

    `worst (N,)` the bounds, `boxes` those used, `rows (N,)` the directions bounded for each point.
    `prove` writes the proof of a point whose worst margin is positive; None where no proofs were
    asked for.
    """

    worst: Tensor
    boxes: dict[int, Box]
    rows: Tensor
    prove: Callable[[int], bytes] | None = None


class Bounder(Protocol):
    """A certifier that bounds the worst margin at any radius.

    It can reuse boxes that are known to hold.
    """

    @property
    def guarantee(self) -> Guarantee:
        """The kind of arithmetic that its claims are about."""

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        """Claim the problem's own radii."""

    def bound(
        self, problem: Problem, arithmetic: Arithmetic, known: dict[int, Box] | None = None
    ) -> Bound:
        """Bound the worst margin over the problem's regions.

        `known` are boxes that hold already, by number of the graph.
        """


@dataclass(frozen=True)
class IBP:
    """Interval bound propagation (Gowal et al. 2018), cheap and loose.

    The last affine layers are merged into the margins. Exact for a linear model under linf.

    Cost: two forward passes in float64.

    Args:
        proofs: Write a proof file with every claim. Only for "float64-checked", and for norm balls
            without constraints, l0 and other counts excepted (`BadInput` otherwise).
        guarantee: "float64-checked" (real arithmetic) or "float32-executed" (the network as float32
            runs it), as for `CROWN`.

    Raises:
        BadInput: If `guarantee` is unknown, or if proof files are asked for together with
            "float32-executed".
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "certificate at the radius",
        "interval bounds of every value",
        substitutions=True,
        needs="operations",
    )

    proofs: bool = field(default=False, repr=False)
    guarantee: Guarantee = field(default="float64-checked", repr=False)

    def __post_init__(self) -> None:
        check_proofs(arithmetic_of(self.guarantee), proofs=self.proofs)

    __repr__ = stated

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        """Yield a claim for every point."""
        return claims(self, problem)

    def bound(
        self, problem: Problem, arithmetic: Arithmetic, known: dict[int, Box] | None = None
    ) -> Bound:
        """Bound the worst margin over the problem's regions (see `Bounder`)."""
        return _bound(
            problem,
            arithmetic,
            known,
            refine=False,
            sweep=False,
            writer=self if self.proofs and known is None else None,
        )

    def forecast(self, problem: Problem) -> Forecast:
        """Forecast the cost from one timed pass through the network."""
        return boxes_forecast(problem, arithmetic_of(self.guarantee))


@dataclass(frozen=True)
class CROWN:
    """CROWN: linear bounds propagated backward (Zhang et al. 2018).

    Every unstable intermediate value is bounded by backward propagation of linear relaxations, then
    the margins are; lower slopes are adaptive.

    Cost: two rows of a backward pass for each unstable neuron, one for each margin.

    Args:
        refine: Bound intermediate values by backward propagation. If False their boxes are plain
            intervals (CROWN-IBP, Zhang et al. 2020), and the rows of the margins are the whole
            cost.
        proofs: Write a proof file with every claim. Only for "float64-checked", and for norm balls
            without constraints, l0 and other counts excepted (`BadInput` otherwise).
        guarantee: "float64-checked": about the network in real arithmetic, with the rounding of the
            bound accounted for. "float32-executed": about the network as float32 executes it, in
            whatever order it adds up (bounds/float32_execution.py).

    Raises:
        BadInput: If `guarantee` is unknown, or if proof files are asked for together with
            "float32-executed".

    Example:
        >>> import torch
        >>> import calipers
        >>> from calipers.certificates import CROWN
        >>> _ = torch.manual_seed(5)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> x = torch.tensor([[0.2, 0.7]])
        >>> problem = calipers.Problem.pose(model, x, None, calipers.Ball("linf", 0.25))
        >>> [claim] = CROWN()(problem)
        >>> claim.radius.tolist()  # proved: nothing adversarial within 0.25
        [0.25]
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "certificate at the radius",
        "linear bounds of every margin; without `refine` over plain intervals, for a few rows",
        substitutions=True,
        needs="operations",
    )

    refine: bool = field(default=True, repr=False)
    proofs: bool = field(default=False, repr=False)
    guarantee: Guarantee = field(default="float64-checked", repr=False)

    def __post_init__(self) -> None:
        check_proofs(arithmetic_of(self.guarantee), proofs=self.proofs)

    __repr__ = stated

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        """Yield a claim for every point."""
        return claims(self, problem)

    def bound(
        self, problem: Problem, arithmetic: Arithmetic, known: dict[int, Box] | None = None
    ) -> Bound:
        """Bound the worst margin over the problem's regions (see `Bounder`)."""
        return _bound(
            problem,
            arithmetic,
            known,
            refine=self.refine,
            sweep=True,
            writer=self if self.proofs and known is None else None,
        )

    def forecast(self, problem: Problem) -> Forecast:
        """Forecast the cost and the chance of success from a few timed rows."""
        return sweeps_forecast(problem, arithmetic_of(self.guarantee), refine=self.refine)


def _bound(
    problem: Problem,
    arithmetic: Arithmetic,
    known: dict[int, Box] | None,
    *,
    refine: bool,
    sweep: bool,
    writer: object | None = None,
) -> Bound:
    graph, region = posed(problem, arithmetic)
    with torch.no_grad(), plain_sums():
        state = relax(graph, region, arithmetic, known, refine=refine)
        rows = problem.goal.rows(problem.y, problem.classes)
        # A proof file holds one of the two kinds of bounds, so they must not be joined for it.
        bounded = (
            interval_margin_bounds
            if not sweep
            else margin_bounds
            if writer is not None
            else joined_bounds
        )
        margins = bounded(state, rows)
        margins = shifted(margins, problem.goal, problem.y, problem.classes)
    margins = margins.nan_to_num(nan=-torch.inf)
    notes = None if writer is None else Notes.of(problem, state if sweep else level(state), margins)
    return Bound(
        problem.goal.worst(margins),
        state.boxes,
        state.rows + rows.shape[1],
        None if notes is None else lambda i: notes.written(i, writer),
    )


def shifted(bounds: Tensor, goal: Goal, y: Tensor, classes: int) -> Tensor:
    """Return bounds (N, S) of rows @ logits with the goal's offsets added.

    The sums are rounded down; a bound whose offset is 0 stays as it is.
    """
    offsets = goal.offsets(y, classes).to(bounds)
    return torch.where(
        offsets == 0, bounds, torch.nextafter(bounds + offsets, torch.full_like(bounds, -torch.inf))
    )


def claims(certifier: Bounder, problem: Problem) -> Iterator[Claim]:
    """Yield the certifier's claims at the problem's radii, batch by batch.

    Where float64 is slow (a GPU) a float32 evaluation goes first, and only what it proves is
    confirmed.
    """
    radii, arithmetic = (
        problem.threat.radii(len(problem)).to(problem.x.device),
        arithmetic_of(certifier.guarantee),
    )
    screen = problem.x.device.type != "cpu"

    def claim(index: Tensor) -> Claim:
        part, radius = problem.take(index), radii[index]
        worst, rows = torch.full_like(radius, -torch.inf), torch.zeros_like(index)
        left, files = torch.arange(len(index), device=index.device), None
        if screen:
            rough = certifier.bound(part, SEARCH)
            worst, rows = rough.worst.double(), rough.rows
            left = torch.nonzero(rough.worst > 0).flatten()
        if len(left):
            proof = certifier.bound(part.take(left), arithmetic)
            worst[left], rows[left] = proof.worst, rows[left] + proof.rows
            files = written(proof.prove, proof.worst > 0, left, len(index))
        proved = torch.where(worst > 0, radius, torch.zeros_like(radius))
        return Claim(
            index, proved, worst, arithmetic.guarantee, torch.zeros_like(rows), rows, files
        )

    yield from problem.executor.map(claim, batches(problem), device=problem.x.device)


def written(
    prove: Callable[[int], bytes] | None, proved: Tensor, places: Tensor, count: int
) -> tuple[bytes | None, ...] | None:
    """Return the proof files of `count` points, None where there is none.

    `places` are the points that were bounded, `proved` says which of them succeeded. Return None
    altogether where no proofs are written.
    """
    if prove is None:
        return None
    with torch.no_grad():
        files = {
            place: prove(i)
            for i, (place, good) in enumerate(zip(places.tolist(), proved.tolist(), strict=True))
            if good
        }
    return tuple(files.get(i) for i in range(count))


def batches(problem: Problem) -> Iterator[Tensor]:
    """Yield the places of points to bound together.

    As many as a fixed number of bytes holds boxes for, and at most 64.
    """
    held = held_bytes(graph_of(problem.classifier, problem.x))
    yield from torch.arange(len(problem), device=problem.x.device).split(
        max(1, min(_POINTS, _HELD_BYTES // held))
    )
