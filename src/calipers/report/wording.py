"""How is a finding put into words? Numbers rounded towards caution, and the sentences that page and terminal share."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from typing import Any, Literal

from calipers.record.estimates import most_missed
from calipers.report.report import Rate, Summary, ToolCount

Toward = Literal["near", "down", "up"]
_ROUNDING = {"near": ROUND_HALF_EVEN, "down": ROUND_FLOOR, "up": ROUND_CEILING}
_LONGEST = 2000  # characters of one provenance value; the record keeps the whole
_DEEPEST = 6  # levels of nested facts shown as such; a stranger's record may nest without end

GUARANTEES = {
    "real": "proved in real arithmetic, rounding of the bound not accounted for",
    "float64-checked": "rounding of the bound accounted for",
    "float32-executed": "holds for the network as executed in float32, in any summation order",
}


def percent(share: float, toward: Toward = "near") -> str:
    """Return a share as a percentage with one decimal; interval ends are rounded outward by the caller's `toward`.

    >>> percent(0.37994, "down"), percent(0.50399, "up")
    ('37.9', '50.4')
    """
    if math.isnan(share):
        return "–"
    scaled = share * 1000
    rounded = math.floor(scaled) if toward == "down" else math.ceil(scaled) if toward == "up" else round(scaled)
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
    return f"{float(Context(prec=4, rounding=_ROUNDING[toward]).create_decimal(repr(float(value)))):.6g}"


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
    """Return who broke the points that did not survive, the model's own errors apart."""
    parts = [tools(summary.broken_by), f"clean errors {integer(summary.clean_errors)}" if summary.clean_errors else ""]
    return ", ".join(part for part in parts if part)


def plain(text: object) -> str:
    """Return text without control characters: a name in a stranger's record must not steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


def lookup(facts: Mapping[str, Any], *path: str) -> Any:
    """Return a nested fact, or None where any part of the way is missing."""
    value: Any = facts
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def counts_switches(summary: Summary) -> bool:
    """Is the distance a number of replaced letters, not a length?"""
    return bool(lookup(summary.question.facts, "threat", "norm") == "substitutions")


def norm(summary: Summary) -> str:
    """Return the name of the threat's norm, or what else measures its distance."""
    if counts_switches(summary):
        return "switches"
    found = (lookup(summary.question.facts, "threat", key) for key in ("norm", "name", "kind"))
    constraints = lookup(summary.question.facts, "threat", "constraints")
    count = len(constraints[1]) if isinstance(constraints, list) and len(constraints) == 2 and isinstance(constraints[1], list) else 0
    under = f" under {count} linear constraint{'' if count == 1 else 's'}" if count else ""
    return str(next((value for value in found if value), "distance")) + under


def radius(summary: Summary) -> str:
    """Return the radius asked, with its fraction of 255 where that is how it was meant; a range where points differ."""
    low, high = summary.radius
    if math.isnan(low):
        return "not set"
    if low != high:
        return f"{distance(low)} .. {distance(high)}"
    steps = high * 255
    is_pixel_step = math.isfinite(high) and len(repr(high)) > 6 and round(steps) >= 1 and math.isclose(steps, round(steps), rel_tol=1e-6)
    return f"{distance(high)} ({round(steps)}/255)" if is_pixel_step else distance(high)


def asked(summary: Summary) -> str:
    """Return what the adversary may do, as "linf radius 0.1" or "at most 2 switches"."""
    if not counts_switches(summary):
        return f"{norm(summary)} radius {radius(summary)}"
    return f"at most {radius(summary)} {'switch' if summary.radius == (1.0, 1.0) else 'switches'}"


def reach(summary: Summary) -> str:
    """Return the word for how far the adversary may go: "radius", or "number of switches"."""
    return "number of switches" if counts_switches(summary) else "radius"


def axis(summary: Summary, quantity: str) -> str:
    """Return the label of a scale of distances: "radius (linf)", or "switches"."""
    return norm(summary) if counts_switches(summary) else f"{quantity} ({norm(summary)})"


