"""Are symbols measured like balls? Both jaws against the list of all neighbours, the door, the
referee, the record, and the words of the report.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_substitutions import fitted, generator, trained, words, written
from torch import Tensor, nn

import calipers
from calipers import presets
from calipers.attacks.defences import BPDA
from calipers.bounds.rounding import CHECKED
from calipers.certificates import enumeration as enumeration
from calipers.certificates.crown import CROWN
from calipers.certificates.enumeration import Enumeration
from calipers.errors import BadInput, Contradiction, UnsupportedOp
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.referee import Referee
from calipers.presets import ATTACKS, CERTIFIERS, PLANS, check_fit, plan_for
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.problem.recorded import recorded_threat
from calipers.record.record import Record
from calipers.report.render import page
from calipers.threats.ball import Ball, Fall, Region
from calipers.threats.neighbours import enumerate_substitutions, neighbourhood_size
from calipers.threats.substitution_region import SubstitutionRegion
from calipers.threats.substitutions import Substitutions, one_hot_groups

WORDS = one_hot_groups(12, 4)
SHORT = one_hot_groups(6, 3)


@cache
def short() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a net over six symbols of three kinds, and the points it gets right: small enough to
    list every word there is.
    """
    y = torch.randint(3, (300,), generator=generator(30))
    # from words at random to words of one symbol
    kept = torch.rand(300, 6, generator=generator(31)) < torch.rand(300, 1, generator=generator(32))
    x = written(
        torch.where(kept, y[:, None], words(300, SHORT, seed=20)), SHORT, dtype=torch.float32
    ).view(300, 1, 6, 3)
    model = fitted(x, y, 3, hidden=16, steps=80)
    right = torch.nonzero(
        ~is_adversarial(
            (model(x).gather(1, y[:, None]) - model(x)).scatter(1, y[:, None], torch.inf).amin(1)
        )
    ).flatten()[:60]
    return model, x[right], y[right]


@cache
def windowed() -> tuple[nn.Module, Tensor, Tensor]:
    """Return the same task for a net that reads the symbols through windows of three."""
    _, x, y = short()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 6, (3, 3)),
            nn.ReLU(),
            nn.Conv2d(6, 6, (2, 1)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(18, 3),
        )
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    with torch.enable_grad():
        for _ in range(150):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    return model.eval().requires_grad_(False), x, y


def lowest_margins(problem: Problem) -> list[Tensor]:
    """Return for each point the lowest margin at exactly 0, 1, ..., G substitutions, from the list
    of all neighbours.
    """
    found = []
    everything = problem.region.at(torch.full((len(problem),), 99.0))
    for i in range(len(problem)):
        every = torch.cat(list(everything.neighbours(i)))
        substitutions = everything.take(torch.full((len(every),), i)).distance(every).long()
        margins = problem.goal.margins(
            problem.classifier.logits64(every), problem.y[i].expand(len(every))
        )
        worst = problem.goal.worst(margins)
        found.append(
            torch.stack(
                [worst[substitutions == k].min() for k in range(int(substitutions.max()) + 1)]
            )
        )
    return found


def fewest(problem: Problem) -> np.ndarray[Any, Any]:
    """Return the least number of substitutions that break each point; infinite where none do."""
    broken = [torch.nonzero(is_adversarial(m)).flatten() for m in lowest_margins(problem)]
    return np.array([float(b[0]) if len(b) else np.inf for b in broken])


# ---- both jaws close on the truth
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_a_measurement_without_a_plan_is_exact(k: int) -> None:
    model, x, y = short()
    threat = Substitutions(SHORT, k)
    result = calipers.measure(model, x, y, threat)
    truth = fewest(Problem.pose(model, x, y, threat))
    assert 0 < (truth > k).sum() < 60
    assert (
        result.robust_accuracy.certified.count
        == result.robust_accuracy.attacked.count
        == (truth > k).sum()
    )
    assert result.finished and result.summary.runs[-1].plan[0] == "categorical"


