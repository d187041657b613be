"""Ladders: all tools' bounds on each point's distance in one drawing.

They go from the loosest proof to the nearest example found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from calipers.report.figures import Frame, Size, _axes, _rect, _svg, _text, ticks
from calipers.report.wording import distance

TALL, TALL_PHONE = Size(860, 0, "wide"), Size(326, 0, "narrow")
_STEP = 30
_SHAPES = {
    "lower": (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
        "M-4 -5L5 0L-4 5Z",
        "M-4 -4H4V4H-4Z",
        "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
        "M0 -5.5L5 4H-5Z",
    ),
    "upper": ("M-4.5 -4.5L4.5 4.5M-4.5 4.5L4.5 -4.5", "M-5.5 0H5.5M0 -5.5V5.5", "M4 -5L-5 0L4 5"),
}


@dataclass(frozen=True)
class Rung:
    """One tool's bound on the distance of every point.

    `side` says whether it is a proved distance ("lower") or that of an example ("upper"). Values
    are NaN or 0 where the tool has none.
    """

    name: str
    side: Literal["lower", "upper"]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Ladder:
    """The points by their names, and the rungs from lowest to highest kind.

    Distances are in `unit`.
    """

    points: tuple[str, ...]
    rungs: tuple[Rung, ...]
    unit: str

    def first(self, count: int) -> Ladder:
        """Return the ladder of the first points."""
        return Ladder(
            self.points[:count],
            tuple(replace(r, values=r.values[:count]) for r in self.rungs),
            self.unit,
        )

    def bracket(self, i: int) -> tuple[float, float]:
        """Return the best proved distance and the nearest example's of a point."""
        lower = max(
            (r.values[i] for r in self.rungs if r.side == "lower" and r.values[i] > 0), default=0.0
        )
        upper = min(
            (r.values[i] for r in self.rungs if r.side == "upper" and r.values[i] > 0),
            default=math.inf,
        )
        return lower, upper


def ladder(found: Ladder, size: Size = TALL) -> str:
    """Return the drawing of a ladder.

    Each row is robust below the best proof and broken beyond the nearest example, with a mark for
    each rung.
    """
    n = len(found.points)
    size = Size(size.width, _STEP * n + 56, size.name)
    ends = [found.bracket(i) for i in range(n)]
    reach = 1.08 * max(
        [e for pair in ends for e in pair if math.isfinite(e)]
        + [r for rung in found.rungs for r in rung.values if r > 0]
        + [1e-12]
    )
    frame = Frame(
        size, (0, reach), (0, 1), left=84 if size.name == "wide" else 52, right=16, top=8, bottom=48
    )
    scale = ticks(0, reach, 8 if size.name == "wide" else 3)
    parts = [_axes(frame, scale, [], f"distance, {found.unit}")]
    for i, (name, (lower, upper)) in enumerate(zip(found.points, ends, strict=True)):
        y = frame.top + _STEP * (i + 0.5)
        spans = [
            ("robust-soft", 0.0, lower),
            ("unknown", lower, min(upper, reach)),
            ("broken-soft", min(upper, reach), reach),
        ]
        parts += [
            _rect(kind, frame.px(a), y - 8, frame.px(b) - frame.px(a), 16)
            for kind, a, b in spans
            if b > a
        ]
        parts.append(_text("tick", frame.left - 9, y + 4, name, "end"))
        parts += [
            mark(rung, found.rungs, frame.px(rung.values[i]), y)
            for rung in found.rungs
            if 0 < rung.values[i] <= reach
        ]
    return _svg(size, "ladder", f"What each tool proves or finds about {n} points.", parts)


def mark(rung: Rung, rungs: Sequence[Rung], x: float, y: float) -> str:
    """Return the mark of a rung at a place of a drawing.

    Its shape identifies the tool, its colour the side.
    """
    same = [r.name for r in rungs if r.side == rung.side]
    shape = _SHAPES[rung.side][same.index(rung.name) % len(_SHAPES[rung.side])]
    return f'<path class="mark {rung.side}" transform="translate({x:.1f} {y:.1f})" d="{shape}"/>'


def key(found: Ladder) -> list[tuple[str, str]]:
    """Return (mark as a small drawing, words) for each rung."""
    words = {"lower": "proved", "upper": "example found"}
    head = '<svg class="figure sign" viewBox="-8 -8 16 16" aria-hidden="true">'
    return [
        (f"{head}{mark(r, found.rungs, 0, 0)}</svg>", f"{r.name}: {words[r.side]}")
        for r in found.rungs
    ]


def scatter(
    proved_border: Sequence[float], brackets: Sequence[tuple[float, float]], unit: str, size: Size
) -> str:
    """Return a plot of adversarial distance against radius of linearity.

    `proved_border` holds the radii of the linear regions. Both scales are logarithmic; a bar goes
    from the best proof to the nearest example. Below the diagonal the decision changes inside the
    linear region, where its distance is known exactly; above it, the decision boundary lies many
    regions away.
    """
    pairs = [
        (r, low, high)
        for r, (low, high) in zip(proved_border, brackets, strict=True)
        if r > 0 and math.isfinite(r) and high > 0 and math.isfinite(high)
    ]
    if not pairs:
        return ""
    x = _decades([r for r, _, _ in pairs])
    y = _decades([v for _, low, high in pairs for v in (low, high) if v > 0])
    frame = Frame(size, x, y, left=64, right=16, top=12, bottom=48)
    parts = [
        _axes(
            frame,
            _powers(x),
            _powers(y),
            f"radius of the linear region, {unit}",
            f"adversarial distance, {unit}",
        )
    ]
    low, high = max(x[0], y[0]), min(x[1], y[1])
    if high > low:
        parts.append(
            f'<path class="asked" d="M{frame.px(low):.1f} {frame.py(low):.1f}L{frame.px(high):.1f} '
            f'{frame.py(high):.1f}"/>'
        )
        near = low + 0.12 * (high - low)  # near the start of the line: few points there
        parts.append(_text("tick", frame.px(near) + 8, frame.py(near) + 12, "equal", "start"))
    for r, lower, upper in pairs:
        px, top, foot = (
            frame.px(math.log10(r)),
            frame.py(math.log10(upper)),
            frame.py(max(math.log10(lower), y[0]) if lower > 0 else y[0]),
        )
        parts.append(
            f'<path class="reach" d="M{px:.1f} {foot:.1f}V{top:.1f}"/>'
            + (f'<circle class="dot robust" cx="{px:.1f}" cy="{foot:.1f}" r="3.5"/>')
        )
        parts.append(f'<circle class="dot broken" cx="{px:.1f}" cy="{top:.1f}" r="4"/>')
    return _svg(
        size,
        "scatter",
        f"Radius of linearity and adversarial distance of {len(pairs)} points.",
        parts,
    )


def _decades(values: Sequence[float]) -> tuple[float, float]:
    low, high = math.log10(min(values)), math.log10(max(values))
    return math.floor(low - 0.05), math.ceil(high + 0.05)


def _powers(span: tuple[float, float]) -> list[tuple[float, str]]:
    return [
        (k, f"10{str(k).translate(_RAISED)}" if abs(k) > 2 else distance(10.0**k))
        for k in range(int(span[0]), int(span[1]) + 1)
    ]


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
