"""Tighter bounds on intermediate values where the network fails.

There are two linear programs for each value, over one case's rows and the condition that the case
fails.

A branch is closed by contradiction: suppose that something adversarial lies within the radius. Its
intermediate values lie between these bounds, so that the rows of smaller boxes hold there, though
not in the rest of the region. Differs from Tjeng et al. 2019, section 4.2, which asks about the
whole region, where optimised slopes leave programs nothing to gain. Every bound is what the
program's multipliers prove. Where a lower bound exceeds the upper one, nothing adversarial exists.
"""

from __future__ import annotations

import time

from calipers.bounds.backward import relax
from calipers.bounds.interval import Box
from calipers.bounds.relaxation import Relaxed
from calipers.certificates.exact.lp import BallPrograms
from calipers.certificates.exact.model import Ends, MIPModel
from calipers.certificates.exact.tree import bound_of


def tightened(state: Relaxed, model: MIPModel, radius: float, ends: float) -> Relaxed | None:
    """Return the relaxation over the perturbations at which the case fails.

    They are those within the radius at which the model's only case fails; None where there is none.
    `state` is the relaxation from which the model was made, over a region at least as large. What
    is not settled by the time `ends` keeps its bounds. Cost: two programs for each unstable value.
    """
    (goal,) = model.goals.values()
    program = BallPrograms(model, state.region)
    program.ends = ends
    here = Ends(model.low_row, model.high_row, model.low.copy(), model.high.copy())
    here.high[goal] = min(here.high[goal], 0.0)
    for column in sorted(model.sources):
        for sign in (1.0, -1.0):
            answer = (
                None if time.monotonic() > ends else program.solve(radius, column, here, sign=sign)
            )
            if answer is None:
                continue
            proved = bound_of(model, answer, here, state.region, state.arithmetic).below(radius)
            if answer.goal is None:
                if proved > 0:
                    return None
                continue
            # Ends are replaced, not changed in place: the program compares them with the former.
            low, high = here.low.copy(), here.high.copy()
            if sign > 0:
                low[column] = max(low[column], proved)
            else:
                high[column] = min(high[column], -proved)
            here = here._replace(low=low, high=high)
            if low[column] > high[column]:
                return None
    boxes = {
        number: Box(box.lower.clone(), box.upper.clone()) for number, box in state.boxes.items()
    }
    for column, (number, element) in model.sources.items():
        boxes[number].lower.view(-1)[element], boxes[number].upper.view(-1)[element] = (
            float(here.low[column]),
            float(here.high[column]),
        )
    found = relax(state.graph, state.region, state.arithmetic, boxes, refine=False)
    crossed = any(bool((box.lower > box.upper).any()) for box in found.boxes.values())
    return None if crossed else found