def test_the_bracket_closes_on_the_fewest_substitutions_wherever_the_search_begins() -> None:
    model, x, y = short()
    for k in (1, 3):
        bracket = calipers.distance(model, x, y, Substitutions(SHORT, k))
        truth = fewest(Problem.pose(model, x, y, Substitutions(SHORT, k)))
        assert bracket.upper.tolist() == truth.tolist()
        assert (
            bracket.lower.tolist()
            == np.where(truth == 0, 0, np.where(np.isinf(truth), bracket.lower, truth - 1)).tolist()
        )


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_enumeration_claims_the_substitutions_that_all_neighbours_resist(k: int) -> None:
    model, x, y = short()
    threat = Substitutions(SHORT, k, allowed=[[0, 1], [2], [], [0, 1, 2], [1, 2], [0]])
    certified = calipers.certify(model, x, y, threat, "Enumeration")
    problem = Problem.pose(model, x, y, threat)
    truth = fewest(problem)
    assert certified.guarantee == "float64-checked"
    assert certified.radius.tolist() == np.minimum(np.maximum(truth - 1, 0), k).tolist()
    for margins, radius, claimed in zip(
        lowest_margins(problem),
        certified.radius.long().tolist(),
        certified.margin.tolist(),
        strict=True,
    ):
        if radius:
            assert 0 < claimed <= margins[: radius + 1].min() < claimed + 1e-3


def test_an_enumeration_that_leaves_out_the_last_substitutions_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        enumeration,
        "enumerate_substitutions",
        lambda counts, k, batch: enumerate_substitutions(counts, max(0, k - 1), batch),
    )
    with pytest.raises((AssertionError, Contradiction)):
        test_enumeration_claims_the_substitutions_that_all_neighbours_resist(2)
    plan = Plan("liar", (Stage(Enumeration(), "certifier"),))
    with pytest.raises(
        Contradiction, match=r"Enumeration.* certifies 2, but a random point at distance"
    ):
        calipers.measure(*short(), Substitutions(SHORT, 2), plan=plan)


def test_enumeration_does_not_begin_what_it_cannot_end() -> None:
    model, x, y = short()
    size = neighbourhood_size([2] * 6, 2)
    problem = Problem.pose(model, x, y, Substitutions(SHORT, 2))
    for limit, claims in [(size, True), (size - 1, False)]:
        claim = next(iter(Enumeration(limit)(problem)))
        assert (
            bool((claim.radius > 0).any()) == claims and bool((claim.forwards > 0).any()) == claims
        )
        assert (claim.forwards <= size).all() and (not claims or (claim.forwards == size).any())
    with pytest.raises(BadInput, match="limit >= 1"):
        Enumeration(0)
    with pytest.raises(BadInput, match="Enumeration answers a Substitutions threat"):
        list(Enumeration()(Problem.pose(model, x, y, Ball("linf", 0.1))))


def test_enumeration_claims_nothing_within_the_rounding_of_a_logit() -> None:
    """Two logits of size 1e4 that differ by less than a few float32 roundings: in float64 the
    margin is positive, and worth nothing.
    """

    class Close(nn.Module):
        def __init__(self, margin: float) -> None:
            super().__init__()
            self.register_buffer("shift", torch.tensor([1e4 + margin, 1e4], dtype=torch.float64))

        def forward(self, z: Tensor) -> Tensor:
            return self.shift.to(z) + 0 * z.flatten(1)[:, :2]

    x, y = torch.eye(3, dtype=torch.float64)[:1], torch.zeros(1, dtype=torch.long)
    radii = [
        float(calipers.certify(Close(m), x, y, Substitutions([[0, 1, 2]], 1), "Enumeration").radius)
        for m in (1e-3, 0.1)
    ]
    assert radii == [0.0, 1.0]


