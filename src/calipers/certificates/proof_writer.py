"""Proof files: what a certifier chose, so that others can check it.

While points are bounded all choices are noted: the rows that narrowed boxes, slopes, multipliers
and cuts. When a point is proved its notes become a file that `record/checker.py` proves from
nothing else. The file repeats the certifier's course: a pass of plain backward propagation, in
which all rows share the slopes of each point; then, where boxes were sharpened, a second pass with
slopes for every row; then the leaves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calipers.bounds.dual_bound import Dual, Free, Root
from calipers.bounds.interval import Box, propagate
from calipers.bounds.optimise import Ascent, Watch
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.unstable_columns import Columns
from calipers.errors import BadInput
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.graph.kinds import Elementwise, is_elementwise
from calipers.graph.relaxations import Lines
from calipers.graph.serialise import described
from calipers.problem.goals import Targeted, Untargeted
from calipers.problem.problem import Problem
from calipers.record.proofs import contents, packed
from calipers.threats.ball import Ball
from calipers.threats.norms import norm_named
from calipers.threats.threat import Threat

Arrays = dict[str, Any]


class Sweeps(NamedTuple):
    """Rows (P,) of backward propagation with slopes of their own.

    They start from directions of `number`. `rows` are their places in the root, `about` says what
    each bounds.
    """

    root: Root
    number: int
    rows: Tensor
    about: tuple[Tensor, Tensor]
    """For the end of a box its element and sign (P,); for a leaf case (P,) and weights (P, S)."""
    alpha: dict[int, Tensor]
    beta: dict[int, Tensor]
    cuts: dict[int, Box]

    def take(self, index: Tensor) -> Sweeps:
        """Return the chosen rows."""
        held = ({k: t[index] for k, t in one.items()} for one in (self.alpha, self.beta))
        alpha, beta = held
        cuts = {k: box.take(index) for k, box in self.cuts.items()}
        return Sweeps(
            self.root,
            self.number,
            self.rows[index],
            (self.about[0][index], self.about[1][index]),
            alpha,
            beta,
            cuts,
        )


@dataclass(frozen=True)
class Noted(Ascent):
    """An ascent that notes what it chose for each end of a box."""

    notes: list[Sweeps] = field(default_factory=list)

    def __call__(self, dual: Dual, free: Free, watch: Watch | None = None) -> tuple[Tensor, Free]:
        """Ascend as `Ascent` does, and note the slopes chosen."""
        bound, chosen = super().__call__(dual, free, watch)
        flat = dual.spec[:, 0].flatten(1)
        element = flat.abs().argmax(1)
        sign = flat.gather(1, element[:, None])[:, 0]
        self.notes.append(
            Sweeps(dual.root, dual.number, dual.rows, (element, sign), chosen.alpha, {}, {})
        )
        return bound, chosen


@dataclass(eq=False)
class Notes:
    """What was chosen for a batch of points.

    `plain` is their relaxation by plain backward propagation, `margins (N, S)` what that proves;
    `sharp` is the second relaxation, of the points `open`, and `ends` its rows; `leaves` are noted
    for places in the problem (P,).
    """

    problem: Problem
    plain: Relaxed
    margins: Tensor
    cases: Tensor
    open: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    sharp: Relaxed | None = None
    ends: list[Sweeps] = field(default_factory=list)
    leaves: list[tuple[int, Tensor, Sweeps]] = field(default_factory=list)

    @classmethod
    def of(cls, problem: Problem, plain: Relaxed, margins: Tensor) -> Notes:
        """Begin with the relaxation by plain backward propagation.

        Raises `BadInput` where proof files cannot express the threat.
        """
        check_ball(problem.threat)
        everything = torch.arange(len(problem), device=problem.x.device)
        return cls(
            problem,
            plain.take(everything),
            margins.clone(),
            problem.goal.cases(problem.classes).to(margins.device),
        )

    def sharpened(self, state: Relaxed, points: Tensor, ends: list[Sweeps]) -> None:
        """Note the second pass over the points `points (M,)`."""
        self.sharp, self.open, self.ends = state, points, ends

    def leaf(self, dual: Dual, free: Free, case: Tensor, points: Tensor) -> None:
        """Note leaves (P,) that were proved for `points`, places in the problem.

        Their directions are those of their cases, repeated where a case has fewer.
        """
        weights = torch.zeros(len(case), len(self.cases), dtype=torch.float64, device=case.device)
        members = [
            torch.nonzero(self.cases == c).flatten() for c in range(int(self.cases.max()) + 1)
        ]
        width = free.mix.shape[1]
        table = torch.stack([torch.cat([m, m[:1].expand(width - len(m))]) for m in members])[case]
        weights.scatter_add_(
            1,
            table,
            free.weights.double() if width > 1 else torch.ones_like(free.mix, dtype=torch.float64),
        )
        turn = 1 if self.sharp is not None else 0
        beta = {k: b for k, b in free.beta.items() if k in dual.cuts}
        self.leaves.append(
            (
                turn,
                points,
                Sweeps(
                    dual.root, dual.number, dual.rows, (case, weights), free.alpha, beta, dual.cuts
                ),
            )
        )

    def written(self, i: int, tool: object) -> bytes:
        """Return the proof of the point at place i."""
        claim, arrays = stated_claim(self.problem, i, self.plain.graph)
        return packed(
            {**claim, "tool": repr(tool), "blocks": self._blocks(i, arrays)}, as_arrays(arrays)
        )

    def _blocks(self, i: int, arrays: Arrays) -> list[dict[str, Any]]:
        blocks: list[dict[str, Any]] = []
        plain = self.plain.take(torch.tensor([i], device=self.margins.device))
        write_shared(plain, arrays)
        for number, flags in improved_ends(plain, {}).items():
            side, element = flags[:, 0].nonzero(as_tuple=True)
            write_block(
                blocks,
                arrays,
                {"pass": 0, "kind": "box", "number": number},
                {"element": element, "upper": side > 0},
            )
        leaves = [
            (turn, sweeps.take(mine))
            for turn, points, sweeps in self.leaves
            if len(mine := torch.nonzero(points == i).flatten())
        ]
        done = {int(c) for _, sweeps in leaves for c in sweeps.about[0].tolist()}
        case, weights = self._plain_leaves(i, done)
        if len(case):
            write_block(
                blocks, arrays, {"pass": 0, "kind": "leaf"}, {"case": case, "weights": weights}
            )
        if any(turn for turn, _ in leaves):
            self._write_second_pass(i, plain, blocks, arrays)
        for turn, sweeps in leaves:
            block = {
                "case": sweeps.about[0],
                "weights": sweeps.about[1],
                **_slopes(sweeps),
                **_cuts(sweeps),
            }
            write_block(blocks, arrays, {"pass": turn, "kind": "leaf"}, block)
        return blocks

    def _plain_leaves(self, i: int, done: set[int]) -> tuple[Tensor, Tensor]:
        """Return the cases proved without a noted leaf, with their weights.

        Each is proved by the best of its margins.
        """
        case = torch.tensor(
            [c for c in range(int(self.cases.max()) + 1) if c not in done],
            dtype=torch.long,
            device=self.margins.device,
        )
        own = torch.where(self.cases == case[:, None], self.margins[i], -torch.inf)
        weights = torch.zeros_like(own)
        return case, weights.scatter_(1, own.argmax(1, keepdim=True), 1.0)

    def _write_second_pass(
        self, i: int, plain: Relaxed, blocks: list[dict[str, Any]], arrays: Arrays
    ) -> None:
        assert self.sharp is not None
        place = torch.nonzero(self.open == i).flatten()
        sharp = self.sharp.take(place)
        improved = improved_ends(sharp, plain.boxes)
        for sweeps in self.ends:
            flags = improved.get(sweeps.number)
            if flags is None:
                continue
            side = (sweeps.about[1] < 0).long()
            mine = torch.nonzero((sweeps.rows == place) & flags[side, 0, sweeps.about[0]]).flatten()
            if len(mine):
                own = sweeps.take(mine)
                block = {"element": own.about[0], "upper": own.about[1] < 0, **_slopes(own)}
                write_block(blocks, arrays, {"pass": 1, "kind": "box", "number": own.number}, block)


def check_ball(threat: Threat) -> None:
    """Raise `BadInput` where proof files cannot express a threat."""
    if (
        not isinstance(threat, Ball)
        or norm_named(threat.norm).is_count
        or threat.constraints is not None
    ):
        raise BadInput(
            "proof files are about norm balls, and no constraints: measure this threat without "
            "proofs"
        )


def level(state: Relaxed) -> Relaxed:
    """Return the state with lines of slope 0 where functions are unstable.

    Backward propagation through them proves no less than intervals do.
    """
    lines = {
        k: Lines(*(torch.zeros_like(t) for t in v))
        for k, v in state.relaxations.items()
        if isinstance(v, Lines)
    }
    return replace(state, relaxations={**state.relaxations, **lines})


def differs(problem: Problem, i: int, data: bytes) -> str:
    """Return what in a proof's claim differs from the problem's question.

    The question is about the point at place i, at the problem's radius; empty if nothing differs.
    """
    claim, arrays = stated_claim(problem, i, graph_of(problem.classifier, problem.x))
    header, held = contents(data)
    for name, facts in json.loads(json.dumps(claim)).items():
        if header.get(name) != facts:
            return f"it is about another {name}"
    told = {
        name: value
        for name, value in held.items()
        if name.startswith(("net.", "threat.")) or name in ("x", "spec", "offsets", "cases")
    }
    asked = as_arrays(arrays)
    wrong = sorted(
        name
        for name in asked.keys() | told.keys()
        if name not in asked or name not in told or not np.array_equal(asked[name], told[name])
    )
    return f"its {wrong[0]} is not what was asked about" if wrong else ""


def stated_claim(problem: Problem, i: int, graph: Graph) -> tuple[dict[str, Any], Arrays]:
    """Return the claim about a point: network, threat and goal.

    With it their arrays.
    """
    network, given = described(graph)
    threat, arrays = problem.threat, Arrays(given)
    assert isinstance(threat, Ball)
    arrays["x"] = problem.x[i]
    _write_threat(threat, arrays)
    radius = float(threat.radii(len(problem))[i])
    return {
        "network": network,
        "threat": {"norm": threat.norm, "radius": radius},
        "goal": _goal(problem, i, arrays),
    }, arrays


def as_arrays(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Return the arrays as NumPy arrays."""
    return {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        for name, value in arrays.items()
    }


