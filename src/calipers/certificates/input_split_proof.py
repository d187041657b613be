"""Proof files of searches that split the input.

They hold the boxes that the search closed, split further until plain backward propagation alone
closes each of them: the search bounds boxes by affine forms as well, which `record/checker.py` does
not know. A file holds runs of boxes, a pass each, with the slopes of every box and the rows to
propagate; the checker proves each box for itself, and that together they are the whole threat set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.backward import margin_bounds, margin_lines, relax
from calipers.bounds.interval import halves
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import Arithmetic, plain_sums
from calipers.certificates.crown import shifted
from calipers.certificates.proof_writer import (
    Arrays,
    as_arrays,
    check_ball,
    improved_ends,
    stated_claim,
    write_block,
    write_shared,
)
from calipers.graph.ir import Graph
from calipers.problem.goals import by_case
from calipers.problem.problem import Problem
from calipers.record.checker import Threat
from calipers.record.proofs import packed
from calipers.threats.ball import Region

_TOGETHER = 512  # boxes of a pass
_CLEAR = 1e-9  # smallest margin of a closed box: the checker computes the same in another order


@dataclass(eq=False)
class ClosedBoxes:
    """The boxes of one point that a search has closed.

    `boxes` holds pairs of ends (P, *D) in float64.
    """

    problem: Problem
    graph: Graph
    region: Region
    arithmetic: Arithmetic
    boxes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def written(self, tool: object) -> bytes:
        """Return the proof file.

        Cost: CROWN for every box, and for those that had to be halved again.
        """
        check_ball(self.problem.threat)
        claim, arrays = stated_claim(self.problem, 0, self.graph)
        blocks: list[dict[str, Any]] = []
        low, high, moving = self._within(claim["threat"], arrays)
        turn = 0
        with torch.no_grad(), plain_sums():
            while len(low):
                run, low, high = (
                    (low[:_TOGETHER], high[:_TOGETHER]),
                    low[_TOGETHER:],
                    high[_TOGETHER:],
                )
                state, margins, closed = self._bounded(*run)
                left = torch.nonzero(~closed).flatten()
                if len(left):
                    halves = self._halved(
                        run[0][left], run[1][left], state.take(left), margins[left], moving
                    )
                    low, high = torch.cat([low, halves[0]]), torch.cat([high, halves[1]])
                kept = torch.nonzero(closed).flatten()
                if len(kept):
                    turn += 1
                    self._write(
                        state.take(kept),
                        margins[kept],
                        (run[0][kept], run[1][kept], moving),
                        turn,
                        blocks,
                        arrays,
                    )
        return packed({**claim, "tool": repr(tool), "blocks": blocks}, as_arrays(arrays))

    def _within(self, facts: dict[str, Any], arrays: Arrays) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes, extended to the checker's own border.

        Those at the border of the threat set are moved out to where the checker sees it. With them
        the features (d,) that move.
        """
        low, high = (torch.cat(ends).flatten(1) for ends in zip(*self.boxes, strict=True))
        held = {
            name.removeprefix("threat."): np.asarray(v)
            for name, v in as_arrays(arrays).items()
            if name.startswith("threat.")
        }
        box = Threat(facts, self.problem.x[0].double().cpu().numpy().reshape(-1), held).box
        floor, ceiling = (torch.from_numpy(end).to(low) for end in box)
        low = torch.where(low == low.amin(0), torch.minimum(low, floor), low)
        high = torch.where(high == high.amax(0), torch.maximum(high, ceiling), high)
        shape = (-1, *self.problem.x.shape[1:])
        return low.view(shape), high.view(shape), torch.nonzero((floor < ceiling)[0]).flatten()

    def _bounded(self, low: Tensor, high: Tensor) -> tuple[Relaxed, Tensor, Tensor]:
        """Return the boxes' relaxation, margins (P, S), and which are closed.

        By plain backward propagation; the last is (P,).
        """
        state, y = (
            relax(self.graph, self.region.boxes(low, high), self.arithmetic),
            self.problem.y.expand(len(low)),
        )
        margins = shifted(
            margin_bounds(state, self._rows(len(low))), self.problem.goal, y, self.problem.classes
        ).nan_to_num(nan=-torch.inf)
        return state, margins, by_case(margins, self._cases(margins)).amin(1) > _CLEAR

    def _rows(self, count: int) -> Tensor:
        return self.problem.goal.rows(self.problem.y.expand(count), self.problem.classes).double()

    def _cases(self, like: Tensor) -> Tensor:
        return self.problem.goal.cases(self.problem.classes).to(like.device)

    def _halved(
        self, low: Tensor, high: Tensor, state: Relaxed, margins: Tensor, moving: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return both halves of each box.

        Each is cut along the feature on whose width the linear bound of its worst margin loses
        most.
        """
        worst = by_case(margins, self._cases(margins)).argmin(1)
        deciding = torch.where(self._cases(margins) == worst[:, None], margins, -torch.inf).argmax(
            1
        )
        lines = margin_lines(
            state, self._rows(len(low))[torch.arange(len(low)), deciding][:, None]
        )[:, 0].flatten(1)
        wide = (high - low).flatten(1)
        loss = lines.abs() * wide
        score = torch.zeros_like(wide)
        score[:, moving] = (
            loss / loss.amax(1, keepdim=True).clamp_min(1e-300)
            + 0.1 * wide / wide.amax(1, keepdim=True)
        )[:, moving]
        return halves(low, high, score.argmax(1))

    def _write(
        self,
        state: Relaxed,
        margins: Tensor,
        boxes: tuple[Tensor, Tensor, Tensor],
        turn: int,
        blocks: list[dict[str, Any]],
        arrays: Arrays,
    ) -> None:
        """Write a pass of boxes.

        Their ends, their slopes, the rows that narrow them, and a leaf for each case of each.
        """
        low, high, moving = boxes
        arrays |= {
            f"pass{turn}.part.place": moving,
            f"pass{turn}.part.low": low.flatten(1)[:, moving],
            f"pass{turn}.part.high": high.flatten(1)[:, moving],
        }
        write_shared(state, arrays, turn)
        for number, flags in improved_ends(state, {}).items():
            side, part, element = flags.nonzero(as_tuple=True)
            write_block(
                blocks,
                arrays,
                {"pass": turn, "kind": "box", "number": number},
                {"part": part, "element": element, "upper": side > 0},
            )
        cases = self._cases(margins)
        each = torch.arange(int(cases.max()) + 1, device=margins.device)
        own = torch.where(cases == each[:, None], margins[:, None], -torch.inf)
        weights = torch.zeros_like(own).scatter_(2, own.argmax(2, keepdim=True), 1.0).flatten(0, 1)
        part = torch.arange(len(margins), device=margins.device).repeat_interleave(len(each))
        write_block(
            blocks,
            arrays,
            {"pass": turn, "kind": "leaf"},
            {"part": part, "case": each.repeat(len(margins)), "weights": weights},
        )