class _Sorted(nn.Module):
    """A net behind an operation that no linear bound knows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = short()[0]

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z) + 0 * torch.sort(z.flatten(1), 1).values[:, :3].cumprod(1)


def test_what_cannot_be_bounded_can_still_be_enumerated() -> None:
    _, x, y = short()
    result = calipers.measure(_Sorted(), x[:20], y[:20], Substitutions(SHORT, 1))
    plan = Plan(
        "bounds too", (Stage(Enumeration(), "certifier"), Stage(presets.CROWN(), "certifier"))
    )
    alone = calipers.measure(_Sorted(), x[:20], y[:20], Substitutions(SHORT, 1), plan=plan)
    for found in (result, alone):
        assert (
            found.robust_accuracy.certified.count
            == (fewest(Problem.pose(short()[0], x[:20], y[:20], Substitutions(SHORT, 1))) > 1).sum()
            > 0
        )
        assert "nothing is proved" not in str(found).lower()
    with pytest.raises(UnsupportedOp):
        calipers.certify(_Sorted(), x[:20], y[:20], Substitutions(SHORT, 1), "CROWN")


def test_a_random_model_is_not_enumerated() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = short()[0]

        def forward(self, z: Tensor) -> Tensor:
            return self.net(z) + torch.randn(len(z), 3)

    _, x, y = short()
    with pytest.raises(UnsupportedOp, match="answers at random"):
        calipers.certify(
            calipers.Classifier(Noisy(), samples=10), x, y, Substitutions(SHORT, 1), "Enumeration"
        )


# ---- bounds over symbols
# --------------------------------------------------------------------------------------------------


def bounds_hold(source: Any, tool: str, k: int) -> int:
    """Check a certifier's margins against all neighbours; return how many points it certifies."""
    model, x, y = source()
    threat = Substitutions(SHORT, k)
    certified = calipers.certify(model, x, y, threat, tool)
    for margins, bound in zip(
        lowest_margins(Problem.pose(model, x, y, threat)), certified.margin.tolist(), strict=True
    ):
        assert bound <= margins[: k + 1].min()
    return int(certified.certified.sum())


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("tool", ["CROWN", "IBP"])
@pytest.mark.parametrize("source", [short, windowed], ids=["dense", "windows"])
def test_bounds_stay_below_every_neighbour(source: Any, tool: str, k: int) -> None:
    count = bounds_hold(source, tool, k)
    assert tool == "IBP" or k > 1 or count > 0


def test_on_a_linear_model_the_bound_is_the_lowest_neighbour() -> None:
    _, x, y = short()
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 3)).double().requires_grad_(False)
    model[1].weight.copy_(torch.randn(3, 18, generator=generator(9), dtype=torch.float64))
    threat = Substitutions(SHORT, 2, allowed=[[0, 1], [2], [], [0, 1, 2], [1, 2], [0]])
    # before any referee has looked
    bound = CROWN().bound(Problem.pose(model, x.double(), y, threat), CHECKED).worst
    truth = torch.stack(
        [m[:3].min() for m in lowest_margins(Problem.pose(model, x.double(), y, threat))]
    )
    assert torch.allclose(bound, truth, rtol=1e-9, atol=1e-9)


def test_a_bound_that_forgets_a_substitution_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = SubstitutionRegion.fall
    monkeypatch.setattr(
        SubstitutionRegion,
        "fall",
        lambda region, a, points: exact(region.at(region.radius - 1), a, points),
    )
    with pytest.raises(AssertionError):
        test_on_a_linear_model_the_bound_is_the_lowest_neighbour()