def _goal(problem: Problem, i: int, arrays: Arrays) -> dict[str, Any]:
    """Return the goal at a point, as written to a file.

    A goal of no known kind is written as its margins.
    """
    goal, y = problem.goal, problem.y[i : i + 1]
    if type(goal) is Untargeted:
        return {"kind": "untargeted", "class": int(y)}
    if type(goal) is Targeted:
        return {
            "kind": "targeted",
            "class": int(torch.as_tensor(goal.target).expand(len(problem))[i]),
        }
    one = goal.take(torch.tensor([i], device=y.device))
    arrays |= {
        "spec": one.rows(y, problem.classes)[0].double(),
        "offsets": one.offsets(y, problem.classes).expand(1, -1)[0].double(),
    }
    arrays["cases"] = one.cases(problem.classes)
    return {"kind": "linear"}


def _write_threat(threat: Ball, arrays: Arrays) -> None:
    if threat.ends is not None:
        arrays |= {
            f"threat.{name}": _flat(torch.as_tensor(end, dtype=torch.float64), arrays)
            for name, end in zip(("low", "high"), threat.ends, strict=True)
        }
    if threat.mask is not None:
        arrays["threat.mask"] = _flat(threat.mask, arrays)
    if threat.weights is not None:
        arrays["threat.weights"] = _flat(threat.weights, arrays)