def stands_at(summary: Summary, value: float) -> str:
    """Return how far away a witness stands: "linf 0.031", or "2 switches"."""
    if not counts_switches(summary):
        return f"{norm(summary)} {distance(value)}"
    return "numeric columns alone" if 0 < value < 1 else f"{distance(value)} {'switch' if value == 1 else 'switches'}"


def missing_lower_jaw(summary: Summary) -> str:
    """Return why nothing could be certified, or nothing where the lower jaw was there."""
    said = summary.question.facts.get("lower_jaw")
    if isinstance(said, str) and said not in ("", "available"):
        return said
    if said is None and summary.n and not any(row.lower > 0 for row in summary.rows):
        return "no certificate is on record"
    return ""


def advice(summary: Summary) -> str:
    """Return how to settle the points that are still open: what the plan that was run named as the next step."""
    where = shlex.quote(summary.record) if summary.record else "RECORD"
    named = summary.question.facts.get("next_step")
    command, _, options = (named if isinstance(named, str) and named else "measure --plan standard").partition(" ")
    return f"calipers {command} --resume {where} {options}".rstrip()


def gap(summary: Summary) -> str:
    """Return the sentence on the first kind of not knowing: what neither jaw could settle."""
    robust = summary.robust
    if not robust.unknown:
        return "There is no gap: every point is either proved robust or broken by an example that anybody can run again."
    are = "point is" if robust.unknown == 1 else "points are"
    return (
        f"The gap between {at_least(robust.certified)} and {at_most(robust.attacked)} % is ignorance about these very points: {integer(robust.unknown)} {are} "
        "neither broken nor certified. More compute narrows it."
    )


def sampling(summary: Summary) -> str:
    """Return the sentence on the second kind of not knowing: that other points could have been drawn."""
    low, high = summary.robust.interval
    return (
        f"The interval from {percent(low, 'down')} to {percent(high, 'up')} % adds chance, since other points could have been drawn: with "
        f"{share_of_points(summary.confidence)} confidence it holds the robust accuracy of the whole population, whatever the attacks missed. "
        "More points narrow it."
    )


def limits(summary: Summary) -> Iterator[str]:
    """Yield what this measurement does not tell, plainest first."""
    if said := alarm(summary):
        yield said[0].upper() + said[1:]
    jaw = missing_lower_jaw(summary)
    if jaw:
        yield f"The lower jaw is missing: {jaw.rstrip('.')}. Nothing is proved robust, and the accuracy under attack is only as strong as the attacks listed."
    if summary.unseen:
        yield f"{points(summary.unseen)} of {integer(summary.n)} not looked at yet. They count as unknown, and the clean accuracy leaves them out."
    if summary.robust.unknown:
        still = [str(r.index) for r in summary.rows if r.verdict == "unknown"]
        more = f" and {integer(len(still) - 20)} more" if len(still) > 20 else ""
        yield f"Still open at the {reach(summary)} asked: {'point' if len(still) == 1 else 'points'} {', '.join(still[:20])}{more}."
    if summary.invalid:
        belong = "belongs" if len(summary.invalid) == 1 else "belong"
        yield f"{points(len(summary.invalid))} could not be measured and {belong} to no rate; the reasons are listed with the points."
    for guarantee, count in summary.guarantees:
        meaning = GUARANTEES.get(guarantee, "see the documentation of that guarantee")
        yield f"{integer(count)} of the certified points have the guarantee “{guarantee}”: {meaning}."
    yield from audits(summary)
    yield from not_run(summary)
    yield from begun_anew(summary)
    yield from failures(summary)
    yield from gradients(summary)
    yield from precision(summary)
    if 0 < summary.n < 100:
        yield f"With {points(summary.n)} little can be said about a population: the intervals are wide for a reason."
    yield "The intervals take the points for a random sample of the population. If they are the first of a test set, read every number as one about that set."
    if counts_switches(summary) and lookup(summary.question.facts, "threat", "letters", "numeric") is not None:
        yield "Distances count switches. Where numeric columns moved and no letter changed, half a switch stands for it: more than none, less than one."
    beyond = f"Beyond the {reach(summary)} asked a curve only carries what happened to be found or proved"
    yield f"{beyond}; that nobody searched there looks the same as robustness."