@pytest.mark.parametrize("mutant", [False, True])
def test_windows_bound_what_symbols_can_do_inside_them(
    mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever columns a window shows, the bound dominates every neighbour's fall in them; one that
    counts only the symbols taken away does not.
    """
    _, x, _ = short()
    region = Substitutions(SHORT, 2).region(x.double())

    def leaving_only(
        self: SubstitutionRegion,
        a: Tensor,
        points: Tensor,
        low: Tensor,
        high: Tensor,
        weight: Tensor | None,
    ) -> Fall:
        value = (a * low[:, None]).neg().clamp(min=0).topk(2, dim=2).values.sum(2)
        return Fall(value, value)

    if mutant:
        monkeypatch.setattr(SubstitutionRegion, "window_fall", leaving_only)
    holds = []
    for i in range(10):
        seen = torch.randperm(18, generator=generator(i))[:7]
        a = torch.randn(1, 5, 7, generator=generator(100 + i), dtype=torch.float64)
        bound = region.window_fall(
            a, torch.tensor([i]), region.low[i : i + 1, seen], region.high[i : i + 1, seen], None
        ).value[0]
        delta = (torch.cat(list(region.neighbours(i))) - x[i].double()).flatten(1)[:, seen]
        holds.append(bool((bound >= -(delta @ a[0].T).amin(0) - 1e-12).all()))
    assert all(holds) != mutant


def test_windows_are_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    bound = SubstitutionRegion.window_fall
    monkeypatch.setattr(
        SubstitutionRegion,
        "window_fall",
        lambda self, *rest: (asked.append(1), bound(self, *rest))[1],
    )
    bounds_hold(windowed, "CROWN", 1)
    assert asked


def test_bounds_hold_where_numeric_columns_move_too() -> None:
    """Symbols listed, numeric columns sampled up to their corners; a numeric radius larger than k
    must not be cut down to k.
    """
    torch.manual_seed(3)
    model = (
        nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 2)).double().requires_grad_(False)
    )
    model[0].weight[:, 18:] *= 0.05
    x = torch.cat(
        [
            written(words(40, SHORT, seed=5), SHORT),
            10 * torch.rand(40, 2, generator=generator(6), dtype=torch.float64),
        ],
        1,
    )
    y = model(x).max(1).indices
    for k in (0.5, 1):
        threat = Substitutions(SHORT, k, continuous=Ball("linf", 3.0, box=(0, 10)))
        problem = Problem.pose(model, x, y, threat)
        for tool in ("CROWN", "IBP"):
            bound = calipers.certify(model, x, y, threat, tool).margin
            for i in range(40):
                every = torch.cat(list(problem.region.neighbours(i))).repeat(9, 1)
                corner = torch.tensor(
                    [[a, b] for a in (-3, 0, 3) for b in (-3, 0, 3)], dtype=torch.float64
                ).repeat_interleave(len(every) // 9, 0)
                every[:, 18:] = (every[:, 18:] + corner).clamp(0, 10)
                worst = problem.goal.worst(
                    problem.goal.margins(model(every), y[i].expand(len(every)))
                )
                assert bound[i] <= worst.min()


# ---- which tools answer
# --------------------------------------------------------------------------------------------------

FIT = {
    "SubstitutionSearch",
    "FGSM",
    "IBP",
    "CROWN",
    "AlphaCROWN",
    "BranchAndBound",
    "CertifiedRadius",
    "Enumeration",
    "MILP",
}


@pytest.mark.parametrize(
    "name", sorted({*ATTACKS, *CERTIFIERS} - FIT - {"BPDA", "EOT", "Transfer"})
)
def test_a_tool_for_balls_refuses_symbols_by_name(name: str) -> None:
    model, x, y = short()
    tool = presets.tool_from(name)
    run: Any = calipers.attack if name in ATTACKS else calipers.certify
    with pytest.raises(
        BadInput,
        match=f"{name} searches the inside of a norm ball.*plan='categorical'",
    ):
        run(model, x, y, Substitutions(SHORT, 1), tool)


@pytest.mark.parametrize("name", sorted(FIT))
def test_a_tool_that_fits_symbols_answers(name: str) -> None:
    model, x, y = short()
    run: Any = calipers.attack if name in ATTACKS else calipers.certify
    run(model, x, y, Substitutions(SHORT, 1), name)


def test_plans_fit_their_threat() -> None:
    model, x, y = short()
    with pytest.raises(
        BadInput,
        match=r"'standard' holds no attack for Substitutions: .* choose one of categorical",
    ):
        calipers.measure(model, x, y, Substitutions(SHORT, 1), plan="standard")
    with pytest.raises(BadInput, match=r"'categorical' holds no attack for a ball in linf"):
        calipers.measure(model, x, y, Ball("linf", 0.1), plan="categorical")
    assert (
        plan_for(Ball("linf", 0.1), None).name == "standard"
        and plan_for(Ball("linf", 0.1), None, "distance").name == "distance"
    )
    assert plan_for(Substitutions(SHORT, 1), None, "distance") == PLANS["categorical"]
    check_fit(BPDA(presets.SubstitutionSearch(), ()), Substitutions(SHORT, 1))
    with pytest.raises(BadInput, match="PGD searches"):
        check_fit(BPDA(presets.PGD(), ()), Substitutions(SHORT, 1))


def test_a_step_is_refused_also_where_nobody_asked_at_the_door() -> None:
    model, x, y = short()
    with pytest.raises(BadInput, match="symbols are replaced, not moved by steps"):
        list(presets.PGD()(Problem.pose(model, x, y, Substitutions(SHORT, 1))))


# ---- the door
# --------------------------------------------------------------------------------------------------


def test_points_and_budget_are_checked_at_the_door() -> None:
    model, x, y = trained()
    x, y = x[:5], y[:5]
    soft = x.clone()
    soft[3, 2] = 0.25
    with pytest.raises(BadInput, match="group 2 of point 3 is not one-hot"):
        calipers.measure(model, soft, y, Substitutions(WORDS, 1))
    with pytest.raises(BadInput, match=r"names? column 51, but a flattened input has 48 columns"):
        calipers.measure(model, x, y, Substitutions(one_hot_groups(13, 4), 1))
    with pytest.raises(BadInput, match="k has 2 entries, but there are 5 points"):
        calipers.measure(model, x, y, Substitutions(WORDS, [1, 2]))
    with pytest.raises(BadInput, match="leave continuous out"):
        calipers.measure(model, x, y, Substitutions(WORDS, 1, continuous=Ball("linf", 0.1)))


def mixed() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model of two symbols of two kinds and a number in 0..1 that alone decides: class 1
    where it is above a half.
    """
    model = nn.Linear(5, 2).requires_grad_(False)
    model.weight.copy_(torch.tensor([[0.2, 0.0, 0.2, 0.0, 0.0], [0.0, 0.2, 0.0, 0.2, 2.0]]))
    model.bias.copy_(torch.tensor([1.0, 0.0]))
    numbers = torch.tensor([[0.6], [0.3], [0.05]])
    x = torch.cat([torch.tensor([[1.0, 0.0, 1.0, 0.0]]).expand(3, -1), numbers], 1)
    return model, x, torch.zeros(3, dtype=torch.long)


def test_the_numeric_part_is_checked_at_the_door() -> None:
    model, x, y = mixed()
    groups = one_hot_groups(2, 2)
    with pytest.raises(BadInput, match=r"1 of 3 points lie outside the box \[0, 0.5\]"):
        Problem.pose(
            model, x, y, Substitutions(groups, 1, continuous=Ball("linf", 0.1, box=(0, 0.5)))
        )
    with pytest.raises(
        BadInput, match=r"k = 0 at point 0 lets nothing move: with numeric columns ask for k=0.5"
    ):
        Problem.pose(model, x, y, Substitutions(groups, 0, continuous=Ball("linf", 0.1)))
    with pytest.raises(BadInput, match="whole number of substitutions"):
        Substitutions(groups, 0.5)


# ---- the referee
# --------------------------------------------------------------------------------------------------


def test_a_witness_that_moves_numbers_alone_stands_at_half_a_substitution() -> None:
    model, x, y = mixed()
    threat = Substitutions(one_hot_groups(2, 2), 1, continuous=Ball("linf", 0.15))
    result = calipers.measure(model, x, y, threat)
    assert result.bracket.upper[0] == 0.5 and (result.bracket.upper[1:] >= 1).all()
    assert (
        result.clean_accuracy.count == 3
        and result.robust_accuracy.attacked.count == 3 - (result.bracket.upper <= 1).sum()
    )
    assert [row.is_clean_error for row in result.points] == [False, False, False]
    half = calipers.attack(
        model,
        x,
        y,
        Substitutions(one_hot_groups(2, 2), 0.5, continuous=Ball("linf", 0.15)),
        "SubstitutionSearch",
    )
    assert half.success.tolist() == [True, False, False] and half.distance[0] == 0.5
    assert "half a substitution" in page([result.summary])


def test_counting_only_symbols_would_call_it_the_models_own_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        SubstitutionRegion,
        "distance",
        lambda region, points: (
            (region.threat.read(points) != region.threat.read(region.center)).any(2).sum(1).double()
        ),
    )
    with pytest.raises((AssertionError, Contradiction)):
        test_a_witness_that_moves_numbers_alone_stands_at_half_a_substitution()


