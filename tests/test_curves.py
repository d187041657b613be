"""Is a curve what single measurements would have found, for less, and does it only ever fall?"""

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from terminal import calipers
from torch import nn

from calipers.api.measure import curve, measure
from calipers.api.results import Result
from calipers.attacks.pgd import PGD
from calipers.certificates.crown import CROWN
from calipers.data import build, images
from calipers.errors import BadInput
from calipers.measurement.curve import _middle, checked
from calipers.measurement.plan import Plan, Stage
from calipers.progress import Progress
from calipers.record.record import Record
from calipers.report.render import page
from calipers.report.report import summaries, summarise
from calipers.report.text import render_text
from calipers.threats.ball import Ball

RADII = [0.01, 0.02, 0.03, 0.05, 0.08, 0.12]
PLAN = Plan("both jaws", (Stage(PGD(steps=8), "attack"), Stage(CROWN(), "certifier")))
THREAT = Ball("linf", 0.1)


def digits(n: int = 24) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    x, y = images()
    return build("mnist-plain"), x[:n], y[:n]


def rates(result: Result) -> list[tuple[int, int]]:
    """Return how many points are proved and how many survive, at each radius."""
    return [(at.robust.certified.count, at.robust.attacked.count) for at in result.curve]


def spent(result: Result) -> int:
    """Return the passes of all tools."""
    return sum(cost.forwards + cost.backwards for cost in result.summary.costs)


@pytest.fixture(scope="module")
def swept() -> Result:
    return curve(*digits(), THREAT, RADII, plan=PLAN)


@pytest.fixture(scope="module")
def separate() -> list[Result]:
    return [measure(*digits(), THREAT.at(r), plan=PLAN) for r in RADII]


def test_both_curves_fall_and_stand_in_order(swept: Result) -> None:
    proved, surviving = (np.array(column) for column in zip(*rates(swept), strict=True))
    assert [at.radius for at in swept.curve] == RADII
    assert (
        (np.diff(proved) <= 0).all()
        and (np.diff(surviving) <= 0).all()
        and (proved <= surviving).all()
    )
    assert proved[0] > 18 and surviving[-1] < 5, (proved, surviving)


def test_it_finds_what_single_measurements_find(swept: Result, separate: list[Result]) -> None:
    alone = [
        (r.robust_accuracy.certified.count, r.robust_accuracy.attacked.count) for r in separate
    ]
    assert all(
        abs(a - c) <= 1 and abs(b - d) <= 1
        for (a, b), (c, d) in zip(rates(swept), alone, strict=True)
    ), (rates(swept), alone)


def test_it_never_contradicts_them(swept: Result, separate: list[Result]) -> None:
    """Joined point by point: no certificate of either stands above a witness of the other."""
    for other in separate:
        swept.bracket.join(other.bracket)


def test_it_costs_less_than_they_do(swept: Result, separate: list[Result]) -> None:
    assert spent(swept) < 0.7 * sum(map(spent, separate)), (spent(swept), sum(map(spent, separate)))


def test_no_point_is_asked_where_its_verdict_is_known(swept: Result) -> None:
    """In the order of the record: an attempt stands at no radius that evidence before it had
    settled.
    """
    lower, upper = dict[str, float](), dict[str, float]()
    for fact in swept.ledger.evidence(swept.summary.question.fingerprint):
        if fact.kind == "attempt" and fact.tool.startswith("PGD"):
            low, high = lower.get(fact.point, 0.0), upper.get(fact.point, np.inf)
            # a stage writes down its witness before it writes that it tried
            found_now = fact.radius >= high > 0
            assert low < fact.radius and (fact.radius < high or found_now)
        if fact.kind == "certificate":
            lower[fact.point] = max(lower.get(fact.point, 0.0), fact.radius)
        if fact.kind == "witness":
            upper[fact.point] = min(upper.get(fact.point, np.inf), fact.radius)
    visits = [
        e
        for e in swept.ledger.evidence(swept.summary.question.fingerprint)
        if e.kind == "attempt" and e.tool.startswith("PGD")
    ]
    assert len(visits) < 0.6 * len(RADII) * 24, len(visits)


def test_each_cell_is_asked_until_one_jaw_settles_it_or_both_have_failed(
    swept: Result, separate: list[Result]
) -> None:
    """What stays unknown in the curve was unknown alone too: nothing is left out for thrift."""
    left = [at.robust.unknown for at in swept.curve]
    assert all(a <= r.robust_accuracy.unknown + 1 for a, r in zip(left, separate, strict=True))
    assert sum(left) > 0, "a curve without an open verdict tests nothing here"


def test_radii_may_come_in_any_order_and_twice(swept: Result) -> None:
    assert rates(curve(*digits(), THREAT, [*RADII[::-1], 0.05], plan=PLAN)) == rates(swept)


def test_one_radius_is_a_measurement() -> None:
    one, alone = (
        curve(*digits(15), THREAT, [0.03], plan=PLAN),
        measure(*digits(15), THREAT.at(0.03), plan=PLAN),
    )
    assert rates(one) == [
        (alone.robust_accuracy.certified.count, alone.robust_accuracy.attacked.count)
    ]


