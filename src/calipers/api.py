"""What does a user call? Measure, distance, attack, certify, check: the same words as on the
command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.rounding import CHECKED, Guarantee, arithmetic_of
from calipers.certificates.milp import exact_within
from calipers.errors import BadInput
from calipers.interchange.door import pose
from calipers.measurement.ask import Answer, ask
from calipers.measurement.exact import close, closed
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.question import begin
from calipers.measurement.referee import Referee, Ruling
from calipers.measurement.run import Watch, run
from calipers.measurement.sweep import sweep
from calipers.presets import plan_for, tool_for
from calipers.problem.calls import with_gradients
from calipers.problem.goals import Goal
from calipers.problem.problem import Problem
from calipers.problem.threat import Threat
from calipers.problem.tools import Attack, Attempt, Certifier, Claim
from calipers.record.bracket import Bracket
from calipers.record.ledger import Ledger
from calipers.report.report import AtRadius, PointRow, Rate, RobustAccuracy, Summary, summarise


@dataclass(frozen=True, eq=False)
class Result:
    """What a measurement found. `summary` holds everything that a report shows; `finished` is False
    where the time limit or Ctrl-C stopped the run.
    """

    summary: Summary
    bracket: Bracket
    ledger: Ledger
    finished: bool

    @property
    def robust_accuracy(self) -> RobustAccuracy:
        """`.certified <= truth <= .attacked` on these points, and `.interval` for the
        population.
        """
        return self.summary.robust

    @property
    def clean_accuracy(self) -> Rate:
        """The share of points on which the model is right."""
        return self.summary.clean

    @property
    def curve(self) -> tuple[AtRadius, ...]:
        """`.radius` and `.robust` (as `robust_accuracy`) at each radius of a run that asked
        several; else nothing.
        """
        return self.summary.at_radii

    @property
    def points(self) -> tuple[PointRow, ...]:
        """One row a point: label, prediction, margin, verdict, lower, upper, tool, cost."""
        return self.summary.rows

    def report(self, path: str | Path = "report.html") -> Path:
        """Write the page and return its path."""
        from calipers.report.render import render_html

        return render_html([self.summary], path)

    def __str__(self) -> str:
        from calipers.report.text import render_text

        return render_text([self.summary])


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
    record: str | Path | Ledger | None = None,
    confidence: float = 0.95,
    seconds: float | None = None,
    lower_share: float | None = None,
    proofs: bool = False,
    guarantee: Guarantee | None = None,
    watch: Watch | None = None,
    title: str = "",
) -> Result:
    """Measure how robust a model is at points x (N, *D) with labels y (N,), from both sides.

    `plan` is "quick", "standard", "brackets" (standard, then the distances of all points),
    "thorough", "complete" (decides what it can), "autoattack", "distance", "categorical" or a
    `Plan`; where none is given, "standard", or "categorical" for `Substitutions`. With a `record`
    file everything admitted is kept, and the same call takes an interrupted run up again. With
    `proofs` it also keeps a proof file for each certificate, for `check`. `guarantee` is what
    certificates speak about: the network in real arithmetic ("float64-checked", the usual one) or
    as float32 runs it, in whatever order it adds up ("float32-executed"); certificates that a
    record holds already stay as they are. `seconds` limits the run. Certifiers that prove nothing
    may take `lower_share` of the processor time of the attacks, a few seconds at least (`math.inf`:
    whatever they take; None: as the plan has it, which "complete" does not limit); what is not run
    for that is said with the time that it would take. Raises `BadInput` at the door,
    `Contradiction` if a certificate stands above a witness. Ctrl-C returns what is known.
    """
    problem, ledger = pose(model, x, y, threat, goal), _ledger(record)
    chosen = _plan(threat, plan, seconds, proofs, guarantee, lower_share)
    finished = run(problem, chosen, ledger, seed=seed, watch=watch, title=title)
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
    record: str | Path | Ledger | None = None,
    confidence: float = 0.95,
    seconds: float | None = None,
    lower_share: float | None = None,
    proofs: bool = False,
    guarantee: Guarantee | None = None,
    watch: Watch | None = None,
    title: str = "",
) -> Result:
    """Measure the robust accuracy at many radii in one run; `.curve` of the result has the rates at
    each, the rest is read at the middle radius.

    An example found at a radius counts at all larger ones, a certificate at all smaller ones: both
    curves fall, and a point is asked only where its verdict is open, at the middle of such radii
    first. The threat's own radius is not used. Stages of the plan that look for distances are left
    out (but where it has no others), so between the radii the curve says no more than at the next.
    With a `record` the same call takes an interrupted run up. Cost: about log2(R) + 1 visits of a
    point that hardens at one of R radii, instead of R. Errors as those of `measure`; `BadInput` for
    radii not above 0.
    """
    problem, ledger = pose(model, x, y, threat, goal), _ledger(record)
    chosen = _plan(threat, plan, seconds, proofs, guarantee, lower_share)
    finished = sweep(problem, chosen, ledger, radii, seed=seed, watch=watch, title=title)
    return _result(problem, ledger, confidence, finished)


def _plan(
    threat: Threat,
    plan: str | Plan | None,
    seconds: float | None,
    proofs: bool,
    guarantee: Guarantee | None,
    lower_share: float | None = None,
) -> Plan:
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
    """Return the certifier as it claims with that guarantee; a search, with its bounder so."""
    if hasattr(tool, "bounder"):
        return dataclasses.replace(tool, bounder=_guaranteeing(tool.bounder, guarantee))
    if not hasattr(tool, "guarantee"):
        if guarantee == CHECKED.guarantee:
            return tool
        raise BadInput(
            f"{tool!r} proves nothing with the guarantee {guarantee}: name a plan without it, or "
            "leave the guarantee out"
        )
    return dataclasses.replace(tool, guarantee=guarantee)


def _ledger(record: str | Path | Ledger | None) -> Ledger:
    return record if isinstance(record, Ledger) else Ledger(record)


def _result(problem: Problem, ledger: Ledger, confidence: float, finished: bool) -> Result:
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
    record: str | Path | Ledger | None = None,
    exact: bool = False,
    seconds: float = 60.0,
    watch: Watch | None = None,
) -> Bracket:
    """Return the bracket [certified, attacked] on every point's adversarial distance; the threat's
    radius is only where the searches begin.

    With `exact` mixed-integer programs then close it, `seconds` for each point, within what the
    attacks have found: for small networks of straight pieces (others raise `BadInput`) under linf,
    l2 or l1, or where letters are replaced. What is not closed by then stays a bracket.
    """
    if exact:
        return measure_exactly(
            model, x, y, threat, goal=goal, seed=seed, record=record, seconds=seconds, watch=watch
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
        watch=watch,
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
    record: str | Path | Ledger | None = None,
    confidence: float = 0.95,
    seconds: float = 60.0,
    proofs: bool = False,
    guarantee: Guarantee | None = None,
    watch: Watch | None = None,
    title: str = "",
) -> Result:
    """Measure distances by the plan (the usual one if not given), then close the brackets by
    mixed-integer programs, `seconds` for each point.

    As `measure`, but what the record keeps of the run says how closed its brackets are.
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
        problem, chosen, ledger, seed=seed, watch=watch, begun=begun, after=(repr(tool),)
    ) and close(problem, tool, ledger, run=begun.number, seed=seed, watch=watch)
    bracket = Bracket.of(problem.names, ledger.evidence(problem.fingerprint()))
    ledger.note(begun.number, "exact", dataclasses.asdict(closed(bracket, threat)))
    return _result(problem, ledger, confidence, finished)


