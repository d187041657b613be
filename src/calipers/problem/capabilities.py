"""Capabilities that tools declare: what they answer and what they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from calipers.errors import BadInput
from calipers.threats.substitutions import Substitutions

if TYPE_CHECKING:
    from calipers.threats.threat import Threat

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

    Args:
        kind: which bound on the distance the tool improves: an "attack" the upper bound, a
            "certifier" the lower.
        task: what it looks for, such as "nearest example" or "certificate at the radius".
        summary: how it does so, in a few words.
        norms: norms of the balls that it works in; empty where it takes no balls.
        substitutions: whether it answers a `Substitutions` threat.
        needs: what it must know of the model; most tools need gradients.
        inner: names of settings that hold other tools: it fits a threat where these fit.

    Raises:
        Nothing: what a tool is asked in vain is refused when it is asked.

    Example:
        >>> tool = Capabilities("attack", "nearest example", "gradient descent", norms=("l2",))
        >>> tool.objective
        'distance'
    """

    kind: Kind
    task: Task
    summary: str
    norms: tuple[str, ...] = EVERY
    substitutions: bool = False
    needs: str = "gradients"
    inner: tuple[str, ...] = ()

    @property
    def objective(self) -> Aim:
        """Whether the tool seeks a "distance", at any radius, or a "verdict".

        A "verdict" is a decision at the radius asked.
        """
        seeks = ("nearest example", "largest certified radius", "exact distance")
        return "distance" if self.task in seeks else "verdict"


def capabilities_of(tool: object) -> Capabilities | None:
    """Return what a tool or its class declares; None if it does not."""
    found = getattr(tool, "capabilities", None)
    return found if isinstance(found, Capabilities) else None


def misfit(tool: object, threat: Threat) -> str:
    """Return why a tool cannot answer a threat, and what can.

    The empty string where it can. Tools that declare no capabilities are assumed to fit.
    """
    told = capabilities_of(tool)
    if told is None:
        return ""
    name = type(tool).__name__
    if isinstance(threat, Substitutions):
        if not told.substitutions:
            return (
                f"{name} searches the inside of a norm ball, but Substitutions are symbols to "
                "replace: take plan='categorical', or a tool that `calipers tools` lists for them"
            )
    elif not told.norms:
        return (
            f"{name} replaces the symbols of a Substitutions threat, but the threat is a Ball: "
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
