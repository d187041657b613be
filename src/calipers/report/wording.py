"""Numbers and sentences that page and terminal share.

Numbers are rounded towards caution.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from typing import Any, Literal

from calipers.report.report import Rate, Summary, ToolCount

Toward = Literal["near", "down", "up"]
_ROUNDING = {"near": ROUND_HALF_EVEN, "down": ROUND_FLOOR, "up": ROUND_CEILING}


def percent(share: float, toward: Toward = "near") -> str:
    """Return a share as a percentage with one decimal.

    Callers choose with `toward` to round the ends of intervals outward.

    >>> percent(0.37994, "down"), percent(0.50399, "up")
    ('37.9', '50.4')
    """
    if math.isnan(share):
        return "–"
    scaled = share * 1000
    rounded = (
        math.floor(scaled)
        if toward == "down"
        else math.ceil(scaled)
        if toward == "up"
        else round(scaled)
    )
    return f"{rounded / 10:.1f}"


def at_least(rate: Rate) -> str:
    """Return the rate's share rounded down, so that "at least" stays true."""
    return f"{rate.count * 1000 // rate.of / 10:.1f}" if rate.of else "–"


def at_most(rate: Rate) -> str:
    """Return the rate's share rounded up, so that "at most" stays true."""
    return f"{-(-rate.count * 1000 // rate.of) / 10:.1f}" if rate.of else "–"


def distance(value: float, toward: Toward = "near") -> str:
    """Return a distance with four significant digits.

    >>> distance(0.0313725, "down"), distance(0.1, "up"), distance(float("inf"))
    ('0.03137', '0.1', '∞')
    """
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
    rounded = Context(prec=4, rounding=_ROUNDING[toward]).create_decimal(repr(float(value)))
    return f"{float(rounded):.6g}"


def integer(value: int) -> str:
    """Return a count with thousands separated."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Return a time span in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def points(n: int) -> str:
    """Return "1 point" or "n points"."""
    return f"{integer(n)} point{'' if n == 1 else 's'}"


def share_of_points(confidence: float) -> str:
    """Return the confidence as a percentage without needless digits."""
    return f"{confidence * 100:.6g} %"


def tools(counts: Iterable[ToolCount]) -> str:
    """Return "CROWN 312, branch and bound 98"."""
    return ", ".join(f"{c.name or 'unnamed tool'} {integer(c.points)}" for c in counts)


def broken(summary: Summary) -> str:
    """Return which tools broke points, and the number of clean errors."""
    parts = [
        tools(summary.broken_by),
        f"clean errors {integer(summary.clean_errors)}" if summary.clean_errors else "",
    ]
    return ", ".join(part for part in parts if part)


def plain(text: object) -> str:
    """Return text without control characters.

    A name in a record from elsewhere must not control the terminal.
    """
    return "".join(c if c.isprintable() else "�" for c in str(text))


def lookup(facts: Mapping[str, Any], *path: str) -> Any:
    """Return a nested fact, or None where any part of the way is missing."""
    value: Any = facts
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def counts_substitutions(summary: Summary) -> bool:
    """Return whether the distance is a number of substitutions, not a length."""
    return bool(lookup(summary.facts, "threat", "norm") == "substitutions")


def norm(summary: Summary) -> str:
    """Return the name of the threat's norm, or what else measures distance."""
    if counts_substitutions(summary):
        return "substitutions"
    found = (lookup(summary.facts, "threat", key) for key in ("norm", "name", "kind"))
    held = lookup(summary.facts, "threat", "constraints")
    count = held if isinstance(held, int) else 0
    under = f" under {count} linear constraint{'' if count == 1 else 's'}" if count else ""
    return str(next((value for value in found if value), "distance")) + under


