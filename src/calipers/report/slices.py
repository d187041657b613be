"""Drawings of planes through a point.

Decisions are colours, linear regions are cells; both axes have the same scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from calipers.report.figures import Frame, Size, _axes, _svg, _text, ticks
from calipers.report.wording import distance

Outline = Sequence[tuple[float, float]]
SQUARE, SQUARE_PHONE = Size(470, 430, "wide"), Size(326, 290, "narrow")
_TINTS = 3  # neighbouring regions of one class usually differ in tint
_OTHERS = 4  # colours besides the point's own class; further classes share the last


class Plane(Protocol):
    """What a drawing needs of a slice of the input space.

    See `calipers.geometry.plane_sections.Slice`.
    """

    @property
    def half(self) -> float:
        """Half the side of the square."""

    @property
    def label(self) -> int:
        """The class that the point belongs to."""

    @property
    def polygons(self) -> Sequence[Outline]:
        """The polygons that are filled."""

    @property
    def classes(self) -> Sequence[int]:
        """The class of each polygon."""

    @property
    def own(self) -> Outline:
        """The point's own linear region."""

    @property
    def boundary(self) -> Sequence[Outline]:
        """The segments where the decision changes."""

    @property
    def marks(self) -> Outline:
        """The point and its adversarial examples."""

    @property
    def unit(self) -> Outline:
        """The ball of radius 1."""

    @property
    def exact(self) -> bool:
        """Whether the polygons are linear regions."""

    @property
    def regions(self) -> int:
        """The number of linear regions."""

    @property
    def norm(self) -> str:
        """The name of the norm."""

    @property
    def across(self) -> str:
        """The words for the second axis."""

    @property
    def index(self) -> int:
        """The position of the point in the data."""


def colours(planes: Iterable[Plane]) -> dict[int, str]:
    """Return the colour of each class in a point's slices.

    The point's own class comes first, the other classes by the area they take.
    """
    room: dict[int, float] = {}
    label = 0
    for plane in planes:
        label = plane.label
        for polygon, kind in zip(plane.polygons, plane.classes, strict=True):
            room[kind] = room.get(kind, 0.0) + _area(polygon) / plane.half**2
    others = sorted((k for k in room if k != label), key=lambda k: -room[k])
    return {label: "class-own", **{k: f"class-{min(i, _OTHERS - 1)}" for i, k in enumerate(others)}}


def plane(
    plane: Plane, palette: dict[int, str], radius: float, proved_border: float, size: Size = SQUARE
) -> str:
    """Return the drawing of a plane.

    `radius` is that of the ball asked about, `proved_border` that of the largest ball inside the
    linear
    region: both outlines are drawn where they can be seen.
    """
    frame = Frame(
        size,
        (-plane.half, plane.half),
        (-plane.half, plane.half),
        left=84,
        right=14,
        top=10,
        bottom=48,
    )
    parts = [*_fills(plane, palette, frame)]
    parts += [f'<path class="own-region" d="{_closed(plane.own, frame)}"/>'] if plane.own else []
    parts.append(f'<path class="decision" d="{_segments(plane.boundary, frame)}"/>')
    for name, length in (("asked", radius), ("proved", proved_border)):
        if 0.02 * plane.half < length < 1.4 * plane.half:
            parts.append(
                f'<path class="ring {name}" '
                f'd="{_closed([(s * length, t * length) for s, t in plane.unit], frame)}"/>'
            )
    clip = f"clip-{plane.index}-{size.name}-{'near' if plane.exact else 'wide'}"
    box = (
        f'x="{frame.left}" y="{frame.top}" width="{size.width - frame.left - frame.right:g}" '
        f'height="{size.height - frame.top - frame.bottom:g}"'
    )
    inside = (
        f'<clipPath id="{clip}"><rect {box}/></clipPath><g '
        f'clip-path="url(#{clip})">{"".join(parts)}</g><rect class="frame" {box}/>'
    )
    count = 3 if size.name == "narrow" else 4
    scale = _round_ticks(plane.half, count)
    axes = _axes(
        frame, scale, scale, f"{plane.norm} distance towards the nearest example", _second(plane)
    )
    title = (
        f"Point {plane.index} in the plane of an adversarial example: class {plane.label} and its "
        f"other classes, within {distance(plane.half)} either way."
    )
    return _svg(
        size,
        "plane",
        title,
        [inside, axes.replace('class="grid"', 'class="grid over"'), *_marks(plane, frame)],
    )


def _second(plane: Plane) -> str:
    return f"{plane.norm} distance {plane.across}"


def _round_ticks(half: float, count: int) -> list[tuple[float, str]]:
    positive = ticks(0, half, max(count // 2, 2))
    return [(-v, "−" + name) for v, name in reversed(positive) if v] + positive


def _fills(plane: Plane, palette: dict[int, str], frame: Frame) -> Iterable[str]:
    """Yield one path for each class and tint.

    So thousands of polygons need few elements.
    """
    groups: dict[str, list[str]] = {}
    for i, (polygon, kind) in enumerate(zip(plane.polygons, plane.classes, strict=True)):
        tint = f" tint-{i % _TINTS}" if plane.exact else ""
        groups.setdefault(f"{palette[kind]}{tint}", []).append(_closed(polygon, frame))
    for name, paths in groups.items():
        yield (
            f'<path class="{"cell" if plane.exact else "strip-of-grid"} {name}" '
            f'd="{"".join(paths)}"/>'
        )


def _marks(plane: Plane, frame: Frame) -> Iterable[str]:
    for k, (s, t) in enumerate(plane.marks):
        if max(abs(s), abs(t)) > plane.half:
            continue
        x, y = frame.px(s), frame.py(t)
        if k == 0:
            yield f'<circle class="origin" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' + _text(
                "value", x + 8, y - 7, "x", "start"
            )
        else:
            yield (
                f'<path class="example" d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"/>'
                + _text("value", x - 8, y - 9, "x′" if k == 1 else "x″", "end")
            )


def _closed(polygon: Outline, frame: Frame) -> str:
    points = [f"{frame.px(s):.1f} {frame.py(t):.1f}" for s, t in polygon]
    return f"M{'L'.join(points)}Z"


def _segments(segments: Sequence[Outline], frame: Frame) -> str:
    return "".join(
        f"M{frame.px(a[0]):.1f} {frame.py(a[1]):.1f}L{frame.px(b[0]):.1f} {frame.py(b[1]):.1f}"
        for a, b in segments
    )


def _area(polygon: Outline) -> float:
    after = [*polygon[1:], polygon[0]]
    return abs(sum(a * d - b * c for (a, b), (c, d) in zip(polygon, after, strict=True))) / 2
