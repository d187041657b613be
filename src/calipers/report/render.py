"""The HTML page of a record.

One self-contained file: no script, no request, every name from the record escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from calipers.record.record import Record
from calipers.report import caveats, figures, geometry, ladder, provenance, wording
from calipers.report.gallery import Exhibit
from calipers.report.geometry import GeometryResult
from calipers.report.report import Summary, short_name, summaries
from calipers.report.tiles import Tiles, tiles

if TYPE_CHECKING:
    from jinja2 import Template

_ROWS = 1000  # points listed one by one; the record keeps the others


@dataclass(frozen=True)
class Section:
    """One question as the page shows it: a summary and its drawings.

    The drawings are trusted markup; their text was escaped where it was built.
    """

    anchor: str
    summary: Summary
    drawings: dict[str, str]
    gallery: tuple[tuple[Exhibit, Tiles], ...]
    limits: tuple[str, ...]
    provenance: list[tuple[str, list[tuple[str, str]]]]


def render_html(
    what: Record | Sequence[Summary], path: str | Path, confidence: float = 0.95
) -> Path:
    """Write the page of a ledger, or of given summaries, and return its path."""
    target = Path(path)
    # A record from elsewhere may hold lone surrogates, which no encoding can write: they become
    # question marks.
    target.write_text(
        page(summaries(what, confidence) if isinstance(what, Record) else what),
        encoding="utf-8",
        errors="replace",
    )
    return target


def page(found: Sequence[Summary]) -> str:
    """Return the page as text."""
    sections = [_section(f"question-{i}", summary) for i, summary in enumerate(found, start=1)]
    return _template().render(sections=sections, css=_read("page.css"), rows=_ROWS)


def _section(anchor: str, summary: Summary) -> Section:
    return Section(
        anchor,
        summary,
        _drawings(summary),
        tuple((exhibit, tiles(exhibit)) for exhibit in summary.gallery),
        tuple(caveats.limits(summary)),
        provenance.provenance(summary.facts),
    )


def _drawings(summary: Summary) -> dict[str, str]:
    """Return every figure twice, for a wide page and for a phone.

    The style sheet shows one of the two.
    """
    builders: list[tuple[str, Callable[[Summary, figures.Size], str], figures.Size]] = [
        ("gauge", figures.gauge, figures.WIDE),
        ("curve", figures.curve, figures.FULL),
        ("brackets", figures.brackets, figures.HALF),
        ("histogram", figures.histogram, figures.HALF),
        ("classes", figures.classes, figures.HALF),
    ]
    drawn = {
        name: build(summary, wide) + build(summary, figures.PHONE) for name, build, wide in builders
    }
    return {**drawn, "bare": figures.gauge(summary, figures.INLINE, bare=True)}


def render_geometry(found: Sequence[GeometryResult], path: str | Path) -> Path:
    """Write the page about a model's geometry, and return its path."""
    target = Path(path)
    shown = [{**vars(p), **_point_of(p)} for p in found]
    css = _read("page.css") + _read("geometry.css")
    target.write_text(
        _template("geometry.html.j2").render(portraits=shown, css=css, median=geometry.median),
        encoding="utf-8",
        errors="replace",
    )
    return target


def _point_of(p: GeometryResult) -> dict[str, object]:
    points = [{**vars(r), "right": r.label == r.prediction} for r in p.points]
    wrong = sum(not r["right"] for r in points)
    return {
        "points": points,
        "wrong": wrong,
        "drawings": geometry.drawings(p),
        "exhibits": geometry.exhibits(p),
        "key": ladder.key(p.ladder),
    }


def _template(name: str = "page.html.j2") -> Template:
    from jinja2 import Environment, StrictUndefined  # imported here: only a page needs it

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(w=wording, caveats=caveats)
    environment.filters.update(short_name=short_name, finite=_is_finite)
    return environment.from_string(_read(name))


def _is_finite(value: float) -> bool:
    return math.isfinite(value)


def _read(name: str) -> str:
    return files("calipers.report").joinpath(name).read_text(encoding="utf-8")
