"""One attack or one certifier, asked about points: `attack`, `certify`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from calipers.api.results import AttackResult, CertifyResult
from calipers.calls import with_gradients
from calipers.interchange.door import pose
from calipers.measurement.ask import Answer, ask
from calipers.measurement.plan import Stage
from calipers.measurement.referee import Referee, Ruling
from calipers.presets import tool_for
from calipers.problem.goals import Goal
from calipers.problem.protocols import Attack, Attempt, Certifier, Claim
from calipers.record.bracket import Bracket
from calipers.threats.threat import Threat


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
) -> AttackResult:
    """Run one attack, and return what it found that the referee admits.

    Ctrl-C ends the search; what it has found until then is judged and returned.

    Args:
        model, x, y, threat, goal: As for `measure`.
        tool: The attack (see `calipers.attacks`), or its text as on the command line. By default
            "PGD(steps=100, restarts=20)", for `Substitutions` "SubstitutionSearch".
        seed: Seed of all random starts.

    Returns:
        An `AttackResult`, with one entry for each point.

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
    device, success = problem.x.device, distance <= threat.radii(n)
    return AttackResult(
        candidates,
        distance.to(device),
        margin.to(device),
        success.to(device),
        forwards.to(device),
        backwards.to(device),
        problem.notes,
    )


@with_gradients()
def certify(
    model: Any,
    x: Any,
    y: Any,
    threat: Threat,
    tool: Certifier | str | None = None,
    *,
    goal: Goal | None = None,
) -> CertifyResult:
    """Run one certifier, and return what it proved that the referee admits.

    Points that the model gets wrong, or that cannot be measured, are never certified.

    Args:
        model, x, y, threat, goal: As for `measure`.
        tool: The certifier (see `calipers.certificates`), or its text as on the command line. By
            default "CROWN".

    Returns:
        A `CertifyResult`, with one entry for each point.

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
    return CertifyResult(
        radius.to(problem.x.device),
        (right & (radius >= threat.radii(n))).to(problem.x.device),
        torch.where(denied, -torch.inf, margin).to(problem.x.device),
        guarantee,
        problem.notes,
    )


__all__ = ["attack", "certify"]
