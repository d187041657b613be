"""Robustness at many radii, with one record for all of them.

An example found counts at every larger radius, a certificate at every smaller one.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calipers.errors import BadInput
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.portfolio import in_turn
from calipers.measurement.question import begin
from calipers.measurement.run import run, scope_of
from calipers.problem.problem import Problem
from calipers.progress import Meter, Watch
from calipers.record.bracket import Bracket
from calipers.record.evidence import Run
from calipers.record.record import Record

Cells = NDArray[np.bool_]
"""(N, R): one cell for each point and radius."""
_KEPT = ("lower_jaw", "not_run")  # notes of an earlier call that are kept


def sweep(
    problem: Problem,
    plan: Plan,
    ledger: Record,
    radii: Sequence[float],
    *,
    progress: Watch | None = None,
) -> bool:
    """Run the plan at every radius that can still yield something new.

    Returns whether the sweep came to its end: False where the time limit or Ctrl-C stopped it.

    Each point is asked at the middle of the radii where its verdict is open, and so on in the
    halves: settled there, it is settled on one whole side. Where it stays open, attacks are only
    tried at larger radii and certifiers at smaller ones: what they could not do inside a smaller
    ball, or for a larger one, is not to be expected from them. So a point costs about log2(R) + 1
    visits of the plan, not R.

    Stages that look for distances are left out, except that a plan of such stages alone is carried
    out once, at the middle radius. An audit bounds what is missed at one radius: here audited
    certifiers try all points, of families of attacks each tries all with its first stage, and other
    audited attacks are left out. The record shows the verdicts at the middle radius, and the rates
    at all of them. The same call resumes a sweep that was stopped: what is settled is read from the
    record, what was tried is not tried again.
    """
    grid = checked(radii)
    shown = grid[len(grid) // 2]
    stages = in_turn([s for s in plan.stages if s.objective == "verdict"])
    said = dataclasses.replace(plan, stages=stages or plan.stages)
    begun = begin(problem.at(shown), said, ledger, radii=grid, kept=_KEPT)
    scope = "sweep " + scope_of(
        dataclasses.replace(plan, stages=stages), problem.names, np.asarray(grid)
    )
    state = _CurveState(problem, ledger, np.asarray(grid), stages, scope, begun)
    began, finished, meter = time.monotonic(), True, Meter(len(problem), progress, parts=True)
    try:
        # The model is run on every point itself before any part of them is visited.
        first = dataclasses.replace(plan, stages=() if stages else plan.stages)
        finished = run(problem.at(shown), first, ledger, progress=meter, begun=begun)
        while finished and (parts := state.next()):
            for part in parts:
                meter.settle(state.settled())
                left = None if plan.seconds is None else plan.seconds - (time.monotonic() - began)
                finished = (
                    finished
                    and (left is None or left > 0)
                    and state.visit(part, dataclasses.replace(plan, seconds=left), meter)
                )
    except KeyboardInterrupt:  # between two runs
        finished = False
    return finished


def checked(radii: Sequence[float]) -> tuple[float, ...]:
    """Return the radii in rising order, each once.

    Raises `BadInput` unless there is one at least, and all are finite and above 0.
    """
    grid = tuple(sorted({float(r) for r in radii}))
    if not grid or not all(math.isfinite(r) and r > 0 for r in grid):
        raise BadInput(
            "a curve needs one radius or more, finite and above 0, in the data's own units "
            f"(radius 0 is the clean accuracy); got {list(radii)}"
        )
    return grid


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Points that some stages visit, each at the radius of its column."""

    name: str
    stages: tuple[Stage, ...]
    places: NDArray[np.int64]
    columns: NDArray[np.int64]


