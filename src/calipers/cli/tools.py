"""The list of tools, for the terminal and as the table of the README."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calipers.problem.capabilities import Capabilities

_BOUND = {"attack": "upper", "certifier": "lower"}
_HEAD = ("tool", "bound", "how", "threats", "needs")


def threats(made: type[Any], told: Capabilities) -> str:
    """Return the threats that a tool handles, in words."""
    from calipers.problem.capabilities import EVERY

    if any(
        f.name in told.inner and f.default is dataclasses.MISSING for f in dataclasses.fields(made)
    ):
        return f"as its {told.inner[-1]}"
    balls = "every norm" if told.norms == EVERY else ", ".join(told.norms)
    return ", ".join(
        part for part in (balls, "substitutions" if told.substitutions else "") if part
    )


def rows(norm: str | None = None) -> dict[str, list[tuple[str, ...]]]:
    """Return a row for each tool, by task.

    Only tools for one norm (or for "substitutions") if one is named. Tools that
    other installed packages offer are listed with the package's own.
    """
    from calipers.presets import ATTACKS, CERTIFIERS, installed_tools
    from calipers.problem.capabilities import capabilities_of

    found: dict[str, list[tuple[str, ...]]] = {}
    for name, made in {**ATTACKS, **CERTIFIERS, **installed_tools()}.items():
        told = capabilities_of(made)
        assert told is not None
        if norm is None or norm in told.norms or (norm == "substitutions" and told.substitutions):
            row = (name, _BOUND[told.kind], told.summary, threats(made, told), told.needs)
            found.setdefault(told.task, []).append(row)
    return found


def as_text(norm: str | None = None) -> str:
    """Return the list for a terminal: tasks, and a line for each tool."""
    lines = []
    for task, tools in rows(norm).items():
        lines += ["", task]
        lines += [f"  {n:<15} {how} ({fits}; needs {needs})" for n, _, how, fits, needs in tools]
    return "\n".join(lines[1:])


def as_markdown() -> str:
    """Return the table of the README, by task."""
    lines = [f"| {' | '.join(_HEAD)} |", "|---|---|---|---|---|"]
    for task, tools in rows().items():
        lines.append(f"| **{task}** | | | | |")
        lines += [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in tools]
    return "\n".join(lines)
