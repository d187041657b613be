"""How robust is a neural network really? Measured between two jaws: the strongest attack from
above, the tightest certificate from below.

Names are imported when first used, so that `import calipers` and the command line's help do not
wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from calipers.api import Attacked, Certified, Result, attack, certify, curve, distance, measure
    from calipers.attacks.apgd import APGD
    from calipers.attacks.boundary import Boundary
    from calipers.attacks.carlini_wagner import CarliniWagner
    from calipers.attacks.closer import Closer
    from calipers.attacks.ddn import DDN
    from calipers.attacks.deepfool import DeepFool
    from calipers.attacks.defences import BPDA, EOT, Through
    from calipers.attacks.descent import Descent
    from calipers.attacks.differences import Differences
    from calipers.attacks.distil import distilled
    from calipers.attacks.fab import FAB
    from calipers.attacks.fmn import FMN
    from calipers.attacks.guided import Guided
    from calipers.attacks.hop_skip_jump import HopSkipJump
    from calipers.attacks.insist import Insist
    from calipers.attacks.momentum import Momentum
    from calipers.attacks.nearest import Nearest
    from calipers.attacks.one_step import Steepest
    from calipers.attacks.pgd import PGD
    from calipers.attacks.ray_search import RaySearch
    from calipers.attacks.replace import Replace
    from calipers.attacks.sigma_zero import SigmaZero
    from calipers.attacks.spsa import SPSA
    from calipers.attacks.square import Square
    from calipers.attacks.transfer import Transfer
    from calipers.certificates.alpha import AlphaCROWN
    from calipers.certificates.branch_and_bound import BranchAndBound
    from calipers.certificates.crown import CROWN, IBP
    from calipers.certificates.enumerate import Enumeration
    from calipers.certificates.guide import Minimisers
    from calipers.certificates.input_split import InputSplit
    from calipers.certificates.linear_region import LinearRegion
    from calipers.certificates.milp import MILP
    from calipers.certificates.own_piece import OwnPiece
    from calipers.certificates.radius import LargestRadius
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
    from calipers.geometry.gradients import linear_score_change, sensitivity
    from calipers.geometry.lines import exit_distance, path, steps_to_leave
    from calipers.geometry.lipschitz import local_slopes
    from calipers.geometry.polynomials import Polynomial, largest_gradient, largest_value
    from calipers.geometry.regions import Regions, activation_pattern, regions_of
    from calipers.geometry.slices import plane_slices
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
    from calipers.record.estimates import clopper_pearson, dkw_half_width, two_sided, wilson
    from calipers.record.evidence import Evidence
    from calipers.record.ledger import Ledger

_HOME = {
    "attacks.apgd": "APGD",
    "attacks.boundary": "Boundary",
    "attacks.carlini_wagner": "CarliniWagner",
    "attacks.closer": "Closer",
    "attacks.ddn": "DDN",
    "attacks.deepfool": "DeepFool",
    "attacks.defences": "BPDA EOT Through",
    "attacks.descent": "Descent",
    "attacks.differences": "Differences",
    "attacks.distil": "distilled",
    "attacks.fab": "FAB",
    "attacks.fmn": "FMN",
    "attacks.guided": "Guided",
    "attacks.hop_skip_jump": "HopSkipJump",
    "attacks.insist": "Insist",
    "attacks.momentum": "Momentum",
    "attacks.transfer": "Transfer",
    "attacks.ray_search": "RaySearch",
    "attacks.replace": "Replace",
    "attacks.sigma_zero": "SigmaZero",
    "attacks.spsa": "SPSA",
    "attacks.square": "Square",
    "certificates.alpha": "AlphaCROWN",
    "certificates.branch_and_bound": "BranchAndBound",
    "certificates.input_split": "InputSplit",
    "certificates.enumerate": "Enumeration",
    "certificates.milp": "MILP",
    "certificates.guide": "Minimisers",
    "problem.answers": "Answers",
    "problem.substitutions": "Substitutions",
    "api": "Attacked Certified Result attack certify curve distance measure",
    "checking": "Checked check",
    "attacks.nearest": "Nearest",
    "attacks.one_step": "Steepest",
    "attacks.pgd": "PGD",
    "certificates.crown": "CROWN IBP",
    "certificates.linear_region": "LinearRegion",
    "certificates.own_piece": "OwnPiece",
    "certificates.radius": "LargestRadius",
    "errors": "BadInput BadModel CalipersError CaptureError Contradiction RecordError ToolFailed "
    "UnsupportedOp",
    "geometry.gradients": "sensitivity linear_score_change",
    "geometry.lines": "exit_distance path steps_to_leave",
    "geometry.lipschitz": "local_slopes",
    "geometry.polynomials": "Polynomial largest_gradient largest_value",
    "geometry.regions": "Regions regions_of activation_pattern",
    "geometry.slices": "plane_slices",
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
    "record.estimates": "clopper_pearson dkw_half_width two_sided wilson",
    "record.evidence": "Evidence",
    "record.ledger": "Ledger",
}
_NOW = {
    "from_estimator": "load",
    "from_onnx": "load",
    "load_model": "load",
    "load_onnx": "load",
}
"""What was called otherwise before: old name, new name."""

_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = [
    "Attacked", "Certified", "Checked", "Result", "attack", "certify", "check", "curve", "distance",
    "measure",
    "APGD", "Boundary", "CarliniWagner", "DDN", "DeepFool", "BPDA", "EOT", "Through", "FAB",
    "FMN", "Guided", "HopSkipJump", "RaySearch", "Differences",
    "Replace", "SigmaZero", "SPSA", "Square", "Minimisers", "Answers",
    "Substitutions",
    "Nearest", "Closer", "Steepest", "PGD", "Momentum", "Descent", "Insist", "Transfer",
    "distilled", "CROWN",
    "IBP", "AlphaCROWN", "BranchAndBound",
    "InputSplit", "Enumeration", "LargestRadius", "LinearRegion", "OwnPiece", "MILP",
    "Portrait", "portrait", "Regions", "regions_of", "activation_pattern", "exit_distance", "path",
    "steps_to_leave", "sensitivity", "linear_score_change",
    "Polynomial", "largest_gradient", "largest_value", "local_slopes", "plane_slices",
    "BadInput", "BadModel", "CalipersError", "CaptureError", "Contradiction", "RecordError",
    "ToolFailed",
    "UnsupportedOp",
    "Capabilities", "verify", "load", "load_data", "load_instances", "load_vnnlib", "Plan",
    "Stage",
    "Problem", "Ball", "Classifier", "Targeted", "Untargeted", "Specification",
    "distance_between", "mse", "psnr", "radius_of_equal_energy",
    "Bracket", "clopper_pearson", "dkw_half_width", "two_sided", "wilson", "Evidence", "Ledger",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NOW:
        raise AttributeError(f"calipers.{name} is called calipers.{_NOW[name]} now")
    if name not in _MODULE:
        raise AttributeError(f"module 'calipers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"calipers.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
