"""Do the optimised certifiers answer questions about letters? Slopes, branches and radii against
the list of all neighbours of small nets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from clocks import AMPLE
from test_categorical import SHORT, fewest, lowest_margins, short, windowed
from test_substitutions import UNEVEN, generator, words, written
from torch import Tensor, nn

import calipers
from calipers.attacks.apgd import APGD
from calipers.certificates import branch_search
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN
from calipers.certificates.input_split import InputSplit
from calipers.certificates.radius import CertifiedRadius
from calipers.errors import BadInput
from calipers.problem.branching import divided
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim
from calipers.threats.ball import Ball
from calipers.threats.substitution_region import SubstitutionRegion
from calipers.threats.substitutions import Substitutions

F64 = torch.float64
TREE = BranchAndBound(seconds=AMPLE, batch=16)


class Embedded(nn.Module):
    """Letters looked up in a table, each in three numbers, then a ReLU net over the word."""

    def __init__(self, groups: int, size: int, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, 3, generator=generator(seed), dtype=F64))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Flatten(),
                nn.Linear(3 * groups, 10),
                nn.ReLU(),
                nn.Linear(10, 8),
                nn.ReLU(),
                nn.Linear(8, 3),
            ).double()

    def forward(self, x: Tensor) -> Tensor:
        """(N, groups, size) one-hot -> (N, 3)."""
        return self.net(x @ self.table)  # type: ignore[no-any-return]


def random_net(inputs: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (
            nn.Sequential(
                nn.Flatten(),
                nn.Linear(inputs, 12),
                nn.ReLU(),
                nn.Linear(12, 10),
                nn.ReLU(),
                nn.Linear(10, 3),
            )
            .double()
            .requires_grad_(False)
        )


def posed(model: nn.Module, last: nn.Module, x: Tensor, threat: Substitutions) -> Problem:
    """Return the question whether class 0 wins, its logit shifted so that it does so for about half
    of the points whatever the adversary does.
    """
    assert isinstance(last, nn.Linear)
    problem = Problem.pose(model, x, torch.zeros(len(x), dtype=torch.long), threat)
    # many words may share their worst neighbour: between two levels nothing is a tie
    levels = exact(problem).round(decimals=6).unique()
    last.bias[0] -= levels[len(levels) // 2 - 1 : len(levels) // 2 + 1].mean()
    return Problem.pose(model, x, problem.y, threat)


def dense(seed: int, k: int) -> Problem:
    """Return a net over four letters of uneven alphabets, at its own predictions."""
    x = written(words(12, UNEVEN, seed=seed), UNEVEN)
    model = random_net(x.shape[1], seed)
    return posed(model, model[-1], x, Substitutions(UNEVEN, k))  # type: ignore[index]


def embedded(seed: int, k: int) -> Problem:
    """Return a net that looks letters up in a table; some letters may only become some others."""
    groups = [[4 * g + a for a in range(4)] for g in range(3 + seed % 3)]
    x = written(words(12, groups, seed=seed), groups).view(12, len(groups), 4)
    model = Embedded(len(groups), 4, seed).requires_grad_(False)
    allowed = torch.rand(len(groups), 4, 4, generator=generator(seed)) < 0.7
    return posed(model, model.net[-1], x, Substitutions(groups, k, allowed=allowed))  # type: ignore[arg-type]


def exact(problem: Problem) -> Tensor:
    """Return the lowest margin of all admissible points, (N,)."""
    budget = problem.region.budget.tolist()
    return torch.stack(
        [m[: k + 1].min() for m, k in zip(lowest_margins(problem), budget, strict=True)]
    )


def margins(tool: Any, problem: Problem) -> Tensor:
    return calipers.certify(problem.classifier, problem.x, problem.y, problem.threat, tool).margin


def verdicts(tool: BranchAndBound, problem: Problem) -> Tensor:
    """Return 1 where the tool proves, -1 where it shows an admissible example that the model gets
    wrong, 0 elsewhere, (N,).
    """
    found = torch.zeros(len(problem))
    for answer in tool(problem):
        if isinstance(answer, Attempt):
            part = problem.take(answer.index)
            assert part.region.contains(answer.candidate).all(), (
                "an example is written in admissible letters"
            )
            assert is_adversarial(
                part.goal.worst(part.margins(part.classifier.logits(answer.candidate)))
            ).all()
            found[answer.index] = -1
        else:
            assert isinstance(answer, Claim)
            found[answer.index] = torch.where(
                answer.margin > 0, 1.0, found[answer.index].double()
            ).float()
    return found


CASES = [(make, seed, k) for make in (dense, embedded) for seed in range(3) for k in (1, 2)]


@pytest.mark.parametrize(("make", "seed", "k"), CASES)
def test_slopes_of_their_own_stay_below_every_neighbour_and_above_plain_ones(
    make: Any, seed: int, k: int
) -> None:
    problem = make(seed, k)
    plain, chosen, truth = margins(CROWN(), problem), margins(AlphaCROWN(), problem), exact(problem)
    assert (chosen <= truth).all()
    assert (chosen >= plain).all()


def test_slopes_of_their_own_are_worth_something() -> None:
    gained = [
        margins(AlphaCROWN(), p) > margins(CROWN(), p) + 0.01 for p in (dense(0, 1), embedded(1, 2))
    ]
    assert all(float(g.double().mean()) > 0.3 for g in gained)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("make", "seed", "k"), CASES)
def test_branch_and_bound_decides_as_the_list_of_all_neighbours(
    make: Any, seed: int, k: int
) -> None:
    problem = make(seed, k)
    assert verdicts(TREE, problem).tolist() == torch.where(exact(problem) > 0, 1.0, -1.0).tolist()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("source", [short, windowed], ids=["dense", "windows"])
def test_trained_nets_are_decided(source: Any, k: int) -> None:
    model, x, y = source()
    problem = Problem.pose(model, x[:30], y[:30], Substitutions(SHORT, k))
    assert verdicts(TREE, problem).tolist() == torch.where(exact(problem) > 0, 1.0, -1.0).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("letters_after", [0, 10**9])
def test_letters_are_fixed_early_late_or_where_nothing_is_left_to_split(
    letters_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch_search, "_SYMBOLS_AFTER", letters_after)
    for seed in range(3):
        problem = dense(seed, 2)
        assert (
            verdicts(TREE, problem).tolist() == torch.where(exact(problem) > 0, 1.0, -1.0).tolist()
        )


@pytest.mark.slow
def test_the_search_really_comes_to_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fixing letters some points stay open: what is left once every element has a side is
    no letter.
    """
    monkeypatch.setattr(branch_search, "most_wanted", lambda problem, points: None)
    unknown = [
        verdicts(BranchAndBound(seconds=0.5, batch=16), dense(seed, 2)) == 0 for seed in range(3)
    ]
    assert any(bool(u.any()) for u in unknown)


