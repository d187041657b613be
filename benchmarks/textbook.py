"""What does a textbook's mixed-integer program of a network look like, and what do other solvers
make of it?

One column for every number of the network, an equation for each element of an affine layer, a
binary and three rows for each ReLU that bends over the region, with constants from interval
arithmetic over that region (Tjeng et al. 2019). The region is that of a known example: constants
are as small as intervals make them. Nobody proves again what these solvers say.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch

from calipers.bounds.backward import relax
from calipers.bounds.interval import Box
from calipers.bounds.rounding import CHECKED
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.problem.problem import Problem

_LOADING = 30.0  # seconds for a process to begin, and to fill a solver

Row = tuple[float, float, list[int], list[float]]
"""(low, high, columns, values)."""


class Told(NamedTuple):
    """What a peer says: the distance (infinite: none within the region), the seconds in its solver,
    and whether it came to an end.
    """

    distance: float
    seconds: float
    solved: bool


@dataclass(eq=False)
class Textbook:
    """Columns with ends, rows, and ReLUs as (before, behind, low, high), of the only point of a
    problem.
    """

    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    relus: list[tuple[int, int, float, float]] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)

    x: list[float] = field(default_factory=list)
    radius: float = 0.0
    margins: list[list[float]] = field(default_factory=list)
    last: int = 0

    @classmethod
    def of(cls, problem: Problem) -> Textbook:
        """Return the program of the only point."""
        book, graph = cls(), graph_of(problem.classifier, problem.x).to(torch.float64)
        boxes: dict[int, Box] = relax(
            graph, problem.threat.region(problem.x.double(), outward=True), CHECKED, refine=False
        ).boxes
        for number in range(len(graph.nodes) + 1):
            book.place[number] = len(book.low)
            book.low += boxes[number].lower[0].flatten().tolist()
            book.high += boxes[number].upper[0].flatten().tolist()
        for number in range(1, len(graph.nodes) + 1):
            book._layer(graph, boxes, number)
        book.x, book.radius = (
            problem.x[0].double().flatten().tolist(),
            float(problem.threat.radii(1)[0]),
        )
        book.margins = problem.goal.rows(problem.y, problem.classes)[0].double().tolist()
        book.last = book.place[len(graph.nodes)]
        return book

    def _layer(self, graph: Graph, boxes: dict[int, Box], number: int) -> None:
        node, own = graph.nodes[number - 1], self.place[number]
        before = node.inputs[0]
        if node.op.affine:
            zero = (
                node.op.value(
                    *(torch.zeros(1, *graph.shape(i), dtype=torch.float64) for i in node.inputs)
                )
                .flatten()
                .tolist()
            )  # type: ignore[attr-defined]
            size = len(zero)
            (back,) = node.op.adjoint(torch.eye(size, dtype=torch.float64).view(size, *node.shape))  # type: ignore[attr-defined]
            for e, weights in enumerate(back.flatten(1).numpy()):
                used = np.flatnonzero(weights)
                self.rows.append(
                    (
                        zero[e],
                        zero[e],
                        [own + e, *(self.place[before] + used).tolist()],
                        [1.0, *(-weights[used]).tolist()],
                    )
                )
            return
        low, high = (
            end[0].flatten().tolist() for end in (boxes[before].lower, boxes[before].upper)
        )
        for e in range(len(low)):
            z, y = self.place[before] + e, own + e
            if low[e] >= 0:
                self.rows.append((0.0, 0.0, [y, z], [1.0, -1.0]))
            elif high[e] <= 0:
                self.rows.append((0.0, 0.0, [y], [1.0]))
            else:
                self.relus.append((z, y, low[e], high[e]))

    def margin(self, which: int) -> Row:
        """Return the row that says that a margin is at most 0."""
        weights = self.margins[which]
        return (-np.inf, 0.0, [self.last + k for k in range(len(weights))], weights)


def by_highs(book: Textbook, seconds: float) -> Told:
    """Ask HiGHS: one program for each rival."""
    import highspy

    best, spent, solved = np.inf, 0.0, True
    for which in range(len(book.margins)):
        h = highspy.Highs()  # type: ignore[no-untyped-call]
        for name, value in {
            "output_flag": False,
            "threads": 1,
            "time_limit": max(0.01, seconds - spent),
        }.items():
            h.setOptionValue(name, value)
        distance = _filled(h, book, which)
        begun = time.perf_counter()
        h.run()
        spent += time.perf_counter() - begun
        status = h.getModelStatus()
        solved &= status in (
            highspy.HighsModelStatus.kOptimal,
            highspy.HighsModelStatus.kInfeasible,
        )
        if status == highspy.HighsModelStatus.kOptimal:
            best = min(best, h.getSolution().col_value[distance])
        if spent >= seconds:
            return Told(best, spent, False)
    return Told(best, spent, solved)


def _filled(h: Any, book: Textbook, which: int) -> int:
    """Give HiGHS the program; return the distance's column."""

    def add(row: Row) -> None:
        h.addRow(row[0], row[1], len(row[2]), np.array(row[2], dtype=np.int32), np.array(row[3]))

    count = len(book.low)
    h.addVars(count, np.array(book.low), np.array(book.high))
    h.addVars(1, np.zeros(1), np.full(1, book.radius))
    h.changeColCost(count, 1.0)
    for i, value in enumerate(book.x):
        add((-np.inf, value, [i, count], [1.0, -1.0]))
        add((value, np.inf, [i, count], [1.0, 1.0]))
    for row in [*book.rows, book.margin(which)]:
        add(row)
    for place, (z, y, low, high) in enumerate(book.relus, start=count + 1):
        h.addVars(1, np.zeros(1), np.ones(1))
        h.changeColsIntegrality(1, np.array([place], dtype=np.int32), np.array([1], dtype=np.uint8))
        for row in _three(z, y, place, low, high):
            add(row)
    return count


