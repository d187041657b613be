"""Are the fewest letters that fool a net found, and proved to be so? Against the list of all
neighbours, and deliberate mistakes in every rule.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clocks import AMPLE
from terminal import calipers as run_calipers
from test_categorical import SHORT, fewest, short
from test_letters_optimised import dense, embedded, posed
from test_milp_trust import LIES
from test_substitutions import generator, words, written
from torch import Tensor, nn

import calipers
from calipers.attacks.apgd import APGD
from calipers.attacks.substitution_search import SubstitutionSearch
from calipers.bounds.rounding import CHECKED, SEARCH
from calipers.certificates.enumeration import Enumeration
from calipers.certificates.exact import lp, substitution_lp, substitution_search
from calipers.certificates.exact.substitution_lp import Part, proved_of
from calipers.certificates.exact.tree import MultiplierBound
from calipers.certificates.milp import MILP
from calipers.errors import BadInput, Contradiction
from calipers.measurement.exact import close, closed, gaps
from calipers.measurement.plan import Plan, Stage
from calipers.measurement.run import run
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.record.bracket import Bracket
from calipers.record.record import Record
from calipers.threats.ball import Ball
from calipers.threats.neighbours import neighbourhood_size
from calipers.threats.substitution_region import SubstitutionRegion
from calipers.threats.substitutions import Substitutions

F64 = torch.float64
TOOL = MILP(seconds=AMPLE, steps=4, intermediate=2)
GROUPS = [[0, 1, 2], [3, 4], [5, 6, 7]]


class Windowed(nn.Module):
    """Letters looked up in a table, read through windows of two."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 3, generator=generator(seed), dtype=F64))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Conv1d(3, 4, 2),
                nn.LeakyReLU(0.1),
                nn.Flatten(),
                nn.Linear(16, 6),
                nn.ReLU(),
                nn.Linear(6, 3),
            ).double()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 5, 3) one-hot -> (N, 3)."""
        return self.net((x @ self.table).mT)  # type: ignore[no-any-return]


def windowed(seed: int, k: int) -> Problem:
    """Return a convolutional net over an embedding of five letters."""
    groups = [[3 * g + a for a in range(3)] for g in range(5)]
    model = Windowed(seed).requires_grad_(False)
    x = written(words(12, groups, seed=seed), groups).view(12, 5, 3)
    return posed(model, model.net[-1], x, Substitutions(groups, k))  # type: ignore[arg-type]


def ends(problem: Problem, tool: MILP = TOOL) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return what is proved and what is broken of every point; examples are measured, and asked of
    the model, here.
    """
    lower, upper = np.zeros(len(problem)), np.full(len(problem), np.inf)
    for result in tool(problem):
        i = int(result.index)
        if not isinstance(result, Attempt):
            lower[i] = float(result.radius)
            continue
        here = problem.take([i])
        upper[i] = float(here.region.distance(result.candidate))
        assert bool(here.goal.worst(here.margins(here.classifier.logits64(result.candidate))) <= 0)
        assert bool(here.region.at(torch.tensor([upper[i]])).contains(result.candidate))
    return lower, upper


def against_the_list(problem: Problem, tool: MILP = TOOL) -> None:
    """Assert that both ends stand where the list of all neighbours says, point by point, but for
    margins within rounding of 0.
    """
    truth, k = fewest(problem), float(problem.threat.radii(1)[0])
    resisted = torch.cat([claim.radius for claim in Enumeration()(problem)]).numpy()
    lower, upper = ends(problem, tool)
    assert (
        (resisted <= lower).all()
        and (lower < np.where(truth == 0, 1, truth)).all()
        and (resisted == np.minimum(np.maximum(truth - 1, 0), k)).mean() > 0.6
    )
    assert upper.tolist() == np.where((truth > k) | (truth == 0), np.inf, truth).tolist()


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave everything to programs but single words."""
    monkeypatch.setattr(substitution_search, "_LISTED", 1)
    monkeypatch.setattr(substitution_search, "_PACE", 0)


MAKES = (dense, embedded, windowed)
CASES = [
    pytest.param(
        make,
        seed,
        k,
        marks=[pytest.mark.slow] if seed or k == 1 or (make, k) == (embedded, 3) else [],
    )
    for make in MAKES
    for seed in (0, 5)
    for k in (1, 2, 3)
]


def some(make: Callable[[int, int], Problem], seed: int, k: int, n: int = 6) -> Problem:
    return make(seed, k).take(range(n))


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("unlisted")
@pytest.mark.parametrize(("make", "seed", "k"), CASES)
def test_programs_alone_find_the_fewest_switches(make: Any, seed: int, k: int) -> None:
    against_the_list(some(make, seed, k))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("make", "seed", "k"), CASES)
def test_the_usual_search_finds_the_fewest_switches(make: Any, seed: int, k: int) -> None:
    against_the_list(make(seed + 2, k))


@pytest.mark.usefixtures("unlisted")
def test_the_programs_have_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would not tell programs from slopes."""
    solved, real, made = [0], substitution_lp.SubstitutionPrograms.solve, list[int]()
    monkeypatch.setattr(
        substitution_lp.SubstitutionPrograms,
        "solve",
        lambda self, *a, **b: (solved.append(1), made.append(len(a[0].put)), real(self, *a, **b))[
            2
        ],
    )
    for make in MAKES:
        solved.clear()
        ends(some(make, 0, 3, 3))
        assert len(solved) > 10
    assert max(made) >= 2


