"""The functions that measure robustness, named as on the command line.

`measure`, `curve`, `distance`, `attack` and `certify`, with what they return. All take the model
first, then points, labels and the threat model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
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


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Everything that a measurement found.

    Args:
        summary: All numbers that a report shows.
        bracket: Lower and upper bounds on the distance of every point, in the order of the points.
        ledger: The record with all evidence, in memory where no file was named.
        finished: Whether the plan was carried out to its end; False where the time limit or Ctrl-C
            stopped the run.

    Raises:
        OSError: By `report`, where the page cannot be written.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> found = calipers.measure(model, x, y, calipers.Ball("linf", 0.1), plan="quick")
        >>> [row.verdict for row in found.points]
        ['robust', 'robust', 'robust', 'robust']
    """

    summary: Summary
    bracket: Bracket
    ledger: Ledger
    finished: bool

    @property
    def robust_accuracy(self) -> RobustAccuracy:
        """Bounds on the robust accuracy at the radius of the threat.

        `certified <= truth <= attacked` holds on these points; `interval` is a confidence interval
        for the population that they were drawn from.
        """
        return self.summary.robust

    @property
    def clean_accuracy(self) -> Rate:
        """The share of points that the model classifies correctly."""
        return self.summary.clean

    @property
    def curve(self) -> tuple[AtRadius, ...]:
        """The robust accuracy at each radius of a run over several radii.

        Each entry has a `radius` and `robust`, which is read like `robust_accuracy`. Empty for a
        run at one radius.
        """
        return self.summary.at_radii

    @property
    def points(self) -> tuple[PointRow, ...]:
        """One row for each point: label, prediction, verdict, bounds, tools, cost."""
        return self.summary.rows

    def report(self, path: str | Path = "report.html") -> Path:
        """Write the report as one HTML page, and return its path."""
        from calipers.report.render import render_html

        return render_html([self.summary], path)

    def to_frame(self) -> Any:
        """Return `points` as a pandas data frame, one row a point.

        Raises:
            BadInput: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise BadInput(
                "to_frame needs pandas: pip install pandas; `points` holds the same rows"
            ) from error
        return pandas.DataFrame([dataclasses.asdict(row) for row in self.points])

    def __str__(self) -> str:
        from calipers.report.text import render_text

        return render_text([self.summary])

    def __repr__(self) -> str:
        return f"<Result: {self.robust_accuracy}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


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
        record: File, or `Ledger`, that keeps everything that was admitted. The same call takes an
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
        watch: Is told about the progress: an object with the methods `stage(name, points)` and
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
    """Bound the robust accuracy at many radii in one run.

    The property `curve` of the result has the bounds at each radius; everything else in it is read
    at the middle radius. An example that is found at one radius counts at all larger ones, a
    certificate at all smaller ones, so both bounds fall with the radius. A point is only visited
    where its verdict is open, at the middle of such radii first.

    Cost: about log2(R) + 1 visits of a point whose verdict is hard to settle at one of R radii, not
    R.

    Args:
        model, x, y, goal, seed, seconds, lower_share, proofs, guarantee, watch, title: As for
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
    """Return the certifier set to that guarantee; for a search, its bounder."""
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
    """Bound the distance from each point to its nearest adversarial example.

    Runs the plan "distance" ("categorical" for `Substitutions`): searches for the nearest example,
    and for the largest radius that can be certified.

    Args:
        model, x, y, goal, seed, record, watch: As for `measure`.
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
        problem, chosen, ledger, seed=seed, watch=watch, begun=begun, after=(repr(tool),)
    ) and close(problem, tool, ledger, run=begun.number, seed=seed, watch=watch)
    bracket = Bracket.of(problem.names, ledger.evidence(problem.fingerprint()))
    ledger.note(begun.number, "exact", dataclasses.asdict(closed(bracket, threat)))
    return _result(problem, ledger, confidence, finished)


@dataclass(frozen=True, eq=False, repr=False)
class Attacked:
    """The result of one attack, as far as the referee admits it.

    Args:
        candidates: The nearest adversarial example of each point (N, *D), and where none was found
            the last point tried.
        distance: Distance of that example (N,), float64: infinite where none was found, 0 where the
            model is wrong at the point itself.
        margin: The worst margin at the candidate (N,), in logits; negative where it is
            misclassified.
        success: Whether the example lies within the radius asked (N,). An attack that looks for the
            nearest example may end beyond it.
        forwards: Forward passes spent on each point (N,).
        backwards: Backward passes spent on each point (N,).
        notes: How model and data were read, where that is not obvious.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-plain"), calipers.load_data(None, points=4)
        >>> found = calipers.attack(model, x, y, calipers.Ball("linf", 0.1), "PGD(steps=20)")
        >>> found.candidates.shape, found.success.tolist()
        (torch.Size([4, 1, 28, 28]), [True, True, True, False])
    """

    candidates: Tensor
    distance: Tensor
    margin: Tensor
    success: Tensor
    forwards: Tensor
    backwards: Tensor
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        found = self.distance[self.distance.isfinite()]
        middle = f", median distance of examples {float(found.median()):.4g}" if len(found) else ""
        count = f"{int(self.success.sum())} of {len(self.success)}"
        return f"<Attacked: {count} within the radius{middle}>"


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
    """Run one attack, and return what it found that the referee admits.

    Ctrl-C ends the search; what it has found until then is judged and returned.

    Args:
        model, x, y, threat, goal: As for `measure`.
        tool: The attack (see `calipers.attacks`), or its text as on the command line. By default
            "PGD(steps=100, restarts=20)", for `Substitutions` "Replace".
        seed: Seed of all random starts.

    Returns:
        An `Attacked`, with one entry for each point.

    Raises:
        BadInput: For a tool that is not known or does not fit the threat, and as `measure`.
        BadModel: As `measure`.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> found = calipers.attack(model, x, y, calipers.Ball("linf", 0.1), "PGD(steps=20)")
        >>> found.success.tolist()
        [False, False, False, False]
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


