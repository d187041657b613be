"""Figures as inline SVG: robust, unknown and broken, in three colours.

Colours and fonts come from CSS classes, so that a figure follows the page's light or dark scheme.
Each builder takes a `Size`: a page shows the wide drawing or the one for a phone, and never scales
text into illegibility.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from calipers.report.report import Summary
from calipers.report.wording import at_least, at_most, axis, distance, reach

Floats = NDArray[np.float64]
_KNOTS = 600  # more steps than this cannot be told apart on a screen
_CLASSES = 20
_CLASS = 7  # characters of a name of a class


@dataclass(frozen=True)
class Size:
    """Width and height in pixels at which text has its natural size.

    `name` is the CSS class that shows or hides the drawing.
    """

    width: int
    height: int
    name: str


WIDE, FULL, HALF = Size(860, 92, "wide"), Size(720, 360, "wide"), Size(500, 320, "wide")
PHONE, INLINE = Size(326, 280, "narrow"), Size(240, 26, "any")


@dataclass(frozen=True)
class Frame:
    """The plotting area: where a value of the data lies in the drawing."""

    size: Size
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 46
    right: float = 14
    top: float = 14
    bottom: float = 44

    def px(self, value: float) -> float:
        """Return the horizontal position of a value."""
        return self.left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (
            self.size.width - self.left - self.right
        )

    def py(self, value: float) -> float:
        """Return the vertical position of a value."""
        return (
            self.size.height
            - self.bottom
            - (value - self.y[0])
            / (self.y[1] - self.y[0])
            * (self.size.height - self.top - self.bottom)
        )


def curve(summary: Summary, size: Size = FULL) -> str:
    """Return the figure of robust accuracy over the radius.

    It shows both step curves, the gap between them, the simultaneous band and the radius asked.
    """
    c = summary.curve
    frame = Frame(size, (0, c.reach), (0, 1))
    inside = np.flatnonzero(c.radii <= c.reach)
    keep = inside[_thin(len(inside), _KNOTS)]
    r, low, high = c.radii[keep], c.certified[keep], c.attacked[keep]
    below, above = _steps(frame, r, low, back=True), _steps(frame, r, high, back=False)
    floor = f"L{frame.px(r[-1]):.1f} {frame.py(0):.1f}H{frame.px(0):.1f}Z"
    parts = [
        _rect(
            "broken-soft",
            frame.px(0),
            frame.py(1),
            frame.px(c.reach) - frame.px(0),
            frame.py(0) - frame.py(1),
        ),
        f'<path class="unknown" d="{above}{floor}"/><path class="robust-soft" d="{below}{floor}"/>',
        _axes(
            frame,
            ticks(0, c.reach, 4 if size.name == "narrow" else 7),
            _QUARTERS,
            axis(summary, "radius"),
        ),
        '<path class="band robust-line" '
        f'd="{_steps(frame, r, np.maximum(low - c.half_width, 0), back=True)}"/>',
        '<path class="band broken-line" '
        f'd="{_steps(frame, r, np.minimum(high + c.half_width, 1), back=False)}"/>',
        f'<path class="curve robust-line" d="{below}"/><path class="curve broken-line" '
        f'd="{above}"/>',
        *_asked_too(summary, frame),
        _asked(summary, frame),
    ]
    return _svg(
        size, "curve", f"Robust accuracy over the {reach(summary)}. {_at_radius(summary)}", parts
    )


_QUARTERS = [(q, f"{q * 100:g} %") for q in (0.0, 0.25, 0.5, 0.75, 1.0)]


def _at_radius(summary: Summary) -> str:
    robust = summary.robust
    if not summary.n:
        return "No points."
    return (
        f"At the {reach(summary)} asked at least {at_least(robust.certified)} % and at most "
        f"{at_most(robust.attacked)} % of the points are robust."
    )


def _asked(summary: Summary, frame: Frame) -> str:
    """Return the vertical line at the radius asked, with both rates there."""
    radius, robust = summary.radius[1], summary.robust
    if summary.radius[0] != radius or not 0 < radius <= summary.curve.reach or not summary.n:
        return ""
    x, low, high = (
        frame.px(radius),
        frame.py(robust.certified.share),
        frame.py(robust.attacked.share),
    )
    side, anchor = (8.0, "start") if radius < 0.75 * summary.curve.reach else (-8.0, "end")
    down, up = min(low + 15, frame.py(0) - 5), max(high - 7, frame.py(1) + 12)
    return (
        f'<path class="asked" d="M{x:.1f} {frame.py(1):.1f}V{frame.py(0):.1f}"/>'
        f'<circle class="dot robust" cx="{x:.1f}" cy="{low:.1f}" r="4"/><circle class="dot broken" '
        f'cx="{x:.1f}" cy="{high:.1f}" r="4"/>'
        + _text("value robust-text", x + side, down, f"{at_least(robust.certified)} %", anchor)
        + _text("value broken-text", x + side, up, f"{at_most(robust.attacked)} %", anchor)
    )


def _asked_too(summary: Summary, frame: Frame) -> list[str]:
    """Return dots on both lines at each radius of a run that asked several.

    The radius at which verdicts are read has dots of its own.
    """
    inside = [
        at
        for at in summary.at_radii
        if at.radius <= summary.curve.reach and at.radius != summary.radius[1]
    ]
    ends = [
        (at.radius, share, side)
        for at in inside
        for share, side in (
            (at.robust.certified.share, "robust"),
            (at.robust.attacked.share, "broken"),
        )
    ]
    return (
        [
            f'<circle class="dot {side}" cx="{frame.px(r):.1f}" cy="{frame.py(share):.1f}" r="3"/>'
            for r, share, side in ends
        ]
        if summary.n
        else []
    )


def gauge(summary: Summary, size: Size = FULL, *, bare: bool = False) -> str:
    """Return the drawing of a caliper that brackets the robust accuracy.

    One scale from 0 to 100 %, with a jaw at either rate, the gap between them, and the sampling
    interval below. `bare` omits scale and interval.
    """
    size = Size(size.width, 26 if bare else 92, size.name)
    inset = 1 if bare else 14
    frame = Frame(size, (0, 1), (0, 1), inset, inset, 0, 0)
    robust, clean = summary.robust, summary.clean.share if summary.clean.of else 1.0
    low, high = (
        robust.certified.share if summary.n else 0.0,
        robust.attacked.share if summary.n else 1.0,
    )
    top, height = (9.0, 12.0) if bare else (26.0, 22.0)
    ends = [
        (0.0, low, "robust"),
        (low, high, "unknown"),
        (high, max(clean, high), "broken"),
        (max(clean, high), 1.0, "error"),
    ]
    parts = [
        _rect(name, frame.px(a), top, frame.px(b) - frame.px(a), height)
        for a, b, name in ends
        if b > a
    ]
    parts.append(_jaws(frame.px(low), frame.px(high), top, height, 8.0 if bare else 14.0))
    if not bare:
        parts.append(_scale(frame, top + height))
        parts.append(_whisker(frame.px(robust.interval[0]), frame.px(robust.interval[1]), 84, 4))
    return _svg(size, "gauge", _at_radius(summary), parts)


def _jaws(low: float, high: float, top: float, height: float, reach: float) -> str:
    """Return the two jaws of the caliper.

    Each measures with its inner, flat edge and is cut away on the outer side.
    """
    y, foot = top - reach, top + height + reach / 3
    left = (
        f'<path class="jaw robust" d="M{low:.1f} '
        f'{foot:.1f}V{y:.1f}H{low - reach:.1f}L{low - reach * 0.25:.1f} {top:.1f}V{foot:.1f}Z"/>'
    )
    right = (
        f'<path class="jaw broken" d="M{high:.1f} '
        f'{foot:.1f}V{y:.1f}H{high + reach:.1f}L{high + reach * 0.25:.1f} {top:.1f}V{foot:.1f}Z"/>'
    )
    return left + right


def _scale(frame: Frame, y: float) -> str:
    lines = "".join(
        f"M{frame.px(k / 20):.1f} {y + 5:g}v{5 if k % 5 == 0 else 2.5:g}" for k in range(21)
    )
    names = "".join(
        _text("tick", frame.px(q), y + 22, f"{q * 100:g}", "middle") for q, _ in _QUARTERS
    )
    return f'<path class="axis" d="{lines}"/>{names}'


def _whisker(low: float, high: float, y: float, half: float) -> str:
    return (
        f'<path class="whisker" d="M{low:.1f} {y - half:g}v{2 * half:g}M{low:.1f} '
        f'{y:g}H{high:.1f}M{high:.1f} {y - half:g}v{2 * half:g}"/>'
    )


def brackets(summary: Summary, size: Size = HALF) -> str:
    """Return the brackets of all points side by side, sorted.

    Each column is robust at the bottom, unknown in the middle, and broken at the top.
    """
    rows = sorted(
        (r for r in summary.rows if r.verdict != "invalid"), key=lambda r: (r.lower, r.upper)
    )
    frame = Frame(size, (0, max(len(rows), 1)), (0, summary.curve.reach), left=52)
    columns = [rows[i] for i in _thin(len(rows), int(frame.px(frame.x[1]) - frame.px(0)))]
    frame = Frame(size, (0, max(len(columns), 1)), (0, summary.curve.reach), left=52)
    ceiling, stroke = (
        summary.curve.reach,
        (frame.px(1) - frame.px(0)) * (0.86 if len(columns) < 60 else 1.08),
    )
    ends = [(min(r.lower, ceiling), min(r.upper, ceiling)) for r in columns]
    bands = [
        ("robust-bar", [(0.0, a) for a, _ in ends]),
        ("unknown-bar", ends),
        ("broken-bar", [(b, ceiling) for _, b in ends]),
    ]
    parts = [
        f'<path class="{name}" style="stroke-width:{stroke:.2f}" d="{_bars(frame, spans)}"/>'
        for name, spans in bands
    ]
    parts.append(
        _axes(
            frame,
            [],
            ticks(0, ceiling, 5),
            f"{len(rows):,} points, sorted",
            axis(summary, "distance"),
        )
    )
    low, high = summary.radius
    if low == high and 0 < low <= ceiling:
        parts.append(
            f'<path class="asked" d="M{frame.px(0):.1f} '
            f'{frame.py(low):.1f}H{frame.px(frame.x[1]):.1f}"/>'
        )
    return _svg(
        size,
        "brackets",
        f"The bracket of each of {len(rows)} points, from what is proved to what is broken.",
        parts,
    )


def _bars(frame: Frame, spans: Iterable[tuple[float, float]]) -> str:
    return "".join(
        f"M{frame.px(i + 0.5):.1f} {frame.py(a):.1f}V{frame.py(b):.1f}"
        for i, (a, b) in enumerate(spans)
        if b > a
    )


def histogram(summary: Summary, size: Size = HALF) -> str:
    """Return the histogram of witnesses' distances and certified radii.

    Distances of witnesses go upwards, certified radii downwards, each on its own scale.
    """
    h = summary.histogram
    tallest = max(int(h.upper.max()), 1), max(int(h.lower.max()), 1)
    frame = Frame(size, (0, summary.curve.reach), (-1.08, 1.08), left=40)
    bars = "".join(
        _bin(frame, h.edges, i, k / tallest[0], "broken") for i, k in enumerate(h.upper) if k
    )
    bars += "".join(
        _bin(frame, h.edges, i, -k / tallest[1], "robust") for i, k in enumerate(h.lower) if k
    )
    counts = [
        (sign, f"{int(k.max()):,}") for sign, k in ((1.0, h.upper), (-1.0, h.lower)) if k.any()
    ] + [(0.0, "0")]
    parts = [
        bars,
        _axes(
            frame,
            ticks(0, summary.curve.reach, 4 if size.name == "narrow" else 6),
            counts,
            axis(summary, "distance"),
        ),
    ]
    parts.append(
        f'<path class="axis" d="M{frame.px(0):.1f} {frame.py(0):.1f}H{frame.px(frame.x[1]):.1f}"/>'
    )
    radius = summary.radius[1]
    if summary.radius[0] == radius and 0 < radius <= summary.curve.reach:
        parts.append(
            f'<path class="asked" d="M{frame.px(radius):.1f} '
            f'{frame.py(1.08):.1f}V{frame.py(-1.08):.1f}"/>'
        )
    return _svg(
        size,
        "histogram",
        "How many witnesses stand, and how many certificates reach, at which distance.",
        parts,
    )


def _bin(frame: Frame, edges: Floats, i: int, height: float, name: str) -> str:
    x, end, y, base = (
        frame.px(edges[i]),
        frame.px(edges[i + 1]),
        frame.py(max(height, 0)),
        frame.py(min(height, 0)),
    )
    return _rect(name, x + 0.5, y, max(end - x - 1, 1), max(base - y, 1))


def classes(summary: Summary, size: Size = HALF) -> str:
    """Return one bar for each class, from 0 to 100 %.

    It shows the certified, unknown and broken shares, with the ends of both Wilson intervals; where
    there are many classes only the worst.
    """
    rows = sorted(summary.classes, key=lambda c: c.attacked.share)[:_CLASSES]
    rows = sorted(rows, key=lambda c: c.label)
    step = 22.0 if size.name == "narrow" else 36.0
    size = Size(size.width, int(step * max(len(rows), 1) + 34), size.name)
    frame = Frame(size, (0, 1), (0, 1), left=44, right=12, top=4, bottom=30)
    parts = [_axes(frame, [(q, name) for q, name in _QUARTERS], [], "")]
    named = {row.label: summary.names.of_class(row.label) for row in rows}
    called = {k: s if len(s) <= _CLASS else f"{s[: _CLASS - 1]}…" for k, s in named.items()}
    for i, row in enumerate(rows):
        y = frame.top + step * i
        ends = [0.0, row.certified.share, row.attacked.share, 1.0]
        names = ("robust", "unknown", "broken-soft")
        parts += [
            _rect(n, frame.px(a), y + 3, frame.px(b) - frame.px(a), step - 12)
            for n, a, b in zip(names, ends, ends[1:], strict=False)
            if b > a
        ]
        parts.append(
            _whisker(
                frame.px(row.certified.wilson.low),
                frame.px(row.attacked.wilson.high),
                y + step - 4,
                2.5,
            )
        )
        parts.append(_text("tick", frame.left - 8, y + step / 2 + 1.5, called[row.label], "end"))
    return _svg(size, "classes", "Certified and attacked accuracy of each class.", parts)


def ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Return about `count` round values in [low, high], with their names."""
    span = high - low
    unit = 10.0 ** math.floor(math.log10(span / count))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if span / (s * unit) <= count)
    return [(low + k * step, distance(low + k * step)) for k in range(int(span / step + 1e-9) + 1)]


