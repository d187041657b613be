"""Between which ends does each value lie wherever the network fails? Two linear programs a value,
over one case's rows and the condition that the case fails.

A branch is closed by contradiction: suppose that something adversarial lies within the radius. Its
values lie between these ends, so the rows of smaller boxes hold there, though not in the rest of
the region (Tjeng et al. 2019, section 4.2, ask about the whole of it, where optimised slopes leave
programs nothing to gain). Every end is what the program's multipliers prove. Where two ends pass
each other there is nothing adversarial.
"""

from __future__ import annotations

import time

from calipers.bounds.interval import Box
from calipers.bounds.linear import relax
from calipers.bounds.relaxed import Relaxed
from calipers.certificates.exact.model import Ends, Model
from calipers.certificates.exact.proving import bound_of
from calipers.certificates.exact.solving import Program


def tightened(state: Relaxed, model: Model, radius: float, ends: float) -> Relaxed | None:
    """Return the point's relaxation over every offset within the radius at which the model's only
    case fails; None where none does.

    `state` is the relaxation that the model was made of, over a region at least as large. What is
    not settled by the time `ends` keeps the ends that it has. Cost: two programs a value that
    bends.
    """
    (goal,) = model.goals.values()
    program = Program(model, state.region)
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
            # Ends are replaced, not changed in place: the program tells by them what is new.
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
