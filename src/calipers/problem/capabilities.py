"""Capabilities that tools declare: what each can be asked, and what it needs to know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from calipers.errors import BadInput
from calipers.problem.substitutions import Substitutions

if TYPE_CHECKING:
    from calipers.problem.threat import Threat

Kind = Literal["attack", "certifier"]
Aim = Literal["verdict", "distance"]
Task = Literal[
    "example within the radius",
    "nearest example",
    "certificate at the radius",
    "largest certified radius",
    "decision at the radius",
    "exact distance",
]

LP = ("linf", "l2", "l1")
COUNTS = ("l0", "pixels")
EVERY = (*LP, *COUNTS)


@dataclass(frozen=True)
class Capabilities:
    """What a tool can be asked, held by its class as `capabilities`.

    Plans, the fit of tool and threat, `calipers tools` and the table of the README are derived from
    these, so a new tool is a class with capabilities and one export.

    Attributes:
        kind: Which end of a bracket the tool moves: an attack the upper one, a certifier the lower.
        task: What it looks for.
        says: How, in a few words.
        norms: Norms of the balls it works in; empty where it works in none.
        substitutions: Does it answer a `Substitutions` threat?
        needs: What it must know of the model.
        inner: Names of settings that hold other tools: it fits where they fit.
    """

    kind: Kind
    task: Task
    says: str
    norms: tuple[str, ...] = EVERY
    substitutions: bool = False
    needs: str = "gradients"
    inner: tuple[str, ...] = ()

    @property
    def aim(self) -> Aim:
        """Is the tool for verdicts at the radius asked, or for distances whatever the radius?"""
        seeks = ("nearest example", "largest certified radius", "exact distance")
        return "distance" if self.task in seeks else "verdict"


def capabilities_of(tool: object) -> Capabilities | None:
    """Return what a tool, or its class, declares; None for one that declares nothing."""
    found = getattr(tool, "capabilities", None)
    return found if isinstance(found, Capabilities) else None


def misfit(tool: object, threat: Threat) -> str:
    """Return why a tool cannot answer such a threat, and what can; nothing where it can.

    Tools that declare nothing are taken at their word.
    """
    told = capabilities_of(tool)
    if told is None:
        return ""
    name = type(tool).__name__
    if isinstance(threat, Substitutions):
        if not told.substitutions:
            return (
                f"{name} searches the inside of a norm ball, but Substitutions are letters to "
                "replace: take plan='categorical', or a tool that `calipers tools` lists for them"
            )
    elif not told.norms:
        return (
            f"{name} replaces the letters of a Substitutions threat, but the threat is a Ball: "
            f"take a tool that `calipers tools` lists for {threat.norm}"
        )
    elif threat.norm not in told.norms:
        return (
            f"{name} is made for {', '.join(told.norms)}, but the threat is in {threat.norm}: "
            f"choose another {told.kind} (`calipers tools` lists them)"
        )
    return next((said for one in inner_tools(tool) if (said := misfit(one, threat))), "")


def inner_tools(tool: object) -> Iterator[object]:
    """Yield the tools that a tool runs."""
    told = capabilities_of(tool)
    for name in () if told is None else told.inner:
        one = getattr(tool, name)
        if one is not None:
            yield one


def check_fit(tool: object, threat: Threat) -> None:
    """Raise `BadInput` where a tool cannot answer such a threat."""
    said = misfit(tool, threat)
    if said:
        raise BadInput(said)