def test_points_of_one_problem_do_not_depend_on_each_other() -> None:
    problem = dense(0, 2)
    lower, upper = ends(problem)
    for i in (0, 3, 7):
        alone = ends(problem.take([i]))
        assert alone[0][0] == lower[i] and alone[1][0] == upper[i]


def test_an_attack_spares_the_levels_from_its_example_on() -> None:
    problem = embedded(0, 2)
    helped = dataclasses.replace(TOOL, attack=SubstitutionSearch(nearest=True))
    for mine, other in zip(ends(problem), ends(problem, helped), strict=True):
        assert mine.tolist() == np.where(other > 2, mine, other).tolist()


def test_a_margin_within_rounding_is_neither_proved_nor_broken() -> None:
    problem = dense(0, 2)
    weakest = torch.cat(list(problem.region.neighbours(4)))
    level = problem.margins(problem.classifier.logits64(weakest)).amin() - 1e-12
    problem.classifier.module[-1].bias[0] -= level  # type: ignore[index, union-attr]
    tied = Problem.pose(problem.classifier.network, problem.x[[4]], problem.y[[4]], problem.threat)
    (claim,) = Enumeration()(tied)
    assert (
        ends(tied)[0].tolist() == claim.radius.tolist()
        and float(claim.radius) < 2
        and ends(tied)[1][0] == np.inf
    )


# ---- numeric columns beside the letters
# --------------------------------------------------------------------------------------------------


