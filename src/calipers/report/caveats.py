"""What a measurement does not show, in sentences.

They say what its tools left out or could not see, and how far its record can be trusted.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator

from calipers.record.estimates import most_missed
from calipers.report.report import Summary
from calipers.report.wording import (
    counts_substitutions,
    duration,
    integer,
    lookup,
    plain,
    points,
    reach,
    share_of_points,
)

GUARANTEES = {
    "real": "proved in real arithmetic, rounding of the bound not accounted for",
    "float64-checked": "rounding of the bound accounted for",
    "float32-executed": "holds for the network as executed in float32, in any summation order",
}


def missing_certificates(summary: Summary) -> str:
    """Return why nothing could be certified, or "" where certifiers could run."""
    said = summary.facts.get("lower_jaw")
    if isinstance(said, str) and said not in ("", "available"):
        return said
    if said is None and summary.n and not any(row.lower > 0 for row in summary.rows):
        return "no certificate is on record"
    return ""


def limits(summary: Summary) -> Iterator[str]:
    """Yield what this measurement does not tell, plainest first."""
    if said := alarm(summary):
        yield said[0].upper() + said[1:]
    missing = missing_certificates(summary)
    if missing:
        yield (
            f"There are no certificates: {missing.rstrip('.')}. Nothing is proved robust, and the "
            "accuracy under attack is only as strong as the attacks listed."
        )
    if summary.unseen:
        yield (
            f"{points(summary.unseen)} of {integer(summary.n)} not looked at yet. They count as "
            "unknown, and the clean accuracy leaves them out."
        )
    if summary.robust.unknown:
        still = [str(r.index) for r in summary.rows if r.verdict == "unknown"]
        more = f" and {integer(len(still) - 20)} more" if len(still) > 20 else ""
        yield (
            f"Still open at the {reach(summary)} asked: {'point' if len(still) == 1 else 'points'} "
            f"{', '.join(still[:20])}{more}."
        )
    if summary.invalid:
        belong = "belongs" if len(summary.invalid) == 1 else "belong"
        yield (
            f"{points(len(summary.invalid))} could not be measured and {belong} to no rate; the "
            "reasons are listed with the points."
        )
    for guarantee, count in summary.guarantees:
        meaning = GUARANTEES.get(guarantee, "see the documentation of that guarantee")
        yield (
            f"{integer(count)} of the certified points have the guarantee “{guarantee}”: {meaning}."
        )
    yield from (said for _, said in shortcomings(summary))
    if 0 < summary.n < 100:
        yield (
            f"With {points(summary.n)} little can be said about a population: the intervals are "
            "wide for a reason."
        )
    yield (
        "The intervals take the points for a random sample of the population. If they are the "
        "first of a test set, read every number as one about that set."
    )
    if (
        counts_substitutions(summary)
        and lookup(summary.facts, "threat", "letters", "numeric") is not None
    ):
        yield (
            "Distances count substitutions. Where numeric columns moved and no symbol changed, "
            "half "
            "a substitution stands for it: more than none, less than one."
        )
    beyond = (
        f"Beyond the {reach(summary)} asked a curve only carries what happened to be found "
        "or proved"
    )
    yield f"{beyond}; that nobody searched there looks the same as robustness."


def shortcomings(summary: Summary) -> Iterator[tuple[str, str]]:
    """Yield what tools left out or could not see, each with a keyword."""
    for word, sentences in _SHORTCOMINGS.items():
        yield from ((word, said) for said in sentences(summary))


def alarm(summary: Summary) -> str:
    """Return the warning that a record was altered, or ""."""
    if not summary.trust.altered:
        return ""
    where = shlex.quote(summary.record) if summary.record else "RECORD"
    return (
        "this record was altered after it was written: "
        f"{'; '.join(map(plain, summary.trust.altered))}. "
        "What is shown may be nobody's measurement: "
        f"calipers check {where} replays it against the model, a new record leaves no doubt."
    )


def standing(summary: Summary) -> Iterator[str]:
    """Yield what is known about a record kept in a file.

    That is whether its evidence was replayed, and whether all of it is chained.
    """
    trust, where = summary.trust, shlex.quote(summary.record)
    if not summary.record:
        return
    check = trust.last_check(summary.question.fingerprint)
    if check is None:
        yield (
            f"not checked: calipers check {where} replays every witness and certificate against "
            "the model"
        )
    else:
        failed = f"{integer(check.failures)} failed" if check.failures else "none failed"
        grown = trust.grown(check)
        since = f"; {integer(grown)} facts were added since" if grown else ""
        replayed = (
            f"{integer(check.witnesses)} witnesses and {integer(check.certificates)} certificates "
            f"replayed, {failed}"
        )
        yield (
            f"checked on {check.at.replace('T', ' ').replace('+00:00', ' UTC')}: {replayed}{since}"
        )
    if trust.unchained:
        yield (
            f"{integer(trust.unchained)} of {integer(trust.facts)} facts were written before "
            "records were chained: whether they were altered cannot be told"
        )


def audits(summary: Summary) -> Iterator[str]:
    """Yield what tools may have missed that were run on a sample only.

    These are tools that were tried on a random part of the open points, settled none of them, and
    were not run on the others.
    """
    held = summary.facts.get("audits")
    for tool, audit in (held if isinstance(held, dict) else {}).items():
        tried, of = lookup(audit, "tried"), lookup(audit, "open")
        if not (isinstance(tried, int) and isinstance(of, int) and 0 < tried < of):
            continue
        broke, would = (
            ("proved", "prove") if lookup(audit, "kind") == "certifier" else ("broke", "break")
        )
        if lookup(audit, "aim") == "distance":
            yield (
                f"{plain(tool).partition('(')[0]} looked for nearer examples of {integer(tried)} "
                f"random points of {integer(of)}, and came hardly nearer than what was known: it "
                "was not run on the others."
            )
            continue
        most, near = integer(most_missed(tried, of, summary.confidence)), lookup(audit, "near")
        also = (
            f" and on the {integer(near)} that came nearest to falling"
            if isinstance(near, int) and near
            else ""
        )
        yield (
            f"{plain(tool).partition('(')[0]} was tried on {integer(tried)} random points of the "
            f"{integer(of)} that were open before it{also} and {broke} none, so it was not run on "
            f"the others: with {share_of_points(summary.confidence)} confidence it would {would} "
            f"at most {most} of them."
        )


_WHY_NOT = {
    "cost": "more than its share of the attacks' time; not run",
    "time": "cut short when its share of the attacks' time was up",
    "memory": "and it would hold about {held:.0f} GB at once; not run",
    "hopeless": "and without hope: {reason}; not run",
}


def not_run(summary: Summary) -> Iterator[str]:
    """Yield which certifiers were not run on all their points.

    With it: the time that this would take by their forecasts, why they were not run, and how to
    insist.
    """
    held = summary.facts.get("not_run")
    for tool, fact in (held if isinstance(held, dict) else {}).items():
        count, seconds, size, reason = (
            lookup(fact, key) for key in ("points", "seconds", "held", "reason")
        )
        why = _WHY_NOT.get(str(lookup(fact, "why")), "")
        if not isinstance(count, int) or not why:
            continue
        took = (
            f"about {duration(seconds)} for "
            if isinstance(seconds, (int, float)) and seconds > 0
            else ""
        )
        which = (
            points(count).replace(" point", " more point")
            if lookup(fact, "proved")
            else points(count)
        )
        told = why.format(held=(size if isinstance(size, int) else 0) / 1e9, reason=plain(reason))
        yield (
            f"{_called(plain(tool))}: {took}{which} of this size, {told}. To insist: the same "
            "command with --lower-share all."
        )


def begun_anew(summary: Summary) -> Iterator[str]:
    """Yield which tools with a time limit were stopped and began again.

    The clock may then have decided otherwise than in a run that was not interrupted.
    """
    held = summary.facts.get("begun_anew")
    for tool in held if isinstance(held, list) else []:
        yield (
            f"{_called(plain(tool))} was stopped at work and began its time anew: what it proved "
            "may differ from what a run left alone proves."
        )


def _called(tool: str) -> str:
    """Return a tool by its repr, without empty parentheses.

    >>> _called("CROWN()"), _called("CROWN(refine=False)")
    ('CROWN', 'CROWN(refine=False)')
    """
    return tool.removesuffix("()")


def gradients(summary: Summary) -> Iterator[str]:
    """Yield where gradient-based attacks are blind, and what to do about it."""
    held = lookup(summary.facts, "gradients")
    asked_at, none, zero, infinite = (
        lookup(held, key) for key in ("asked", "none", "zero", "not finite")
    )
    if (
        not all(isinstance(n, int) for n in (asked_at, none, zero, infinite))
        or not asked_at
        or not none + zero + infinite
    ):
        return
    why = lookup(held, "why")
    parts = [
        "does not exist at "
        f"{integer(none)}{f' ({plain(why)})' if isinstance(why, str) and why else ''}"
        if none
        else "",
        f"is exactly zero at {integer(zero)}" if zero else "",
        f"is not finite at {integer(infinite)}" if infinite else "",
    ]
    yield (
        f"Of {points(asked_at)} the gradient of the margin "
        f"{', '.join(part for part in parts if part)}: attacks by gradients see nothing there, and "
        "what they leave standing may only be hidden from them. Ask attacks that need none "
        "(--tool Square, FiniteDifferences, SPSA or HopSkipJump), or give the layer that rounds or "
        "cuts another slope: BPDA(PGD(steps=40), (('layer', 'identity'),))."
    )


def precision(summary: Summary) -> Iterator[str]:
    """Yield that there was no float64 copy to judge by, and why."""
    why = summary.facts.get("no_float64")
    if isinstance(why, str) and why:
        dtype = str(lookup(summary.facts, "model", "dtype") or "own precision").removeprefix(
            "torch."
        )
        yield (
            f"Margins are judged in {plain(dtype)} alone: no float64 copy of the model can be run "
            f"({plain(why)}). Differences within rounding may count."
        )


def failures(summary: Summary) -> Iterator[str]:
    """Yield which certifiers ended on an error of their own."""
    held = summary.facts.get("failed")
    for fact in (held if isinstance(held, dict) else {}).values():
        yield (
            f"{plain(lookup(fact, 'error')).rstrip('.')}. What it might have proved is missing; "
            "what other tools found stands."
        )


def understood(summary: Summary) -> Iterator[str]:
    """Yield how model and data were read, where that is not obvious."""
    held = summary.facts.get("read")
    said = [plain(note) for note in held] if isinstance(held, list) else []
    if said:
        yield f"Read at the door: {'; '.join(said)}."


_SHORTCOMINGS: dict[str, Callable[[Summary], Iterator[str]]] = {
    "audit": audits,
    "clock": begun_anew,
    "not run": not_run,
    "failed": failures,
    "gradient": gradients,
    "float32": precision,
    "read": understood,
}