def alarm(summary: Summary) -> str:
    """Return the sentence on a record that is not as it was written, or nothing."""
    if not summary.trust.altered:
        return ""
    where = shlex.quote(summary.record) if summary.record else "RECORD"
    return (
        f"this record was altered after it was written: {'; '.join(map(plain, summary.trust.altered))}. What is shown may be nobody's measurement: "
        f"calipers check {where} replays it against the model, a new record leaves no doubt."
    )


def standing(summary: Summary) -> Iterator[str]:
    """Yield what is known about a record kept in a file: whether its evidence was replayed, and whether all of it is chained."""
    trust, where = summary.trust, shlex.quote(summary.record)
    if not summary.record:
        return
    check = trust.last_check(summary.question.fingerprint)
    if check is None:
        yield f"not checked: calipers check {where} replays every witness and certificate against the model"
    else:
        failed = f"{integer(check.failures)} failed" if check.failures else "none failed"
        grown = trust.grown(check)
        since = f"; {integer(grown)} facts were added since" if grown else ""
        replayed = f"{integer(check.witnesses)} witnesses and {integer(check.certificates)} certificates replayed, {failed}"
        yield f"checked on {check.at.replace('T', ' ').replace('+00:00', ' UTC')}: {replayed}{since}"
    if trust.unchained:
        yield f"{integer(trust.unchained)} of {integer(trust.facts)} facts were written before records were chained: whether they were altered cannot be told"


def audits(summary: Summary) -> Iterator[str]:
    """Yield what a tool may have missed that was tried on a random part of the open points, settled none of them, and was not run on the others."""
    held = summary.question.facts.get("audits")
    for tool, audit in (held if isinstance(held, dict) else {}).items():
        tried, of = lookup(audit, "tried"), lookup(audit, "open")
        if not (isinstance(tried, int) and isinstance(of, int) and 0 < tried < of):
            continue
        broke, would = ("proved", "prove") if lookup(audit, "kind") == "certifier" else ("broke", "break")
        if lookup(audit, "aim") == "distance":
            yield (
                f"{plain(tool).partition('(')[0]} looked for nearer examples of {integer(tried)} random points of {integer(of)}, and came hardly nearer than "
                "what was known: it was not run on the others."
            )
            continue
        most, near = integer(most_missed(tried, of, summary.confidence)), lookup(audit, "near")
        also = f" and on the {integer(near)} that came nearest to falling" if isinstance(near, int) and near else ""
        yield (
            f"{plain(tool).partition('(')[0]} was tried on {integer(tried)} random points of the {integer(of)} that were open before it{also} "
            f"and {broke} none, so it was not run on the others: with {share_of_points(summary.confidence)} confidence it would {would} at most {most} of them."
        )


_WHY_NOT = {
    "cost": "more than its share of the attacks' time; not run",
    "time": "cut short when its share of the attacks' time was up",
    "memory": "and it would hold about {held:.0f} GB at once; not run",
    "hopeless": "and without hope: {reason}; not run",
}


def not_run(summary: Summary) -> Iterator[str]:
    """Yield which certifiers were not run on all the points that they were for, what that would take by their forecasts, why not, and how to insist."""
    held = summary.question.facts.get("not_run")
    for tool, fact in (held if isinstance(held, dict) else {}).items():
        count, seconds, size, reason = (lookup(fact, key) for key in ("points", "seconds", "held", "reason"))
        why = _WHY_NOT.get(str(lookup(fact, "why")), "")
        if not isinstance(count, int) or not why:
            continue
        took = f"about {duration(seconds)} for " if isinstance(seconds, (int, float)) and seconds > 0 else ""
        which = points(count).replace(" point", " more point") if lookup(fact, "proved") else points(count)
        told = why.format(held=(size if isinstance(size, int) else 0) / 1e9, reason=plain(reason))
        yield f"{_called(plain(tool))}: {took}{which} of this size, {told}. To insist: the same command with --lower-share all."