def rulings() -> list[bool]:
    """Return which of five candidates for a broken point the referee admits: itself, half symbols,
    too many substitutions, a frozen column moved, a real witness.
    """
    model, x, y = short()
    problem = Problem.pose(model, x, y, Substitutions(SHORT, 6))
    truth = fewest(problem)
    i = int(np.flatnonzero(truth == 1)[0])
    one = problem.take([i])
    good = next(
        p
        for p in torch.cat(list(one.region.neighbours(0)))
        if is_adversarial(one.goal.worst(one.margins(model(p[None]))))[0]
    )
    soft = 0.01 * x[i] + 0.99 * good
    # it would fool the model
    assert is_adversarial(one.goal.worst(one.margins(model(soft[None]))))[0]
    admitted = []
    for candidate in (x[i], soft, 2 * good - x[i], good + 0 * good):
        none = torch.zeros(1, dtype=torch.long)
        ruling = Referee(one).attempt(Attempt(none, candidate[None], none, none), none, "test", 0.0)
        admitted.append(bool(ruling.evidence))
    return admitted


def test_the_referee_refuses_what_is_no_symbol() -> None:
    assert rulings() == [False, False, False, True]


def test_a_referee_that_only_counts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SubstitutionRegion,
        "contains",
        lambda region, points: region.distance(points) <= region.radius,
    )
    assert rulings() != [False, False, False, True]


