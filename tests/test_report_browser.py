"""Does a browser show the report as meant? Headless Chromium: no error, no request, figures of
visible size, no sideways scrolling, both schemes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import FACTS, MIXED, ROBUST, fabricate

from calipers.report.render import render_html

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = [360, 768, 1280]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]"
    )
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        pytest.skip(
            "no Chromium on this machine: install chromium or google-chrome to look at the page"
        )
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # three questions in one record: images in grey and in colour, hostile names, vectors without a
    # lower jaw
    ledger = fabricate(MIXED * 10)
    hostile = (
        "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
        + "unbroken" * 30
    )
    facts = {**FACTS, "model": {"name": hostile, "note": "https://example.org/" + "x" * 200}}
    fabricate([*MIXED, ROBUST], ledger=ledger, fingerprint="e" * 64, facts=facts, shape=(3, 8, 8))
    fabricate(
        [(0.0, 0.05), (0.0, float("inf"))] * 4,
        ledger=ledger,
        fingerprint="d" * 64,
        facts={**FACTS, "lower_jaw": "no bounds"},
        shape=(5,),
    )
    with ledger:
        return render_html(ledger, tmp_path_factory.mktemp("page") / "report.html")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_stands_alone_and_fits(
    browser: Any, report: Path, scheme: str, width: int
) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(report.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    seen = tab.evaluate(LOOK)
    tab.close()
    assert not said, said
    assert asked[0] == report.as_uri() and all(url.startswith(("file:", "data:")) for url in asked)
    assert seen["overflow"] <= 0 and not seen["overhanging"], (
        f"too wide at {width} by {seen['overflow']} pixels: {seen['overhanging']}"
    )
    assert len(seen["figures"]) == 3 * 5 + 3 and min(min(size) for size in seen["figures"]) > 15
    assert seen["smallest"] >= 10, "text in a figure is too small to read"
    assert seen["contrast"] >= 4.5 and seen["title"] != "owned"
    assert (seen["paper"] < 0.2) == (scheme == "dark")


LOOK = """() => {
  const light = colour => {
    const part = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const contrast = element => {
    let back = element;
    while (back && getComputedStyle(back).backgroundColor === 'rgba(0, 0, 0, 0)') back = back.parentElement;
    const pair = [light(getComputedStyle(element).color), light(getComputedStyle(back || document.body).backgroundColor)];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };
  const wide = document.documentElement.clientWidth;
  const overhangs = element => !element.closest('.scroll')
    && element.getBoundingClientRect().right > element.closest('section').getBoundingClientRect().right - 12;
  const readable = 'p, li, td, th, dd, dt, h1, h2, h3, figcaption, span';
  const shown = [...document.querySelectorAll('svg.figure')].filter(svg => svg.getClientRects().length);
  return {
    overflow: document.documentElement.scrollWidth - wide,
    overhanging: [...document.querySelectorAll('section :not(svg *)')].filter(overhangs).map(e => e.tagName + ' ' + e.textContent.slice(0, 40)),
    figures: shown.map(svg => svg.getBoundingClientRect()).map(box => [box.width, box.height]),
    smallest: Math.min(...shown.flatMap(svg => [...svg.querySelectorAll('text')]).map(text => text.getBoundingClientRect().height)),
    contrast: Math.min(...[...document.querySelectorAll(readable)].filter(e => e.textContent.trim()).map(contrast)),
    paper: light(getComputedStyle(document.body).backgroundColor),
    title: document.title,
  };
}"""


def test_a_record_without_questions_is_a_page_too(browser: Any, tmp_path: Path) -> None:
    tab = browser.new_page(viewport={"width": 360, "height": 800})
    tab.goto(render_html([], tmp_path / "empty.html").as_uri())
    assert "holds no question" in tab.inner_text("main")
    tab.close()