@pytest.mark.parametrize("radii", [[], [0.0, 0.1], [-1.0], [float("nan")], [float("inf")]])
def test_wrong_radii_are_refused(radii: list[float]) -> None:
    with pytest.raises(BadInput, match="above 0"):
        checked(radii)


def test_the_middle_is_taken_of_the_open_radii_alone() -> None:
    cells = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=bool)
    assert _middle(cells).tolist() == [2, 2, 4]


@pytest.mark.parametrize("stages", [PLAN.stages[:1], PLAN.stages[1:]], ids=["attack", "certifier"])
def test_a_plan_may_have_one_jaw(stages: tuple[Stage, ...]) -> None:
    proved, surviving = zip(
        *rates(curve(*digits(20), THREAT, RADII, plan=Plan("one jaw", stages))), strict=True
    )
    assert max(proved) == 0 if stages[0].kind == "attack" else min(surviving) == surviving[0]


def test_points_that_cannot_be_measured_are_in_no_rate() -> None:
    model, x, y = digits(10)
    x = x.clone()
    x[3, 0, 5, 5] = torch.nan
    found = curve(model, x, y, THREAT, [0.01, 0.05], plan=PLAN)
    assert {at.robust.certified.of for at in found.curve} == {9}


# ---- the record
# --------------------------------------------------------------------------------------------------


class Falls:
    """Presses Ctrl-C after it was told of progress so many times."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def __call__(self, now: Progress) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("blocks", [0, 1, 3, 6])
def test_an_interrupted_curve_goes_on_to_the_same_end(
    blocks: int, swept: Result, tmp_path: Path
) -> None:
    path = tmp_path / "run.calipers"
    cut = curve(*digits(), THREAT, RADII, plan=PLAN, record=path, progress=Falls(blocks))
    assert not cut.finished and (np.array(rates(cut))[:, 0] <= np.array(rates(cut))[:, 1]).all()
    cut.ledger.close()
    whole = curve(*digits(), THREAT, RADII, plan=PLAN, record=path)
    assert whole.finished and rates(whole) == rates(swept)
    assert np.array_equal(whole.bracket.lower, swept.bracket.lower) and np.array_equal(
        whole.bracket.upper, swept.bracket.upper
    )


def test_a_finished_curve_is_not_measured_again(swept: Result) -> None:
    before = len(swept.ledger.evidence(swept.summary.question.fingerprint))
    again = curve(*digits(), THREAT, RADII, plan=PLAN, record=swept.ledger)
    assert (
        rates(again) == rates(swept)
        and len(again.ledger.evidence(again.summary.question.fingerprint)) == before
    )
    assert spent(again) == spent(swept)


def test_the_time_limit_stops_between_visits() -> None:
    found = curve(*digits(10), THREAT, RADII, plan=dataclasses.replace(PLAN, seconds=0.0))
    assert not found.finished and len(found.curve) == len(RADII) and found.clean_accuracy.of == 10


def test_table_and_page_show_every_radius_from_the_record_alone(swept: Result) -> None:
    (summary,) = summaries(swept.ledger)
    text, html = render_text([summary]), page([summary])
    for at in summary.at_radii:
        assert f"\n  {at.radius:<8.6g}" in text and f"<tr><td>{at.radius:.6g}</td>" in html
    assert summary.radius == (0.05, 0.05)
    assert html.count('class="dot robust"') >= len(RADII) and html.count(
        'class="dot broken"'
    ) >= len(RADII)


def test_a_single_radius_later_is_no_curve_any_more(tmp_path: Path) -> None:
    with Record(tmp_path / "run.calipers") as ledger:
        assert curve(*digits(10), THREAT, [0.01, 0.03], plan=PLAN, record=ledger).curve
        assert measure(*digits(10), THREAT.at(0.03), plan=PLAN, record=ledger).curve == ()


def test_a_strangers_radii_are_not_believed(swept: Result) -> None:
    held = swept.ledger.questions()[0]
    for said, read in (
        ("0.1", 0),
        ([0.1, "x"], 0),
        ([float("nan")], 0),
        ([-1.0], 0),
        ([None], 0),
        ({"a": 1}, 0),
        ([0.1, 0.2], 2),
    ):
        with Record() as ledger:
            asked = replace(held, facts={**held.facts, "radii": said})
            ledger.ask(asked, swept.ledger.points(held.fingerprint))
            assert len(summarise(ledger, asked).at_radii) == read


def test_the_command_line_prints_the_table_and_goes_on(tmp_path: Path) -> None:
    words = [
        "measure",
        "-m",
        "mnist-plain",
        "-n",
        "12",
        "--plan",
        "quick",
        "--radii",
        "2/255,0.03,0.05",
        "-o",
        "none",
    ]
    shown = [calipers(tmp_path, *words) for _ in range(2)]
    assert shown[0].returncode == 0, shown[0].stderr
    table = [run.stdout.split("at least")[-1].split("distance")[0] for run in shown]
    assert (
        table[0] == table[1]
        and len(table[0].strip().splitlines()) == 4
        and "0.00784314" in table[0]
    )
    wrong = calipers(tmp_path, *words[:-4], "--radii", "0,0.1", "-o", "none")
    assert wrong.returncode == 2 and "above 0" in wrong.stderr