def test_parts_cover_the_whole_once() -> None:
    problem = dataclasses.replace(embedded(2, 2), y=embedded(2, 2).y).take([3])
    whole = torch.cat(list(problem.region.neighbours(0))).flatten(1)
    for group in range(problem.region.options.shape[1]):  # type: ignore[attr-defined]
        parts = divided(problem, group)
        listed = torch.cat(
            [torch.cat(list(parts.region.neighbours(i))).flatten(1) for i in range(len(parts))]
        )  # type: ignore[attr-defined]
        assert sorted(listed.tolist()) == sorted(whole.tolist())


def test_fixed_letters_move_no_more() -> None:
    """What bounds see of a part is its own: the hull, and the falls that it allows."""
    part = divided(dense(1, 2).take([0]), 2)
    region, a = (
        part.region,
        torch.randn(1, 20, part.x[0].numel(), generator=generator(1), dtype=F64),
    )
    assert isinstance(region, SubstitutionRegion)
    assert (region.low[:, UNEVEN[2]] == 0).all()
    assert (region.high[:, UNEVEN[2]] == 0).all()
    for i in range(len(part)):
        fallen = (torch.cat(list(region.neighbours(i))) - part.x[i]).flatten(1) @ a[0].T
        assert torch.allclose(region.fall(a, torch.tensor([i])).value[0], -fallen.amin(0))


# ---- letters and numbers
# --------------------------------------------------------------------------------------------------


def mixed(seed: int, k: float) -> tuple[Problem, Tensor]:
    """Return four letters beside one number, and the lowest margin over all letters and a fine grid
    of the number.
    """
    groups = UNEVEN
    x = torch.cat(
        [
            written(words(8, groups, seed=seed), groups),
            torch.rand(8, 1, generator=generator(seed), dtype=F64),
        ],
        1,
    )
    model = random_net(x.shape[1], seed)
    problem = Problem.pose(
        model, x, model(x).argmax(1), Substitutions(groups, k, continuous=Ball("linf", 0.2))
    )
    lowest = []
    for i in range(len(x)):
        every = torch.cat(list(problem.region.neighbours(i)))  # type: ignore[attr-defined]
        grid = torch.linspace(-0.2, 0.2, 81, dtype=F64).repeat_interleave(len(every))
        every = every.repeat(81, 1)
        every[:, -1] = (every[:, -1] + grid).clamp(0, 1)
        lowest.append(
            problem.goal.worst(
                problem.goal.margins(model(every), problem.y[i].expand(len(every)))
            ).min()
        )
    return problem, torch.stack(lowest)