def mixed(seed: int, norm: str, radius: float = 0.1) -> Problem:
    """Return a net over three letters and three numbers in [0, 1]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (
            nn.Sequential(nn.Linear(11, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
            .double()
            .requires_grad_(False)
        )
    x = written(words(1, GROUPS, seed=seed), GROUPS, 11)
    x[:, 8:] = torch.rand(1, 3, generator=generator(seed), dtype=F64)
    return Problem.pose(
        model,
        x,
        model(x).argmax(1),
        Substitutions(
            GROUPS, 3, continuous=Ball(norm, radius, weights=torch.tensor([0.5, 1.0, 2.0]))
        ),
    )


def word_by_word(problem: Problem) -> float:
    """Return the distance of the only point: the numbers of every word are searched as a ball of
    their own.
    """
    numeric, best = problem.threat.continuous, np.inf  # type: ignore[union-attr]
    assert numeric is not None
    mask, weights = torch.zeros(11, dtype=torch.bool), torch.ones(11, dtype=F64)
    mask[8:], weights[8:] = True, numeric.weights.double()  # type: ignore[union-attr]
    for word in torch.cat(list(problem.region.neighbours(0))).split(1):
        substitutions = float(problem.region.distance(word))
        if bool(problem.goal.worst(problem.margins(problem.classifier.logits64(word))) <= 0):
            best = min(best, substitutions)
        elif max(substitutions, 0.5) < best:
            ball = Problem.pose(
                problem.classifier,
                word,
                problem.y,
                Ball(numeric.norm, numeric.radius, mask=mask, weights=weights),
            )
            best = (
                max(substitutions, 0.5)
                if any(
                    isinstance(r, Attempt) and bool(ball.region.contains(r.candidate))
                    for r in TOOL(ball)
                )
                else best
            )
    return best


@pytest.mark.one_in(2)
@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_numbers_that_move_beside_the_letters(norm: str) -> None:
    truths = []
    for seed in range(10):
        problem = mixed(seed, norm)
        (lower,), (upper,) = ends(problem)
        truths.append(word_by_word(problem))
        assert (lower, upper) == (
            {0.5: 0.0, 1.0: 0.5, 2.0: 1.0, 3.0: 2.0, np.inf: 3.0}[truths[-1]],
            truths[-1],
        )
    assert {1.0, np.inf} <= set(truths)


def test_sets_of_numbers_without_straight_sides_are_refused() -> None:
    with pytest.raises(BadInput, match="linf or l1 only"):
        ends(mixed(0, "l2"))
    bound = mixed(0, "linf")
    numeric = Ball(
        "linf", 0.1, constraints=(torch.ones(1, 3, dtype=F64), torch.tensor([9.0], dtype=F64))
    )
    with pytest.raises(BadInput, match="constraints on numeric columns"):
        ends(
            Problem.pose(
                bound.classifier, bound.x, bound.y, Substitutions(GROUPS, 3, continuous=numeric)
            )
        )


# ---- what multipliers prove of a part
# --------------------------------------------------------------------------------------------------


def parts(region: SubstitutionRegion, seed: int) -> list[Part]:
    """Return a part, one with letters put in, and one with letters barred too."""
    whole, source = Part.whole(region), np.random.default_rng(seed)
    group, symbol = source.permutation(np.argwhere(whole.options))[0].tolist()
    one = whole.with_symbol(group, symbol)
    return [whole, one, one.without(source.random(one.options.shape) < 0.3)]


def exactly(bound: MultiplierBound, region: SubstitutionRegion, part: Part) -> Fraction:
    """Return the constant plus the least of <slope, delta> over a part, word by word in rational
    numbers.
    """
    slope = [Fraction(v) for v in bound.slope.tolist()]
    words = (
        (torch.cat(list(part.of(region).neighbours(0))) - region.center).flatten(1).int().tolist()
    )
    return Fraction(bound.constant) + min(
        sum((v * d for v, d in zip(slope, word, strict=True)), Fraction(0)) for word in words
    )


def bounds_hold(arithmetic: Any = CHECKED) -> None:
    """Assert that bounds of parts stay below every word of them, by no more than rounding."""
    region = dense(0, 3).region.take(torch.tensor([0]))
    assert isinstance(region, SubstitutionRegion)
    for seed in range(40):
        source = np.random.default_rng(seed)
        bound = MultiplierBound(
            float(source.normal()),
            source.normal(size=12) * 10.0 ** source.integers(-3, 6, 12),
            region,
            0.0,
        )
        for part in parts(region, seed):
            proved, size = (
                proved_of(bound, region, part, arithmetic),
                float(np.abs(bound.slope).sum()),
            )
            truth = exactly(bound, region, part)
            assert Fraction(proved.whole) <= truth <= Fraction(proved.whole + 1e-10 * size)
            assert np.isinf(proved.each[~part.options]).all()
            for group, symbol in np.argwhere(part.options).tolist():
                truth = exactly(bound, region, forced(part, group, symbol))
                assert (
                    Fraction(proved.each[group, symbol])
                    <= truth
                    <= Fraction(proved.each[group, symbol] + 1e-10 * size)
                )


def forced(part: Part, group: int, symbol: int) -> Part:
    return part.with_symbol(group, symbol)


def test_bounds_of_parts_are_the_least_of_all_words_less_rounding() -> None:
    bounds_hold()


def test_bounds_of_parts_without_room_for_rounding_are_caught() -> None:
    with pytest.raises(AssertionError):
        bounds_hold(dataclasses.replace(SEARCH, dtype=F64))


def test_a_part_counts_its_ways_and_knows_what_it_lies_within() -> None:
    region = dense(0, 3).region.take(torch.tensor([0]))
    assert isinstance(region, SubstitutionRegion)
    whole, one, barred = parts(region, 3)
    for part in (whole, one, barred):
        listed = torch.cat(list(part.of(region).neighbours(0)))
        assert part.ways == len(listed) == len(listed.unique(dim=0)) and bool(
            region.take(torch.zeros(len(listed), dtype=torch.long)).contains(listed).all()
        )
        assert bool(
            part.of(region).take(torch.zeros(len(listed), dtype=torch.long)).contains(listed).all()
        )
    assert (
        one.within(whole)
        and barred.within(one)
        and barred.within(whole)
        and not whole.within(one)
        and not one.within(barred)
    )
    assert whole.ways == neighbourhood_size(whole.options.sum(1).tolist(), 3)


# ---- mistakes that must show
# --------------------------------------------------------------------------------------------------


def shows(check: Callable[[], None]) -> bool:
    """Does a mistake show in this check?"""
    try:
        check()
    except (AssertionError, Contradiction):
        return True
    return False


def everything() -> None:
    """The tests above in short."""
    for make, seed, k in [(dense, 0, 3), (embedded, 2, 3), (windowed, 0, 3)]:
        against_the_list(some(make, seed, k, 5))


@pytest.fixture
def unhelped(unlisted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no program's solution be tried as an example either: then only what is asked word by word
    is found.
    """
    monkeypatch.setattr(
        substitution_search.SubstitutionTree, "_point", lambda self, delta: self.region.center
    )


