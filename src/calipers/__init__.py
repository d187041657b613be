"""Adversarial robustness of neural networks, bracketed from both sides.

An attack gives an upper bound on the distance from an input to its nearest adversarial example, a
certificate a lower bound: the two jaws of a caliper. `measure` reports both for every point, and
the robust accuracy that they imply.

Names are imported when first used, so that `import calipers` and the command line's help do not
wait for torch.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from calipers.renamed import NAMES, TOOLS

__version__ = "0.1.0"

if TYPE_CHECKING:
    from calipers.api.ask import attack, certify
    from calipers.api.check import CheckResult, check
    from calipers.api.geometry import GeometryResult, local_geometry
    from calipers.api.measure import curve, distance, measure
    from calipers.api.results import AttackResult, CertifyResult, Result
    from calipers.api.verify import verify
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
    from calipers.interchange import load, load_data, load_instances, load_vnnlib
    from calipers.measurement.plan import Plan, Stage
    from calipers.models.classifier import Classifier
    from calipers.models.wrappers import BlackBox
    from calipers.problem.capabilities import Capabilities
    from calipers.problem.goals import Targeted, Untargeted
    from calipers.problem.problem import Problem
    from calipers.problem.specification import Specification
    from calipers.record.bracket import Bracket
    from calipers.record.evidence import Evidence
    from calipers.record.record import Record
    from calipers.threats.ball import Ball
    from calipers.threats.distortion import mse, psnr, radius_of_equal_energy
    from calipers.threats.norms import distance_between
    from calipers.threats.substitutions import Substitutions, one_hot_groups

_HOME = {
    "api.results": "AttackResult CertifyResult Result",
    "api.ask": "attack certify",
    "api.measure": "curve distance measure",
    "api.check": "CheckResult check",
    "api.geometry": "GeometryResult local_geometry",
    "api.verify": "verify",
    "errors": "BadInput BadModel CalipersError CaptureError Contradiction RecordError ToolFailed "
    "UnsupportedOp",
    "interchange": "load load_data load_instances load_vnnlib",
    "measurement.plan": "Plan Stage",
    "models.classifier": "Classifier",
    "models.wrappers": "BlackBox",
    "problem.capabilities": "Capabilities",
    "problem.goals": "Targeted Untargeted",
    "problem.problem": "Problem",
    "problem.specification": "Specification",
    "record.bracket": "Bracket",
    "record.evidence": "Evidence",
    "record.record": "Record",
    "threats.ball": "Ball",
    "threats.distortion": "mse psnr radius_of_equal_energy",
    "threats.norms": "distance_between",
    "threats.substitutions": "Substitutions one_hot_groups",
}
_ROOMS = ("attacks", "certificates", "geometry", "record")
"""Packages whose names are public too: `calipers.attacks.PGD`."""

_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "measure", "curve", "distance", "attack", "certify", "check", "verify", "local_geometry",
    "Result", "AttackResult", "CertifyResult", "CheckResult", "GeometryResult", "Bracket",
    "Evidence", "Record", "Classifier", "BlackBox",
    "load", "load_data", "load_instances", "load_vnnlib",
    "Ball", "Substitutions", "one_hot_groups", "Untargeted", "Targeted", "Specification", "Problem",
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
    if find_spec(f"calipers.{name}"):  # a module that `from calipers import name` imports next
        return f"the module calipers.{name} is not imported"
    now = NAMES.get(name, TOOLS.get(name, name))
    if name in NAMES:
        return f"calipers.{name} is called calipers.{now} now"
    for room in () if name.startswith("_") else _ROOMS:
        if now in getattr(importlib.import_module(f"calipers.{room}"), "__all__", ()):
            return f"calipers.{name} is called calipers.{room}.{now} now"
    return f"module 'calipers' has no attribute {name!r}"


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
