"""The terminal's view of a measurement: one short table per question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calipers.record.record import Record
from calipers.report.caveats import alarm, missing_certificates, shortcomings, standing
from calipers.report.report import Summary, summaries
from calipers.report.wording import (
    advice,
    asked,
    at_least,
    at_most,
    broken,
    counts_substitutions,
    distance,
    duration,
    integer,
    norm,
    percent,
    plain,
    points,
    radius,
    share_of_points,
    stands_at,
    tools,
)

_SHOWN_INVALID = 5
_SHOWN_EXAMPLES, _WIDEST = 3, 160  # examples, and characters of what one changes


def render_text(what: Record | Sequence[Summary], confidence: float = 0.95) -> str:
    """Return the tables of all questions."""
    found = summaries(what, confidence) if isinstance(what, Record) else tuple(what)
    if not found:
        return "This record holds no question yet. Measure first: calipers measure --record RECORD"
    titled = len(found) > 1
    return "\n\n".join(
        "\n".join(plain(line) for line in _lines(summary, titled)) for summary in found
    )


def _lines(summary: Summary, titled: bool) -> Iterator[str]:
    if titled:
        yield summary.title
    how_far = (
        asked(summary)
        if counts_substitutions(summary)
        else f"{norm(summary)} eps = {radius(summary)}"
    )
    if said := alarm(summary):
        yield f"WARNING: {said}"
    yield f"robust accuracy, {how_far}, {points(summary.n)}, {share_of_points(summary.confidence)}"
    if summary.n:
        yield from _rates(summary)
        yield from _curve(summary)
        what = "substitutions" if counts_substitutions(summary) else "distance"
        yield f"  {what} {_median(summary)}"
        yield from _examples(summary)
    yield f"  cost     {_cost(summary)}"
    yield from _remarks(summary)


def _rates(summary: Summary) -> Iterator[str]:
    robust, (low, high) = summary.robust, summary.robust.interval
    proved = (
        f"certified: {tools(summary.certified_by)}" if summary.certified_by else "nothing certified"
    )
    beaten = f"broken: {broken(summary)}" if broken(summary) else "nothing broken"
    from_low, to_high = f"({percent(low, 'down')} ..)", f"(.. {percent(high, 'up')})"
    yield f"  at least {at_least(robust.certified):>5} %  {from_low:<12} {proved}"
    yield f"  at most  {at_most(robust.attacked):>5} %  {to_high:<12} {beaten}"
    narrow = (
        f"{points(robust.unknown)}. To narrow: {advice(summary)}"
        if robust.unknown
        else "every point is settled"
    )
    yield f"  unknown  {percent(robust.unknown_share):>5} %  {narrow}"
    clean = summary.clean
    if clean.of:
        short = "" if clean.of == summary.n else f"  of the {integer(clean.of)} looked at"
        yield (
            f"  clean    {percent(clean.share):>5} %  ({percent(clean.wilson.low, 'down')} .. "
            f"{percent(clean.wilson.high, 'up')}){short}"
        )


def _curve(summary: Summary) -> Iterator[str]:
    """Yield the rates at all radii of a run that asked several."""
    if summary.at_radii:
        yield f"  {'at':<8} {'at least':>10}  {'at most':>9}  {'unknown':>9}   interval"
    for at in summary.at_radii:
        robust, (low, high) = at.robust, at.robust.interval
        rates = (
            f"{at_least(robust.certified):>8} %  {at_most(robust.attacked):>7} %  "
            f"{percent(robust.unknown_share):>7} %"
        )
        yield f"  {at.radius:<8.6g} {rates}   {percent(low, 'down')} .. {percent(high, 'up')} %"


def _median(summary: Summary) -> str:
    median = next(q for q in summary.quantiles if q.share == 0.5)
    if median.upper == 0:
        return "median 0: the model is wrong at more than half of the points"
    return f"median above {distance(median.lower, 'down')}, " + (
        "no upper end: more than half of the points have no witness"
        if median.upper == float("inf")
        else f"at most {distance(median.upper, 'up')}"
    )


def _examples(summary: Summary) -> Iterator[str]:
    """Yield the nearest examples of named columns or symbols."""
    names = summary.names
    for one in [e for e in summary.gallery if e.words][:_SHOWN_EXAMPLES]:
        words = one.words if len(one.words) <= _WIDEST else f"{one.words[:_WIDEST]} …"
        taken = names.of_class(one.label)
        taken += " (a tie)" if one.fooled == one.label else f" -> {names.of_class(one.fooled)}"
        yield f"  example  point {one.index}, {taken}, {stands_at(summary, one.distance)}: {words}"


def _cost(summary: Summary) -> str:
    forwards, backwards = (
        sum(c.forwards for c in summary.costs),
        sum(c.backwards for c in summary.costs),
    )
    return (
        f"{integer(forwards)} forwards, {integer(backwards)} backwards, "
        f"{duration(sum(c.seconds for c in summary.costs))}"
    )


def _remarks(summary: Summary) -> Iterator[str]:
    for said in standing(summary):
        yield f"  record   {said}"
    missing = missing_certificates(summary)
    if missing:
        yield (
            f"  no certificates: {missing.rstrip('.')}. Nothing is proved, and the accuracy under "
            "attack is only as strong as the attacks."
        )
    for word, said in shortcomings(summary):
        yield f"  {word:<8} {said}"
    for row in summary.invalid[:_SHOWN_INVALID]:
        yield f"  invalid  point {row.index} is in no rate: {row.note or 'no reason given'}"
    if len(summary.invalid) > _SHOWN_INVALID:
        yield f"  invalid  {points(len(summary.invalid) - _SHOWN_INVALID)} more"
