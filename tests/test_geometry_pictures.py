"""Do the pictures show what is there? Polygons against the model itself, drawings as well-formed
markup, and the page in a browser.
"""

from __future__ import annotations

import math
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from terminal import calipers
from test_geometry_regions import NETS, classifier, posed, seeded
from test_report_browser import FLAGS, LOOK
from torch import Tensor, nn

from calipers.api import geometry
from calipers.api.geometry import local_geometry
from calipers.errors import BadInput
from calipers.geometry import subdivision as cutting
from calipers.geometry.linear_pieces import Pieces
from calipers.geometry.plane_sections import Slice, plane_slices
from calipers.geometry.regions import regions_of
from calipers.geometry.subdivision import cells, decided
from calipers.graph.capture import graph_of
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.report import slices
from calipers.report.geometry import GeometryResult, drawings
from calipers.report.ladder import Ladder, Rung, key, ladder, scatter
from calipers.report.maps import gradient_map
from calipers.threats.ball import Ball

SQUARE = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)


def plane_of(name: str, seed: int) -> tuple[Problem, Tensor, Tensor]:
    problem = posed(name, seed, "l2")
    axes = torch.randn(
        2, *NETS[name][1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return problem, problem.x[0], axes


def inside(corners: Tensor, count: int, seed: int = 0) -> Tensor:
    """Points well inside a convex polygon, as mixtures of its corners."""
    weight = (
        torch.rand(
            count, len(corners), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        + 0.05
    )
    return (weight / weight.sum(1, keepdim=True)) @ corners


def area(corners: Tensor) -> float:
    after = corners.roll(-1, 0)
    return float((corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]).sum().abs() / 2)


# it takes ten seconds
SLOWER = [
    pytest.param(name, marks=[pytest.mark.slow] if name == "convolutional" else []) for name in NETS
]


# ---- polygons
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLOWER)
def test_regions_tile_the_plane_and_each_is_one_pattern(name: str) -> None:
    for seed in range(2):
        problem, x, axes = plane_of(name, seed)
        graph = graph_of(problem.classifier, problem.x)
        found = cells(graph, x, axes, SQUARE)
        assert sum(map(area, found.corners)) == pytest.approx(4.0, rel=1e-9)
        seen = set()
        for corners, m in zip(found.corners, found.maps, strict=True):
            if area(corners) < 1e-7:
                continue
            at = inside(corners, 5)
            points = x + torch.einsum("mk,k...->m...", at, axes)
            pattern = Pieces.at(graph, points).pattern()
            assert bool((pattern == pattern[0]).all())
            torch.testing.assert_close(
                m[0] + at @ m[1:], graph.values(points)[-1], atol=1e-9, rtol=1e-9
            )
            seen.add(tuple(pattern[0].tolist()))
        grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 120, dtype=torch.float64) * 0.999] * 2)
        sampled = {
            tuple(p)
            for p in Pieces.at(graph, x + torch.einsum("mk,k...->m...", grid, axes))
            .pattern()
            .tolist()
        }
        assert sampled <= seen and len(seen) > 5, "sampling met a region that was not cut out"


@pytest.mark.parametrize("name", SLOWER)
def test_cut_decisions_are_the_models_own(name: str) -> None:
    problem, x, axes = plane_of(name, 1)
    found = cells(graph_of(problem.classifier, problem.x), x, axes, 3 * SQUARE)
    parts, classes = decided(found)
    assert (
        sum(map(area, parts.corners)) == pytest.approx(36.0, rel=1e-9)
        and len(set(classes.tolist())) > 1
    )
    for corners, kind in zip(parts.corners, classes.tolist(), strict=True):
        if area(corners) > 1e-6:
            points = x + torch.einsum("mk,k...->m...", inside(corners, 4), axes)
            assert problem.classifier.logits64(points).argmax(1).tolist() == [kind] * 4


def test_a_plane_of_too_many_regions_is_refused_early() -> None:
    problem, x, axes = plane_of("convolutional", 0)
    with pytest.raises(BadInput, match="smaller part of the plane"):
        cells(graph_of(problem.classifier, problem.x), x, axes, 10 * SQUARE, most=20)