def radius(summary: Summary) -> str:
    """Return the radius asked, as a range where points differ.

    With its fraction of 255 where that is how it was meant.
    """
    low, high = summary.radius
    if math.isnan(low):
        return "not set"
    if low != high:
        return f"{distance(low)} .. {distance(high)}"
    steps = high * 255
    is_pixel_step = (
        math.isfinite(high)
        and len(repr(high)) > 6
        and round(steps) >= 1
        and math.isclose(steps, round(steps), rel_tol=1e-6)
    )
    return f"{distance(high)} ({round(steps)}/255)" if is_pixel_step else distance(high)


def asked(summary: Summary) -> str:
    """Return the threat model, such as "linf radius 0.1"."""
    if not counts_substitutions(summary):
        return f"{norm(summary)} radius {radius(summary)}"
    noun = "substitution" if summary.radius == (1.0, 1.0) else "substitutions"
    return f"at most {radius(summary)} {noun}"


def reach(summary: Summary) -> str:
    """Return the word for the limit: "radius", or "number of substitutions"."""
    return "number of substitutions" if counts_substitutions(summary) else "radius"


def axis(summary: Summary, quantity: str) -> str:
    """Return the label of a scale of distances.

    That is "radius (linf)", or "substitutions".
    """
    return norm(summary) if counts_substitutions(summary) else f"{quantity} ({norm(summary)})"


def stands_at(summary: Summary, value: float) -> str:
    """Return the distance of a witness: "linf 0.031", or "2 substitutions"."""
    if not counts_substitutions(summary):
        return f"{norm(summary)} {distance(value)}"
    return (
        "numeric columns alone"
        if 0 < value < 1
        else f"{distance(value)} {'substitution' if value == 1 else 'substitutions'}"
    )


def advice(summary: Summary) -> str:
    """Return how to settle the points that are still open.

    That is the plan's next step, as the command line or the call by which this model was measured.
    """
    named = summary.facts.get("next_step")
    step = named if isinstance(named, str) and named else "measure --plan standard"
    command, _, options = step.partition(" ")
    run = summary.runs[-1] if summary.runs else None
    if run is not None and run.argv:
        return shlex.join(["calipers", command, *_kept(run.argv[1:]), *shlex.split(options)])
    if run is not None and run.time:
        plan = options.rpartition(" ")[2] or "standard"
        record = f", record={summary.record!r}" if summary.record else ""
        return f'calipers.measure(model, x, y, threat, plan="{plan}"{record})'
    where = shlex.quote(summary.record) if summary.record else "RECORD"
    return f"calipers {command} --record {where} {options}".rstrip()


def _kept(argv: Sequence[str]) -> list[str]:
    """Return the words of a command line that say what is measured.

    The words on the tools to use are left out.
    """
    kept, skipped = list[str](), False
    for word in argv:
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        if skipped or name == "--exact":
            skipped = False
        elif name in ("--plan", "-p", "--tool", "-t"):
            skipped = word in ("--plan", "-p", "--tool", "-t")  # its value is a word of its own
        else:
            kept.append(word)
    return kept


def gap(summary: Summary) -> str:
    """Return the sentence on the points that are neither proved nor broken."""
    robust = summary.robust
    if not robust.unknown:
        return (
            "There is no gap: every point is either proved robust or broken by an example that "
            "anybody can run again."
        )
    are = "point is" if robust.unknown == 1 else "points are"
    return (
        f"The gap between {at_least(robust.certified)} and {at_most(robust.attacked)} % is "
        f"ignorance about these very points: {integer(robust.unknown)} {are} neither broken nor "
        "certified. More compute narrows it."
    )


def sampling(summary: Summary) -> str:
    """Return the sentence on sampling: other points could have been drawn."""
    low, high = summary.robust.interval
    return (
        f"The interval from {percent(low, 'down')} to {percent(high, 'up')} % adds chance, since "
        f"other points could have been drawn: with {share_of_points(summary.confidence)} "
        "confidence it holds the robust accuracy of the whole population, whatever the attacks "
        "missed. More points narrow it."
    )