# ---- record and report
# --------------------------------------------------------------------------------------------------


def test_a_record_is_taken_up_again_checked_and_shown(tmp_path: Path) -> None:
    model, x, y = short()
    path, threat = (
        tmp_path / "run.calipers",
        Substitutions(SHORT, 2, allowed=[[0, 1], [2], [], [0, 1, 2], [1, 2], [0]]),
    )
    first = calipers.measure(model, x, y, threat, record=path)
    first.ledger.close()
    again = calipers.measure(model, x, y, threat, record=path)
    # nothing was done twice
    assert sum(c.forwards for c in again.summary.costs) == sum(
        c.forwards for c in first.summary.costs
    )
    assert (
        again.bracket.upper.tolist() == first.bracket.upper.tolist()
        and again.bracket.lower.tolist() == first.bracket.lower.tolist()
    )
    again.ledger.close()
    with Record(path, read_only=True) as ledger:
        asked = ledger.questions()[0]
        assert asked.data is not None
        back = recorded_threat(asked.data["threat"], torch.full((60,), 2.0))
        assert back.identity() == threat.identity()
        (checked,) = calipers.check(ledger, model)
        assert checked.sound and checked.witnesses > 0 and checked.certificates > 0


def test_a_mixed_threat_comes_back_from_its_record(tmp_path: Path) -> None:
    model, x, y = mixed()
    threat = Substitutions(
        one_hot_groups(2, 2),
        1,
        continuous=Ball(
            "l2", 0.15, box=(0, 1), mask=torch.tensor([True]), weights=torch.tensor([2.0])
        ),
    )
    with calipers.measure(model, x, y, threat, record=tmp_path / "run.calipers").ledger as ledger:
        data = ledger.questions()[0].data
    assert data is not None
    assert recorded_threat(data["threat"], torch.ones(3)).identity() == threat.identity()


