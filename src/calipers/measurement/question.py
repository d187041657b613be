"""Questions as the record keeps them.

Threat model and goal as data, descriptions of them for people, and for each run its circumstances.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.measurement.plan import Plan
from calipers.measurement.probe import acquaint
from calipers.problem.goals import Targeted
from calipers.problem.problem import Problem
from calipers.problem.recorded import data_of
from calipers.record.evidence import Evidence, Point, Question, Run
from calipers.record.record import Record
from calipers.record.rows import BY_VALUE
from calipers.threats.ball import Ball

_KEPT = ("begun_anew",)  # notes of an earlier run on this question that stay true


def begin(
    problem: Problem,
    plan: Plan,
    ledger: Record,
    *,
    radii: Sequence[float] = (),
    then: Sequence[str] = (),
    kept: Sequence[str] = (),
) -> Run:
    """Register the question, its points and this run; return the run.

    `radii` are those of a curve, `then` tools that are asked after the plan's, `kept` keys of notes
    of the run before that hold for this one too. Raises `RecordError` where the record is about
    another program of this name.
    """
    asked = question(problem)
    acquaint(problem, asked.title, ledger)
    ledger.ask(asked, points_of(problem))
    earlier = ledger.runs(asked.fingerprint)
    notes = {
        key: value
        for key, value in (earlier[-1].notes if earlier else {}).items()
        if key in (*_KEPT, *kept)
    }
    given = problem.threat.radii(len(problem))
    return ledger.begin(
        Run(
            asked.fingerprint,
            plan.seed,
            (plan.name, *(s.name for s in plan.stages), *then),
            tuple(dict.fromkeys((float(given.min()), float(given.max())))),
            tuple(radii),
            {"calipers": _version(), "torch": torch.__version__, "numpy": np.__version__},
            asked.title,
            notes={**notes, **_circumstances(problem, plan)},
        )
    )


def _circumstances(problem: Problem, plan: Plan) -> dict[str, Any]:
    return {
        "points": len(problem),
        "device": str(problem.classifier.device),
        "next_step": plan.next_step,
        **({"settings": plan.settings} if plan.settings else {}),
        **({"read": list(problem.notes)} if problem.notes else {}),
    }


def question(problem: Problem) -> Question:
    """Return the question as the record keeps it."""
    model, name = problem.classifier, problem.classifier.name
    std = None if model.std is None else model.std.tolist()
    facts: dict[str, Any] = {
        "model": {
            "name": name,
            "hash": model.digest(),
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "dtype": str(model.dtype),
            "mean": None if model.mean is None else model.mean.tolist(),
            "std": std,
        },
        "threat": _threat_in_words(problem),
        "goal": _goal_in_words(problem),
        "data": {"shape": list(problem.x.shape[1:]), **_names(problem)},
        **({"no_float64": model.no_float64} if model.no_float64 else {}),
    }
    threat, goal = data_of(problem.threat), data_of(problem.goal)
    data = None if threat is None or goal is None else {"threat": threat, "goal": goal}
    return Question(problem.fingerprint(), name, facts, data)


def _names(problem: Problem) -> dict[str, list[str]]:
    """Return the names of columns and classes, where they have any."""
    labels = problem.classifier.labels
    classes = [] if labels is None else [str(name) for name in np.asarray(labels).tolist()]
    found = {"features": list(problem.features), "classes": classes}
    return {key: names for key, names in found.items() if names}


def points_of(problem: Problem) -> list[Point]:
    """Return the problem's points as the record keeps them."""
    arrays, labels, radii = (
        problem.x.detach().cpu().numpy(),
        problem.y.tolist(),
        problem.threat.radii(len(problem)).tolist(),
    )
    own = torch.as_tensor(problem.goal.target) if isinstance(problem.goal, Targeted) else None
    targets = [None] * len(radii) if own is None or not own.dim() else own.tolist()
    return [
        Point(name, i, labels[i], radii[i], arrays[i], targets[i])
        for i, name in enumerate(problem.names)
    ]


def keep_inputs(
    problem: Problem, place: Mapping[str, int], ledger: Record, facts: Iterable[Evidence]
) -> None:
    """Keep by value the large inputs that these witnesses belong to."""
    if problem.x[0].numel() * problem.x.element_size() > BY_VALUE:
        places = {e.point: place[e.point] for e in facts if e.kind == "witness"}
        inputs = {name: problem.x[i].cpu().numpy() for name, i in places.items()}
        ledger.keep_inputs(problem.fingerprint(), inputs)


def _threat_in_words(problem: Problem) -> dict[str, Any]:
    threat = problem.threat
    words: dict[str, Any] = {
        "norm": threat.norm,
        "units": "native",
        "box": None if threat.ends is None else [_plain(end) for end in threat.ends],
        "masked_features": None if threat.mask is None else int((~threat.mask).sum()),
        "weights": None if threat.weights is None else "per feature",
    }
    if isinstance(threat, Ball):
        if threat.constraints is not None:
            words["constraints"] = len(threat.constraints[1])
        if threat.grid is not None:
            words["grid"] = threat.grid
        return words
    numeric, reach = threat.continuous, None
    if numeric is not None:
        radius = _one_or_range(torch.as_tensor(numeric.radius, dtype=torch.float64))
        reach = {"norm": numeric.norm, "radius": radius}
    words["letters"] = {
        "groups": len(threat.groups),
        "restricted": threat.allowed is not None,
        "numeric": reach,
    }
    return words


def _goal_in_words(problem: Problem) -> str:
    goal = problem.identity()["goal"]
    assert isinstance(goal, dict)
    return str(goal["name"]).lower() + (f" at class {goal['target']}" if "target" in goal else "")


def _plain(end: float | Tensor) -> float | str:
    return (
        float(end)
        if not isinstance(end, Tensor) or end.numel() == 1
        else f"{float(end.min()):g}..{float(end.max()):g} by feature"
    )


def _one_or_range(radii: Tensor) -> float | list[float]:
    low, high = float(radii.min()), float(radii.max())
    return low if low == high else [low, high]


def _version() -> str:
    """Return the installed version of calipers.

    Code run from a source tree that was never installed has none: "source".
    """
    try:
        return metadata.version("calipers")
    except metadata.PackageNotFoundError:
        return "source"
