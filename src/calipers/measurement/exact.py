"""Exact distances: a complete tool is asked within what attacks found.

Point by point, until the lower and the upper bound meet.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from calipers.measurement.ask import Answer, ask
from calipers.measurement.gaps import MET, gaps
from calipers.measurement.joined import Known
from calipers.measurement.plan import Stage
from calipers.measurement.question import keep_inputs
from calipers.measurement.referee import Ruling
from calipers.problem.interrupts import counted
from calipers.problem.problem import Problem
from calipers.problem.protocols import Certifier, Claim
from calipers.progress import Meter, Watch, meter
from calipers.record.bracket import Bracket
from calipers.record.evidence import Evidence
from calipers.record.record import Record
from calipers.threats.threat import Threat

# share of an example's distance by which the region asked about is larger, so that it contains the
# example. Where distances are counts it is smaller by it: at most one substitution less
_ROOM = 1e-3


@dataclass(frozen=True)
class Closed:
    """How many points with a distance are exact, and the others' widest gap.

    `points` counts those with a distance (the misclassified ones have none). `widest` is a share of
    the upper bound, 0 where all are exact.
    """

    exact: int
    points: int
    widest: float


def closed(bracket: Bracket, threat: Threat) -> Closed:
    """Return how many brackets on distances of this threat are closed."""
    gap = gaps(bracket, threat)[bracket.upper > 0]
    return Closed(int((gap <= MET).sum()), len(gap), float(gap[gap > MET].max(initial=0.0)))


def close(
    problem: Problem,
    tool: Certifier,
    ledger: Record,
    *,
    run: int = 0,
    seed: int = 0,
    progress: Meter | Watch | None = None,
) -> bool:
    """Run the tool on every point whose bounds are apart, nearest first.

    What the referee admits is recorded as evidence of that run. Returns False if Ctrl-C came
    between.

    Points are asked in the order of their upper bounds. The region asked about reaches a little
    beyond the nearest known example (where distances are counts, not quite as far as it); where no
    example is known it is the whole box, or without one the problem's own radius. A point that this
    very tool was tried on is skipped. Raises `Contradiction` as soon as a certificate exceeds a
    witness's distance.
    """
    fingerprint, counter = problem.fingerprint(), meter(progress, len(problem))
    facts = ledger.evidence(fingerprint)
    # What the tool itself found before it was interrupted must not change the regions that it is
    # asked about when the run is resumed.
    bracket = Bracket.of(problem.names, [e for e in facts if e.tool != repr(tool)])
    passed = {
        e.point
        for e in facts
        if e.kind == "invalid" or (e.kind == "attempt" and e.tool == repr(tool))
    }
    gap, wide = gaps(bracket, problem.threat), problem.threat.widest(problem.x).cpu().numpy()
    own, nothing = (
        problem.threat.radii(len(problem)).numpy(),
        torch.zeros(len(problem), dtype=torch.float64),
    )
    counts = problem.threat.next(nothing).numpy() > 0
    near = np.minimum(bracket.upper * np.where(counts, 1 - _ROOM, 1 + _ROOM), wide)
    asked = np.where(np.isfinite(bracket.upper), near, np.where(np.isfinite(wide), wide, own))
    todo = [
        i
        for i in np.argsort(bracket.upper, kind="stable").tolist()
        if gap[i] > MET and problem.names[i] not in passed
    ]
    counter.stage(repr(tool), len(todo))
    if not todo:
        return True
    index = torch.tensor(todo, device=problem.x.device)
    part = problem.take(index).at(torch.as_tensor(asked[todo]))

    known, found = Known(problem.names, own, facts), defaultdict[str, list[Evidence]](list)
    place = {name: i for i, name in enumerate(problem.names)}
    met = gaps(known.bracket(), problem.threat) <= MET

    def admit(result: Answer, ruling: Ruling) -> None:
        new = ruling.evidence
        keep_inputs(problem, place, ledger, new)
        ledger.append(fingerprint, new, run=run)
        for e in new:
            found[e.point].append(e)
        known.add(new)
        if isinstance(result, Claim):  # it comes after the point's examples: the point is done
            own_finds = [e for tried in ruling.tried for e in found[tried.point]]
            left = ledger.finish(fingerprint, ruling.tried, own_finds, run=run)
            known.finish(left, ruling.tried)
            through = sorted({place[e.point] for e in (*new, *ruling.tried)})
            met[through] = gaps(known.bracket_of(through), problem.threat) <= MET
            counter.decided(int(met.sum()))
            counter.done(len(ruling.tried))

    try:
        with counted(counter.step):
            for _ in ask(Stage(tool, "certifier", "distance"), part, admit, seed=seed):
                pass
    except KeyboardInterrupt:
        return False
    return True
