"""How does the record keep a question? Who was asked about what, and the circumstances of the
run.
"""

from __future__ import annotations

from importlib import metadata

import numpy as np
import torch
from torch import Tensor

from calipers.measurement.plan import Plan
from calipers.problem.problem import Problem
from calipers.record.evidence import Question


def question(problem: Problem, plan: Plan, seed: int, extra: dict[str, object]) -> Question:
    """Return the question as the record keeps it: identity, and the circumstances of this run."""
    model, threat = problem.classifier, problem.threat
    radii = threat.radii(len(problem))
    std = None if model.std is None else model.std.tolist()
    facts: dict[str, object] = {
        "model": {
            "name": extra.get("title", type(model.module).__name__),
            "hash": model.digest(),
            "parameters": sum(p.numel() for p in model.module.parameters()),
            "dtype": str(model.dtype),
            "device": str(model.device),
            "mean": None if model.mean is None else model.mean.tolist(),
            "std": std,
        },
        "threat": {
            "norm": threat.norm,
            "radius": _one_or_range(radii),
            "units": "native",
            "box": None if threat.box is None else [_plain(end) for end in threat.box],
            "radius_standardised": None if std is None else [_one_or_range(radii / s) for s in std],
            "masked_features": None if threat.mask is None else int((~threat.mask).sum()),
            "weights": None if threat.weights is None else "per feature",
            **threat.particulars(),
        },
        "goal": _goal_text(problem),
        "data": {"points": len(problem), "shape": list(problem.x.shape[1:])},
        "versions": {"calipers": _version(), "torch": torch.__version__, "numpy": np.__version__},
        "seed": seed,
        "plan": [plan.name, *(s.name for s in plan.stages)],
        "next_step": plan.next_step,
        **({"no_float64": model.no_float64} if model.no_float64 else {}),
        **extra,
    }
    return Question(
        problem.fingerprint(), str(facts.get("title", type(model.module).__name__)), facts
    )


def _goal_text(problem: Problem) -> str:
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
    """Return the installed version; code run from a source tree that was never installed has
    none.
    """
    try:
        return metadata.version("calipers")
    except metadata.PackageNotFoundError:
        return "source"
