"""Adversarial robustness of neural networks, bracketed from both sides.

An attack gives an upper bound on the distance from an input to its nearest adversarial example, a
certificate a lower bound: the two jaws of a caliper. `measure` reports both for every point, and
the robust accuracy that they imply.

Names are imported when first used, so that `import calipers` and the command line's help do not
wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from calipers.api import Attacked, Certified, Result, attack, certify, curve, distance, measure
    from calipers.checking import Checked, check
    from calipers.errors import (
        BadInput,
        BadModel,
        CalipersError,
        CaptureError,
        Contradiction,
        RecordError,
        ToolFailed,
        UnsupportedOp,
    )
    from calipers.instances import verify
    from calipers.interchange import load, load_data, load_instances, load_vnnlib
    from calipers.measurement.plan import Plan, Stage
    from calipers.portraits import Portrait, portrait
    from calipers.problem.answers import Answers
    from calipers.problem.ball import Ball
    from calipers.problem.capabilities import Capabilities
    from calipers.problem.classifier import Classifier
    from calipers.problem.distortion import mse, psnr, radius_of_equal_energy
    from calipers.problem.goals import Targeted, Untargeted
    from calipers.problem.norms import distance_between
    from calipers.problem.problem import Problem
    from calipers.problem.specification import Specification
    from calipers.problem.substitutions import Substitutions
    from calipers.record.bracket import Bracket
    from calipers.record.evidence import Evidence
    from calipers.record.ledger import Ledger

_HOME = {
    "problem.answers": "Answers",
    "problem.substitutions": "Substitutions",
    "api": "Attacked Certified Result attack certify curve distance measure",
    "checking": "Checked check",
    "errors": "BadInput BadModel CalipersError CaptureError Contradiction RecordError ToolFailed "
    "UnsupportedOp",
    "portraits": "Portrait portrait",
    "instances": "verify",
    "interchange": "load load_data load_instances load_vnnlib",
    "measurement.plan": "Plan Stage",
    "problem.ball": "Ball",
    "problem.capabilities": "Capabilities",
    "problem.classifier": "Classifier",
    "problem.distortion": "mse psnr radius_of_equal_energy",
    "problem.goals": "Targeted Untargeted",
    "problem.norms": "distance_between",
    "problem.specification": "Specification",
    "problem.problem": "Problem",
    "record.bracket": "Bracket",
    "record.evidence": "Evidence",
    "record.ledger": "Ledger",
}
_ROOMS = ("attacks", "certificates", "geometry", "record")
"""Packages whose names are public too: `calipers.attacks.PGD`."""

_NOW = {
    "from_estimator": "load",
    "from_onnx": "load",
    "load_model": "load",
    "load_onnx": "load",
}
"""Names that have been renamed: old name, new name."""

_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "measure", "curve", "distance", "attack", "certify", "check", "verify", "portrait",
    "Result", "Attacked", "Certified", "Checked", "Portrait", "Bracket", "Evidence", "Ledger",
    "Classifier", "Answers", "load", "load_data", "load_instances", "load_vnnlib",
    "Ball", "Substitutions", "Untargeted", "Targeted", "Specification", "Problem",
    "Plan", "Stage", "Capabilities",
    "distance_between", "mse", "psnr", "radius_of_equal_energy",
    "CalipersError", "BadInput", "BadModel", "CaptureError", "Contradiction", "RecordError",
    "ToolFailed", "UnsupportedOp",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"calipers.{name}")
    if name in _MODULE:
        return getattr(importlib.import_module(f"calipers.{_MODULE[name]}"), name)
    raise AttributeError(_unknown(name))


def _unknown(name: str) -> str:
    """Return the message for an unknown name, with its new place if moved."""
    if name in _NOW:
        return f"calipers.{name} is called calipers.{_NOW[name]} now"
    for room in () if name.startswith("_") else _ROOMS:
        if name in getattr(importlib.import_module(f"calipers.{room}"), "__all__", ()):
            return f"calipers.{name} is called calipers.{room}.{name} now"
    return f"module 'calipers' has no attribute {name!r}"


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
