"""The facts that a report shows: question, circumstances and runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from calipers.record.evidence import Question, Run

_LONGEST = 2000  # characters of one provenance value; the record keeps the whole
_DEEPEST = 6  # levels of nested facts shown as such; a record from elsewhere may nest deeper


def facts_of(question: Question, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the facts of a question and of its latest run, by name.

    Of earlier runs there is one line each.
    """
    facts = {**question.facts}
    if not runs:
        return facts
    run = runs[-1]
    notes = {key: value for key, value in run.notes.items() if key not in ("points", "device")}
    facts |= {
        "time": run.time,
        "seed": run.seed,
        "plan": list(run.plan),
        "versions": run.versions,
        **notes,
    }
    for group, key, value in (
        ("model", "device", run.notes.get("device")),
        ("data", "points", run.notes.get("points")),
        ("threat", "radius", _one_or_range(run)),
        ("threat", "radius_standardised", _standardised(facts.get("model"), run)),
    ):
        held = facts.get(group)
        if value is not None and isinstance(held, dict):
            facts[group] = {**held, key: value}
    if run.radii:
        facts["radii"] = list(run.radii)
    if run.argv:
        facts["command"] = command_of(run)
    if len(runs) > 1:
        facts["earlier runs"] = {str(r.number): _line(r) for r in runs[:-1]}
    return facts


def command_of(run: Run) -> str:
    """Return the command line of a run, as it can be typed again.

    "" where there was none.
    """
    return shlex.join(["calipers", *run.argv]) if run.argv else ""


def _one_or_range(run: Run) -> Any:
    return run.radius[0] if len(run.radius) == 1 else list(run.radius) or None


def _standardised(model: Any, run: Run) -> Any:
    """Return the radius in standard deviations of each channel, else None."""
    std = model.get("std") if isinstance(model, dict) else None
    if not isinstance(std, list) or not run.radius:
        return None
    low, high = run.radius[0], run.radius[-1]
    return [low / s if low == high else [low / s, high / s] for s in std]


def _line(run: Run) -> str:
    """Return one earlier run in a line."""
    radius = " to ".join(f"{r:g}" for r in run.radius)
    when, plan = run.time or "at an unknown time", run.plan[0] if run.plan else "unknown"
    said = f"{when}, plan {plan}, radius {radius}, seed {run.seed}"
    return f"{said}, {command_of(run)}" if run.argv else said


def provenance(facts: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return all facts as groups of (key, text), nested keys joined by dots.

    Unknown facts are shown too.
    """
    loose = [(str(k), _shown(v)) for k, v in facts.items() if not isinstance(v, dict)]
    groups = [
        (str(k), list(_flatten(v, "", _DEEPEST)))
        for k, v in facts.items()
        if isinstance(v, dict) and v
    ]
    return ([("question", loose)] if loose else []) + groups


def _flatten(value: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and depth:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key), depth - 1)
    else:
        yield path, _shown(value)


def _shown(value: Any) -> str:
    """Return one value as text.

    Names stay as they are, lists get commas, the rest is JSON.
    """
    if isinstance(value, list) and not any(isinstance(v, list | dict) for v in value):
        text = ", ".join(map(_shown, value)) or "none"
    elif isinstance(value, str):
        text = value or "not given"
    elif value is None:
        text = "none"
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"
