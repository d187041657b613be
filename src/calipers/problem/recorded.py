"""Threats and goals as data that a record keeps, and back.

What belongs to single points, their radius and a target of their own, is kept with the points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.goals import Goal, Targeted, Untargeted
from calipers.problem.specification import Specification
from calipers.threats.ball import Ball
from calipers.threats.substitutions import Substitutions
from calipers.threats.threat import Threat

_KINDS: dict[str, Any] = {
    "ball": Ball,
    "substitutions": Substitutions,
    "untargeted": Untargeted,
    "targeted": Targeted,
    "specification": Specification,
}
_RENAMED = {"belongs": "case_of", "numeric": "continuous", "shifts": "offset"}
"""Fields that earlier records hold under another name."""
_BY_POINT = {"ball": "radius", "substitutions": "k"}  # the field that the points hold


def data_of(value: Threat | Goal) -> dict[str, Any] | None:
    """Return a threat or a goal as a dict of numbers, text and arrays.

    The arrays are NumPy's. None for a class that is not one of this package.

    >>> data_of(Ball("l2", 0.5))["norm"]
    'l2'
    """
    kind = next((name for name, cls in _KINDS.items() if type(value) is cls), None)
    if kind is None:
        return None
    data = _fields(value, kind)
    data.pop(_BY_POINT.get(kind, ""), None)
    if isinstance(value, Targeted) and torch.as_tensor(value.target).dim():
        data["target"] = None
    return data


def _fields(value: Any, kind: str) -> dict[str, Any]:
    """Return the fields of a threat or a goal as plain data."""
    named = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    return {"kind": kind, **{name: _plain(inner) for name, inner in named.items()}}


def _plain(value: Any) -> Any:
    """Return a field's value as plain data."""
    if isinstance(value, Tensor):
        held = value.detach().cpu()
        # NumPy has no bfloat16; float32 holds each of its numbers exactly
        held = held.float() if held.dtype == torch.bfloat16 else held
        return held.numpy().copy()
    if isinstance(value, Ball):
        return _fields(value, "ball")
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def recorded_threat(data: Mapping[str, Any], radii: Tensor) -> Threat:
    """Return the threat of a record, from its data and the radii (N,)."""
    made = _made({**data, _BY_POINT.get(data["kind"], ""): radii})
    if not isinstance(made, Ball | Substitutions):
        raise BadInput(f"{data['kind']} is no threat")
    return made


def recorded_goal(data: Mapping[str, Any], targets: Sequence[int | None]) -> Goal:
    """Return the goal of a record, from its data and the targets (N,)."""
    if data["kind"] == "targeted" and data["target"] is None:
        if None in targets:
            raise BadInput("a point of a targeted goal has no target")
        return Targeted(torch.tensor(targets))
    made = _made(data)
    if isinstance(made, Ball | Substitutions):
        raise BadInput(f"{data['kind']} is no goal")
    goal: Goal = made
    return goal


def _made(data: Mapping[str, Any]) -> Any:
    """Return the threat or the goal that such data describes."""
    if data["kind"] not in _KINDS:
        raise BadInput(f"this calipers knows no threat or goal called {data['kind']}")
    fields = {
        _RENAMED.get(name, name): _value(inner)
        for name, inner in data.items()
        if name not in ("kind", "")
    }
    return _KINDS[data["kind"]](**fields)


def _value(held: Any) -> Any:
    """Return the value of a field from plain data."""
    if isinstance(held, np.ndarray):
        return torch.from_numpy(held)
    if isinstance(held, dict):
        return _made(held)
    return tuple(_value(inner) for inner in held) if isinstance(held, list) else held
