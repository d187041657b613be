"""SCIP on a network's program, in a process of its own.

The process can be ended at any time, and its faults do not reach the caller. The program consists
of the model's rows over perturbations within the radius, a binary for each option of a choice, and
the distance as its objective; the row of an option is relaxed by a big-M constant where another
option is chosen. What comes back are points and the branches in which SCIP's search tree ended.
Both are hints, which are not trusted.
"""

from __future__ import annotations

import pickle
import sys
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_THIN = 1e-9  # a row whose two ends are no farther apart counts as an equation
_SETTINGS: dict[str, Any] = {
    "misc/catchctrlc": False,  # the caller is interrupted, and ends this process
    # rows are tight already, and branches must be those of the given choices
    "presolving/maxrounds": 0,
    "presolving/maxrestarts": 0,
    "limits/gap": 1e-4,  # hints need no more
    # Nonlinear sub-programs take two thirds of a search over a Euclidean ball, and cuts take more
    # time than they save.
    **dict.fromkeys(
        [
            "heuristics/subnlp/freq",
            "heuristics/mpec/freq",
            "heuristics/nlpdiving/freq",
            "heuristics/multistart/freq",
        ],
        -1,
    ),
    "separating/maxrounds": 0,
    "separating/maxroundsroot": 0,
}


class Way(NamedTuple):
    """One option of a choice, with big-M constants.

    With it the row `row` becomes an equation with `at` on the right; otherwise it may be below `at`
    by `below` or above it by `above`. Column `z` lies between `low` and `high` (no column where z <
    0).
    """

    row: int
    at: float
    below: float
    above: float
    z: int
    low: float
    high: float


class SCIPJob(NamedTuple):
    """What SCIP is asked: a model, a ball, and the goals.

    The rows are low_row <= inputs @ delta + columns @ v <= high_row, with low <= v <= high. |delta|
    is within `radius` in the norm of exponent `power` (1, 2, inf) with `weight`, and delta within
    `floor` and `ceiling`. For each column of `goals` the question is how near a point is where it
    is at most 0.
    """

    inputs: Any
    columns: Any
    low_row: Floats
    high_row: Floats
    low: Floats
    high: Floats
    choices: list[list[Way]]
    power: float
    weight: Floats
    floor: Floats
    ceiling: Floats
    goals: list[int]
    radius: float
    seconds: float


class Hints(NamedTuple):
    """What SCIP says about one goal.

    It is the nearest perturbation found (None: none), the lower bound on the distance that SCIP
    claims, and the branches in which its tree ended, choice -> option.
    """

    goal: int
    delta: Floats | None
    distance: float
    branches: list[dict[int, int]]
    length: float = np.inf
    """Length of the perturbation, as SCIP says."""


def serve() -> None:
    """Read a question from stdin, and write the hints to stdout as they come."""
    question: SCIPJob = pickle.load(sys.stdin.buffer)
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # only hints may be in the output
    ends, radius = time.monotonic() + question.seconds, question.radius
    for goal in question.goals:
        if time.monotonic() > ends:
            break
        hints = _Program(question, goal, radius).hints(goal, ends - time.monotonic())
        radius = min(radius, hints.length)  # not SCIP's bound, which is near 0 after a time-out
        pickle.dump(hints, out)
        out.flush()