@dataclass(frozen=True, eq=False, repr=False)
class Certified:
    """The result of one certifier, as far as the referee admits it.

    Args:
        radius: Radius within which no adversarial example exists (N,), float64, in native units; 0
            where nothing is proven.
        certified: Whether that covers the radius asked (N,).
        margin: Lower bound on the worst margin within the radius (N,), float64, in logits; minus
            infinity where the tool's claim is not admitted.
        guarantee: What is proven, and in which arithmetic: "float64-checked" or "float32-executed".
        notes: How model and data were read, where that is not obvious.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> found = calipers.certify(model, x, y, calipers.Ball("linf", 0.1), "IBP")
        >>> found.guarantee, found.radius.shape
        ('float64-checked', torch.Size([4]))
    """

    radius: Tensor
    certified: Tensor
    margin: Tensor
    guarantee: str
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        proved = f"{int(self.certified.sum())} of {len(self.certified)} at the radius"
        return f"<Certified: {proved}, {self.guarantee or 'nothing claimed'}>"


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
    """Run one certifier, and return what it proved that the referee admits.

    Points that the model gets wrong, or that cannot be measured, are never certified.

    Args:
        model, x, y, threat, goal: As for `measure`.
        tool: The certifier (see `calipers.certificates`), or its text as on the command line. By
            default "CROWN".

    Returns:
        A `Certified`, with one entry for each point.

    Raises:
        BadInput: For a tool that is not known or does not fit the threat, and as `measure`.
        BadModel: As `measure`.
        CaptureError: Where the model cannot be turned into a graph.
        Contradiction: Where a claim is certainly wrong, or an example that the tool itself met lies
            inside the certified radius.
        ToolFailed: Where the certifier ends on an error other than those of calipers.
        UnsupportedOp: Where an operation of the model cannot be bounded.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> calipers.certify(model, x, y, calipers.Ball("linf", 0.1)).certified.tolist()
        [True, True, True, True]
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