def _flat(value: Tensor, arrays: Arrays) -> Tensor:
    """Return a value as one number, or one for each feature of the point."""
    return value if value.dim() == 0 else value.expand(arrays["x"].shape).flatten()


def write_block(
    blocks: list[dict[str, Any]], arrays: Arrays, facts: dict[str, Any], held: dict[str, Tensor]
) -> None:
    """Add a block and its arrays."""
    arrays |= {f"b{len(blocks)}.{name}": value for name, value in held.items()}
    blocks.append(facts)


def improved_ends(state: Relaxed, known: dict[int, Box]) -> dict[int, Tensor]:
    """Return by number which ends of boxes were narrowed, (2, N, n).

    Lower ends, then upper ones: those narrower than intervals and the known boxes make them.
    """
    found = {}
    for number in state.graph.nonlinear:
        if number == 0:
            continue
        plain, box = (
            propagate(state.graph, number, state.boxes, state.arithmetic),
            state.boxes[number],
        )
        plain = plain.meet(known[number]) if known else plain
        flags = torch.stack([box.lower > plain.lower, box.upper < plain.upper]).flatten(2)
        if bool(flags.any()):
            found[number] = flags
    return found


def write_shared(state: Relaxed, arrays: Arrays, turn: int = 0) -> None:
    """Write the slopes (N, n) that all rows of a region share.

    Only where functions are unstable; NaN elsewhere.
    """
    for k, i, op in _functions(state.graph):
        low, high, lines = (
            state.boxes[i].lower.flatten(1),
            state.boxes[i].upper.flatten(1),
            state.lines(k),
        )
        unstable = op.unstable(low, high)
        if bool(unstable.any()):
            kept = _chosen(
                op,
                low[unstable],
                high[unstable],
                {"low": lines.lower_slope.flatten(1), "high": lines.upper_slope.flatten(1)},
            )
            arrays |= {
                f"pass{turn}.{k}.{name}": torch.where(unstable, slope, torch.nan)
                for name, slope in kept.items()
            }


