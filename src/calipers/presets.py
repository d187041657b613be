"""Which tools are there, and which plans are made of them? The only file that knows every tool by
name.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from calipers.attacks.apgd import APGD
from calipers.attacks.boundary import Boundary
from calipers.attacks.carlini_wagner import CarliniWagner
from calipers.attacks.closer import Closer
from calipers.attacks.ddn import DDN
from calipers.attacks.deepfool import DeepFool
from calipers.attacks.defences import EOT, Through
from calipers.attacks.descent import Descent
from calipers.attacks.differences import Differences
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
from calipers.errors import BadInput
from calipers.measurement.plan import Plan, Stage
from calipers.problem.ball import Ball
from calipers.problem.norms import Norm, norm_named
from calipers.problem.substitutions import Substitutions
from calipers.problem.threat import Threat
from calipers.problem.tools import Attack, Certifier

_NEAREST = (
    Nearest,
    Closer,
    FMN,
    DDN,
    DeepFool,
    FAB,
    CarliniWagner,
    SigmaZero,
    HopSkipJump,
    Boundary,
    RaySearch,
)
"""Attacks that look for the nearest example, whatever the radius."""

ATTACKS: dict[str, type[Any]] = {
    tool.__name__: tool
    for tool in (
        Steepest,
        PGD,
        APGD,
        Descent,
        Momentum,
        Guided,
        Insist,
        Square,
        SPSA,
        Differences,
        Replace,
        Through,
        EOT,
        Transfer,
        *_NEAREST,
    )
}
CERTIFIERS: dict[str, type[Any]] = {
    tool.__name__: tool
    for tool in (
        IBP,
        CROWN,
        AlphaCROWN,
        BranchAndBound,
        InputSplit,
        Enumeration,
        LargestRadius,
        LinearRegion,
        OwnPiece,
        MILP,
    )
}

GUIDES: dict[str, type[Any]] = {tool.__name__: tool for tool in (Minimisers,)}

_LETTERS_ONLY = (Replace, Enumeration)
_LETTERS_TOO = (Steepest, IBP, CROWN, AlphaCROWN, BranchAndBound, LargestRadius, MILP)
"""Tools that answer a `Substitutions` threat; all others search the inside of a ball."""

_FITS: tuple[tuple[tuple[type[Any], ...], Callable[[Norm], bool]], ...] = (
    ((Square, FAB), lambda norm: not norm.is_count),
    ((DDN,), lambda norm: norm.is_euclidean),
    ((SigmaZero,), lambda norm: norm.is_count),
)
"""Tools that are made for some norms: a plan that is asked for by name passes over those that do
not fit.
"""

_USUAL: dict[str, tuple[Any, ...]] = {
    "Nearest": (PGD(steps=20),),
    "Guided": (APGD(targets=9, halving=True, restarts=2), Minimisers(2)),
    "Closer": (FMN(steps=50), APGD(steps=20, targets=9, halving=True)),
    "Insist": (PGD(steps=40), Descent()),
    "LargestRadius": (CROWN(),),
    "LinearRegion": (CROWN(),),
    "OwnPiece": (MILP(seconds=10),),
}
"""What a search runs when only its name is given."""

_ALONE: dict[str, tuple[Attack | Certifier, Attack | Certifier]] = {
    "attack": (PGD(steps=100, restarts=20), Replace()),
    "certify": (CROWN(), CROWN()),
}
"""The tool of a command that names none: for a ball, and for letters."""

# random points that decide whether a costly tool is worth running on the others; none of 16 bounds
# what all would give by 17 %
_AUDIT = 16
# of the radius: as far beyond it as most points have an example that only deep searches break
_MISSED = 0.15
# of the attacks' time that certifiers may take without proving anything: a run then takes less than
# twice as long as its attacks
_SHARE = 0.75

_VERDICTS = (
    Stage(PGD(steps=10, step=0.25), "attack"),
    Stage(IBP(), "certifier", audit=_AUDIT),
    Stage(CROWN(), "certifier", audit=_AUDIT),
    Stage(CROWN(refine=False), "certifier", audit=_AUDIT, fallback=True),
)


def _family(
    name: str,
    tool: Attack,
    audit: int | None = _AUDIT,
    *,
    waits: bool = False,
    near: float | None = None,
) -> Stage:
    return Stage(tool, "attack", audit=audit, family=name, waits=waits, near=near)


_FAMILIES = (
    _family("ascents", APGD(steps=100), None),
    _family(
        "ascents for each rival",
        Guided(APGD(steps=60, restarts=2, targets=5, halving=True), Minimisers(2)),
    ),
    _family("growing and shrinking radii", FMN(steps=60, targets=3, gamma=0.2, inside=True)),
    _family("tangents", FAB(steps=40, targets=3, backward=0.8, inside=True)),
    _family("tangents", FAB(steps=60, targets=9, backward=0.8, inside=True)),
    _family("directions", DDN(steps=50, inside=True)),
    _family("counts", SigmaZero(steps=200, inside=True), None),
    _family("radii for each rival", FMN(steps=100, targets=9, gamma=0.2, inside=True), waits=True),
    _family("near misses", FMN(steps=200, targets=9, inside=True), 0, waits=True, near=_MISSED),
    _family("near misses", FAB(steps=60, targets=9, inside=True), 0, waits=True, near=_MISSED),
    _family(
        "near misses",
        Guided(APGD(steps=300, restarts=2, targets=5, halving=True), Minimisers(2)),
        0,
        waits=True,
        near=_MISSED,
    ),
    _family("scores", Square(queries=800, ahead=8), waits=True, near=0.0),
)
"""What stands side by side in the plans: ascents at the radius, searches for the nearest example, a
second and deeper look at what was nearly broken, and scores alone (see `measurement.portfolio`).
"""

_NEARER = tuple(
    Stage(tool, "attack", "distance", audit=_AUDIT)
    for tool in (
        FAB(steps=60, targets=9, backward=0.8),
        FMN(steps=200, targets=9, gamma=0.2),
        Closer(FAB(steps=40, targets=3, backward=0.8), PGD(steps=20, step=0.1), rounds=5),
        DDN(steps=100),
    )
)
"""Searches for the nearest example by other ways, each on all points only where it comes nearer on
some of them.
"""

_DISTANCES = (
    Stage(LinearRegion(CROWN()), "certifier", "distance"),
    Stage(FMN(steps=60, targets=3, gamma=0.2), "attack", "distance"),
    *_NEARER,
    Stage(LargestRadius(CROWN(), rounds=2, tolerance=0.05), "certifier", "distance"),
    Stage(
        LargestRadius(CROWN(refine=False), rounds=8, tolerance=0.05),
        "certifier",
        "distance",
        fallback=True,
    ),
)

_UNTIL_STOPPED = 1e6

VERIFY = (
    Stage(PGD(steps=20, restarts=4), "attack"),
    Stage(IBP(), "certifier"),
    Stage(InputSplit(seconds=_UNTIL_STOPPED), "certifier"),
    Stage(CROWN(), "certifier"),
    Stage(PGD(steps=100, restarts=20), "attack"),
    Stage(BranchAndBound(seconds=_UNTIL_STOPPED, attack=APGD(steps=20)), "certifier"),
)
"""What decides a property of a network, in order; the complete tools go on until the time is up."""

VERIFY_TOGETHER = (Stage(IBP(), "certifier"), Stage(CROWN(), "certifier"))
"""What is asked first about the boxes of a property that has many, all of them at once."""

VERIFY_ASKING = (Stage(Differences(queries=5000), "attack"),)
"""What looks for an unsafe input of a network that can only be asked."""

_CLOSER = Closer(
    FMN(steps=60, targets=3, gamma=0.2),
    Guided(APGD(steps=20, targets=9, halving=True), Minimisers(2)),
)

_HARDER = "attack --tool 'APGD(steps=500, restarts=5, targets=9)'"

PLANS: dict[str, Plan] = {
    "quick": Plan(
        "quick",
        (*_VERDICTS, Stage(PGD(steps=40, restarts=2), "attack")),
        "measure --plan standard",
        lower_share=_SHARE,
    ),
    "standard": Plan(
        "standard",
        (*_VERDICTS, *_FAMILIES),
        "measure --plan thorough",
        lower_share=_SHARE,
    ),
    "brackets": Plan(
        "brackets",
        (*_VERDICTS, *_FAMILIES, *_DISTANCES),
        "measure --plan thorough",
        lower_share=_SHARE,
    ),
    "thorough": Plan(
        "thorough",
        (
            *_VERDICTS,
            *_FAMILIES,
            Stage(Guided(APGD(steps=200, restarts=4, targets=9), Minimisers(4)), "attack"),
            Stage(FAB(steps=100, targets=9), "attack"),
            Stage(Square(queries=5000), "attack"),
            *_DISTANCES,
        ),
        "measure --plan complete",
        lower_share=_SHARE,
    ),
    "complete": Plan(
        "complete",
        (
            *_VERDICTS,
            *_FAMILIES,
            Stage(InputSplit(), "certifier"),
            Stage(Guided(APGD(steps=100, restarts=5, targets=9), Minimisers(5)), "attack"),
            Stage(BranchAndBound(seconds=60, attack=APGD(steps=20)), "certifier"),
        ),
        _HARDER,
    ),
    "autoattack": Plan(
        "autoattack",
        (
            Stage(APGD(steps=100), "attack"),
            Stage(APGD(steps=100, targets=9), "attack"),
            Stage(FAB(steps=100, targets=9), "attack"),
            Stage(Square(queries=5000, rescale=False), "attack"),
        ),
        "measure --plan thorough",
    ),
    "distance": Plan(
        "distance",
        (
            Stage(LinearRegion(CROWN()), "certifier", "distance"),
            Stage(OwnPiece(MILP(seconds=10)), "certifier", "distance"),
            Stage(Nearest(PGD(steps=20), rounds=8, tolerance=0.01), "attack", "distance"),
            Stage(_CLOSER, "attack", "distance"),
            *_NEARER,
            Stage(FMN(steps=500, targets=9), "attack", "distance", audit=_AUDIT),
            Stage(FMN(steps=500, targets=9, gamma=0.2), "attack", "distance", audit=_AUDIT),
            Stage(LargestRadius(CROWN(), rounds=12), "certifier", "distance"),
            Stage(
                LargestRadius(CROWN(refine=False), rounds=12),
                "certifier",
                "distance",
                fallback=True,
            ),
        ),
        "measure --plan standard",
        lower_share=_SHARE,
    ),
    "categorical": Plan(
        "categorical",
        (
            Stage(Replace("gradient"), "attack"),
            Stage(Replace(), "attack"),
            Stage(Enumeration(), "certifier"),
            Stage(CROWN(), "certifier"),
            Stage(Replace(nearest=True), "attack", "distance"),
            Stage(Enumeration(limit=50_000), "certifier", "distance"),
        ),
        "measure --plan categorical",
    ),
}


def plan_named(name: str) -> Plan:
    """Return the plan of that name."""
    if name not in PLANS:
        raise BadInput(f"there is no plan {name!r}; choose one of {', '.join(PLANS)}")
    return PLANS[name]


def plan_for(threat: Threat, plan: str | Plan | None, usual: str = "standard") -> Plan:
    """Return the plan asked for; where none is, the `usual` one for a ball and "categorical" for
    substitutions. Refuses tools that do not fit the threat.
    """
    if plan is None:
        plan = "categorical" if isinstance(threat, Substitutions) else usual
    chosen = plan if isinstance(plan, Plan) else plan_named(plan)
    if not isinstance(plan, Plan) and isinstance(threat, Ball):
        chosen = _fitting(chosen, norm_named(threat.norm))
    for stage in chosen.stages:
        check_fit(stage.tool, threat)
    return chosen


def _fitting(plan: Plan, norm: Norm) -> Plan:
    """Return the plan without the tools that are made for other norms."""
    kept = tuple(
        s
        for s in plan.stages
        if all(
            fits(norm)
            for tools, fits in _FITS
            if isinstance(s.tool, tools) or _begins(s.tool, tools)
        )
    )
    return plan if len(kept) == len(plan.stages) else dataclasses.replace(plan, stages=kept)


def _begins(tool: object, tools: tuple[type[Any], ...]) -> bool:
    """Is the tool a search that runs one of these, first or again and again?"""
    return isinstance(tool, (Closer, Insist, Nearest)) and any(
        isinstance(getattr(tool, name, None), tools) for name in ("first", "again", "attack")
    )


def plan_of(command: str, tool: str | None, threat: Threat) -> Plan:
    """Return the plan of one tool alone, written down as for `tool_from`; where none is named, the
    command's usual one for such a threat.
    """
    chosen = tool_for(command, tool, threat)
    if (type(chosen).__name__ in ATTACKS) != (command == "attack"):
        other = "certify" if command == "attack" else "attack"
        raise BadInput(
            f"{type(chosen).__name__} is no tool for {command}: write calipers {other} --tool "
            f"{type(chosen).__name__}"
        )
    return Plan(
        repr(chosen),
        (stage_of(chosen),),
        f"measure --plan {'categorical' if isinstance(threat, Substitutions) else 'standard'}",
    )


def tool_for(
    command: str, tool: Attack | Certifier | str | None, threat: Threat
) -> Attack | Certifier:
    """Return the tool that is given, or written down as for `tool_from`; for None, the command's
    usual one for such a threat. Refuses tools that do not fit the threat.
    """
    if tool is None:
        tool = _ALONE[command][isinstance(threat, Substitutions)]
    chosen = tool_from(tool) if isinstance(tool, str) else tool
    check_fit(chosen, threat)
    return chosen


def check_fit(tool: Attack | Certifier, threat: Threat) -> None:
    """Raise `BadInput` where a tool cannot answer such a threat; tools that are not listed here are
    taken at their word.
    """
    while isinstance(tool, (Through, EOT, Transfer)):
        tool = tool.attack
    name, known = type(tool).__name__, (*ATTACKS.values(), *CERTIFIERS.values())
    if isinstance(threat, Substitutions):
        if isinstance(tool, known) and not isinstance(tool, (*_LETTERS_ONLY, *_LETTERS_TOO)):
            instead = "Replace" if name in ATTACKS else "Enumeration or CROWN"
            raise BadInput(
                f"{name} searches the inside of a norm ball, but Substitutions are letters to "
                f"replace: use {instead}, or plan='categorical'"
            )
        if isinstance(tool, BranchAndBound) and tool.attack is not None:
            raise BadInput(
                "BranchAndBound takes no attack where letters are replaced: leave it out, it tries "
                "admissible letters on its way"
            )
        if isinstance(tool, LargestRadius):
            check_fit(tool.bounder, threat)
        if isinstance(tool, MILP) and tool.attack is not None:
            check_fit(tool.attack, threat)
    elif isinstance(tool, _LETTERS_ONLY):
        instead = "PGD" if name in ATTACKS else "CROWN"
        raise BadInput(
            f"{name} replaces the letters of a Substitutions threat, but the threat is a Ball: "
            f"use {instead}"
        )


def stage_of(tool: Attack | Certifier) -> Stage:
    """Return a stage that runs one tool; tools that search for a distance are aimed at
    distances.
    """
    kind: Literal["attack", "certifier"] = (
        "attack" if type(tool).__name__ in ATTACKS else "certifier"
    )
    seeks_distance = isinstance(tool, (*_NEAREST, LargestRadius, LinearRegion, OwnPiece))
    return Stage(tool, kind, "distance" if seeks_distance else "verdict")


def tool_from(text: str) -> Attack | Certifier:
    """Return the tool that a text like `PGD(steps=100, restarts=20)` writes down: what a tool's
    repr prints, or just its name.

    The text is parsed, never executed: only the tools above, keyword arguments, numbers and
    strings.
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body)  # type: ignore[no-any-return]
    except (SyntaxError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{text!r} does not write down a tool ({error}). Write for example PGD(steps=100, "
            "restarts=20) or CROWN."
        ) from error


def _build(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _tool(node.id)(*_USUAL.get(node.id, ()))
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return ast.literal_eval(node)
    tool = _tool(node.func.id)
    names = [f.name for f in dataclasses.fields(tool)]
    values = {
        **dict(zip(names, map(_build, node.args), strict=False)),
        **{str(k.arg): _build(k.value) for k in node.keywords},
    }
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise BadInput(
            f"{tool.__name__} has no setting {unknown[0]!r}; its settings are "
            f"{', '.join(names) or 'none'}"
        )
    return tool(**values)


def _tool(name: str) -> type[Any]:
    tools = {**ATTACKS, **CERTIFIERS, **GUIDES}
    if name not in tools:
        import difflib

        near = difflib.get_close_matches(name, tools, n=1)
        raise BadInput(
            f"there is no tool {name!r}{f'; did you mean {near[0]}?' if near else '.'} Tools: "
            f"{', '.join(tools)}"
        )
    return tools[name]
