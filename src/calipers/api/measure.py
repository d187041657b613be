"""Functions that measure robustness from both sides.

`measure`, `curve` and `distance`, named as on the command line. All take the model first, then
points, labels and the threat model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calipers.api.results import Result
from calipers.bounds.rounding import CHECKED, Guarantee, arithmetic_of
from calipers.calls import with_gradients
from calipers.certificates.milp import exact_within
from calipers.errors import BadInput
from calipers.interchange.door import pose
from calipers.measurement.curve import sweep
from calipers.measurement.exact import close, closed
from calipers.measurement.plan import Plan
from calipers.measurement.question import begin
from calipers.measurement.run import Watch, run
from calipers.presets import plan_for
from calipers.problem.goals import Goal
from calipers.problem.problem import Problem
from calipers.record.bracket import Bracket
from calipers.record.record import Record
from calipers.report.report import summarise
from calipers.threats.threat import Threat


@with_gradients()
def measure(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    *,
    goal: Goal | None = None,
    plan: str | Plan | None = None,
    seed: int = 0,
    record: str | Path | Record | None = None,
    confidence: float = 0.95,
    seconds: float | None = None,
    lower_share: float | None = None,
    proofs: bool = False,
    guarantee: Guarantee | None = None,
    progress: Watch | None = None,
    title: str = "",
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
        plan: Which tools are run, and in what order: "quick", "standard", "brackets" (standard,
            then the distances of all points), "thorough", "complete" (branch and bound, which
            decides what it can), "autoattack", "distance", "categorical", or a `Plan`. By default
            "standard", for `Substitutions` "categorical".
        seed: Seed of all random starts and samples.
        record: File, or `Record`, that keeps everything that was admitted. The same call takes an
            interrupted run up again. By default nothing is kept beyond the result.
        confidence: Level of all confidence intervals.
        seconds: Limit of the run in seconds; None for no limit.
        lower_share: What certifiers that prove nothing may take, as a share of the attacks'
            processor time, but a few seconds at least; `math.inf` for no limit. What is not run for
            this reason is reported with the time that it would take. None: as the plan says (0.75;
            "complete" has no limit).
        proofs: Whether to keep a proof file for each certificate, which `check` verifies
            independently; needs a `record` to last.
        guarantee: What certificates are about: the network in real arithmetic ("float64-checked",
            the default) or as float32 runs it, whatever the order of its sums ("float32-executed").
            Certificates that a record holds already keep theirs.
        progress: Is told about the progress: an object with the methods `stage(name, points)` and
            `progress(done, settled)`.
        title: Name of the model in reports.

    Returns:
        A `Result`. Where an operation of the model cannot be bounded there are only upper bounds,
        and the report says why.

    Raises:
        BadInput: For data, a threat or an option that do not fit, before anything is run.
        BadModel: For a model that cannot be measured.
        Contradiction: Where a certificate is refuted by an adversarial example.
        RecordError: Where the record cannot be used, or is about another model of this name.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> found = calipers.measure(model, x, y, calipers.Ball("linf", 0.1), plan="quick")
        >>> found.robust_accuracy.certified.count, found.robust_accuracy.attacked.count
        (4, 4)
    """
    problem, ledger = pose(model, x, y, threat, goal), _ledger(record)
    chosen = _plan(threat, plan, seconds, proofs, guarantee, lower_share)
    finished = run(problem, chosen, ledger, seed=seed, progress=progress, title=title)
    return _result(problem, ledger, confidence, finished)


