"""Does a report count what the record holds? Fabricated ledgers, read back as numbers and
pictures.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from calipers.errors import Contradiction
from calipers.record.evidence import Evidence, Point, Question
from calipers.record.record import Record
from calipers.report import caveats
from calipers.report.gallery import data_range
from calipers.report.render import page
from calipers.report.report import Summary, summaries
from calipers.report.tiles import as_image, png, tiles

INF = math.inf
ROBUST, BROKEN, OPEN, WRONG, REFUSED = (
    (0.2, INF),
    (0.01, 0.05),
    (0.04, 0.3),
    (0.0, 0.0),
    (math.nan, math.nan),
)
ATTACK, PROOF = "PGD(steps=7, restarts=2)", "CROWN(slopes='adaptive')"
FACTS = {
    "model": {
        "name": "net",
        "hash": "ab" * 32,
        "parameters": 1234,
        "dtype": "float32",
        "device": "cpu",
        "mean": [0.13],
        "std": [0.31],
    },
    "threat": {
        "norm": "linf",
        "radius": 0.1,
        "box": [0, 1],
        "units": "native",
        "radius_standardised": 0.32,
        "masked_features": 0,
        "weights": None,
    },
    "goal": "untargeted",
    "data": {"shape": [8, 8], "hash": "cd" * 32},
    "versions": {"calipers": "0.1.0"},
    "seed": 0,
    "lower_jaw": "available",
    "plan": [ATTACK, PROOF],
}


def fabricate(
    brackets: Sequence[tuple[float, float]],
    *,
    ledger: Record | None = None,
    facts: dict[str, Any] | None = None,
    fingerprint: str = "f" * 64,
    shape: tuple[int, ...] = (1, 8, 8),
    radius: float | Sequence[float] = 0.1,
    stored: bool = True,
) -> Record:
    """Return a ledger with one question whose points have these brackets, labels 0, 1, 2 in turn;
    NaN stands for a point that cannot be measured.
    """
    ledger, draw = ledger or Record(), np.random.default_rng(0)
    radii = np.broadcast_to(radius, len(brackets))
    points = [
        Point(f"p{i}", i, i % 3, float(radii[i]), draw.random(shape).astype(np.float32))
        for i in range(len(brackets))
    ]
    ledger.ask(Question(fingerprint, "a question", FACTS if facts is None else facts), points)
    for point, (lower, upper) in zip(points, brackets, strict=True):
        ledger.append(fingerprint, evidence_of(point, lower, upper, stored))
    return ledger


def evidence_of(point: Point, lower: float, upper: float, stored: bool = True) -> list[Evidence]:
    """Return what a run would have admitted about one point."""
    if math.isnan(lower):
        return [Evidence(point.name, "invalid", "referee", note="a feature lies outside the box")]
    answer = (point.label + (upper == 0)) % 3
    facts = [
        Evidence(
            point.name,
            "clean",
            "clean",
            margin=1.5 if upper else -0.5,
            prediction=answer,
            forwards=1,
            seconds=0.5,
        )
    ]
    if lower > 0:
        facts.append(
            Evidence(
                point.name,
                "certificate",
                PROOF,
                lower,
                0.1,
                "float64-checked",
                forwards=2,
                backwards=3,
                seconds=0.25,
            )
        )
    if upper == 0:
        facts.append(Evidence(point.name, "witness", "clean", 0.0, -0.5, prediction=answer))
    elif math.isfinite(upper):
        moved = (
            np.clip(point.array + np.float32(upper) * np.where(point.array > 0.5, -1, 1), 0, 1)
            if stored
            else None
        )
        facts.append(
            Evidence(
                point.name,
                "witness",
                ATTACK,
                upper,
                -0.01,
                prediction=(point.label + 1) % 3,
                forwards=7,
                backwards=7,
                array=moved,
            )
        )
    else:
        facts.append(
            Evidence(
                point.name, "attempt", ATTACK, forwards=14, backwards=14, note="no example found"
            )
        )
    return facts


def told(brackets: Sequence[tuple[float, float]], **options: Any) -> Summary:
    """Return the summary of such a ledger."""
    with fabricate(brackets, **options) as ledger:
        return summaries(ledger)[0]


MIXED = [ROBUST] * 6 + [BROKEN] * 5 + [OPEN] * 3 + [WRONG] * 2 + [REFUSED]


# ---- numbers
# --------------------------------------------------------------------------------------------------


def test_the_two_sided_interval_is_the_published_example() -> None:
    summary = told([ROBUST] * 300 + [OPEN] * 170 + [BROKEN] * 530, stored=False)
    assert (summary.robust.certified.count, summary.robust.attacked.count, summary.n) == (
        300,
        470,
        1000,
    )
    assert summary.robust.interval == pytest.approx((0.2724, 0.5010), abs=5e-5)
    assert summary.robust.attacked.wilson.low == pytest.approx(0.4392, abs=5e-5)
    assert summary.robust.attacked.exact.high == pytest.approx(0.5015, abs=5e-5)


def test_verdicts_and_tools_are_counted() -> None:
    summary = told(MIXED)
    robust = summary.robust
    assert (summary.n, robust.certified.count, robust.attacked.count, robust.unknown) == (
        16,
        6,
        9,
        3,
    )
    assert robust.unknown_share == pytest.approx(3 / 16)
    assert [(c.name, c.points) for c in summary.certified_by] == [("CROWN", 6)]
    assert [(c.name, c.points) for c in summary.broken_by] == [("PGD", 5)]
    assert (summary.clean_errors, summary.clean.count, summary.clean.of) == (2, 14, 16)
    assert summary.guarantees == (("float64-checked", 6),)


def test_rows_carry_what_is_known_of_each_point() -> None:
    rows = told([BROKEN, WRONG, ROBUST]).rows
    assert [r.verdict for r in rows] == ["broken", "broken", "robust"]
    assert [r.tool for r in rows] == ["PGD", "clean error", "CROWN"]
    assert (rows[0].lower, rows[0].upper, rows[0].margin, rows[0].prediction) == (
        0.01,
        0.05,
        1.5,
        0,
    )
    assert (rows[0].forwards, rows[0].backwards, rows[0].seconds) == (10, 10, 0.75)


def test_an_invalid_point_is_in_no_rate_but_listed() -> None:
    summary = told(MIXED)
    assert [(r.index, r.note) for r in summary.invalid] == [(16, "a feature lies outside the box")]
    assert len(summary.rows) == 17 and sum(c.certified.of for c in summary.classes) == 16


def test_a_point_not_looked_at_is_unknown_and_not_clean() -> None:
    with fabricate([ROBUST, BROKEN]) as ledger:
        ledger.ask(ledger.questions()[0], [Point("late", 2, 0, 0.0, np.zeros((1, 8, 8)))])
        summary = summaries(ledger)[0]
    assert (summary.rows[2].verdict, summary.unseen, summary.clean.of, summary.n) == (
        "unknown",
        1,
        2,
        3,
    )
    assert summary.curve.at(0.0)[0] == pytest.approx(2 / 3)
    assert any("not looked at" in line for line in caveats.limits(summary))


def test_classes_are_counted_with_their_intervals() -> None:
    rows = told([ROBUST, BROKEN, OPEN, WRONG]).classes
    assert [
        (c.label, c.certified.count, c.attacked.count, c.clean.count, c.clean.of) for c in rows
    ] == [
        (0, 1, 1, 1, 2),
        (1, 0, 0, 1, 1),
        (2, 0, 1, 1, 1),
    ]
    assert rows[0].certified.wilson.low < 0.5 < rows[0].certified.wilson.high


def test_costs_are_summed_for_each_tool() -> None:
    costs = {c.tool: c for c in told([ROBUST, BROKEN, WRONG, REFUSED]).costs}
    assert set(costs) == {"clean", PROOF, ATTACK}
    assert (
        costs[ATTACK].tried,
        costs[ATTACK].settled,
        costs[ATTACK].forwards,
        costs[ATTACK].notes,
    ) == (
        2,
        1,
        21,
        (("no example found", 1),),
    )
    assert (costs[PROOF].tried, costs[PROOF].settled, costs[PROOF].backwards) == (2, 1, 6)
    assert (costs["clean"].tried, costs["clean"].settled, costs["clean"].seconds) == (3, 1, 1.5)


def test_a_contradiction_is_not_reported_over() -> None:
    with pytest.raises(Contradiction, match="PGD"):
        told([(0.3, 0.2)])


# ---- distances
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_curves_fall_and_never_cross(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lower = draw.random(40) * (draw.random(40) < 0.7)
    upper = np.where(draw.random(40) < 0.6, lower + 0.01 + draw.random(40), INF)
    summary = told([*zip(lower, upper, strict=True), WRONG, WRONG], stored=False, radius=0.4)
    curve = summary.curve
    assert (
        np.all(np.diff(curve.radii) > 0)
        and np.all(np.diff(curve.certified) <= 0)
        and np.all(np.diff(curve.attacked) <= 0)
    )
    assert np.all(curve.certified <= curve.attacked)
    assert curve.at(0.0)[0] == pytest.approx(summary.clean.share) == curve.at(0.0)[1]
    assert curve.at(0.4) == pytest.approx(
        (summary.robust.certified.share, summary.robust.attacked.share)
    )
    for radius in [*draw.random(20), *lower[lower > 0][:5], *upper[np.isfinite(upper)][:5]]:
        assert curve.at(radius) == pytest.approx(
            (np.sum(lower >= radius) / 42, np.sum(upper > radius) / 42)
        )


def test_the_band_is_the_simultaneous_one() -> None:
    assert told([ROBUST] * 100, stored=False).curve.half_width == pytest.approx(0.1358, abs=1e-4)


def test_quantiles_are_order_statistics_of_both_ends() -> None:
    summary = told([(0.1 * k, 0.1 * k + 0.05) for k in range(1, 11)])
    median = summary.quantiles[1]
    assert (median.share, median.lower, median.upper) == pytest.approx((0.5, 0.5, 0.55))
    assert median.low <= median.lower and median.upper <= median.high
    assert told([(0.1, INF)] * 3).quantiles[1].upper == INF


def test_every_end_of_a_bracket_is_counted_once() -> None:
    h = told([*MIXED, (0.0, 0.2), (0.0, INF)]).histogram
    assert (h.no_witness, h.no_certificate, h.clean_errors) == (7, 2, 2)
    assert (
        h.lower.sum() + h.no_certificate + h.clean_errors
        == 18
        == h.upper.sum() + h.no_witness + h.clean_errors
    )


def test_the_figure_reaches_past_the_radius_asked_unless_that_only_caps_a_search() -> None:
    assert told([BROKEN, ROBUST]).curve.reach > 0.2
    assert told([BROKEN] * 5, radius=100.0).curve.reach < 0.1
    assert told([], radius=0.1).curve.reach == 1.0


# ---- witnesses
# --------------------------------------------------------------------------------------------------


def test_the_gallery_shows_the_nearest_and_every_class() -> None:
    summary = told([(0.0, 0.01 + 0.001 * i) for i in range(30)] + [ROBUST, WRONG])
    distances = [e.distance for e in summary.gallery]
    assert len(distances) == 12 and distances[:4] == pytest.approx([0.01, 0.011, 0.012, 0.013])
    assert {e.label for e in summary.gallery[4:7]} == {0, 1, 2}
    assert all(e.distance > 0 for e in summary.gallery)


def test_differences_are_described_in_the_boxs_range() -> None:
    (exhibit,) = told([(0.0, 0.05)], shape=(4,)).gallery
    assert exhibit.linf == pytest.approx(0.05, rel=1e-5) and exhibit.l2 == pytest.approx(
        0.1, rel=1e-5
    )
    assert (
        exhibit.psnr == pytest.approx(-20 * math.log10(0.05), rel=1e-5)
        and exhibit.changed == 4
        and exhibit.distance == 0.05
    )


def test_witnesses_without_a_stored_input_are_left_out_of_the_gallery() -> None:
    summary = told([BROKEN] * 3, stored=False)
    assert summary.gallery == () and "the inputs are not" in page([summary])
    assert "no attack broke a point" in page([told([ROBUST])])


@pytest.mark.parametrize(
    ("box", "span"),
    [
        ([0, 1], (0, 1)),
        ([[0, -1], [1, 2]], (-1, 2)),
        (None, None),
        ([0], None),
        ("all", None),
        ([1, 1], None),
        ([0, "x"], None),
        ([0, INF], None),
    ],
)
def test_the_box_is_read_in_any_form(box: Any, span: tuple[float, float] | None) -> None:
    assert data_range({"threat": {"box": box}}) == span


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3)])
def test_a_png_holds_its_pixels(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    data = png(pixels)
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    body = data[data.index(b"IDAT") + 4 :][
        : struct.unpack(">I", data[data.index(b"IDAT") - 4 :][:4])[0]
    ]
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, -1)
    assert (width, height, depth, colour) == (6, 5, 8, 0 if len(shape) == 2 else 2)
    assert np.all(rows[:, 0] == 0) and np.array_equal(rows[:, 1:].reshape(shape), pixels)


@pytest.mark.parametrize(
    ("shape", "is_image"),
    [
        ((1, 8, 8), True),
        ((3, 8, 8), True),
        ((8, 8), True),
        ((2, 8, 8), False),
        ((8,), False),
        ((2, 60), False),
    ],
)
def test_inputs_are_drawn_as_images_or_as_bars(shape: tuple[int, ...], is_image: bool) -> None:
    (exhibit,) = told([(0.0, 0.05)], shape=shape).gallery
    drawn = tiles(exhibit)
    assert (as_image(exhibit.clean) is not None) == is_image == ("data:image/png" in drawn.clean)
    assert drawn.gain == 10 or not is_image
    assert ("most changed of 120 features" in drawn.note) == (shape == (2, 60))
