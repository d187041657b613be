"""Is a costly tool run on all open points exactly where a random part of them says that it finds
something, and is what it may have missed stated?
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

import calipers
from calipers import data
from calipers.measurement.plan import Plan, Stage
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.record.estimates import most_missed
from calipers.report import caveats

RADIUS = 0.02


@dataclass(frozen=True)
class Spy:
    """An attack that finds nothing, or lets PGD find what it can; `asked` counts its points."""

    works: bool
    asked: list[int]

    def __repr__(self) -> str:
        return f"Spy(works={self.works})"

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        self.asked.append(len(problem))
        if self.works:
            yield from calipers.attacks.PGD(steps=10)(problem, seed=seed)
            return
        none = torch.zeros(len(problem), dtype=torch.long)
        yield Attempt(torch.arange(len(problem)), problem.x.clone(), none, none)


def run(
    spy: Spy,
    count: int = 80,
    audit: int = 20,
    radius: float = RADIUS,
    record: object = None,
    order: list[int] | None = None,
) -> calipers.Result:
    """Run a plan of one audited stage on embedded images."""
    x, y = data.images()
    take = order if order is not None else list(range(count))
    ball = calipers.Ball("linf", radius)
    return calipers.measure(
        data.build("mnist-plain"),
        x[take],
        y[take],
        ball,
        plan=Plan("audit", (Stage(spy, "attack", pilot=audit),)),
        record=record,
    )  # type: ignore[arg-type]


def test_an_audit_that_finds_nothing_spares_the_others_and_says_what_it_may_have_missed() -> None:
    spy = Spy(False, [])
    result = run(spy)
    still = result.clean_accuracy.count
    assert spy.asked == [20] and result.finished
    assert result.summary.facts["audits"] == {
        "Spy(works=False)": {"kind": "attack", "open": still, "tried": 20}
    }
    (line,) = (said for said in caveats.limits(result.summary) if "Spy" in said)
    assert (
        f"20 random points of the {still} " in line
        and f"break at most {most_missed(20, still)} of them" in line
    )
    assert line in str(result)


def test_an_audit_that_finds_something_is_followed_by_all_the_others() -> None:
    spy = Spy(True, [])
    result = run(spy, radius=0.1)
    assert sum(spy.asked) == result.clean_accuracy.count and spy.asked[0] == 20
    plain = calipers.measure(
        data.build("mnist-plain"),
        *(t[:80] for t in data.images()),
        calipers.Ball("linf", 0.1),
        plan=Plan("all", (Stage(spy, "attack"),)),
    )
    np.testing.assert_array_equal(result.bracket.upper, plain.bracket.upper)
    assert "audits" not in result.summary.facts


def test_few_open_points_are_all_tried() -> None:
    spy = Spy(False, [])
    result = run(spy, count=15)
    assert spy.asked == [result.clean_accuracy.count] and "audits" not in result.summary.facts


def test_the_drawn_points_do_not_depend_on_order_and_a_second_run_does_nothing_again(
    tmp_path: Path,
) -> None:
    forth, back = run(Spy(False, [])), run(Spy(False, []), order=list(range(79, -1, -1)))
    tried = [
        {
            e.point
            for e in r.ledger.evidence(r.summary.question.fingerprint)
            if e.tool.startswith("Spy")
        }
        for r in (forth, back)
    ]
    assert tried[0] == tried[1] and len(tried[0]) == 20
    first, again = Spy(True, []), Spy(True, [])
    one = run(first, record=tmp_path / "run.calipers", radius=0.1)
    two = run(again, record=tmp_path / "run.calipers", radius=0.1)
    assert first.asked and not again.asked
    np.testing.assert_array_equal(one.bracket.upper, two.bracket.upper)


def test_a_certifier_that_proves_nothing_on_the_audit_is_given_up() -> None:
    x, y = (t[:80] for t in data.images())
    stages = (
        Stage(calipers.certificates.IBP(), "certifier", pilot=10),
        Stage(calipers.certificates.CROWN(), "certifier", pilot=10),
    )
    result = calipers.measure(
        data.build("mnist-robust"), x, y, calipers.Ball("linf", 0.1), plan=Plan("audit", stages)
    )
    audits = result.summary.facts["audits"]
    assert list(audits) == ["IBP()"] and audits["IBP()"]["kind"] == "certifier"
    assert result.robust_accuracy.certified.count > 20
    assert any(
        said.startswith("IBP") and "proved none" in said for said in caveats.limits(result.summary)
    )


@pytest.mark.parametrize(("tried", "of"), [(0, 7), (7, 7), (3, 7), (20, 77), (32, 400), (1, 1)])
def test_the_bound_is_the_hypergeometric_one(tried: int, of: int) -> None:
    """Met none in the draw: the largest number that this had more than one chance in twenty to
    happen with.
    """
    fits = [k for k in range(of - tried + 1) if comb(of - k, tried) / comb(of, tried) > 0.05]
    assert most_missed(tried, of) == max(fits)


def test_the_bound_covers() -> None:
    """Of many draws from 100 points, 12 of which would fall, at most one in twenty meets none and
    claims fewer than 12.
    """
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        met = (generator.permutation(100)[:25] < 12).any()
        wrong += (not met) and most_missed(25, 100) < 12
    assert wrong <= 2000 * 0.05


def test_an_audit_of_more_points_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="5 of 3"):
        most_missed(5, 3)


def test_a_resumed_audit_counts_what_the_tool_itself_found_not_what_later_ones_did(
    tmp_path: Path,
) -> None:
    """A later attack breaks the audited points; the same command again must not take that for the
    audited tool's success.
    """
    x, y = (t[:60] for t in data.images())
    spies = [Spy(False, []), Spy(False, [])]
    for spy in spies:
        stages = (Stage(spy, "attack", pilot=20), Stage(calipers.attacks.PGD(steps=10), "attack"))
        calipers.measure(
            data.build("mnist-plain"),
            x,
            y,
            calipers.Ball("linf", 0.1),
            plan=Plan("audit", stages),
            record=tmp_path / "run.calipers",
        )
    assert spies[0].asked == [20] and spies[1].asked == []
