"""Which tools are there, and which plans are made of them? The only file that knows every tool by name."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from calipers.attacks.nearest import Nearest
from calipers.attacks.one_step import Steepest
from calipers.attacks.pgd import PGD
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.radius import LargestRadius
from calipers.errors import BadInput
from calipers.measurement.plan import Plan, Stage
from calipers.problem.tools import Attack, Certifier

ATTACKS: dict[str, type[Any]] = {tool.__name__: tool for tool in (Steepest, PGD, Nearest)}
CERTIFIERS: dict[str, type[Any]] = {tool.__name__: tool for tool in (IBP, CROWN, LargestRadius)}

_USUAL: dict[str, tuple[Any, ...]] = {"Nearest": (PGD(steps=20),), "LargestRadius": (CROWN(),)}
"""What a search runs when only its name is given."""

DEFAULT_ATTACK, DEFAULT_CERTIFIER = PGD(steps=100, restarts=20), CROWN()

_VERDICTS = (
    Stage(PGD(steps=10, step=0.25), "attack"),
    Stage(IBP(), "certifier"),
    Stage(CROWN(), "certifier"),
)
_DISTANCES = (
    Stage(Nearest(PGD(steps=10, step=0.25), rounds=8, tolerance=0.02), "attack", "distance"),
    Stage(LargestRadius(CROWN(), rounds=3, tolerance=0.03), "certifier", "distance"),
)

_HARDER = "attack --tool 'PGD(steps=500, restarts=20)'"

PLANS: dict[str, Plan] = {
    "quick": Plan("quick", (*_VERDICTS, Stage(PGD(steps=40, restarts=2), "attack")), "measure --plan standard"),
    "standard": Plan(
        "standard",
        (*_VERDICTS, Stage(PGD(steps=100, restarts=10), "attack"), *_DISTANCES),
        _HARDER,
    ),
    "distance": Plan(
        "distance",
        (
            Stage(Nearest(PGD(steps=20), rounds=12), "attack", "distance"),
            Stage(LargestRadius(CROWN(), rounds=12), "certifier", "distance"),
        ),
        "measure --plan standard",
    ),
}


def plan_named(name: str) -> Plan:
    """Return the plan of that name."""
    if name not in PLANS:
        raise BadInput(f"there is no plan {name!r}; choose one of {', '.join(PLANS)}")
    return PLANS[name]


def stage_of(tool: Attack | Certifier) -> Stage:
    """Return a stage that runs one tool; tools that search for a distance are aimed at distances."""
    kind = "attack" if type(tool).__name__ in ATTACKS else "certifier"
    return Stage(tool, kind, "distance" if isinstance(tool, (Nearest, LargestRadius)) else "verdict")  # type: ignore[arg-type]


def tool_from(text: str) -> Attack | Certifier:
    """Return the tool that a text like `PGD(steps=100, restarts=20)` writes down: what a tool's repr prints, or just its name.

    The text is parsed, never executed: only the tools above, keyword arguments, numbers and strings.
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body)  # type: ignore[no-any-return]
    except (SyntaxError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{text!r} does not write down a tool ({error}). Write for example PGD(steps=100, restarts=20) or CROWN.") from error


def _build(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _tool(node.id)(*_USUAL.get(node.id, ()))
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return ast.literal_eval(node)
    tool = _tool(node.func.id)
    names = [f.name for f in dataclasses.fields(tool)]
    values = {**dict(zip(names, map(_build, node.args), strict=False)), **{str(k.arg): _build(k.value) for k in node.keywords}}
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise BadInput(f"{tool.__name__} has no setting {unknown[0]!r}; its settings are {', '.join(names) or 'none'}")
    return tool(**values)


def _tool(name: str) -> type[Any]:
    tools = {**ATTACKS, **CERTIFIERS}
    if name not in tools:
        import difflib

        near = difflib.get_close_matches(name, tools, n=1)
        raise BadInput(f"there is no tool {name!r}{f'; did you mean {near[0]}?' if near else ''} Tools: {', '.join(tools)}")
    return tools[name]
