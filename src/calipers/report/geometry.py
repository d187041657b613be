"""Portraits of a model's geometry, as a page and as a table.

They show why a model is fragile at some points. Imports without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from calipers.errors import BadInput
from calipers.report import ladder as ladders
from calipers.report import slices
from calipers.report.figures import HALF, PHONE
from calipers.report.ladder import Ladder
from calipers.report.maps import Map
from calipers.report.slices import Plane

Pictures = tuple[tuple[tuple[Plane, ...], ...], tuple[Map, ...]]
"""Slices and gradient maps."""
_RUNGS_OF = 24  # points whose ladders are drawn; the table has all


@dataclass(frozen=True)
class PointGeometry:
    """The geometry around one point.

    Distances are in the threat's norm, infinite or NaN where there is none. `gradient` is the dual
    norm of the worst margin's gradient, `first_order` margin / gradient (an estimate). `border` is
    the computed distance d_B to the border of the point's linear region, `proved_border` what is
    proved of it; `decision` is the distance d_D to the decision boundary of the region's affine
    map, `exact` says whether that is the adversarial distance. `exit` is how far the region reaches
    along the steepest step, `crossed` how many regions lie on the way to the nearest example (0:
    not counted).
    """

    index: int
    label: int
    prediction: int
    margin: float
    gradient: float
    first_order: float
    border: float
    proved_border: float
    decision: float
    exact: bool
    exit: float
    crossed: int
    lower: float
    upper: float
    where: str


@dataclass(frozen=True, eq=False)
class GeometryResult:
    """All that was measured of a model's geometry.

    Args:
        title: Name of the model.
        unit: The norm and unit of distances, in words.
        radius: The radius asked about.
        points: One entry for each point.
        ladder: All tools' bounds on the distances.
        regions: "" for a network with linear regions, else a sentence on why there are none.
        draw: Computes pictures, slices and maps, for so many points.
        slices: Planes through points, as `calipers.geometry.plane_sections` computes them.
        maps: Gradient maps.

    Returns:
        A frozen dataclass; `str` gives the table for a terminal.

    Raises:
        Nothing.
    """

    title: str
    unit: str
    radius: float
    points: tuple[PointGeometry, ...]
    ladder: Ladder
    regions: str
    draw: Callable[[int, int], Pictures] = field(repr=False)
    slices: tuple[tuple[Plane, ...], ...] = field(default=(), repr=False)
    maps: tuple[Map, ...] = field(default=(), repr=False)

    def drawn(self, slices: int = 2, maps: int = 6) -> GeometryResult:
        """Return the same result with its pictures.

        Args:
            slices: For how many of the points that have an adversarial example its plane is drawn,
                at the cost of a forward pass for each linear region and grid point.
            maps: For how many points the gradient is shown as a picture.

        Raises:
            BadInput: For a number below 0.
        """
        if slices < 0 or maps < 0:
            raise BadInput(f"the number of pictures is 0 or more, got {min(slices, maps)}")
        planes, gradients = self.draw(slices, maps)
        return replace(self, slices=planes, maps=gradients)

    def report(self, path: str | Path = "geometry.html", slices: int = 2, maps: int = 6) -> Path:
        """Write the page with its pictures (see `drawn`), and return its path."""
        from calipers.report.render import render_geometry

        return render_geometry([self.drawn(slices, maps)], path)

    def __str__(self) -> str:
        return text(self)


def drawings(portrait: GeometryResult) -> dict[str, str]:
    """Return the ladder and the scatter plot, for a wide page and for a phone."""
    found, rights = (
        portrait.ladder,
        [i for i, p in enumerate(portrait.points) if p.label == p.prediction],
    )
    brackets = [(portrait.points[i].lower, portrait.points[i].upper) for i in rights]
    proved_border = [portrait.points[i].border for i in rights]
    both = [ladders.scatter(proved_border, brackets, found.unit, size) for size in (HALF, PHONE)]
    drawn = (
        [
            ladders.ladder(found.first(_RUNGS_OF), size)
            for size in (ladders.TALL, ladders.TALL_PHONE)
        ]
        if found.points
        else []
    )
    return {"ladder": "".join(drawn), "scatter": "".join(both)}


@dataclass(frozen=True)
class GeometryExhibit:
    """The slices of one point: captioned drawings, and the classes' colours."""

    index: int
    label: int
    views: tuple[tuple[str, str], ...]
    key: tuple[tuple[str, str], ...]


def exhibits(portrait: GeometryResult) -> list[GeometryExhibit]:
    """Return the drawings of every point that was sliced."""
    found = []
    for planes in portrait.slices:
        palette = slices.colours(planes)
        index, label = planes[0].index, planes[0].label
        proved_border = next((p.border for p in portrait.points if p.index == index), math.nan)
        views = []
        for k, plane in enumerate(planes):
            drawn = "".join(
                slices.plane(plane, palette, portrait.radius, proved_border, size)
                for size in (slices.SQUARE, slices.SQUARE_PHONE)
            )
            views.append((drawn, _caption(plane, k)))
        found.append(
            GeometryExhibit(
                index,
                label,
                tuple(views),
                tuple((name, f"taken for {kind}") for kind, name in palette.items()),
            )
        )
    return found


def _caption(plane: Plane, k: int) -> str:
    if not plane.exact:
        return "Decisions on a grid of 200 by 200; the line is where the decision changes."
    start = "The same plane near the point: all" if k else "All"
    return (
        f"{start} {plane.regions:,} linear regions, cut exactly; the point's own is outlined. "
        "Where the plane leaves a box, radii still mean what is inside."
    )


def text(portrait: GeometryResult) -> str:
    """Return the table for a terminal."""
    head = f"{portrait.title}, {portrait.unit}"
    columns = (
        "point  label  margin     |grad|*    first order  linear within  decision d_D      regions "
        "to x'  robust within  broken at"
    )
    lines = [head, columns]
    for p in portrait.points:
        if p.label != p.prediction:
            lines.append(f"{p.index:5d}  {p.label:5d}  wrong: the model says {p.prediction}")
            continue
        decision = (
            "-"
            if not math.isfinite(p.decision)
            else f"{p.decision:.4g}" + (" (exact)" if p.exact else "")
        )
        crossed = f"{p.crossed:,}" if p.crossed else "-"
        cells = (p.margin, p.gradient, p.first_order, p.proved_border)
        values = "  ".join(f"{_short(v):>{w}}" for v, w in zip(cells, (9, 9, 11, 13), strict=True))
        lines.append(
            f"{p.index:5d}  {p.label:5d}  {values}  {decision:<16}  {crossed:>13}  "
            f"{_short(p.lower):>13}  {_short(p.upper):>9}"
        )
    note = (
        portrait.regions
        or "linear within: proved; first order: an estimate; d_D: where the decision of the "
        "region's affine map would change."
    )
    return "\n".join([*lines, note])


def _short(value: float) -> str:
    return "-" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.4g}"


def median(values: Sequence[float]) -> float:
    """Return the middle one of the finite values, NaN where there are none.

    Of an even number of values it is the upper one of the middle two.
    """
    kept = sorted(v for v in values if math.isfinite(v))
    return kept[len(kept) // 2] if kept else math.nan