@dataclass(frozen=True, eq=False)
class Attacked:
    """What one attack did, as the referee saw it.

    `candidates (N, *D)` are the nearest examples, and where there is none what was tried last;
    `margin (N,)` is the worst margin there. `distance (N,)`, float64, is that of the example:
    infinite where none was found, 0 where the model is wrong at the point itself. `success (N,)`:
    an example within the radius asked; an attack that seeks the nearest one may end beyond it.
    `forwards`, `backwards (N,)` are the passes spent; `notes` say how model and data were read,
    where that is not plain.
    """

    candidates: Tensor
    distance: Tensor
    margin: Tensor
    success: Tensor
    forwards: Tensor
    backwards: Tensor
    notes: tuple[str, ...] = ()


@with_gradients()
def attack(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    tool: Attack | str | None = None,
    *,
    goal: Goal | None = None,
    seed: int = 0,
) -> Attacked:
    """Run one attack, and let the referee say what counts. Ctrl-C ends the search; what it has
    found is judged and returned.

    `tool` is the attack itself, or what the command line calls it ("PGD(steps=100, restarts=20)",
    also the usual one; for `Substitutions`, "Replace").
    """
    problem = pose(model, x, y, threat, goal)
    chosen = tool_for("attack", tool, threat)
    n, candidates, place = (
        len(problem),
        problem.x.clone(),
        {name: i for i, name in enumerate(problem.names)},
    )
    forwards, backwards = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
    distance, margin = torch.full((n,), torch.inf, dtype=torch.float64), torch.full((n,), torch.nan)
    everywhere = torch.arange(n, device=problem.x.device)
    for fact in Referee(problem).open(everywhere):
        i = place[fact.point]
        margin[i], distance[i] = fact.margin, 0.0 if fact.kind == "witness" else distance[i]

    def keep(answer: Answer, ruling: Ruling) -> None:
        assert isinstance(answer, Attempt)
        forwards[answer.index.cpu()], backwards[answer.index.cpu()] = (
            answer.forwards.cpu(),
            answer.backwards.cpu(),
        )
        found = {fact.point: fact.radius for fact in ruling.evidence}
        for k, (i, tried) in enumerate(zip(answer.index.tolist(), ruling.tried, strict=True)):
            here = found.get(problem.names[i], torch.inf)
            if here < distance[i] or bool(distance[i].isinf()):
                candidates[i], distance[i], margin[i] = answer.candidate[k], here, tried.margin

    with contextlib.suppress(KeyboardInterrupt):
        for _ in ask(Stage(chosen, "attack"), problem, keep, seed=seed):
            pass
    success = distance <= threat.radii(n)
    return Attacked(
        candidates,
        distance.to(problem.x.device),
        margin,
        success.to(problem.x.device),
        forwards,
        backwards,
        problem.notes,
    )


