"""Plans: which tools are run, and in what order.

The tools are those that the packages `attacks` and `certificates` export.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from importlib import metadata
from typing import Any

from calipers import attacks, certificates
from calipers.attacks import (
    APGD,
    DDN,
    FAB,
    FMN,
    PGD,
    AdaptiveRestarts,
    FiniteDifferences,
    IterativeTightening,
    MultiEpsilon,
    RadiusBisection,
    SigmaZero,
    Square,
    SubstitutionSearch,
    WarmStarted,
)
from calipers.bounds.rounding import CHECKED, Guarantee, arithmetic_of
from calipers.certificates import (
    CROWN,
    IBP,
    MILP,
    BranchAndBound,
    CertifiedRadius,
    Enumeration,
    InputSplit,
    LinearRegion,
    OwnPiece,
    RelaxationMinimizers,
)
from calipers.errors import BadInput
from calipers.measurement.plan import Plan, Stage
from calipers.problem.capabilities import capabilities_of, check_fit, misfit
from calipers.problem.protocols import Attack, Certifier
from calipers.renamed import SETTINGS, TOOLS
from calipers.threats.substitutions import Substitutions
from calipers.threats.threat import Threat


def _listed(room: Any) -> dict[str, type[Any]]:
    """Return the tools that a package exports: whatever declares capabilities."""
    found = {name: getattr(room, name) for name in room.__all__}
    return {name: made for name, made in found.items() if capabilities_of(made) is not None}


ATTACKS = _listed(attacks)
CERTIFIERS = _listed(certificates)

_USUAL: dict[str, Attack | Certifier] = {
    "RadiusBisection": RadiusBisection(PGD(steps=20)),
    "WarmStarted": WarmStarted(
        APGD(targets=9, successive_halving=True, restarts=2), RelaxationMinimizers(2)
    ),
    "IterativeTightening": IterativeTightening(
        FMN(steps=50), APGD(steps=20, targets=9, successive_halving=True)
    ),
    "AdaptiveRestarts": AdaptiveRestarts(PGD(steps=40), MultiEpsilon()),
    "CertifiedRadius": CertifiedRadius(CROWN()),
    "LinearRegion": LinearRegion(CROWN()),
    "OwnPiece": OwnPiece(MILP(seconds=10)),
}
"""What a search runs when only its name is given."""

_ALONE: dict[str, tuple[Attack | Certifier, Attack | Certifier]] = {
    "attack": (PGD(steps=100, restarts=20), SubstitutionSearch()),
    "certify": (CROWN(), CROWN()),
}
"""The tool of a command that names none: for a ball, and for substitutions."""

# size of the random sample that decides whether a costly tool is run on the other points: if it
# settles none of 16, it would settle at most 17 % of all (with 95 % confidence)
_AUDIT = 16
# as a share of the radius: most points that only deep searches break have an example that near
_MISSED = 0.15
# what certifiers may take without proving anything, as a share of the time of the attacks: a run
# then takes less than twice as long as its attacks
_SHARE = 0.75

_VERDICTS = (
    Stage(PGD(steps=10, step=0.25), "attack"),
    Stage(IBP(), "certifier", pilot=_AUDIT),
    Stage(CROWN(), "certifier", pilot=_AUDIT),
    Stage(CROWN(refine=False), "certifier", pilot=_AUDIT, fallback=True),
)


def _family(
    name: str,
    tool: Attack,
    audit: int | None = _AUDIT,
    *,
    waits: bool = False,
    near: float | None = None,
) -> Stage:
    """Return the stage of an attack that belongs to a family."""
    return Stage(tool, "attack", pilot=audit, family=name, waits=waits, near=near)


_FAMILIES = (
    _family("gradient ascent", APGD(steps=100), None),
    _family(
        "targeted gradient ascent",
        WarmStarted(
            APGD(steps=60, restarts=2, targets=5, successive_halving=True), RelaxationMinimizers(2)
        ),
    ),
    _family("FMN", FMN(steps=60, targets=3, gamma=0.2, inside=True)),
    _family("FAB", FAB(steps=40, targets=3, beta=0.8, inside=True)),
    _family("FAB", FAB(steps=60, targets=9, beta=0.8, inside=True)),
    _family("DDN", DDN(steps=50, inside=True)),
    _family("SigmaZero", SigmaZero(steps=200, inside=True), None),
    _family("targeted FMN", FMN(steps=100, targets=9, gamma=0.2, inside=True), waits=True),
    _family("near misses", FMN(steps=200, targets=9, inside=True), 0, waits=True, near=_MISSED),
    _family("near misses", FAB(steps=60, targets=9, inside=True), 0, waits=True, near=_MISSED),
    _family(
        "near misses",
        WarmStarted(
            APGD(steps=300, restarts=2, targets=5, successive_halving=True), RelaxationMinimizers(2)
        ),
        0,
        waits=True,
        near=_MISSED,
    ),
    _family("score-based", Square(queries=800, proposals_per_step=8), waits=True, near=0.0),
)
"""Attacks that stand side by side in the plans (see `measurement.portfolio`): ascents at the
radius, searches for the nearest example, a second and deeper look at points that were nearly
broken, and attacks that use scores alone.
"""

_NEARER = tuple(
    Stage(tool, "attack", "distance", pilot=_AUDIT)
    for tool in (
        FAB(steps=60, targets=9, beta=0.8),
        FMN(steps=200, targets=9, gamma=0.2),
        IterativeTightening(FAB(steps=40, targets=3, beta=0.8), PGD(steps=20, step=0.1), rounds=5),
        DDN(steps=100),
    )
)
"""Searches for the nearest example by other methods. Each is run on all points only if it comes
nearer on some of a sample.
"""

_CLOSER = IterativeTightening(
    FMN(steps=60, targets=3, gamma=0.2),
    WarmStarted(APGD(steps=20, targets=9, successive_halving=True), RelaxationMinimizers(2)),
)

_DISTANCES = (
    Stage(LinearRegion(CROWN()), "certifier", "distance"),
    Stage(FMN(steps=60, targets=3, gamma=0.2), "attack", "distance"),
    Stage(_CLOSER, "attack", "distance", pilot=_AUDIT),
    *_NEARER,
    Stage(CertifiedRadius(CROWN(), rounds=2, tolerance=0.05), "certifier", "distance"),
    Stage(
        CertifiedRadius(CROWN(refine=False), rounds=8, tolerance=0.05),
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
"""What is run first on a property of many boxes, on all of them at once."""

VERIFY_ASKING = (Stage(FiniteDifferences(queries=5000), "attack"),)
"""What looks for an unsafe input of a network that can be run, but not bounded."""

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
            Stage(
                WarmStarted(APGD(steps=200, restarts=4, targets=9), RelaxationMinimizers(4)),
                "attack",
            ),
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
            Stage(
                WarmStarted(APGD(steps=100, restarts=5, targets=9), RelaxationMinimizers(5)),
                "attack",
            ),
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
            Stage(RadiusBisection(PGD(steps=20), rounds=8, tolerance=0.01), "attack", "distance"),
            Stage(_CLOSER, "attack", "distance"),
            *_NEARER,
            Stage(FMN(steps=500, targets=9), "attack", "distance", pilot=_AUDIT),
            Stage(FMN(steps=500, targets=9, gamma=0.2), "attack", "distance", pilot=_AUDIT),
            Stage(CertifiedRadius(CROWN(), rounds=12), "certifier", "distance"),
            Stage(
                CertifiedRadius(CROWN(refine=False), rounds=12),
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
            Stage(SubstitutionSearch("gradient"), "attack"),
            Stage(SubstitutionSearch(), "attack"),
            Stage(Enumeration(), "certifier"),
            Stage(CROWN(), "certifier"),
            Stage(SubstitutionSearch(nearest=True), "attack", "distance"),
            Stage(Enumeration(limit=50_000), "certifier", "distance"),
        ),
        "measure --plan categorical",
    ),
}


def plan_named(name: str) -> Plan:
    """Return the plan of that name, or raise `BadInput`."""
    if name not in PLANS:
        raise BadInput(f"there is no plan {name!r}; choose one of {', '.join(PLANS)}")
    return PLANS[name]


def plan_for(threat: Threat, plan: str | Plan | None, usual: str = "standard") -> Plan:
    """Return the plan asked for, ready to run: its stages fit the threat.

    A `Plan` without stages, like a name, stands for the plan of that name; where none is named, it
    is the `usual` one for a ball and "categorical" for substitutions. The tools keep proof files
    and have the guarantee that the plan's settings say. Raises `BadInput` for a name that is not
    known, for a named plan that has no attack for the threat, and for stages with a tool that does
    not fit it, unless that stands in a family, whose members are alternatives.
    """
    asked = plan if isinstance(plan, Plan) else Plan(plan or "")
    if asked.stages:
        for stage in asked.stages:
            if not stage.family:
                check_fit(stage.tool, threat)
    else:
        asked = _named(asked, "categorical" if isinstance(threat, Substitutions) else usual)
        if not _answers(asked, threat):
            raise BadInput(
                f"the plan {asked.name!r} holds no attack for {_told(threat)}: leave the plan out, "
                f"or choose one of {', '.join(n for n in PLANS if _answers(PLANS[n], threat))}"
            )
    if asked.lower_share is not None and math.isinf(asked.lower_share):
        asked = dataclasses.replace(asked, lower_share=None)
    return _set(_fitting(asked, threat))


def _named(asked: Plan, usual: str) -> Plan:
    """Return a plan's settings with the stages of the plan of its name."""
    named = plan_named(asked.name or usual)
    return dataclasses.replace(
        asked,
        name=named.name,
        stages=named.stages,
        next_step=asked.next_step or named.next_step,
        lower_share=named.lower_share if asked.lower_share is None else asked.lower_share,
    )