class _CurveState:
    """The state of a sweep: which cells each kind of tool can still settle.

    `spent` marks, for attacks and for certifiers, the cells in which they need not be asked any
    more.
    """

    def __init__(
        self,
        problem: Problem,
        ledger: Record,
        grid: NDArray[np.float64],
        stages: tuple[Stage, ...],
        scope: str,
        begun: Run,
    ) -> None:
        self.problem, self.ledger, self.grid = problem, ledger, grid
        self.stages, self.scope, self.begun = stages, scope, begun
        self.fingerprint, self.round = problem.fingerprint(), 0
        self.jaws = {
            kind: tuple(s for s in stages if s.kind == kind) for kind in ("attack", "certifier")
        }
        self.spent = {
            kind: np.full((len(problem), len(grid)), not jaw) for kind, jaw in self.jaws.items()
        }
        self._remember()
        held = self._decided(
            "start",
            lambda: {
                kind: np.packbits(cells).tobytes().hex() for kind, cells in self.spent.items()
            },
        )
        for kind, bits in held.items():
            cells = np.unpackbits(
                np.frombuffer(bytes.fromhex(bits), np.uint8), count=self.spent[kind].size
            )
            self.spent[kind] = cells.astype(bool).reshape(self.spent[kind].shape)

    def _decided(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what was decided in this sweep before, or decide it now.

        A resumed sweep thus makes the same visits, with the same points together.
        """
        return self.ledger.decide(self.fingerprint, self.scope, key, make)

    def next(self) -> list[_Part]:
        """Return what to visit in the next round.

        Points are visited by attacks and certifiers where both can still settle something, else by
        the kind that can.
        """
        self.round += 1
        jaws = {"both": self.stages, **self.jaws}
        told = self._decided(
            f"round {self.round}",
            lambda: [
                (jaw, places.tolist(), columns.tolist()) for jaw, places, columns in self._round()
            ],
        )
        return [
            _Part(f"round {self.round}, {jaw}", jaws[jaw], np.asarray(places), np.asarray(columns))
            for jaw, places, columns in told
        ]

    def _round(self) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
        open_cells = self._open()
        attack, certifier = (open_cells & ~self.spent[kind] for kind in ("attack", "certifier"))
        both = attack & certifier
        alone = ~both.any(1, keepdims=True)
        for jaw, cells in (
            ("both", both),
            ("attack", attack & alone),
            ("certifier", certifier & alone),
        ):
            places = np.flatnonzero(cells.any(1))
            if len(places):
                yield jaw, places, _middle(cells[places])

    def visit(self, part: _Part, plan: Plan, meter: Meter) -> bool:
        """Run the part's stages, and note which radii need not be asked any more.

        That concerns the points that stay open. Returns False where the run was stopped.
        """
        asked = self.problem.take(torch.from_numpy(part.places)).at(
            torch.from_numpy(self.grid[part.columns])
        )
        plan = dataclasses.replace(plan, stages=part.stages)
        if not run(asked, plan, self.ledger, progress=meter, begun=self.begun):
            return False
        failed = np.asarray(
            self._decided(
                f"{part.name} failed",
                lambda: np.flatnonzero(self._open()[part.places, part.columns]).tolist(),
            ),
            dtype=np.int64,
        )
        for kind in {s.kind for s in part.stages}:
            self._fail(kind, part.places[failed], part.columns[failed])
        return True

    def _fail(self, kind: str, places: NDArray[np.int64], columns: NDArray[np.int64]) -> None:
        """Note that attacks, or certifiers, could not settle these cells.

        An attack then has nothing to say at smaller radii, a certifier at larger ones.
        """
        column, at = np.arange(len(self.grid)), columns[:, None]
        # unlike |=, this is right where a place occurs twice
        np.logical_or.at(
            self.spent[kind], places, column <= at if kind == "attack" else column >= at
        )

    def _remember(self) -> None:
        """Read from the record which visits of an earlier run failed.

        So that this one proceeds in the same way.
        """
        tried, still = self._tried(), self._open()
        # A visit of both kinds that was cut short between them is made again; a visit of one kind
        # is one of a cell where the other had failed before.
        for cells in (tried["attack"] & tried["certifier"] & still, still):
            for kind, other in (("attack", "certifier"), ("certifier", "attack")):
                ended = cells & tried[kind] & (tried[other] | self.spent[other])
                self._fail(kind, *np.nonzero(ended))

    def _tried(self) -> dict[str, Cells]:
        """Return the cells in which all attacks, or all certifiers, were tried."""
        place, column = (
            {name: i for i, name in enumerate(self.problem.names)},
            {r: k for k, r in enumerate(self.grid.tolist())},
        )
        counts = {s.name: np.zeros(self.spent["attack"].shape, dtype=bool) for s in self.stages}
        for e in self.ledger.evidence(self.fingerprint):
            if e.kind == "attempt" and e.tool in counts and e.point in place and e.radius in column:
                counts[e.tool][place[e.point], column[e.radius]] = True
        none = np.zeros_like(self.spent["attack"])
        return {
            kind: np.logical_and.reduce([counts[s.name] for s in jaw]) if jaw else none
            for kind, jaw in self.jaws.items()
        }

    def settled(self) -> int:
        """Return how many points have a verdict at every radius."""
        return int((~self._open().any(1)).sum())

    def _open(self) -> Cells:
        """Return in which cells the record leaves the verdict open.

        None of a point that cannot be measured is open.
        """
        facts = self.ledger.evidence(self.fingerprint)
        bracket = Bracket.of(self.problem.names, facts)
        invalid = {e.point for e in facts if e.kind == "invalid"}
        usable = np.array([name not in invalid for name in self.problem.names])
        cells: Cells = (
            (bracket.lower[:, None] < self.grid)
            & (self.grid < bracket.upper[:, None])
            & usable[:, None]
        )
        return cells


def _middle(cells: Cells) -> NDArray[np.int64]:
    """Return the middle one of the true columns of each row.

    Every row has one.
    """
    half = (cells.sum(1, keepdims=True) + 1) // 2
    return np.asarray((cells.cumsum(1) >= half).argmax(1), dtype=np.int64)