def test_a_kink_that_is_overlooked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: cut at the first kink of each operation only. A polygon then holds several
    patterns.
    """
    problem, x, axes = plane_of("mixed", 0)
    graph = graph_of(problem.classifier, problem.x)
    whole = cutting.breakpoints_of
    right = cells(graph, x, axes, 3 * SQUARE)
    monkeypatch.setattr(
        cutting, "breakpoints_of", lambda op: None if whole(op) is None else whole(op)[:1]
    )  # type: ignore[index]
    wrong = cells(graph, x, axes, 3 * SQUARE)
    assert len(wrong.corners) < len(right.corners)
    patterns = [
        Pieces.at(graph, x + torch.einsum("mk,k...->m...", inside(c, 20), axes)).pattern()
        for c in wrong.corners
        if area(c) > 1e-6
    ]
    assert any(bool((p != p[0]).any()) for p in patterns)


# ---- slices
# --------------------------------------------------------------------------------------------------


def sliced(
    norm: str, most: int = 20_000, model: nn.Module | None = None
) -> tuple[Problem, tuple[Slice, ...]]:
    net = model or classifier("dense", 1)
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = Problem.pose(net, x, torch.zeros(40, dtype=torch.long), Ball(norm, 0.1, box=None))
    y = problem.classifier.logits(x).argmax(1)
    problem = Problem.pose(problem.classifier, x, y, Ball(norm, 0.1, box=None))
    other = 8 * x  # far along rays from the origin some decision changes
    far = torch.nonzero(problem.classifier.logits(other).argmax(1) != y).flatten()
    i = int(far[0])
    return problem, plane_slices(problem, i, other[i], most=most)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_slice_is_to_scale_and_its_ball_fits_its_region(norm: str) -> None:
    problem, views = sliced(norm)
    (view,) = views[-1:]
    assert view.exact and view.own and view.regions > 3
    i = view.index
    assert view.marks[1][0] == pytest.approx(
        float(problem.region.take(slice(i, i + 1)).distance(8 * problem.x[i : i + 1]))
    )
    border = float(regions_of(problem.take([i])).border)
    own = torch.tensor(view.own, dtype=torch.float64)
    ring = border * torch.tensor(view.unit, dtype=torch.float64)
    turns = own.roll(-1, 0) - own
    sides = turns[:, None, 0] * (ring[None, :, 1] - own[:, None, 1]) - turns[:, None, 1] * (
        ring[None, :, 0] - own[:, None, 0]
    )
    assert bool((sides * sides.sum().sign() >= -1e-9 * border).all()), (
        "the ball of that radius leaves the region"
    )


def test_many_regions_are_drawn_near_the_point_and_decisions_on_a_grid() -> None:
    problem, views = sliced("l2", most=6)
    wide, near = views
    assert not wide.exact and near.exact and near.half < wide.half and near.regions <= 6
    assert wide.boundary, "the decision changes in the wide view"
    x = problem.x[wide.index]
    u = 8 * x - x
    u = u / torch.linalg.vector_norm(u)
    crossings = [s for (s, t), _ in wide.boundary if abs(t) < wide.half / 150 and s > 0]
    path = x + torch.linspace(0, wide.half, 4000, dtype=torch.float64)[:, None] * u
    answers = problem.classifier.logits(path).argmax(1)
    first = float(torch.nonzero(answers != problem.y[wide.index]).flatten()[0]) / 3999 * wide.half
    assert min(crossings) == pytest.approx(first, abs=wide.half / 60)


def test_curved_networks_are_drawn_without_regions() -> None:
    net = seeded(1, lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    _, views = sliced("l2", model=net)
    assert len(views) == 1 and not views[0].exact and views[0].regions == 0 and not views[0].own


def test_directions_that_are_none_are_refused() -> None:
    problem, _ = sliced("l2")
    with pytest.raises(BadInput, match="no direction"):
        plane_slices(problem, 0, problem.x[0])
    with pytest.raises(BadInput, match="same direction"):
        plane_slices(problem, 0, problem.x[0] + 1, problem.x[0] + 2)


# ---- drawings
# --------------------------------------------------------------------------------------------------

FOUND = Ladder(
    ("point 0", "<b>1</b>"),
    (
        Rung("IBP", "lower", (0.01, 0.0)),
        Rung("CROWN", "lower", (0.03, 0.02)),
        Rung("FMN", "upper", (0.05, math.nan)),
        Rung("IterativeTightening", "upper", (0.06, 0.2)),
    ),
    "linf",
)


def markup(text: str) -> ET.Element:
    return ET.fromstring(f"<all>{text}</all>")


def test_a_ladder_joins_proofs_and_examples() -> None:
    assert FOUND.bracket(0) == (0.03, 0.05) and FOUND.bracket(1) == (0.02, 0.2)
    drawn = markup(ladder(FOUND))
    marks = [e for e in drawn.iter() if e.get("class", "").startswith("mark")]
    assert len(marks) == 6 and len({(e.get("class"), e.get("d")) for e in marks}) == 4
    bars = {
        kind: [e for e in drawn.iter("rect") if e.get("class") == kind]
        for kind in ("robust-soft", "unknown", "broken-soft")
    }
    assert all(len(found) == 2 for found in bars.values())
    first = [bars[kind][0] for kind in ("robust-soft", "unknown", "broken-soft")]
    ends = [
        (float(e.get("x", "")), float(e.get("x", "")) + float(e.get("width", ""))) for e in first
    ]
    assert ends[0][1] == pytest.approx(ends[1][0], abs=0.2) and ends[1][1] == pytest.approx(
        ends[2][0], abs=0.2
    )
    per = (ends[0][1] - ends[0][0]) / 0.03
    assert (ends[1][1] - ends[0][0]) / per == pytest.approx(0.05, rel=0.02)  # to one scale
    assert len(key(FOUND)) == 4 and all(markup(sign) is not None for sign, _ in key(FOUND))


def test_a_scatter_leaves_out_what_has_no_distance() -> None:
    size = slices.SQUARE
    drawn = markup(
        scatter(
            [1e-4, 0.2, math.inf, 0.1],
            [(0.01, 0.05), (0.1, 0.1), (0.1, 0.2), (0.0, math.inf)],
            "l2",
            size,
        )
    )
    assert len([e for e in drawn.iter("circle") if "broken" in e.get("class", "")]) == 2
    assert (
        any(e.get("class") == "asked" for e in drawn.iter())
        and scatter([math.nan], [(0.1, 0.2)], "l2", size) == ""
    )


def test_slices_are_well_formed_and_name_their_classes() -> None:
    for most in (20_000, 6):
        _, views = sliced("l2", most)
        palette = slices.colours(views)
        assert palette[views[0].label] == "class-own" and len(set(palette.values())) == len(palette)
        for view in views:
            drawn = markup(slices.plane(view, palette, 0.1, 0.01))
            classes = {e.get("class", "") for e in drawn.iter("path")}
            assert any("class-own" in c for c in classes)
            assert ("own-region" in classes) == view.exact


def test_a_gradient_map_says_where_the_gradient_is() -> None:
    gradient = np.zeros((1, 10, 10))
    gradient[0, 0, :5] = 1.0
    one = gradient_map(3, np.zeros((1, 10, 10)), gradient, None, (0.0, 1.0), "class 1")
    assert one.share == 1.0 and "data:image/png" in one.gradient and one.change == ""
    strip = gradient_map(3, np.zeros(7), np.arange(7.0), np.ones(7), (0.0, 1.0), "class 1")
    assert all(markup(part) is not None for part in (strip.point, strip.gradient, strip.change))
    assert gradient_map(0, np.zeros(7), np.zeros(7), None, (0.0, 0.0), "").share == 0.0


# ---- the whole
# --------------------------------------------------------------------------------------------------

TOOLS = ("FMN(steps=20)", "CertifiedRadius(IBP(), rounds=4)", "CertifiedRadius(CROWN(), rounds=4)")


def portrayed(
    build: Callable[[], nn.Module], norm: str = "linf", *, exact: bool = False
) -> GeometryResult:
    net = seeded(1, build)
    x = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = net(x).argmax(1)
    y[3] = (y[3] + 1) % 3
    return local_geometry(
        Classifier(net, name="<script>alert(1)</script>"),
        x,
        y,
        Ball(norm, 0.1),
        tools=TOOLS,
        exact=exact and 20,
    ).drawn(slices=1, maps=2)


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )


def curved() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_usual_ladder_ends_in_searches_for_radii(norm: str) -> None:
    tools = [repr(tool) for tool in geometry._usual(Ball(norm, 0.1))]
    assert [name for name in tools if name.startswith("CertifiedRadius(certifier=CROWN(")]
    assert not [name for name in tools if name.startswith("LinearRegion(")]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_portrait_keeps_its_promises(norm: str) -> None:
    found = portrayed(small, norm)
    names = [r.name for r in found.ladder.rungs]
    assert names[0] == "linear region" and {"FMN", "IBP", "CROWN"} <= set(names)
    for p in found.points:
        if p.index == 3:
            assert p.upper == 0 and p.prediction != p.label
            continue
        assert (
            0 < p.proved_border <= p.border
            and p.lower < p.upper
            and p.lower >= min(p.proved_border, p.decision) * (1 - 1e-6)
        )
        assert p.exit >= p.border * (1 - 1e-9), (
            "no direction leaves the region before its nearest border"
        )
        assert not p.exact or p.upper == pytest.approx(p.decision, rel=1e-5)
    assert "wrong: the model says" in str(found) and len(found.ladder.points) == 9
    assert all(len(r.values) == 9 for r in found.ladder.rungs)


def test_exact_distances_close_the_ladder() -> None:
    found = portrayed(small, exact=True)
    (proved,) = [r for r in found.ladder.rungs if r.name == "MILP" and r.side == "lower"]
    assert all(p.lower >= p.upper * (1 - 1e-4) for p in found.points if p.index != 3)
    assert all(
        max(r.values[i] for r in found.ladder.rungs if r.side == "lower") == value
        for i, value in enumerate(proved.values)
    )


def test_a_curved_network_has_a_portrait_without_regions() -> None:
    found = portrayed(curved, exact=True)
    assert "MILP" not in {r.name for r in found.ladder.rungs}
    assert "not piecewise linear" in found.regions and math.isnan(found.points[0].border)
    assert (
        "linear region" not in {r.name for r in found.ladder.rungs}
        and found.points[0].upper > found.points[0].lower > 0
    )
    assert drawings(found)["scatter"] == "" and "not piecewise linear" in str(found)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_stands_alone_and_fits(tmp_path: Path, scheme: str, width: int) -> None:
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
    page = portrayed(small).report(tmp_path / "geometry.html")
    said: list[str] = []
    asked: list[str] = []
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=program, args=FLAGS)
        tab = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        seen = tab.evaluate(LOOK)
        chromium.close()
    assert not said, said
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert seen["overflow"] <= 0 and not seen["overhanging"], (
        f"too wide at {width} by {seen['overflow']} pixels: {seen['overhanging']}"
    )
    assert len(seen["figures"]) >= 4 and min(min(size) for size in seen["figures"]) > 15
    assert (
        seen["smallest"] >= 10
        and seen["contrast"] >= 4.5
        and (seen["paper"] < 0.2) == (scheme == "dark")
    )


MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
"""


def test_the_command_line_draws_a_page(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "points.npz",
        x=rng.random((6, 1, 3, 4), dtype=np.float32),
        y=rng.integers(0, 3, 6),
    )
    words = [
        "geometry",
        "--model",
        "net.py:build",
        "--data",
        "points.npz",
        "--ladder",
        "FMN(steps=10); CertifiedRadius(CROWN(), rounds=3)",
    ]
    done = calipers(tmp_path, *words, "--slices", "1", "--exact")
    assert done.returncode == 0, done.stderr
    assert "linear within" in done.stdout and all(
        name in (tmp_path / "geometry.html").read_text() for name in ("CROWN", "MILP")
    )
    refused = calipers(
        tmp_path,
        "geometry",
        "--model",
        "net.py:build",
        "--data",
        "points.npz",
        "--norm",
        "l0",
        "--epsilon",
        "1",
    )
    assert refused.returncode == 2 and "linf, l2 or l1" in refused.stderr