def test_the_report_speaks_of_substitutions() -> None:
    model, x, y = short()
    result = calipers.measure(model, x, y, Substitutions(SHORT, 2))
    text, shown = str(result), page([result.summary])
    assert (
        "at most 2 substitutions" in text and "eps" not in text and "substitutions median" in text
    )
    assert (
        "at most 2 substitutions" in shown
        and "number of substitutions asked" in shown
        and "1 substitution<" in shown
    )
    assert (
        "substitutions radius" not in shown
        and "substitutions radius" not in shown
        and "native units" not in shown.split("provenance")[0].split("<details")[0]
    )
    one = str(calipers.measure(model, x, y, Substitutions(SHORT, 1)))
    assert "at most 1 substitution," in one


def test_the_command_line_measures_reports_and_checks_symbols(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from calipers.cli import app

    model, x, y = short()
    torch.save(model, tmp_path / "net.pt")
    (tmp_path / "net.py").write_text(
        "import torch\n\n\ndef build():\n    return torch.load('net.pt', weights_only=False)\n"
    )
    np.savez(tmp_path / "points.npz", x=x.numpy(), y=y.numpy())
    monkeypatch.chdir(tmp_path)
    asked = ["-m", "net.py:build", "-d", "points.npz", "--one-hot", "6,3", "-e", "2", "-q"]
    said = CliRunner().invoke(app, ["measure", *asked, "--record", "run.calipers"])
    assert (
        said.exit_code == 0
        and "at most 2 substitutions" in said.output
        and "Enumeration" in said.output
    ), said.output
    assert "at most 2 substitutions" in CliRunner().invoke(app, ["report", "run.calipers"]).output
    checked = CliRunner().invoke(app, ["check", "run.calipers", "-m", "net.py:build"])
    assert checked.exit_code == 0 and "0 failed" in checked.output, checked.output
    wrong = CliRunner().invoke(app, ["attack", *asked, "-t", "PGD"])
    assert wrong.exit_code == 2 and "plan='categorical'" in wrong.output
    assert (
        "two whole numbers"
        in CliRunner().invoke(app, ["measure", *asked[:4], "--one-hot", "6"]).output
    )


# ---- the chapter's numbers
# --------------------------------------------------------------------------------------------------


def test_the_robust_hinge_over_a_neighbourhood_of_categories() -> None:
    """Scores (2, 1/2, -1) of three categories, y = +1: over {0, 1} the worst hinge loss is 1/2,
    over {0, 1, 2} it is 2.
    """
    w, x = torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    for allowed, worst in [([[1]], 0.5), ([[1, 2]], 2.0)]:
        found = Substitutions([[0, 1, 2]], 1, allowed).region(x).support(-w)
        assert float((1 + found.value).clamp(min=0)) == worst
        assert float((1 - (w * found.point).sum()).clamp(min=0)) == worst


def test_three_symbols_of_four_kinds_have_ten_neighbours_with_themselves() -> None:
    x = written(words(1, one_hot_groups(3, 4)), one_hot_groups(3, 4))
    region: Region = Substitutions(one_hot_groups(3, 4), 1).region(x)
    assert isinstance(region, SubstitutionRegion) and region.sizes() == [10]
    # one substitution is the l1 distance 2
    assert (torch.cat(list(region.neighbours(0))) - x).abs().sum(1).tolist() == [0.0, *[2.0] * 9]