def _set(plan: Plan) -> Plan:
    """Return the plan with its settings handed on to its certifiers."""
    stages = plan.stages
    if plan.guarantee is not None:
        arithmetic_of(plan.guarantee)
        stages = tuple(
            dataclasses.replace(s, tool=_guaranteeing(s.tool, plan.guarantee))
            if s.kind == "certifier"
            else s
            for s in stages
        )
    if plan.proofs:
        stages = tuple(stage.proving() for stage in stages)
    return dataclasses.replace(plan, stages=stages)


def _guaranteeing(tool: Any, guarantee: Guarantee) -> Any:
    """Return the certifier set to that guarantee; for a search, its certifier."""
    if hasattr(tool, "certifier"):
        return dataclasses.replace(tool, certifier=_guaranteeing(tool.certifier, guarantee))
    if not hasattr(tool, "guarantee"):
        if guarantee == CHECKED.guarantee:
            return tool
        raise BadInput(
            f"{tool!r} proves nothing with the guarantee {guarantee}: name a plan without it, or "
            "leave the guarantee out"
        )
    return dataclasses.replace(tool, guarantee=guarantee)


def _fitting(plan: Plan, threat: Threat) -> Plan:
    """Return the plan without the stages whose tools do not fit the threat."""
    kept = tuple(stage for stage in plan.stages if not misfit(stage.tool, threat))
    return plan if len(kept) == len(plan.stages) else dataclasses.replace(plan, stages=kept)


