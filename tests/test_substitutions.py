"""May the adversary replace letters? The set is exact, its support is the maximum, its neighbours are all there, and the searches find what exists."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from functools import cache
from math import comb
from pathlib import Path
from typing import Any

import beside
import pytest
import torch
from torch import Tensor, nn

from calipers.attacks.fgsm import FGSM
from calipers.attacks.substitution_search import SubstitutionSearch
from calipers.errors import BadInput
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.referee import Referee
from calipers.measurement.run import run
from calipers.problem.goals import Targeted, Untargeted, is_adversarial
from calipers.problem.problem import Problem
from calipers.random_streams import Streams
from calipers.record.bracket import Bracket
from calipers.record.record import Record
from calipers.threats.ball import Ball
from calipers.threats.neighbours import enumerate_substitutions, neighbourhood_size
from calipers.threats.substitution_region import SubstitutionRegion
from calipers.threats.substitutions import Substitutions, one_hot_groups

SPLICE = beside.DATA / "data" / "splice.data.gz"
UNEVEN = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9, 10, 11]]
ALLOWED = [[0, 2], [1], [0, 1, 3], []]
F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def written(
    rows: Tensor, groups: list[list[int]], width: int | None = None, dtype: torch.dtype = F64
) -> Tensor:
    """Return one-hot points of the letters (N, G)."""
    x = torch.zeros(len(rows), width or 1 + max(map(max, groups)), dtype=dtype)
    for g, columns in enumerate(groups):
        x[torch.arange(len(rows)), torch.tensor(columns)[rows[:, g]]] = 1
    return x


def words(n: int, groups: list[list[int]], seed: int = 0) -> Tensor:
    return torch.stack(
        [
            torch.randint(len(columns), (n,), generator=generator(seed + g))
            for g, columns in enumerate(groups)
        ],
        1,
    )


def brute(x: Tensor, groups: list[list[int]], allowed: list[list[int]] | None, k: int) -> Tensor:
    """Return all admissible points around one point, letter by letter, from the definition."""
    own = [int(x[columns].argmax()) for columns in groups]
    choices = [
        sorted({o, *(range(len(c)) if allowed is None else allowed[g])})
        for g, (o, c) in enumerate(zip(own, groups, strict=True))
    ]
    kept = [
        w
        for w in itertools.product(*choices)
        if sum(a != b for a, b in zip(w, own, strict=True)) <= k
    ]
    return written(torch.tensor(kept), groups)


@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["all", "some"])
@pytest.mark.parametrize("k", [0, 1, 2, [0, 1, 2, 3, 4, 1]], ids=str)
def test_the_support_is_the_maximum_over_all_neighbours(
    k: int | list[int], allowed: list[list[int]] | None
) -> None:
    x, g = written(words(6, UNEVEN), UNEVEN), torch.randn(6, 12, generator=generator(3), dtype=F64)
    threat = Substitutions(UNEVEN, k, allowed)
    region = threat.region(x)
    value, point = region.support(g)
    for i, budget in enumerate(threat.radii(6).int().tolist()):
        best = (brute(x[i], UNEVEN, allowed, budget) @ g[i]).max()
        assert torch.isclose(value[i], best, rtol=1e-12)
    assert torch.allclose((g * point).sum(1), value, rtol=1e-12)
    assert region.contains(point).all()


@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["all", "some"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_the_enumeration_and_the_membership_are_the_definition(
    k: int, allowed: list[list[int]] | None
) -> None:
    x = written(words(5, UNEVEN, seed=8), UNEVEN)
    region = Substitutions(UNEVEN, k, allowed).region(x)
    everything = written(
        torch.tensor(list(itertools.product(*(range(len(c)) for c in UNEVEN)))), UNEVEN
    )
    for i in range(5):
        found = torch.cat(list(region.neighbours(i, batch=7)))
        expected = {tuple(row) for row in brute(x[i], UNEVEN, allowed, k).tolist()}
        assert (
            len(found) == len(expected) == region.sizes()[i]
            and {tuple(row) for row in found.tolist()} == expected
        )
        many = region.take(torch.full((len(everything),), i))
        assert [bool(b) for b in many.contains(everything)] == [
            tuple(row) in expected for row in everything.tolist()
        ]
        changed = region.take(torch.full((len(found),), i)).distance(found)
        # k switches are the l1 budget 2k
        assert (changed.diff() >= 0).all() and torch.equal(changed, (found - x[i]).abs().sum(1) / 2)


def test_sizes_are_the_closed_form() -> None:
    for n, k, size in [(60, 2, 4), (60, 3, 4), (22, 4, 7), (5, 5, 3)]:
        assert neighbourhood_size([size - 1] * n, k) == sum(
            comb(n, i) * (size - 1) ** i for i in range(k + 1)
        )
    assert neighbourhood_size([2, 0, 3, 1], 2) == 1 + (2 + 3 + 1) + (2 * 3 + 2 * 1 + 3 * 1)
    for batch in (1, 5, 1000):
        parts = list(enumerate_substitutions(torch.tensor([2, 0, 3, 1]), 3, batch))
        assert (
            sum(map(len, parts)) == neighbourhood_size([2, 0, 3, 1], 3)
            and max(map(len, parts)) <= batch
        )


def test_a_point_that_is_nearly_admissible_is_outside() -> None:
    x = written(torch.zeros(1, 4, dtype=torch.long), UNEVEN, width=13)
    region = Substitutions(UNEVEN, 1, ALLOWED).region(x)

    def moved(*changes: tuple[int, float]) -> Tensor:
        point = x.clone()
        for column, value in changes:
            point[0, column] = value
        return point

    assert region.contains(moved((0, 0), (2, 1)))
    outside = [
        moved((0, 0), (1, 1)),  # a letter that is not allowed
        moved((9, 0), (10, 1)),  # a frozen group
        moved((0, 0)), moved((2, 1)), moved((0, 0.5), (2, 0.5)), moved((0, 1 + 1e-12)), moved((0, torch.nan)), moved((0, 0), (2, torch.inf)),
        moved((0, 0), (2, 1), (3, 0), (4, 1)),  # two switches
        moved((12, 1e-300)),  # a column in no group
    ]  # fmt: skip
    assert not any(bool(region.contains(point)) for point in outside)
    assert region.contains(region.snap(moved((0, torch.nan), (4, torch.inf))))


@pytest.mark.parametrize("allowed", [None, ALLOWED], ids=["all", "some"])
def test_samples_and_snapped_points_are_admissible_and_neighbours_stay_where_they_are(
    allowed: list[list[int]] | None,
) -> None:
    x = written(words(300, UNEVEN, seed=1), UNEVEN)
    region = Substitutions(UNEVEN, 2, allowed).region(x)
    sample = region.sample(Streams.of(0, [str(i) for i in range(300)], x.device))
    assert (
        region.contains(sample).all()
        and (region.distance(sample) == region.options.any(2).sum(1).clamp(max=2)).all()
    )
    assert len(sample.unique(dim=0)) > 30 and torch.equal(region.snap(sample), sample)
    noise = torch.rand(300, 12, generator=generator(2), dtype=F64)
    snapped = region.snap(noise)
    assert region.contains(snapped).all()
    for i in range(20):
        nearest = (brute(x[i], UNEVEN, allowed, 2) - noise[i]).square().sum(1).min()
        assert torch.isclose((snapped[i] - noise[i]).square().sum(), nearest)


def test_letters_may_become_what_the_table_says() -> None:
    groups = one_hot_groups(3, 4, symbols_first=True)
    assert groups[0] == [0, 3, 6, 9]
    pairs = torch.zeros(3, 4, 4, dtype=torch.bool)
    for a, b in [(0, 2), (2, 0), (1, 3), (3, 1)]:  # transitions only: A <-> G, C <-> T
        pairs[:, a, b] = True
    x = written(torch.tensor([[0, 1, 2]]), groups).view(1, 4, 3)
    region = Substitutions(groups, 3, pairs).region(x)
    assert region.sizes() == [8] and torch.cat(list(region.neighbours(0))).shape == (8, 4, 3)
    assert torch.equal(torch.cat(list(region.neighbours(0)))[-1].argmax(0), torch.tensor([2, 3, 0]))


def test_threats_are_taken_asked_and_written_down_like_balls() -> None:
    threat = Substitutions(UNEVEN, [1, 2, 0], ALLOWED)
    assert threat.radii(3).tolist() == [1, 2, 0] and threat.take(torch.tensor([2, 1])).radii(
        2
    ).tolist() == [
        0,
        2,
    ]
    assert threat.at(3).radii(2).tolist() == [3, 3] and threat.at(3).identity() == json.loads(
        json.dumps(threat.identity())
    )
    assert threat.identity() != Substitutions(UNEVEN, 1).identity()
    x = written(words(3, UNEVEN), UNEVEN)
    assert threat.region(x).at(torch.tensor([0.0, 1.5, 9.0])).budget.tolist() == [0, 1, 4]
    assert threat.widest(x).max() <= 3


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"k": -1}, "from 0 to the number of groups, 4, got -1"),
        ({"k": 5}, "from 0 to the number of groups, 4, got 5"),
        ({"k": 1.5}, "whole number"),
        ({"k": [1, 9]}, "at point 1"),
        ({"groups": [[0, 1], [1, 2]]}, "overlap: column 1"),
        ({"groups": [[0]]}, "at least two columns"),
        ({"groups": [[0, -1]]}, "counted from 0"),
        ({"groups": []}, "at least one group"),
        ({"allowed": [[0], [2], [], []]}, "group 1 has the symbols 0..1"),
        ({"allowed": [[0]]}, "for 1 groups, but there are 4"),
        ({"allowed": torch.ones(4, 4)}, "bool mask of shape"),
    ],
    ids=[
        "negative",
        "many",
        "fraction",
        "per point",
        "overlap",
        "lonely",
        "column",
        "none",
        "letter",
        "lists",
        "mask",
    ],
)
def test_threats_that_make_no_sense_say_so(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Substitutions(**{"groups": UNEVEN, "k": 1, **parts})


def test_points_that_are_no_letters_say_so() -> None:
    x = written(words(3, UNEVEN), UNEVEN)
    x[2, 3:5] = 0.5
    with pytest.raises(
        BadInput, match=r"group 1 of point 2 is not one-hot: its columns hold \[0.5, 0.5\]"
    ):
        Substitutions(UNEVEN, 1).region(x)
    with pytest.raises(BadInput, match="column 11, but a flattened input has 6 columns"):
        Substitutions(UNEVEN, 1).region(torch.ones(2, 2, 3))
    with pytest.raises(BadInput, match="k has 2 entries, but there are 3 points"):
        Substitutions(UNEVEN, [1, 1]).region(x[[0, 1, 1]])


# ---- mutants ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_support_that_takes_one_switch_too_many_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        SubstitutionRegion, "budget", property(lambda region: region.radius.long() + 1)
    )
    with pytest.raises(AssertionError):
        test_the_support_is_the_maximum_over_all_neighbours(1, None)


def test_a_membership_that_forgets_the_allowed_sets_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgetful(region: SubstitutionRegion, points: Tensor) -> Tensor:
        values = region.threat.read(points)
        return (
            ((values == 0) | (values == 1)).all(2).all(1)
            & (values.sum(2) == 1).all(1)
            & (region.distance(points) <= region.radius)
        )

    monkeypatch.setattr(SubstitutionRegion, "contains", forgetful)
    with pytest.raises(AssertionError):
        test_the_enumeration_and_the_membership_are_the_definition(3, ALLOWED)


# ---- searching -------------------------------------------------------------------------------------------------------------------------------------


@cache
def trained(n: int = 1200, length: int = 12, size: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a small net that tells words by which letter is more frequent at hidden places, with its data."""
    rows = words(n, one_hot_groups(length, size), seed=50)
    x = written(rows, one_hot_groups(length, size), dtype=torch.float32).view(n, length, size)
    secret = torch.randn(length, size, 2, generator=generator(1))
    score = torch.einsum("nls,lsc->nc", x, secret)
    y = (score[:, 0] * score[:, 1] > 0).long() + (score[:, 0] > 2).long()
    return fitted(x, y, 3), x, y