def begun_anew(summary: Summary) -> Iterator[str]:
    """Yield which tools of limited time were stopped at work and began their time anew: the clock may then have decided otherwise."""
    held = summary.question.facts.get("begun_anew")
    for tool in held if isinstance(held, list) else []:
        yield f"{_called(plain(tool))} was stopped at work and began its time anew: what it proved may differ from what a run left alone proves."


def _called(tool: str) -> str:
    """Return a tool by its name, and its settings where they tell it from another of the name.

    >>> _called("CROWN()"), _called("CROWN(refine=False)")
    ('CROWN', 'CROWN(refine=False)')
    """
    return tool.removesuffix("()")


def gradients(summary: Summary) -> Iterator[str]:
    """Yield where attacks by gradients are blind, and what to do about it."""
    held = lookup(summary.question.facts, "gradients")
    asked_at, none, zero, infinite = (lookup(held, key) for key in ("asked", "none", "zero", "not finite"))
    if not all(isinstance(n, int) for n in (asked_at, none, zero, infinite)) or not asked_at or not none + zero + infinite:
        return
    why = lookup(held, "why")
    parts = [
        f"does not exist at {integer(none)}{f' ({plain(why)})' if isinstance(why, str) and why else ''}" if none else "",
        f"is exactly zero at {integer(zero)}" if zero else "",
        f"is not finite at {integer(infinite)}" if infinite else "",
    ]
    yield (
        f"Of {points(asked_at)} the gradient of the margin {', '.join(part for part in parts if part)}: attacks by gradients see nothing there, and what "
        "they leave standing may only be hidden from them. Ask attacks that need none (--tool Square, Differences, SPSA or HopSkipJump), or give the layer "
        "that rounds or cuts another slope: Through(PGD(steps=40), (('layer', 'identity'),))."
    )


def precision(summary: Summary) -> Iterator[str]:
    """Yield that there was no float64 copy to judge by, and why."""
    why = summary.question.facts.get("no_float64")
    if isinstance(why, str) and why:
        dtype = str(lookup(summary.question.facts, "model", "dtype") or "own precision").removeprefix("torch.")
        yield f"Margins are judged in {plain(dtype)} alone: no float64 copy of the model can be run ({plain(why)}). Differences within rounding may count."


def failures(summary: Summary) -> Iterator[str]:
    """Yield which certifiers ended on an error of their own."""
    held = summary.question.facts.get("failed")
    for fact in (held if isinstance(held, dict) else {}).values():
        yield f"{plain(lookup(fact, 'error')).rstrip('.')}. What it might have proved is missing; what other tools found stands."


def provenance(facts: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return all facts as groups of (key, text), nested keys joined by dots; nothing is left out for being unknown."""
    loose = [(str(k), _shown(v)) for k, v in facts.items() if not isinstance(v, dict)]
    groups = [(str(k), list(_flatten(v, "", _DEEPEST))) for k, v in facts.items() if isinstance(v, dict) and v]
    return ([("question", loose)] if loose else []) + groups


def _flatten(value: Any, path: str, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and depth:
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key), depth - 1)
    else:
        yield path, _shown(value)


def _shown(value: Any) -> str:
    """Return one value as text: names as they are, lists with commas, the rest as JSON."""
    if isinstance(value, list) and not any(isinstance(v, list | dict) for v in value):
        text = ", ".join(map(_shown, value)) or "none"
    elif isinstance(value, str):
        text = value or "not given"
    elif value is None:
        text = "none"
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({integer(len(text))} characters)"
