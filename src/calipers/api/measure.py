"""Functions that measure robustness from both sides.

`measure`, `curve` and `distance`, named as on the command line. All take the model first, then
points, labels and the threat model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from calipers.api.display import shown
from calipers.api.results import Result
from calipers.api.settings import Settings, checked
from calipers.bounds.rounding import CHECKED
from calipers.calls import with_gradients
from calipers.certificates.milp import exact_within
from calipers.errors import BadInput
from calipers.interchange.door import pose
from calipers.measurement.curve import sweep
from calipers.measurement.exact import close, closed
from calipers.measurement.plan import Plan
from calipers.measurement.question import begin
from calipers.measurement.run import run
from calipers.presets import plan_for
from calipers.problem.goals import Goal
from calipers.problem.interrupts import Limit, limited
from calipers.problem.problem import Problem
from calipers.problem.protocols import Certifier
from calipers.progress import Meter, Watch
from calipers.record.bracket import Bracket
from calipers.record.record import Record
from calipers.report.report import summarise
from calipers.threats.threat import Threat

EXACT_SECONDS = 60.0  # limit of the programs of one point, where none is given


@checked
@with_gradients()
def measure(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    *,
    goal: Goal | None = None,
    plan: str | Plan | None = None,
    record: str | Path | Record | None = None,
    progress: Watch | bool | None = None,
) -> Result:
    """Bound the robust accuracy, and every point's distance, from both sides.

    Attacks find adversarial examples (upper bounds on the distance), certifiers prove that there
    are none (lower bounds). What a tool claims counts only where an independent check in the
    package, the referee, admits it. Ctrl-C ends the run and returns what is known so far.

    Args:
        model: A `torch.nn.Module` in evaluation mode that returns logits, a `Classifier`, or
            whatever `load` reads: a file name, a fitted estimator, an onnxruntime session.
        x: Points (N, *D), a tensor, array, list or frame; or a DataLoader or Dataset, which brings
            its labels along.
        y: Labels (N,). None stands for those of the loader or, where there are none, for the
            model's own predictions.
        threat: What the adversary may do, a `Ball` or `Substitutions`; its radius is in native
            units of the data.
        goal: What the adversary wants; by default any other class (`Untargeted`).
        plan: Which tools are run, in what order, and with which seed and limits: a `Plan`, or the
            name of one, "quick", "standard", "thorough" … By default "standard", for
            `Substitutions` "categorical".
        record: File, or `Record`, that keeps everything that was admitted. The same call takes an
            interrupted run up again. By default nothing is kept beyond the result.
        progress: True shows one counter for the whole run: a bar on a terminal or in a notebook,
            plain lines elsewhere. A function is called with a `calipers.progress.Progress` instead:
            points decided and asked, the tool at work, its share of the points and its steps.

    Returns:
        A `Result`. Where an operation of the model cannot be bounded there are only upper bounds,
        and the report says why.

    Raises:
        BadInput: For data, a threat or a plan that do not fit, before anything is run.
        BadModel: For a model that cannot be measured.
        Contradiction: Where a certificate is refuted by an adversarial example.
        RecordError: Where the record cannot be used, or is about another model of this name.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> plan = calipers.Plan("quick", seconds=60, seed=1)
        >>> found = calipers.measure(model, x, y, calipers.Ball("linf", 0.1), plan=plan)
        >>> found.robust_accuracy.certified.count, found.robust_accuracy.attacked.count
        (4, 4)
    """
    asked = _Asked.of(model, x, y, threat, goal=goal, plan=plan, record=record, progress=progress)
    with asked.shown() as watch:
        finished = run(asked.problem, asked.plan, asked.ledger, progress=watch)
    return asked.result(finished)


@checked
@with_gradients()
def curve(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    radii: Sequence[float],
    **settings: Unpack[Settings],
) -> Result:
    """Bound the robust accuracy at many radii in one run.

    The property `curve` of the result has the bounds at each radius; everything else in it is read
    at the middle radius. An example that is found at one radius counts at all larger ones, a
    certificate at all smaller ones, so both bounds fall with the radius. A point is only visited
    where its verdict is open, at the middle of such radii first.

    Cost: about log2(R) + 1 visits of a point whose verdict is hard to settle at one of R radii, not
    R.

    Args:
        model, x, y: As for `measure`.
        threat: As for `measure`; its own radius is not used.
        radii: The radii, all above 0, in native units of the data.
        **settings: `goal`, `plan`, `record` and `progress`, as for `measure`. Stages of the plan
            that look for distances are left out, unless it has no others; between two radii the
            curve therefore says no more than at the next one.

    Returns:
        A `Result` whose `curve` has one entry for each radius.

    Raises:
        BadInput: For radii that are not above 0, and as `measure`.
        BadModel, Contradiction, RecordError: As `measure`.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> ball = calipers.Ball("linf", 0.1)
        >>> found = calipers.curve(model, x, y, ball, [0.02, 0.05, 0.1], plan="quick")
        >>> [(one.radius, one.robust.certified.count) for one in found.curve]
        [(0.02, 4), (0.05, 4), (0.1, 4)]
    """
    asked = _Asked.of(model, x, y, threat, **settings)
    with asked.shown() as watch:
        finished = sweep(asked.problem, asked.plan, asked.ledger, radii, progress=watch)
    return asked.result(finished)


@checked
@with_gradients()
def distance(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    *,
    exact: bool | float = False,
    **settings: Unpack[Settings],
) -> Bracket:
    """Bound the distance from each point to its nearest adversarial example.

    Runs the plan "distance" ("categorical" for `Substitutions`): searches for the nearest example,
    and for the largest radius that can be certified.

    Args:
        model, x, y: As for `measure`.
        threat: As for `measure`; its radius is only where the searches begin.
        exact: Whether to close the brackets by mixed-integer programs, within what the attacks have
            found. For small piecewise-linear networks under linf, l2 or l1, or with substitutions.
            A number limits the programs of each point, in seconds (True: 60); what is not closed by
            then stays a bracket.
        **settings: `goal`, `plan` (by default "distance"), `record` and `progress`, as for
            `measure`.

    Returns:
        A `Bracket`: `lower` and `upper` bounds (N,) in native units, and the tools they are from.
        An upper bound is infinite where no example was found, and 0 where the model is wrong at the
        point itself.

    Raises:
        BadInput: With `exact`, for other networks and threats; and as `measure`.
        BadModel, Contradiction, RecordError: As `measure`.

    Example:
        >>> import calipers, torch
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        >>> bracket = calipers.distance(model.eval(), [[0.8, 0.2]], [0], calipers.Ball("linf", 0.1))
        >>> bool(bracket.lower[0] <= 0.3 <= bracket.upper[0] < 0.301)
        True
    """
    if exact:
        return measure_exactly(model, x, y, threat, exact, **settings).bracket
    asked = _Asked.of(model, x, y, threat, "distance", **settings)
    with asked.shown() as watch:
        finished = run(asked.problem, asked.plan, asked.ledger, progress=watch)
    return asked.result(finished).bracket


@checked
@with_gradients()
def measure_exactly(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    exact: bool | float = True,
    **settings: Unpack[Settings],
) -> Result:
    """Measure distances, then close the brackets by mixed-integer programs.

    `exact` is as for `distance`, the plan is by default "distance", or "categorical", and runs
    first; its seconds are those of all together. Otherwise as `measure`; the record also notes how
    many brackets were closed.
    """
    guarantee = getattr(settings.get("plan"), "guarantee", None)
    if guarantee not in (None, CHECKED.guarantee):
        raise BadInput(
            f"exact distances are those of real arithmetic, proved {CHECKED.guarantee}: leave the "
            f"guarantee {guarantee} out"
        )
    tool = exact_tool(exact)
    asked = _Asked.of(model, x, y, threat, "distance", **settings)
    problem, plan, ledger = asked.problem, asked.plan, asked.ledger
    ends = None if plan.seconds is None else Limit(time.monotonic, time.monotonic() + plan.seconds)
    begun = begin(problem, plan, ledger, then=(repr(tool),))
    with asked.shown() as watch, limited(*(() if ends is None else (ends,))):
        meter = Meter(len(problem), watch)
        finished = run(
            problem, plan, ledger, progress=meter, begun=begun, after=(repr(tool),)
        ) and close(problem, tool, ledger, run=begun.number, seed=plan.seed, progress=meter)
    bracket = Bracket.of(problem.names, ledger.evidence(problem.fingerprint()))
    ledger.note(begun.number, "exact", dataclasses.asdict(closed(bracket, threat)))
    return asked.result(finished)


def exact_tool(exact: bool | float) -> Certifier:
    """Return the mixed-integer programs, limited to those seconds a point."""
    return exact_within(EXACT_SECONDS if exact is True else exact)


@dataclasses.dataclass(frozen=True, eq=False)
class _Asked:
    """What a measuring call was given, read and checked."""

    problem: Problem
    plan: Plan
    ledger: Record
    progress: Watch | bool | None

    @classmethod
    def of(
        cls,
        model: Any,
        x: Any,
        y: Any,
        threat: Threat,
        usual: str = "standard",
        **settings: Unpack[Settings],
    ) -> _Asked:
        """Read the arguments; `usual` is the plan where none is named."""
        problem = pose(model, x, y, threat, settings.get("goal"))
        plan, record = plan_for(threat, settings.get("plan"), usual), settings.get("record")
        ledger = record if isinstance(record, Record) else Record(record)
        return cls(problem, plan, ledger, settings.get("progress"))

    def shown(self) -> contextlib.AbstractContextManager[Watch | None]:
        """Return the display of the run's progress, as it was asked for."""
        return shown(self.progress, self.problem.classifier.name)

    def result(self, finished: bool) -> Result:
        """Return what the record says about the question now."""
        fingerprint = self.problem.fingerprint()
        asked = next(q for q in self.ledger.questions() if q.fingerprint == fingerprint)
        summary = summarise(self.ledger, asked)
        row_of = {row.name: row for row in summary.rows}
        rows = [row_of[name] for name in self.problem.names]
        bracket = Bracket(
            np.array([row.lower for row in rows]),
            np.array([row.upper for row in rows]),
            tuple(row.lower_tool for row in rows),
            tuple(row.upper_tool for row in rows),
        )
        return Result(summary, bracket, self.ledger, finished)


__all__ = ["curve", "distance", "measure", "measure_exactly"]