def _three(z: int, y: int, binary: int, low: float, high: float) -> list[Row]:
    return [
        (0.0, np.inf, [y, z], [1.0, -1.0]),
        (-np.inf, -low, [y, z, binary], [1.0, -1.0, -low]),
        (-np.inf, 0.0, [y, binary], [1.0, -high]),
    ]


def by_scip(book: Textbook, seconds: float) -> Told:
    """Ask SCIP, the same programs."""
    import pyscipopt

    best, spent, solved = np.inf, 0.0, True
    for which in range(len(book.margins)):
        model = pyscipopt.Model()
        model.hideOutput()
        model.setParam("limits/time", max(0.01, seconds - spent))
        columns = [
            model.addVar(lb=low, ub=high) for low, high in zip(book.low, book.high, strict=True)
        ]
        columns.append(model.addVar(lb=0.0, ub=book.radius, obj=1.0))
        distance, count = columns[-1], len(columns)
        columns += [model.addVar(vtype="B") for _ in book.relus]
        rows = [*book.rows, book.margin(which)]
        for i, value in enumerate(book.x):
            rows += [
                (-np.inf, value, [i, count - 1], [1.0, -1.0]),
                (value, np.inf, [i, count - 1], [1.0, 1.0]),
            ]
        for place, relu in enumerate(book.relus, start=count):
            rows += _three(relu[0], relu[1], place, relu[2], relu[3])
        for low, high, places, values in rows:
            terms = pyscipopt.quicksum(v * columns[c] for c, v in zip(places, values, strict=True))
            model.addCons(
                terms == low if low == high else terms >= low if np.isfinite(low) else terms <= high
            )
        begun = time.perf_counter()
        model.optimize()
        spent += time.perf_counter() - begun
        solved &= model.getStatus() in ("optimal", "infeasible")
        if model.getStatus() == "optimal":
            best = min(best, float(model.getVal(distance)))
        if spent >= seconds:
            return Told(best, spent, False)
    return Told(best, spent, solved)


def by_marabou(book: Textbook, seconds: float) -> Told:
    """Ask Marabou whether a rival wins anywhere in the region: it decides, and does not measure.
    Distance 0 means yes, infinite means no.
    """
    from maraboupy import Marabou, MarabouCore

    spent, found, solved = 0.0, False, True
    for which in range(len(book.margins)):
        query = MarabouCore.InputQuery()
        query.setNumberOfVariables(len(book.low))
        for c, (low, high) in enumerate(zip(book.low, book.high, strict=True)):
            query.setLowerBound(c, low)
            query.setUpperBound(c, high)
        inputs = len(book.x)
        for i in range(inputs):
            query.markInputVariable(i, i)
        for low, high, places, values in [*book.rows, book.margin(which)]:
            equation = (
                MarabouCore.Equation()
                if low == high
                else MarabouCore.Equation(MarabouCore.Equation.LE)
            )
            for c, v in zip(places, values, strict=True):
                equation.addAddend(v, c)
            equation.setScalar(high)
            query.addEquation(equation)
        for z, y, _, _ in book.relus:
            MarabouCore.addReluConstraint(query, z, y)
        options = Marabou.createOptions(
            verbosity=0, timeoutInSeconds=max(1, int(seconds - spent)), numWorkers=1
        )
        begun = time.perf_counter()
        status, _, _ = MarabouCore.solve(query, options, "/dev/null")
        spent += time.perf_counter() - begun
        found |= status == "sat"
        solved &= status in ("sat", "unsat")
        if found:
            return Told(0.0, spent, solved=True)
        if spent >= seconds:
            break
    return Told(np.inf, spent, solved and spent < seconds)


PEERS = {
    "HiGHS": (by_highs, "highspy"),
    "SCIP": (by_scip, "pyscipopt"),
    "Marabou": (by_marabou, "maraboupy"),
}


class Asked:
    """A peer in a process of its own: the three cannot be loaded beside each other, and one that
    overruns its time is ended.
    """

    def __init__(self, peer: str) -> None:
        self.peer, self.pool = peer, self._begun()

    @staticmethod
    def _begun() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __call__(self, book: Textbook, seconds: float) -> Told:
        """Return what the peer says within so many seconds, or that it ran out of them."""
        asked = self.pool.submit(PEERS[self.peer][0], book, seconds)
        try:
            told = asked.result(timeout=_LOADING + 2 * seconds)
        except TimeoutError:
            self.close()
            self.pool = self._begun()
            return Told(np.inf, seconds, solved=False)
        return told if told.solved else told._replace(seconds=min(told.seconds, seconds))

    def close(self) -> None:
        """End the process."""
        for process in list((self.pool._processes or {}).values()):
            process.kill()
        self.pool.shutdown(cancel_futures=True)