def _functions(graph: Graph) -> list[tuple[int, int, Elementwise]]:
    """Return node, input and operation of every elementwise function."""
    return [
        (k, node.inputs[0], node.op)
        for k, node in enumerate(graph.nodes, start=1)
        if is_elementwise(node.op)
    ]


def _chosen(
    op: Elementwise, low: Tensor, high: Tensor, slopes: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return only the slopes that were chosen.

    A side that does not move with alpha is left out: the checker finds the chord itself.
    """
    if not op.linear_in_alpha:
        return slopes
    first, last = (op.relax(low, high, torch.full_like(low, a)) for a in (0.0, 1.0))
    moves = {
        "low": bool((first.lower_slope != last.lower_slope).any()),
        "high": bool((first.upper_slope != last.upper_slope).any()),
    }
    return {name: slope for name, slope in slopes.items() if moves[name]}


def _slopes(sweeps: Sweeps) -> dict[str, Tensor]:
    """Return the slopes of one point's rows, by operation.

    The places (U,) of the columns and the slopes (P, U), and the weights of products.
    """
    held: dict[str, Tensor] = {}
    root = sweeps.root
    for k, i, op in _functions(root.state.graph):
        if k not in sweeps.alpha or k > sweeps.number:
            continue
        columns, whole = root.columns[i].take(sweeps.rows), root.state.boxes[i]
        box = _cut(
            columns,
            Box(columns.get(whole.lower[sweeps.rows]), columns.get(whole.upper[sweeps.rows])),
            sweeps.cuts.get(i),
        )
        lines = op.relax(box.lower, box.upper, columns.filled(sweeps.alpha[k].double().clamp(0, 1)))
        real = columns.real[0]
        if bool(real.any()):
            kept = _chosen(
                op,
                box.lower[:, real],
                box.upper[:, real],
                {"low": lines.lower_slope[:, real], "high": lines.upper_slope[:, real]},
            )
            held |= {
                f"{k}.{name}": value
                for name, value in {"place": columns.place[0, real], **kept}.items()
            }
    return held | _weights(sweeps)


def _weights(sweeps: Sweeps) -> dict[str, Tensor]:
    """Return the weights of the second planes of products, by operation.

    One for each row and result (P, n), for both sides alike.
    """
    graph, held = sweeps.root.state.graph, dict[str, Tensor]()
    for k, weights in sweeps.alpha.items():
        if k <= sweeps.number and not graph.nodes[k - 1].op.elementwise and bool(weights.any()):
            weights = weights.double().clamp(0, 1)
            held |= {
                f"{k}.place": torch.arange(weights.shape[1]),
                f"{k}.low": weights,
                f"{k}.high": weights,
            }
    return held


def _cut(columns: Columns, box: Box, cut: Box | None) -> Box:
    if cut is None:
        return box
    lower = torch.maximum(box.lower, columns.filled(cut.lower).double())
    return Box(
        lower, torch.maximum(torch.minimum(box.upper, columns.filled(cut.upper).double()), lower)
    )


def _cuts(sweeps: Sweeps) -> dict[str, Tensor]:
    """Return the cuts of one point's leaves, by number.

    Of every element that any of them cuts (U,) the ends and multipliers (P, U); a multiplier
    without a constraint of its sign is left out.
    """
    held: dict[str, Tensor] = {}
    for number, box in sweeps.cuts.items():
        columns = sweeps.root.columns[number].take(sweeps.rows)
        cut = ((box.lower.isfinite() | box.upper.isfinite()) & columns.real).any(0)
        if not bool(cut.any()):
            continue
        low, high = box.lower[:, cut], box.upper[:, cut]
        beta = sweeps.beta[number][:, cut] if number in sweeps.beta else torch.zeros_like(low)
        allowed = beta.isfinite() & torch.where(beta > 0, low.isfinite(), high.isfinite())
        parts = {
            "place": columns.place[0, cut],
            "low": low,
            "high": high,
            "beta": torch.where(allowed, beta, 0.0),
        }
        held |= {f"cut{number}.{name}": value for name, value in parts.items()}
    return held
