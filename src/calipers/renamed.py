"""Former names, each with the name that replaces it: what errors tell."""

from __future__ import annotations

import ast

TOOLS = {
    "Boundary": "BoundaryAttack",
    "Closer": "IterativeTightening",
    "Descent": "MultiEpsilon",
    "Differences": "FiniteDifferences",
    "Guided": "WarmStarted",
    "Insist": "AdaptiveRestarts",
    "LargestRadius": "CertifiedRadius",
    "Minimisers": "RelaxationMinimizers",
    "Momentum": "MIFGSM",
    "Nearest": "RadiusBisection",
    "RaySearch": "RayS",
    "Replace": "SubstitutionSearch",
    "Steepest": "FGSM",
    "Through": "BPDA",
}
"""Attacks and certifiers."""

SETTINGS = {
    "APGD": {"halving": "successive_halving"},
    "AlphaCROWN": {"sharpen": "intermediate"},
    "BranchAndBound": {"sharpen": "intermediate"},
    "CarliniWagner": {"first_c": "initial_const"},
    "Closer": {"attack": "refine", "first": "attack", "share": "fraction"},
    "EOT": {
        "draws": "samples",
        "judges": "eval_samples",
        "of": "average",
        "votes": "success_rate",
    },
    "FAB": {"backward": "beta", "most_bias": "alpha_max", "overshoot": "eta"},
    "Guided": {"guide": "starts"},
    "Insist": {
        "again": "restart",
        "first": "attack",
        "tries": "restarts",
        "within": "threshold",
    },
    "LargestRadius": {"bounder": "certifier"},
    "LinearRegion": {"bounder": "certifier"},
    "MILP": {"first": "lp_budget", "sharpen": "intermediate", "watch": "progress"},
    "SPSA": {"reach": "delta"},
    "Square": {"ahead": "proposals_per_step"},
    "Through": {"stand_ins": "backward"},
}
"""Settings of tools, by the name that the tool had."""

NAMES = {
    "Answers": "BlackBox",
    "Attacked": "AttackResult",
    "Certified": "CertifyResult",
    "Checked": "CheckResult",
    "Ledger": "Record",
    "Portrait": "GeometryResult",
    "from_estimator": "load",
    "from_onnx": "load",
    "load_model": "load",
    "load_onnx": "load",
    "portrait": "local_geometry",
}
"""Names of the package itself."""

PARAMETERS = {
    "confidence": "Result.at_confidence(0.95)",
    "distance(seconds)": "exact=60",
    "guarantee": "Plan(guarantee=...)",
    "local_geometry(maps)": "GeometryResult.drawn(maps=6)",
    "local_geometry(seconds)": "exact=60",
    "local_geometry(slices)": "GeometryResult.drawn(slices=2)",
    "lower_share": "Plan(lower_share=...)",
    "proofs": "Plan(proofs=True)",
    "seconds": "Plan(seconds=...)",
    "seed": "Plan(seed=...)",
    "title": "Classifier(model, name=...)",
}
"""Parameters of functions: of one in brackets, else of all that measure."""

OPTIONS = {
    "--letters": "--one-hot",
    "--points": "--limit",
    "--proof": "--proofs",
    "--resume": "--record",
    "--timeout": "--seconds",
}
"""Options of the command line."""


def modern(text: str) -> str:
    """Return the text of a tool, as a record keeps it, with today's names.

    >>> modern("Insist(first=PGD(steps=5), again=PGD(steps=9), within=0.05, tries=2)")
    'AdaptiveRestarts(attack=PGD(steps=5), restart=PGD(steps=9), threshold=0.05, restarts=2)'
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            now = SETTINGS.get(node.func.id, {})
            for setting in node.keywords:
                setting.arg = now.get(str(setting.arg), setting.arg)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = TOOLS.get(node.id, node.id)
    return ast.unparse(tree)