def _answers(plan: Plan, threat: Threat) -> bool:
    """Return whether a plan has an attack that fits the threat."""
    return any(s.kind == "attack" and not misfit(s.tool, threat) for s in plan.stages)


def _told(threat: Threat) -> str:
    """Return the threat in words."""
    return "Substitutions" if isinstance(threat, Substitutions) else f"a ball in {threat.norm}"


def plan_of(command: str, tool: str | None, threat: Threat) -> Plan:
    """Return the plan that runs one tool alone.

    The tool is written as for `tool_from`; where none is named, it is the command's usual one for
    such a threat. Raises `BadInput` for a certifier given to `attack`, or an attack given to
    `certify`.
    """
    chosen = tool_for(command, tool, threat)
    stage, other = stage_of(chosen), "certify" if command == "attack" else "attack"
    if (stage.kind == "attack") != (command == "attack"):
        raise BadInput(
            f"{type(chosen).__name__} is no tool for {command}: write calipers {other} --tool "
            f"{type(chosen).__name__}"
        )
    return Plan(
        repr(chosen),
        (stage,),
        f"measure --plan {'categorical' if isinstance(threat, Substitutions) else 'standard'}",
    )


def tool_for(
    command: str, tool: Attack | Certifier | str | None, threat: Threat
) -> Attack | Certifier:
    """Return the tool that is given, or that a text as for `tool_from` names.

    For None, it is the command's usual one for such a threat. Raises `BadInput` for a tool that
    does not fit the threat.
    """
    if tool is None:
        tool = _ALONE[command][isinstance(threat, Substitutions)]
    chosen = tool_from(tool) if isinstance(tool, str) else tool
    check_fit(chosen, threat)
    return chosen