def _not_put_in(self: Part, group: int, symbol: int) -> Part:
    return self._replace(options=_settled(self.options, group), left=self.left - 1)


def _settled(options: Any, group: int) -> Any:
    options = options.copy()
    options[group] = False
    return options


real_whole, real_with, real_proved = (
    Part.whole.__func__,
    Part.with_symbol,
    substitution_lp.proved_of,
)  # type: ignore[attr-defined]


def _bars_everything(bound: Any, region: Any, part: Part, arithmetic: Any) -> Any:
    return real_proved(bound, region, part, arithmetic)._replace(each=np.ones(part.options.shape))


def _bars_for_fewer(bound: Any, region: Any, part: Part, arithmetic: Any) -> Any:
    fewer = real_proved(bound, region, part._replace(left=max(1, part.left - 1)), arithmetic)
    return real_proved(bound, region, part, arithmetic)._replace(each=fewer.each)


MISTAKES: dict[str, tuple[object, str, object]] = {
    "a budget of one switch less": (
        Part,
        "whole",
        classmethod(
            lambda cls, region: real_whole(cls, region)._replace(left=int(region.budget[0]) - 1)
        ),
    ),
    "a letter that is not put in": (Part, "with_symbol", _not_put_in),
    "a letter that costs two switches": (
        Part,
        "with_symbol",
        lambda self, g, j: (lambda p: p._replace(left=max(p.left - 1, 0)))(real_with(self, g, j)),
    ),
    "a group barred for one letter": (
        Part,
        "without_symbol",
        lambda self, group, symbol: self._replace(options=_settled(self.options, group)),
    ),
    "a part within any other": (Part, "within", lambda self, other: True),
    "letters barred without a bound": (substitution_search, "proved_of", _bars_everything),
    "letters barred as if a switch less were left": (
        substitution_search,
        "proved_of",
        _bars_for_fewer,
    ),
    "bounds that are a little high": (
        substitution_search,
        "proved_of",
        lambda *a: (lambda p: p._replace(whole=p.whole + 0.3))(real_proved(*a)),
    ),
    "a model that is not asked": (substitution_search.Words, "resist", lambda self, points: True),
}


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("unhelped")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "a part within any other" else [])
        for name in MISTAKES
    ],
)
def test_a_mistake_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MISTAKES[name])
    assert shows(everything)


@pytest.mark.slow
@pytest.mark.usefixtures("unhelped")
def test_the_check_for_mistakes_finds_none_where_none_is() -> None:
    assert not shows(everything)


# ---- a solver that lies
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("unlisted")
@pytest.mark.parametrize("name", LIES)
def test_a_lying_solver_cannot_make_a_claim_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, real = some(dense, 0, 2, 4), substitution_lp.SubstitutionPrograms.solve
    truth = fewest(problem)

    def lying(self: substitution_lp.SubstitutionPrograms, *args: Any) -> lp.Answer | None:
        answer = real(self, *args)
        return None if answer is None else LIES[name](answer)

    monkeypatch.setattr(substitution_lp.SubstitutionPrograms, "solve", lying)
    lower, upper = ends(problem, dataclasses.replace(TOOL, seconds=1))
    assert (lower < np.where(truth == 0, 1, truth)).all() and (upper >= truth).all()