class _Program:
    """SCIP's program for one goal.

    Perturbations are in shares of the radius, u = weight * delta / radius, so that nothing depends
    on the data's units.
    """

    def __init__(self, question: SCIPJob, goal: int, radius: float) -> None:
        import pyscipopt

        self.question, self.radius, self.sum = question, radius, pyscipopt.quicksum
        self.model = pyscipopt.Model()
        self.model.hideOutput()
        for name, value in _SETTINGS.items():
            self.model.setParam(name, value)
        self.scale = radius / question.weight
        low, high = (
            np.maximum(question.floor / self.scale, -1.0),
            np.minimum(question.ceiling / self.scale, 1.0),
        )
        self.offsets = {
            int(i): self.model.addVar(lb=float(low[i]), ub=float(high[i]))
            for i in np.flatnonzero(low < high)
        }
        self.columns = [
            self.model.addVar(lb=float(a), ub=float(min(b, 0.0) if c == goal else b))
            for c, (a, b) in enumerate(zip(question.low, question.high, strict=True))
        ]
        self.distance = self.model.addVar(lb=0.0, ub=1.0, obj=1.0)
        self._ball()
        self._rows()
        # by name: the choice, the option where it is 1, and the one where it is 0 (-1: several)
        self.binaries: dict[str, tuple[int, int, int]] = {}
        for place, ways in enumerate(question.choices):
            self._choice(place, ways)

    def _ball(self) -> None:
        """Require the distance variable to be at least the norm of u.

        For l2 it is at least the squared norm.
        """
        power, add = self.question.power, self.model.addVar
        if power == 2:
            self.model.addCons(self.sum(u * u for u in self.offsets.values()) <= self.distance)
        elif power == 1:
            sizes = {i: add(lb=0.0, ub=1.0) for i in self.offsets}
            for i, u in self.offsets.items():
                self.model.addCons(u <= sizes[i])
                self.model.addCons(-u <= sizes[i])
            self.model.addCons(self.sum(sizes.values()) <= self.distance)
        else:
            for u in self.offsets.values():
                self.model.addCons(u <= self.distance)
                self.model.addCons(-u <= self.distance)

    def _row(self, row: int) -> Any:
        """Return the sum of a row."""
        q = self.question
        inputs = [
            (self.offsets[int(i)], a * self.scale[i])
            for i, a in _entries(q.inputs, row)
            if int(i) in self.offsets
        ]
        return self.sum(
            v * float(a)
            for v, a in [*inputs, *((self.columns[c], a) for c, a in _entries(q.columns, row))]
        )

    def _rows(self) -> None:
        for row, (low, high) in enumerate(
            zip(self.question.low_row.tolist(), self.question.high_row.tolist(), strict=True)
        ):
            if high - low <= _THIN:
                self.model.addCons(self._row(row) == (low + high) / 2)
                continue
            if np.isfinite(low):
                self.model.addCons(self._row(row) >= low)
            if np.isfinite(high):
                self.model.addCons(self._row(row) <= high)

    def _choice(self, place: int, ways: list[Way]) -> None:
        """Add a binary for each option, of which exactly one is 1.

        Two options share one binary.
        """
        chosen = list[Any]()
        for k in range(len(ways)):
            if len(ways) == 2 and k == 1:
                chosen.append(1 - chosen[0])
                continue
            name = f"c{place}o{k}"
            self.binaries[name] = (place, k, 1 - k if len(ways) == 2 else -1)
            chosen.append(self.model.addVar(name=name, vtype="B"))
        if len(ways) != 2:
            self.model.addCons(self.sum(chosen) == 1)
        for way, b in zip(ways, chosen, strict=True):
            self.model.addCons(self._row(way.row) <= way.at + way.above * (1 - b))
            self.model.addCons(self._row(way.row) >= way.at - way.below * (1 - b))
            if way.z >= 0:
                z, low, high = (
                    self.columns[way.z],
                    self.question.low[way.z],
                    self.question.high[way.z],
                )
                self.model.addCons(z >= max(way.low, low) * b + low * (1 - b))
                self.model.addCons(z <= min(way.high, high) * b + high * (1 - b))

    def hints(self, goal: int, seconds: float) -> Hints:
        """Solve the program, and return the hints."""
        ended = _ended(self.model)
        self.model.setParam("limits/time", max(0.01, seconds))
        self.model.optimize()
        root, delta, length = 0.5 if self.question.power == 2 else 1.0, None, np.inf
        if self.model.getNSols():
            delta = np.zeros(len(self.scale))
            best = self.model.getBestSol()
            for i, u in self.offsets.items():
                delta[i] = self.model.getSolVal(best, u) * self.scale[i]
            length = self.model.getPrimalbound() ** root * self.radius
        told = float(np.clip(self.model.getDualbound(), 0.0, 1.0)) ** root * self.radius
        return Hints(goal, delta, told, [self._made(path) for path in ended.paths], length)

    def _made(self, path: list[tuple[str, float, bool]]) -> dict[int, int]:
        """Return the choices that a branch made.

        The path is (name of the binary, its bound, whether that is a lower one).
        """
        made = {}
        for name, bound, lower in path:
            place, one, zero = self.binaries.get(name.removeprefix("t_"), (-1, -1, -1))
            option = one if lower and bound > 0.5 else zero if not lower and bound < 0.5 else -1
            if option >= 0:
                made[place] = option
        return made


def _entries(matrix: Any, row: int) -> list[tuple[int, float]]:
    """Return the entries of a row of a sparse matrix: (column, value)."""
    part = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return list(zip(matrix.indices[part].tolist(), matrix.data[part].tolist(), strict=True))


def _ended(model: Any) -> Any:
    """Return an event handler that keeps the paths to the search's leaves."""
    from pyscipopt.scip import PY_SCIP_EVENTTYPE, Eventhdlr

    kinds = (PY_SCIP_EVENTTYPE.NODEINFEASIBLE, PY_SCIP_EVENTTYPE.NODEFEASIBLE)

    class Ended(Eventhdlr):
        def __init__(self) -> None:
            self.paths: list[list[tuple[str, float, bool]]] = []

        def eventinit(self) -> None:
            for kind in kinds:
                self.model.catchEvent(kind, self)

        def eventexec(self, event: Any) -> None:
            node, path = event.getNode(), []
            while node.getDepth() > 0:
                branchings = node.getParentBranchings()
                if branchings is not None:
                    path += [
                        (v.name, bound, kind == 0)
                        for v, bound, kind in zip(*branchings, strict=True)
                    ]
                node = node.getParent()
            self.paths.append(path)

    ended = Ended()
    model.includeEventhdlr(ended, "ended", "keeps the paths to the nodes that the search ends in")
    return ended