def _axes(
    frame: Frame,
    x: Sequence[tuple[float, str]],
    y: Sequence[tuple[float, str]],
    xlabel: str,
    ylabel: str = "",
) -> str:
    left, right, bottom, top = (
        frame.px(frame.x[0]),
        frame.px(frame.x[1]),
        frame.py(frame.y[0]),
        frame.py(frame.y[1]),
    )
    grid = "".join(f"M{left:.1f} {frame.py(v):.1f}H{right:.1f}" for v, _ in y) + "".join(
        f"M{frame.px(v):.1f} {bottom:.1f}V{top:.1f}" for v, _ in x
    )
    names = "".join(_text("tick", left - 7, frame.py(v) + 4, name, "end") for v, name in y)
    names += "".join(
        _text(
            "tick", frame.px(v), bottom + 17, name, "end" if frame.px(v) > right - 8 else "middle"
        )
        for v, name in x
    )
    titles = (
        _text("label", (left + right) / 2, bottom + (35 if x else 19), xlabel, "middle")
        if xlabel
        else ""
    )
    titles += (
        f'<g transform="translate(11 {(top + bottom) / 2:.1f}) '
        f'rotate(-90)">{_text("label", 0, 0, ylabel, "middle")}</g>'
        if ylabel
        else ""
    )
    return f'<path class="grid" d="{grid}"/>{names}{titles}'


def _steps(frame: Frame, x: Floats, y: Floats, *, back: bool) -> str:
    """Return a step path.

    Each value holds back to the knot before (`back`) or on to the knot after.
    """
    path = [f"M{frame.px(x[0]):.1f} {frame.py(y[0]):.1f}"]
    for i in range(1, len(x)):
        across, along = f"H{frame.px(x[i]):.1f}", f"V{frame.py(y[i]):.1f}"
        path.append(along + across if back else across + along)
    return "".join(path)


def _thin(n: int, most: int) -> NDArray[np.intp]:
    return np.arange(n) if n <= most else np.unique(np.linspace(0, n - 1, most).astype(np.intp))


def _rect(name: str, x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
    )


def _text(name: str, x: float, y: float, text: str, anchor: str) -> str:
    return (
        f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _svg(size: Size, kind: str, title: str, parts: Iterable[str]) -> str:
    name = escape(title, quote=True)
    head = (
        f'<svg class="figure {kind} {size.name}" role="img" aria-label="{name}" viewBox="0 0 '
        f'{size.width} {size.height}"><title>{name}</title>'
    )
    return head + "".join(parts) + "</svg>"
