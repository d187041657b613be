"""Does the reader see what was found, whatever the record holds? The terminal table and the page,
read as text.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from test_report import BROKEN, FACTS, INF, MIXED, OPEN, REFUSED, ROBUST, WRONG, fabricate, told

from calipers.record.evidence import Evidence
from calipers.record.record import Record
from calipers.report import caveats, figures, wording
from calipers.report.render import page, render_html
from calipers.report.report import Rate, summaries
from calipers.report.text import render_text

# ---- text
# --------------------------------------------------------------------------------------------------


def test_the_terminal_table_states_both_jaws(tmp_path: Path) -> None:
    with Record(tmp_path / "run.calipers") as ledger:
        lines = render_text(fabricate(MIXED, ledger=ledger)).splitlines()
    assert lines == [
        "robust accuracy, linf eps = 0.1, 16 points, 95 %",
        "  at least  37.5 %  (18.4 ..)    certified: CROWN 6",
        "  at most   56.3 %  (.. 77.0)    broken: PGD 5, clean errors 2",
        "  unknown   18.8 %  3 points. To narrow: calipers measure --record run.calipers --plan "
        "standard",
        "  clean     87.5 %  (63.9 .. 96.6)",
        "  distance median above 0.04, at most 0.3",
        "  cost     184 forwards, 182 backwards, 11.5 s",
        "  record   not checked: calipers check run.calipers replays every witness and certificate "
        "against the model",
        "  invalid  point 16 is in no rate: a feature lies outside the box",
    ]


def test_percentages_are_rounded_towards_caution() -> None:
    assert (wording.at_least(Rate(2, 3)), wording.at_most(Rate(2, 3))) == ("66.6", "66.7")
    assert (wording.at_least(Rate(9999, 10000)), wording.at_most(Rate(1, 10000))) == ("99.9", "0.1")
    assert (
        wording.at_least(Rate(29, 100)),
        wording.at_most(Rate(29, 100)),
        wording.at_least(Rate(0, 0)),
    ) == ("29.0", "29.0", "–")
    assert (
        wording.distance(0.123456, "down"),
        wording.distance(0.123456, "up"),
        wording.distance(1e-9),
    ) == (
        "0.1234",
        "0.1235",
        "1e-09",
    )


@pytest.mark.parametrize(
    ("radius", "said"),
    [
        (8 / 255, "0.03137 (8/255)"),
        (0.1, "0.1"),
        (0.2, "0.2"),
        (INF, "∞"),
        ([0.1, 0.3], "0.1 .. 0.3"),
        (1 / 3, "0.3333 (85/255)"),
        (math.pi, "3.142"),
    ],
)
def test_the_radius_is_named_as_it_was_meant(radius: Any, said: str) -> None:
    assert (
        wording.radius(
            told([ROBUST, ROBUST] if radius != INF else [BROKEN, OPEN], radius=radius, stored=False)
        )
        == said
    )


def test_a_missing_lower_jaw_is_stated_plainly() -> None:
    reason = "aten.erfinv at model.py:41 has no bounds"
    for facts, said in (
        ({**FACTS, "lower_jaw": reason}, reason),
        ({}, "no certificate is on record"),
    ):
        summary = told([(0.0, 0.05), (0.0, INF)], facts=facts)
        assert f"no certificates: {said}" in render_text([summary])
        assert said in page([summary]) and any(
            "There are no certificates" in line for line in caveats.limits(summary)
        )
    assert "no certificates" not in render_text([told([ROBUST])])


def test_a_name_cannot_steer_the_terminal() -> None:
    shown = render_text(
        [told([REFUSED, ROBUST], facts={"model": {"name": "a\x1b[2Jb\u202ec"}}, radius=0.1)] * 2
    )
    assert not [c for c in shown if c != "\n" and not c.isprintable()] and "a�[2Jb�c" in shown


# ---- the page
# --------------------------------------------------------------------------------------------------


class Balance(HTMLParser):
    """Checks that every tag that is opened is closed in its place, and collects tags and
    attributes.
    """

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag, line {self.getpos()[0]}"


def parsed(text: str) -> Balance:
    """Return the tags of a page that is known to be well formed and self-contained."""
    reader = Balance()
    reader.feed(text)
    reader.close()
    assert not reader.open
    tags = {tag for tag, _ in reader.seen}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in reader.seen:
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("data:," if tag == "link" else "#")
    assert (
        "http" not in re.sub("http-equiv", "", text)
        and "url(" not in text
        and "@import" not in text
    )
    return reader


STRANGE: dict[str, Any] = {
    "mixed": {"brackets": MIXED},
    "no points": {"brackets": []},
    "one point": {"brackets": [ROBUST]},
    "one open point": {"brackets": [(0.0, INF)]},
    "all wrong": {"brackets": [WRONG] * 3},
    "all refused": {"brackets": [REFUSED] * 3},
    "no witnesses": {"brackets": [ROBUST] * 5},
    "no certificates": {"brackets": [(0.0, 0.05), (0.0, INF)], "facts": {"lower_jaw": "no bounds"}},
    "no facts": {"brackets": MIXED, "facts": {}},
    "facts of other shapes": {
        "brackets": MIXED,
        "facts": {
            "model": "net",
            "threat": [1],
            "data": None,
            "plan": {},
            "versions": {"a": {"b": [{}]}},
        },
    },
    "own radii": {"brackets": MIXED[:3], "radius": [0.1, 0.2, 0.3]},
    "no radius": {"brackets": [BROKEN, OPEN, (0.1, INF)], "radius": INF},
    "radius nought": {"brackets": [ROBUST, BROKEN, WRONG], "radius": 0.0},
    "vectors": {"brackets": MIXED, "shape": (7,)},
    "colours": {"brackets": MIXED, "shape": (3, 8, 8)},
    "large images": {"brackets": [BROKEN], "shape": (3, 300, 200)},
    "a single number": {"brackets": [BROKEN], "shape": ()},
}


@pytest.mark.parametrize("name", STRANGE)
def test_any_ledger_becomes_text_and_a_well_formed_page(name: str) -> None:
    summary = told(**STRANGE[name])
    assert "robust accuracy" in render_text([summary])
    text = page([summary])
    parsed(text)
    assert page([summary]) == text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)
        assert not re.search(r"\bnan\b|\binf\b", drawing)


def test_a_record_without_questions_says_so() -> None:
    with Record() as ledger:
        assert summaries(ledger) == () and "holds no question" in render_text(ledger)
    parsed(page([]))
    assert "holds no question" in page([])


def test_several_models_are_compared_first() -> None:
    with fabricate(MIXED) as ledger:
        fabricate(
            [ROBUST] * 9,
            ledger=ledger,
            fingerprint="e" * 64,
            facts={**FACTS, "model": {"name": "other net"}},
        )
        found = summaries(ledger)
    text = page(found)
    parsed(text)
    assert (
        text.index("2 questions, side by side")
        < text.index('id="question-1"')
        < text.index('id="question-2"')
    )
    assert "other net" in render_text(found)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style><style>*{display:none}",
    "{{ 7 * 7 }}",
    "' onload='x",
    "]]>&lt;\x00\x1b",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_a_record_stay_text(name: str) -> None:
    facts = {
        **FACTS,
        "model": {"name": name, name: name},
        "goal": name,
        "lower_jaw": name,
        name: [name, {name: name}],
        "threat": {"norm": name, "box": name},
    }
    tool = f"{name}(steps=1)"
    found = [
        Evidence("p0", "witness", tool, 0.02, prediction=1, array=np.zeros((1, 8, 8))),
        Evidence("p1", "attempt", tool, note=name),
    ]
    proof = Evidence("p1", "certificate", tool, 0.3, guarantee=name)  # type: ignore[arg-type]
    with fabricate([BROKEN, ROBUST, REFUSED], facts=facts) as ledger:
        ledger.append(
            ledger.questions()[0].fingerprint,
            [*found, proof, Evidence("p2", "invalid", tool, note=name)],
        )
        text = page(summaries(ledger))
    clean = parsed(page([told([BROKEN, ROBUST, REFUSED])]))
    assert {tag for tag, _ in parsed(text).seen} <= {tag for tag, _ in clean.seen} | {
        "small",
        "code",
    }
    assert "49" not in re.findall(r'<h1 class="title">(.*?)</h1>', text)


def test_facts_that_nest_without_end_or_cannot_be_encoded_still_render(tmp_path: Path) -> None:
    deep: Any = "bottom"
    for _ in range(300):
        deep = {"down": deep}
    facts = {
        **FACTS,
        "deep": deep,
        "half": "\ud800",
        "long": "x" * 100_000,
        "numbers": [math.nan, 1e300, True, None],
    }
    with fabricate([BROKEN], facts=facts) as ledger:
        text = render_html(ledger, tmp_path / "report.html").read_text(encoding="utf-8")
    parsed(text)
    assert len(text) < 120_000 and "(100000 characters)" in text


def test_the_page_allows_itself_no_request() -> None:
    policies = [
        a.get("content")
        for tag, a in parsed(page([told(MIXED)])).seen
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    ]


@pytest.mark.parametrize("size", [figures.FULL, figures.HALF, figures.PHONE])
def test_figures_are_named_for_those_who_cannot_see_them(size: figures.Size) -> None:
    summary = told(MIXED)
    for build in (
        figures.curve,
        figures.gauge,
        figures.brackets,
        figures.histogram,
        figures.classes,
    ):
        drawing = ElementTree.fromstring(build(summary, size))
        assert (
            drawing.get("role") == "img"
            and drawing.get("aria-label") == drawing.findtext("title") != ""
        )


@pytest.mark.parametrize(
    ("high", "count"), [(1.0, 5), (0.15, 7), (3e-7, 4), (8 / 255, 6), (12345.0, 4)]
)
def test_ticks_are_few_round_and_inside(high: float, count: int) -> None:
    found = figures.ticks(0, high, count)
    assert 2 <= len(found) <= count + 1 and all(
        0 <= value <= high * (1 + 1e-9) for value, _ in found
    )
    assert len({name for _, name in found}) == len(found)


def test_a_report_is_made_without_torch(tmp_path: Path) -> None:
    with Record(tmp_path / "run.calipers") as ledger:
        fabricate(MIXED, ledger=ledger)
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")
sys.meta_path.insert(0, Blocked())
from calipers.record.record import Record
from calipers.report.render import render_html
from calipers.report.text import render_text
ledger = Record(sys.argv[1], read_only=True)
print(render_text(ledger))
render_html(ledger, sys.argv[2])
"""
    arguments = [
        sys.executable,
        "-c",
        code,
        str(tmp_path / "run.calipers"),
        str(tmp_path / "report.html"),
    ]
    source = str(Path(figures.__file__).parents[2])
    done = subprocess.run(
        arguments,
        env={"PYTHONPATH": source, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "at least" in done.stdout and (tmp_path / "report.html").stat().st_size > 10_000