@dataclass(frozen=True, eq=False)
class Certified:
    """What one certifier proved, as far as the referee admits it.

    `radius (N,)` float64 (0: nothing), `certified (N,)` at the radius asked, `margin (N,)` the
    lower bound of the worst margin (minus infinity where the tool's word is not admitted), the
    guarantee, and `notes` on how model and data were read, where that is not plain.
    """

    radius: Tensor
    certified: Tensor
    margin: Tensor
    guarantee: str
    notes: tuple[str, ...] = ()


@with_gradients()
def certify(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    tool: Certifier | str | None = None,
    *,
    goal: Goal | None = None,
) -> Certified:
    """Run one certifier, and let the referee say what counts.

    `tool` is the certifier itself, or what the command line calls it ("CROWN", also the usual one).
    Points that the model gets wrong, or that cannot be measured, are never certified. Raises
    `Contradiction` where a claim is wrong beyond doubt or an example that the tool met itself lies
    inside it; `UnsupportedOp` or `CaptureError` where the model cannot be bounded.
    """
    problem = pose(model, x, y, threat, goal)
    chosen = tool_for("certify", tool, threat)
    n, guarantee = len(problem), ""
    margin, claimed = (
        torch.full((n,), -torch.inf, dtype=torch.float64),
        torch.zeros(n, dtype=torch.bool),
    )
    opened = Referee(problem).open(torch.arange(n, device=problem.x.device))
    out = {fact.point for fact in opened if fact.kind in ("witness", "invalid")}
    facts, unfit = (
        [fact for fact in opened if fact.kind == "witness"],
        {fact.point for fact in opened if fact.kind == "invalid"},
    )
    fit = torch.tensor(
        [i for i, name in enumerate(problem.names) if name not in unfit], dtype=torch.long
    )

    def keep(answer: Answer, ruling: Ruling) -> None:
        nonlocal guarantee
        facts.extend(
            fact for fact in ruling.evidence if fact.kind == "witness" or fact.point not in out
        )
        if isinstance(answer, Claim):
            guarantee = answer.guarantee
            place = fit[answer.index.cpu()]
            margin[place], claimed[place] = (
                answer.margin.cpu().double().nan_to_num(nan=-torch.inf),
                answer.radius.cpu() != 0,
            )

    for _ in ask(Stage(chosen, "certifier"), problem.take(fit), keep) if len(fit) else ():
        pass
    radius, right = (
        torch.from_numpy(Bracket.of(problem.names, facts).lower),
        torch.tensor([name not in out for name in problem.names]),
    )
    denied = (margin > 0) & (~right | (claimed & (radius == 0)))
    return Certified(
        radius,
        right & (radius >= threat.radii(n)),
        torch.where(denied, -torch.inf, margin),
        guarantee,
        problem.notes,
    )


__all__ = [
    "Attacked",
    "Certified",
    "Result",
    "attack",
    "certify",
    "curve",
    "distance",
    "measure",
    "measure_exactly",
]