@pytest.mark.parametrize("k", [0.5, 1, 2])
def test_numbers_beside_the_letters_are_decided_too(k: float) -> None:
    for seed in range(2):
        problem, lowest = mixed(seed, k)
        assert (margins(AlphaCROWN(), problem) <= lowest).all()
        found = verdicts(TREE, problem)
        assert (found != 0).all()
        assert ((found == 1) <= (lowest > 0)).all()
        assert ((found == -1) >= (lowest <= 0)).all()


# ---- radii of switches
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounder", [CROWN(), AlphaCROWN(intermediate=0)], ids=["CROWN", "AlphaCROWN"]
)
def test_the_largest_radius_is_a_whole_number_that_holds(bounder: Any) -> None:
    model, x, y = short()
    truth = torch.tensor(fewest(Problem.pose(model, x, y, Substitutions(SHORT, 1))))
    for k in (1, 3):
        radius = calipers.certify(
            model, x, y, Substitutions(SHORT, k), CertifiedRadius(bounder)
        ).radius
        direct = calipers.certify(model, x, y, Substitutions(SHORT, 1), bounder).certified
        assert (radius < truth).all()
        assert (radius == radius.floor()).all()
        assert (radius[direct] >= 1).all(), "what the bounder proves at one switch is found"


def test_numbers_alone_count_as_half_a_switch_in_radii_too() -> None:
    problem, _ = mixed(0, 1)
    radius = calipers.certify(
        problem.classifier, problem.x, problem.y, problem.threat, CertifiedRadius(CROWN())
    ).radius
    alone = margins(CROWN(), problem.at(torch.full((8,), 0.5))) > 0
    assert set(radius.tolist()) <= {0.0, 0.5, 1.0, 2.0, 3.0, 4.0}
    assert (radius[alone] >= 0.5).all()


# ---- who refuses
# --------------------------------------------------------------------------------------------------


def test_what_cannot_answer_says_so() -> None:
    problem = dense(0, 1)
    with pytest.raises(BadInput, match="between two symbols there is nothing"):
        next(iter(InputSplit()(problem)))
    for tool, words_ in (
        (BranchAndBound(attack=APGD()), "APGD searches the inside of a norm ball"),
        (CROWN(proofs=True), "proof files are about norm balls"),
    ):
        with pytest.raises(BadInput, match=words_):
            margins(tool, problem)


# ---- mutants
# --------------------------------------------------------------------------------------------------


def test_bounds_that_count_one_switch_too_few_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether only the confirming sweep counts wrong, or everything does."""
    problem = dense(0, 2)
    truth, whole = exact(problem), SubstitutionRegion.fall
    with monkeypatch.context() as patched:
        patched.setattr(
            SubstitutionRegion,
            "fall",
            lambda region, a, points: whole(region.at(region.radius - 1), a, points),
        )
        assert bool((margins(AlphaCROWN(), problem) > truth).any())
    monkeypatch.setattr(
        SubstitutionRegion,
        "budget",
        property(lambda region: (region.radius.long() - 1).clamp_min(0)),
    )
    assert bool(((verdicts(TREE, problem) == 1) & (truth <= 0)).any())


@pytest.mark.slow
def test_parts_without_the_first_letter_put_in_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(problem: Problem, group: int) -> Problem:
        return divided(problem, group).take([0])

    monkeypatch.setattr(branch_search, "divided", forgetful)
    monkeypatch.setattr(branch_search, "_SYMBOLS_AFTER", 0)
    wrong = [
        bool(((verdicts(TREE, p) == 1) & (exact(p) <= 0)).any())
        for p in (dense(seed, 2) for seed in range(4))
    ]
    assert any(wrong)


def test_an_example_between_the_letters_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SubstitutionRegion, "snap", lambda region, points: points)
    problem = dense(0, 2)
    with pytest.raises(AssertionError, match="admissible letters"):
        verdicts(TREE, problem)