@with_gradients()
def curve(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    radii: Sequence[float],
    *,
    goal: Goal | None = None,
    plan: str | Plan | None = None,
    seed: int = 0,
    record: str | Path | Record | None = None,
    confidence: float = 0.95,
    seconds: float | None = None,
    lower_share: float | None = None,
    proofs: bool = False,
    guarantee: Guarantee | None = None,
    progress: Watch | None = None,
    title: str = "",
) -> Result:
    """Bound the robust accuracy at many radii in one run.

    The property `curve` of the result has the bounds at each radius; everything else in it is read
    at the middle radius. An example that is found at one radius counts at all larger ones, a
    certificate at all smaller ones, so both bounds fall with the radius. A point is only visited
    where its verdict is open, at the middle of such radii first.

    Cost: about log2(R) + 1 visits of a point whose verdict is hard to settle at one of R radii, not
    R.

    Args:
        model, x, y, goal, seed, seconds, lower_share, proofs, guarantee, progress, title: As for
            `measure`.
        threat: As for `measure`; its own radius is not used.
        radii: The radii, all above 0, in native units of the data.
        plan: As for `measure`. Stages that look for distances are left out, unless the plan has no
            others; between two radii the curve therefore says no more than at the next one.
        record: As for `measure`; the same call takes an interrupted run up again.
        confidence: As for `measure`.

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
    problem, ledger = pose(model, x, y, threat, goal), _ledger(record)
    chosen = _plan(threat, plan, seconds, proofs, guarantee, lower_share)
    finished = sweep(problem, chosen, ledger, radii, seed=seed, progress=progress, title=title)
    return _result(problem, ledger, confidence, finished)


def _plan(
    threat: Threat,
    plan: str | Plan | None,
    seconds: float | None,
    proofs: bool,
    guarantee: Guarantee | None,
    lower_share: float | None = None,
) -> Plan:
    """Return the plan with the settings of a call, or raise `BadInput`."""
    chosen = plan_for(threat, plan)
    if lower_share is not None:
        if not lower_share >= 0:
            raise BadInput(
                "lower_share is a share of the attacks' time, 0 or more, or math.inf; got "
                f"{lower_share}"
            )
        chosen = dataclasses.replace(
            chosen, lower_share=None if math.isinf(lower_share) else float(lower_share)
        )
    if guarantee is not None:
        arithmetic_of(guarantee)
        chosen = dataclasses.replace(
            chosen,
            stages=tuple(
                dataclasses.replace(s, tool=_guaranteeing(s.tool, guarantee))
                if s.kind == "certifier"
                else s
                for s in chosen.stages
            ),
        )
    if proofs:
        chosen = dataclasses.replace(chosen, stages=tuple(s.proving() for s in chosen.stages))
    return chosen if seconds is None else dataclasses.replace(chosen, seconds=seconds)


def _guaranteeing(tool: Any, guarantee: Guarantee) -> Any:
    """Return the certifier set to that guarantee; for a search, its certifier."""
    if hasattr(tool, "certifier"):
        return dataclasses.replace(tool, certifier=_guaranteeing(tool.certifier, guarantee))
    if not hasattr(tool, "guarantee"):
        if guarantee == CHECKED.guarantee:
            return tool
        raise BadInput(
            f"{tool!r} proves nothing with the guarantee {guarantee}: name a plan without it, or "
            "leave the guarantee out"
        )
    return dataclasses.replace(tool, guarantee=guarantee)


def _ledger(record: str | Path | Record | None) -> Record:
    return record if isinstance(record, Record) else Record(record)


def _result(problem: Problem, ledger: Record, confidence: float, finished: bool) -> Result:
    fingerprint = problem.fingerprint()
    asked = next(q for q in ledger.questions() if q.fingerprint == fingerprint)
    summary = summarise(ledger, asked, confidence)
    row_of = {row.name: row for row in summary.rows}
    rows = [row_of[name] for name in problem.names]
    bracket = Bracket(
        np.array([row.lower for row in rows]),
        np.array([row.upper for row in rows]),
        tuple(row.lower_tool for row in rows),
        tuple(row.upper_tool for row in rows),
    )
    return Result(summary, bracket, ledger, finished)


@with_gradients()
def distance(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    *,
    goal: Goal | None = None,
    seed: int = 0,
    record: str | Path | Record | None = None,
    exact: bool = False,
    seconds: float = 60.0,
    progress: Watch | None = None,
) -> Bracket:
    """Bound the distance from each point to its nearest adversarial example.

    Runs the plan "distance" ("categorical" for `Substitutions`): searches for the nearest example,
    and for the largest radius that can be certified.

    Args:
        model, x, y, goal, seed, record, progress: As for `measure`.
        threat: As for `measure`; its radius is only where the searches begin.
        exact: Whether to close the brackets by mixed-integer programs, within what the attacks have
            found. For small piecewise-linear networks under linf, l2 or l1, or with substitutions.
        seconds: Limit of these programs for each point, in seconds; what is not closed by then
            stays a bracket. Without `exact` it is not used.

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
        return measure_exactly(
            model,
            x,
            y,
            threat,
            goal=goal,
            seed=seed,
            record=record,
            seconds=seconds,
            progress=progress,
        ).bracket
    return measure(
        model,
        x,
        y,
        threat,
        goal=goal,
        plan=plan_for(threat, None, "distance"),
        seed=seed,
        record=record,
        progress=progress,
    ).bracket


@with_gradients()
def measure_exactly(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    *,
    goal: Goal | None = None,
    plan: str | Plan | None = None,
    seed: int = 0,
    record: str | Path | Record | None = None,
    confidence: float = 0.95,
    seconds: float = 60.0,
    proofs: bool = False,
    guarantee: Guarantee | None = None,
    progress: Watch | None = None,
    title: str = "",
) -> Result:
    """Measure distances, then close the brackets by mixed-integer programs.

    The plan (by default "distance", or "categorical") runs first, the programs for at most
    `seconds` for each point. Otherwise as `measure`; the record also notes how many brackets were
    closed.
    """
    if guarantee not in (None, CHECKED.guarantee):
        raise BadInput(
            f"exact distances are those of real arithmetic, proved {CHECKED.guarantee}: leave the "
            f"guarantee {guarantee} out"
        )
    problem, ledger, tool = (
        pose(model, x, y, threat, goal),
        _ledger(record),
        exact_within(seconds),
    )
    chosen = _plan(threat, plan_for(threat, plan, "distance"), None, proofs, guarantee)
    begun = begin(problem, chosen, ledger, seed=seed, title=title, then=(repr(tool),))
    finished = run(
        problem, chosen, ledger, seed=seed, progress=progress, begun=begun, after=(repr(tool),)
    ) and close(problem, tool, ledger, run=begun.number, seed=seed, progress=progress)
    bracket = Bracket.of(problem.names, ledger.evidence(problem.fingerprint()))
    ledger.note(begun.number, "exact", dataclasses.asdict(closed(bracket, threat)))
    return _result(problem, ledger, confidence, finished)


__all__ = ["curve", "distance", "measure", "measure_exactly"]