@pytest.mark.usefixtures("unlisted")
@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=[pytest.mark.slow]) for k in (1, 2))])
def test_random_multipliers_prove_nothing_wrong(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, source, real = (
        some(windowed, seed, 2, 3),
        np.random.default_rng(seed),
        substitution_lp.SubstitutionPrograms.solve,
    )
    truth = fewest(problem)

    def noisy(self: substitution_lp.SubstitutionPrograms, *args: Any) -> lp.Answer | None:
        answer = real(self, *args)
        return answer and answer._replace(
            multipliers=answer.multipliers + 0.1 * source.normal(size=len(answer.multipliers))
        )

    monkeypatch.setattr(substitution_lp.SubstitutionPrograms, "solve", noisy)
    lower, _ = ends(problem, dataclasses.replace(TOOL, seconds=2))
    assert (lower < np.where(truth == 0, 1, truth)).all()


# ---- interrupts and time
# --------------------------------------------------------------------------------------------------


def clocked(problem: Problem, monkeypatch: pytest.MonkeyPatch, seconds: int) -> float:
    """Return what is proved of the only point when every look at the clock takes a second."""
    ticks = itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(substitution_search.time, "monotonic", lambda: float(next(ticks)))
        return float(ends(problem, dataclasses.replace(TOOL, seconds=seconds))[0][0])


def out_of_time(monkeypatch: pytest.MonkeyPatch) -> set[float]:
    """Return what is proved of a point that three switches break, whenever the time is up; nothing
    may be proved that is wrong.
    """
    problem = embedded(2, 3)
    truth = fewest(problem)
    point = problem.take([int(np.flatnonzero(truth == 3)[0])])
    proved = {clocked(point, monkeypatch, seconds) for seconds in (*range(1, 40), 400)}
    assert max(proved) <= 2
    return proved


@pytest.mark.slow
@pytest.mark.parametrize("listed", [1, pytest.param(2**14, marks=[pytest.mark.slow])])
def test_time_that_is_up_leaves_what_is_proved(
    listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(substitution_search, "_LISTED", listed)
    monkeypatch.setattr(substitution_search, "_PACE", 0)
    assert out_of_time(monkeypatch) >= {0.0, 1.0, 2.0}


@pytest.mark.slow
def test_a_list_cut_short_that_counts_as_whole_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = substitution_search.SubstitutionTree._listed

    def forgetful(self: substitution_search.SubstitutionTree, part: Part) -> bool:
        before, settled = self.stuck, real(self, part)
        self.stuck = before
        return settled

    monkeypatch.setattr(substitution_search.SubstitutionTree, "_listed", forgetful)
    with pytest.raises(AssertionError):
        out_of_time(monkeypatch)


def interrupted(problem: Problem, monkeypatch: pytest.MonkeyPatch, begin: int) -> dict[int, float]:
    """Return what is claimed of each point where Ctrl-C comes at the program of that number."""
    calls, real, told = (
        itertools.count(),
        substitution_lp.SubstitutionPrograms.solve,
        dict[int, float](),
    )

    def breaking(self: substitution_lp.SubstitutionPrograms, *args: Any) -> Any:
        if next(calls) == begin:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(substitution_lp.SubstitutionPrograms, "solve", breaking)
        try:
            told.update(
                (int(result.index), float(result.radius))
                for result in TOOL(problem)
                if not isinstance(result, Attempt)
            )
        except KeyboardInterrupt:
            return told
    raise AssertionError("nothing was interrupted")


@pytest.mark.usefixtures("unlisted")
def test_an_interrupt_hands_over_what_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, threads = some(dense, 0, 3), torch.get_num_threads()
    truth = fewest(problem)
    torch.set_num_threads(1)
    try:
        told = [interrupted(problem, monkeypatch, begin) for begin in (0, 4, 12)]
    finally:
        torch.set_num_threads(threads)
    assert all(radius < truth[i] for claims in told for i, radius in claims.items())
    assert all(told) and len(told[0]) < len(problem) and max(told[2].values()) > 0


# ---- the doors
# --------------------------------------------------------------------------------------------------


def test_exact_distances_of_letters_close_the_bracket(tmp_path: Path) -> None:
    model, x, y = short()
    x, y, threat = x[:20], y[:20], Substitutions(SHORT, 1)
    bracket = calipers.distance(model, x, y, threat, exact=True, record=tmp_path / "run")
    truth = fewest(Problem.pose(model, x, y, threat))
    assert bracket.upper.tolist() == truth.tolist() and np.isfinite(truth).any()
    assert (
        bracket.lower.tolist()
        == np.where(np.isinf(truth), bracket.lower, np.maximum(truth - 1, 0)).tolist()
    )
    assert closed(bracket, threat).exact == np.isfinite(truth).sum()
    (checked,) = calipers.check(tmp_path / "run", model)
    assert checked.sound


@pytest.mark.parametrize(
    "tools", [(), (SubstitutionSearch("gradient"),)], ids=["nothing known", "examples known"]
)
def test_the_search_closes_what_the_plan_leaves_open(tools: tuple[SubstitutionSearch, ...]) -> None:
    model, x, y = short()
    problem, ledger = Problem.pose(model, x[:12], y[:12], Substitutions(SHORT, 6)), Record(None)
    run(problem, Plan("begun", tuple(Stage(tool, "attack") for tool in tools)), ledger)
    assert close(problem, TOOL, ledger)
    bracket, truth = (
        Bracket.of(problem.names, ledger.evidence(problem.fingerprint())),
        fewest(problem),
    )
    assert (
        bracket.upper.tolist() == truth.tolist()
        and bracket.lower.tolist() == np.where(np.isinf(truth), 6, truth - 1).tolist()
    )


def test_a_known_example_is_not_looked_for_again() -> None:
    model, x, y = short()
    problem, ledger, asked = (
        Problem.pose(model, x[:12], y[:12], Substitutions(SHORT, 6)),
        Record(None),
        dict[str, float](),
    )
    run(problem, Plan("begun", (Stage(SubstitutionSearch(nearest=True), "attack"),)), ledger)
    upper = Bracket.of(problem.names, ledger.evidence(problem.fingerprint())).upper

    def spying(part: Problem, *, seed: int = 0) -> Any:
        asked.update(zip(part.names, part.threat.radii(len(part)).tolist(), strict=True))
        return iter(())

    close(problem, spying, ledger)
    assert {
        name: u - 1 for name, u in zip(problem.names, upper.tolist(), strict=True) if 1 < u < np.inf
    }.items() <= asked.items()
    assert set(asked) == {
        name for name, u in zip(problem.names, upper.tolist(), strict=True) if u > 1
    }


def test_a_bracket_of_switches_is_closed_where_no_number_lies_inside() -> None:
    bracket = Bracket(
        np.array([1.0, 0.0, 0.0, 0.5, 2.0]),
        np.array([2.0, 2.0, 1.0, 1.0, np.inf]),
        ("",) * 5,
        ("",) * 5,
    )
    assert gaps(bracket, Substitutions(GROUPS, 1)).tolist() == [0, 1, 0, 0, 1]
    assert gaps(bracket, Substitutions(GROUPS, 1, continuous=Ball("linf", 0.1))).tolist() == [
        0,
        1,
        1,
        0,
        1,
    ]
    assert gaps(bracket, Ball("linf", 0.1)).tolist() == [0.5, 1, 1, 0.5, 1]


MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).eval()

def curved():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
"""


def test_the_command_line_closes_distances_of_letters(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    groups = [[3 * g + a for a in range(3)] for g in range(4)]
    x = written(words(5, groups), groups, dtype=torch.float32)
    names = dict[str, Any]()
    exec(MODEL, names)
    np.savez(tmp_path / "points.npz", x=x.numpy(), y=names["build"]()(x).argmax(1).numpy())
    asked = [
        "distance",
        "-d",
        "points.npz",
        "--one-hot",
        "4,3",
        "-e",
        "1",
        "--exact",
        "-q",
        "--record",
        "none",
        "--report",
        "none",
    ]
    shown = run_calipers(tmp_path, *asked, "-m", "net.py:build")
    assert shown.returncode == 0 and "exact: 5 of 5 distances" in shown.stdout
    gaps_shown = {
        line.split()[5] for line in shown.stdout.partition("certified above")[2].splitlines()[1:6]
    }
    assert gaps_shown == {"0.0e+00"}


def test_what_programs_cannot_say_is_refused() -> None:
    model, x, y = short()
    curved = nn.Sequential(*[nn.Tanh() if isinstance(m, nn.ReLU) else m for m in model.children()])  # type: ignore[attr-defined]
    y = curved(x).argmax(1)
    with pytest.raises(BadInput, match="piecewise linear"):
        ends(Problem.pose(curved, x, y, Substitutions(SHORT, 6)))
    with pytest.raises(BadInput, match="Substitutions are symbols to replace"):
        calipers.certify(model, x, y, Substitutions(SHORT, 1), MILP(attack=APGD()))