def stage_of(tool: Attack | Certifier) -> Stage:
    """Return a stage that runs one tool, aimed at what it looks for.

    Raises `BadInput` for a tool that declares no capabilities; write `Stage(tool, kind)` for it.
    """
    told = capabilities_of(tool)
    if told is None:
        raise BadInput(
            f"{type(tool).__name__} does not say whether it is an attack or a certifier: give it "
            "`capabilities` (calipers.Capabilities), or write Stage(tool, 'attack')"
        )
    return Stage(tool, told.kind, told.objective)


def tool_from(text: str) -> Attack | Certifier:
    """Return the tool that a text like `PGD(steps=100)` describes.

    The text is what a tool's repr prints, or just its name. It is parsed, never executed: only the
    tools above and those that are installed, arguments, numbers and strings are read. Raises
    `BadInput` for anything else.
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
    """Return the value of a parsed expression: a tool, a number or a string."""
    if isinstance(node, ast.Name):
        tool = _tool(node.id)
        lacking = [f.name for f in dataclasses.fields(tool) if _required(f)]
        if node.id in _USUAL:
            return _USUAL[node.id]
        if lacking:
            raise BadInput(
                f"{node.id} needs its settings {', '.join(lacking)}: see `calipers tools`"
            )
        return tool()
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return ast.literal_eval(node)
    tool = _tool(node.func.id)
    names = [f.name for f in dataclasses.fields(tool)]
    values = {
        **dict(zip(names, map(_build, node.args), strict=False)),
        **{str(k.arg): _build(k.value) for k in node.keywords},
    }
    for name in sorted(set(values) - set(names)):
        now = SETTINGS.get(tool.__name__, {}).get(name)
        told = (
            f"it is called {now} now" if now else f"its settings are {', '.join(names) or 'none'}"
        )
        raise BadInput(f"{tool.__name__} has no setting {name!r}; {told}")
    return tool(**values)


def _required(setting: dataclasses.Field[Any]) -> bool:
    """Return whether a setting has no default."""
    return setting.init and setting.default is setting.default_factory is dataclasses.MISSING


def installed_tools() -> dict[str, type[Any]]:
    """Return the tools that other installed packages offer, by name.

    A package offers them as entry points of the group `calipers.tools`, each a frozen dataclass
    with `capabilities`. Raises `BadInput` for one that declares none.
    """
    found: dict[str, type[Any]] = {}
    for entry in metadata.entry_points(group="calipers.tools"):
        found[entry.name] = entry.load()
        if capabilities_of(found[entry.name]) is None:
            raise BadInput(
                f"{entry.value}, installed as the tool {entry.name}, declares no `capabilities`: "
                "see calipers.Capabilities"
            )
    return found


def _tool(name: str) -> type[Any]:
    """Return the class of the tool of that name, or raise `BadInput`."""
    tools = {**ATTACKS, **CERTIFIERS, "RelaxationMinimizers": RelaxationMinimizers}
    if name in TOOLS:
        raise BadInput(f"the tool {name} is called {TOOLS[name]} now")
    if name not in tools:
        installed = installed_tools()
        if name in installed:
            return installed[name]
        import difflib

        near = difflib.get_close_matches(name, tools, n=1)
        raise BadInput(
            f"there is no tool {name!r}{f'; did you mean {near[0]}?' if near else '.'} Tools: "
            f"{', '.join(tools)}"
        )
    return tools[name]