def fitted(x: Tensor, y: Tensor, classes: int, hidden: int = 48, steps: int = 150) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(x[0].numel(), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimiser.step()
    return model.eval().requires_grad_(False)


@cache
def splice() -> tuple[nn.Module, Tensor, Tensor]:
    with gzip.open(beside.given(SPLICE), "rt") as file:
        rows = [[part.strip() for part in line.split(",")] for line in file if line.strip()]
    rows = [row for row in rows if set(row[2]) <= set("ACGT")]
    x = written(
        torch.tensor([["ACGT".index(a) for a in row[2]] for row in rows]),
        one_hot_groups(60, 4),
        dtype=torch.float32,
    )
    y = torch.tensor([["EI", "IE", "N"].index(row[0]) for row in rows])
    order = torch.randperm(len(x), generator=generator(0))
    x, y = x[order], y[order]
    return fitted(x[800:], y[800:], 3, steps=60), x[:800], y[:800]


def found(attack: SubstitutionSearch, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Return broken, candidates and forwards; every point is mentioned once, and every candidate is admissible."""
    attempts = list(attack(problem))
    index = torch.cat([a.index for a in attempts])
    assert index.tolist() == list(range(len(problem)))
    candidate, forwards = (
        torch.cat([a.candidate for a in attempts]),
        torch.cat([a.forwards for a in attempts]),
    )
    assert problem.region.contains(candidate).all()
    worst = problem.goal.worst(problem.margins(problem.classifier.logits(candidate)))
    return is_adversarial(worst), candidate, forwards


def right(model: nn.Module, x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    keep = torch.nonzero(
        ~is_adversarial(Untargeted().worst(Untargeted().margins(model(x), y)))
    ).flatten()[:n]
    return x[keep], y[keep]


def posed(
    source: Callable[[], tuple[nn.Module, Tensor, Tensor]],
    n: int,
    k: int | list[int],
    groups: list[list[int]],
    **parts: Any,
) -> Problem:
    model, x, y = source()
    return Problem.pose(model, *right(model, x, y, n), Substitutions(groups, k, **parts))


@pytest.mark.parametrize(
    ("source", "groups"),
    [(trained, one_hot_groups(12, 4)), (splice, one_hot_groups(60, 4))],
    ids=["synthetic", "splice"],
)
def test_one_switch_is_found_greedily_wherever_it_exists(
    source: Callable[[], tuple[nn.Module, Tensor, Tensor]], groups: list[list[int]]
) -> None:
    problem = posed(source, 300, 1, groups)
    everything = found(SubstitutionSearch("exhaustive"), problem)[0]
    assert 0 < everything.sum() < 300
    for search in ("greedy", "beam", "auto"):
        assert torch.equal(found(SubstitutionSearch(search), problem)[0], everything), search


@pytest.mark.parametrize(
    ("source", "groups", "n"),
    [(trained, one_hot_groups(12, 4), 300), (splice, one_hot_groups(60, 4), 200)],
    ids=["synthetic", "splice"],
)
def test_two_switches_are_nearly_always_found(
    source: Callable[[], tuple[nn.Module, Tensor, Tensor]], groups: list[list[int]], n: int
) -> None:
    problem = posed(source, n, 2, groups)
    everything = found(SubstitutionSearch("exhaustive"), problem)[0]
    beam = found(SubstitutionSearch("beam"), problem)[0]
    assert everything.any() and not (beam & ~everything).any()
    assert (everything.sum() - beam.sum()) <= 0.01 * n
    assert torch.equal(found(SubstitutionSearch(), problem)[0], everything)


def test_exhaustive_is_exact_and_finds_the_fewest_switches() -> None:
    problem = posed(trained, 25, 3, one_hot_groups(12, 4), allowed=[[0, 1, 2]] * 6 + [[3]] * 6)
    broken, candidate, forwards = found(SubstitutionSearch("exhaustive"), problem)
    for i in range(25):
        every = torch.cat(list(problem.region.neighbours(i)))
        worst = problem.goal.worst(
            problem.goal.margins(problem.classifier.logits(every), problem.y[i].expand(len(every)))
        )
        assert bool(broken[i]) == bool(is_adversarial(worst).any())
        changed = problem.region.take(torch.full((len(every),), i)).distance(every)
        if broken[i]:
            assert problem.region.distance(candidate)[i] == changed[is_adversarial(worst)].min()
        else:
            # and one at the start
            assert forwards[i] == len(every) + 1 == problem.region.sizes()[i] + 1


def test_the_nearest_witness_has_the_fewest_switches_there_are() -> None:
    problem = posed(trained, 60, 3, one_hot_groups(12, 4))
    broken, candidate, _ = found(SubstitutionSearch(nearest=True), problem)
    exact, fewest, _ = found(SubstitutionSearch("exhaustive"), problem)
    assert torch.equal(broken, exact)
    assert torch.equal(
        problem.region.distance(candidate)[broken], problem.region.distance(fewest)[broken]
    )


def test_a_measurement_of_letters_ends_with_a_record(tmp_path: Path) -> None:
    problem = posed(trained, 30, 2, one_hot_groups(12, 4))
    plan = Plan(
        "letters",
        (
            Stage(SubstitutionSearch("greedy"), "attack"),
            Stage(SubstitutionSearch(nearest=True), "attack", "distance"),
        ),
    )
    with Record(tmp_path / "record.sqlite") as ledger:
        assert run(problem, plan, ledger)
        upper = Bracket.of(problem.names, ledger.evidence(problem.fingerprint())).upper
    exact, fewest, _ = found(SubstitutionSearch("exhaustive"), problem)
    assert (upper <= 2).tolist() == exact.tolist() and (
        upper < torch.inf
    ).all()  # what resists two switches is broken by more
    assert upper[exact.numpy()].tolist() == problem.region.distance(fewest)[exact].tolist()


@pytest.mark.parametrize("search", ["auto", "exhaustive", "gradient", "greedy", "beam"])
def test_results_depend_on_the_point_alone(search: Any) -> None:
    problem = posed(
        trained,
        90,
        [k % 4 for k in range(90)],
        one_hot_groups(12, 4),
        allowed=[[0, 1, 2]] * 6 + [[1, 3]] * 6,
    )
    _, candidate, forwards = found(SubstitutionSearch(search), problem)
    order = torch.randperm(90, generator=generator(5))[:41]
    _, again, spent = found(SubstitutionSearch(search), problem.take(order))
    assert torch.equal(again, candidate[order]) and torch.equal(spent, forwards[order])


def test_first_order_ranking_keeps_to_the_limit() -> None:
    problem = posed(trained, 60, 3, one_hot_groups(12, 4))
    for search in ("greedy", "beam"):
        broken, _, forwards = found(SubstitutionSearch(search, limit=600), problem)
        assert (
            forwards.max() <= 700
            and broken.sum() >= 0.9 * found(SubstitutionSearch(search), problem)[0].sum()
        )
    with pytest.raises(BadInput, match="more than limit=600"):
        list(SubstitutionSearch("exhaustive", limit=600)(problem))


class _Lured(nn.Module):
    """Only switches 3 and 4 together break it, but 0 and 1 look better alone (and spoil each other)."""

    def forward(self, x: Tensor) -> Tensor:
        s = x[:, 1::2]
        margin = (
            1
            - 0.5 * s[:, 0]
            - 0.4 * s[:, 1]
            + 0.5 * s[:, 0] * s[:, 1]
            - 0.1 * s[:, 3]
            - 2 * s[:, 3] * s[:, 4]
        )
        return torch.stack([margin + 3, torch.full_like(margin, 3.0)], 1)


def test_exchanges_leave_a_trap_that_a_narrow_beam_falls_into() -> None:
    x = written(torch.zeros(1, 5, dtype=torch.long), one_hot_groups(5, 2), dtype=torch.float32)
    problem = Problem.pose(
        _Lured(), x, torch.zeros(1, dtype=torch.long), Substitutions(one_hot_groups(5, 2), 2)
    )
    assert [
        bool(found(SubstitutionSearch(search, width=2), problem)[0])
        for search in ("greedy", "beam", "exhaustive")
    ] == [False, True, True]


def test_on_a_linear_model_the_slope_is_enough() -> None:
    w = torch.randn(48, 2, generator=generator(4), dtype=F64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2, bias=False)).double()
    model[1].weight.data = w.T.contiguous()
    x = written(words(80, one_hot_groups(12, 4)), one_hot_groups(12, 4)).view(80, 12, 4)
    problem = Problem.pose(
        model, x, model(x).detach().max(1).indices, Substitutions(one_hot_groups(12, 4), 2)
    )
    everything = found(SubstitutionSearch("exhaustive"), problem)[0]
    assert torch.equal(found(SubstitutionSearch("gradient"), problem)[0], everything)
    assert torch.equal(found(FGSM(), problem)[0], everything)  # type: ignore[arg-type]


def test_targets_and_ties_are_the_goals_business() -> None:
    model, x, y = trained()
    x, y = right(model, x, y, 60)
    goal = Targeted((y + 1) % 3)
    problem = Problem.pose(model, x, y, Substitutions(one_hot_groups(12, 4), 2), goal)
    broken, candidate, _ = found(SubstitutionSearch("beam"), problem)
    assert broken.any() and torch.equal(
        model(candidate[broken]).max(1).indices, ((y + 1) % 3)[broken]
    )


def test_a_model_without_gradients_is_searched_all_the_same() -> None:
    model, x, y = trained()
    stepped = nn.Sequential(model, _Cut())
    problem = Problem.pose(
        stepped, *right(stepped, x, y, 40), Substitutions(one_hot_groups(12, 4), 2)
    )
    assert torch.equal(
        found(SubstitutionSearch(), problem)[0], found(SubstitutionSearch("exhaustive"), problem)[0]
    )


class _Cut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


def test_numeric_columns_move_too() -> None:
    model, x, y = trained()

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, z: Tensor) -> Tensor:
            return self.model(z[:, :48].view(-1, 12, 4)) + 6 * (z[:, 48:] - 0.5) @ torch.tensor(
                [[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]]
            )

    z = torch.cat([x.flatten(1), torch.full((len(x), 2), 0.5)], 1)
    z, y = right(Mixed(), z, y, 100)
    shares = []
    for numeric in (None, Ball("linf", 0.2), Ball("l2", 0.2, mask=torch.tensor([True, False]))):
        problem = Problem.pose(
            Mixed(), z, y, Substitutions(one_hot_groups(12, 4), 1, continuous=numeric)
        )
        broken = found(SubstitutionSearch(), problem)[0]
        shares.append(int(broken.sum()))
        support = problem.region.support(torch.ones_like(z))
        assert problem.region.contains(
            support.point if numeric is None else problem.region.snap(support.point)
        ).all()
    assert shares[1] > shares[2] >= shares[0]
    with pytest.raises(BadInput, match="symbols only"):
        list(SubstitutionSearch("exhaustive")(problem))
    with pytest.raises(BadInput, match="Substitutions threat"):
        list(SubstitutionSearch()(Problem.pose(Mixed(), z, y, Ball("linf", 0.1))))


def test_the_referee_counts_switches() -> None:
    problem = posed(trained, 40, 2, one_hot_groups(12, 4))
    for attempt in SubstitutionSearch()(problem):
        facts = (
            Referee(problem).attempt(attempt, torch.arange(40), "SubstitutionSearch", 1.0).evidence
        )
        assert len(facts) == found(SubstitutionSearch(), problem)[0].sum() and {
            fact.radius for fact in facts
        } <= {
            1.0,
            2.0,
        }


# ---- the chapter's example -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
def test_the_robust_hinge_loss_of_a_linear_model(k: int) -> None:
    """max over at most k nucleotide switches of max(0, 1 - y w.x') = max(0, 1 - y w.x + sum of the k largest max_a y (w_own - w_a))."""
    groups = one_hot_groups(6, 4)
    x, w = written(words(10, groups), groups), torch.randn(24, generator=generator(7), dtype=F64)
    y = torch.where(torch.arange(10) % 2 == 0, 1.0, -1.0).double()
    region = Substitutions(groups, k).region(x)
    robust = (1 + region.support(-y[:, None] * w).value).clamp(min=0)
    gain = (
        y[:, None, None]
        * (w.view(6, 4)[torch.arange(6), words(10, groups)][:, :, None] - w.view(6, 4))
    ).amax(2)  # what the chapter adds to the loss
    assert torch.allclose(
        robust,
        (1 - y * (x @ w) + gain.sort(1, descending=True).values[:, :k].sum(1)).clamp(min=0),
        rtol=1e-12,
    )
    for i in range(10):
        assert torch.isclose(
            robust[i],
            (1 - y[i] * (brute(x[i], groups, None, k) @ w)).clamp(min=0).max(),
            rtol=1e-12,
        )


@pytest.mark.parametrize("search", ["auto", "gradient", "greedy", "beam"])
def test_no_switch_of_a_witness_can_be_taken_back(search: Any) -> None:
    problem = posed(trained, 60, 4, one_hot_groups(12, 4))
    broken, candidate, _ = found(SubstitutionSearch(search), problem)
    for i in torch.nonzero(broken).flatten().tolist():
        changed = torch.nonzero((candidate[i] != problem.x[i]).any(1)).flatten().tolist()
        fewer = torch.stack(
            [
                candidate[i].index_copy(0, torch.tensor([g]), problem.x[i, g : g + 1])
                for g in changed
            ]
        )
        worst = problem.goal.worst(
            problem.goal.margins(problem.classifier.logits(fewer), problem.y[i].expand(len(fewer)))
        )
        assert len(changed) == 1 or not is_adversarial(worst).any()
