"""Do wider balls and repeated tries find what a single search misses, and never claim what is not
there?
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers import data
from calipers.attacks.adaptive_restarts import AdaptiveRestarts
from calipers.attacks.multi_epsilon import MultiEpsilon
from calipers.problem.goals import Targeted, Untargeted, endless, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt

RADII = {"linf": 0.1, "l2": 1.0, "l1": 6.0}


def digits(norm: str, count: int = 100, radius: float | None = None) -> Problem:
    """Return correctly classified embedded images before the plain embedded net."""
    x, y = (t[:count] for t in data.images())
    model = data.build("mnist-plain")
    kept = model(x).argmax(1) == y
    return Problem.pose(model, x[kept], y[kept], calipers.Ball(norm, radius or RADII[norm]))


def broken(attack: Attack, problem: Problem, seed: int = 0) -> Tensor:
    """Return which points the attack breaks, each mentioned once, with an admissible example."""
    found, seen = (
        torch.zeros(len(problem), dtype=torch.bool),
        torch.zeros(len(problem), dtype=torch.long),
    )
    for attempt in attack(problem, seed=seed):
        part = problem.take(attempt.index)
        seen[attempt.index] += 1
        found[attempt.index] = (part.clearance(attempt.candidate) <= 0) & part.region.contains(
            attempt.candidate
        )
        assert (attempt.forwards > 0).all()
    assert (seen == 1).all()
    return found


def linear(norm: str, ratio: float, box: tuple[float, float] | None) -> Problem:
    """Return points of a linear model, each at a radius of `ratio` times its exact distance (no
    box: margin over dual norm).
    """
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(12, 4).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 12, generator=generator))
        model.bias.zero_()
    x = torch.rand(20, 12, generator=generator, dtype=torch.float64)
    problem = Problem.pose(model, x, model(x).argmax(1), calipers.Ball(norm, 1.0, box=box))
    margins = problem.margins(model(x))
    rows = problem.goal.rows(problem.y, 4).double() @ model.weight
    exact = (
        margins / torch.stack([problem.region.norm.dual(rows[:, s]) for s in range(3)], 1)
    ).amin(1)
    return problem.at(exact.detach() * ratio)


@pytest.mark.parametrize("norm", RADII)
def test_descent_gives_the_exact_verdict_on_a_linear_model(norm: str) -> None:
    assert broken(MultiEpsilon(steps=60), linear(norm, 1.01, None)).all()
    assert not broken(MultiEpsilon(steps=60), linear(norm, 0.99, None)).any()


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("targets", [0, 3])
def test_the_widest_ball_is_never_mistaken_for_the_one_asked_for(norm: str, targets: int) -> None:
    """Every candidate lies in the ball asked for, though all points fall in one three times as
    wide.
    """
    problem = digits(norm, 40, RADII[norm] / 4)
    for attempt in MultiEpsilon(steps=20, targets=targets)(problem):
        assert problem.take(attempt.index).region.contains(attempt.candidate).all()
    assert (
        broken(calipers.attacks.PGD(steps=20), problem.at(RADII[norm] * 3)).all()
        and not broken(MultiEpsilon(steps=20, targets=targets), problem).all()
    )


def test_descent_finds_in_l1_what_a_search_from_inside_misses() -> None:
    problem = digits("l1", 200)
    plain, wide = (
        broken(calipers.attacks.APGD(steps=60), problem),
        broken(MultiEpsilon(steps=60, targets=0), problem),
    )
    assert (wide & ~plain).sum() >= 2


def test_a_goal_without_end_falls_where_the_goal_falls_and_is_never_reached() -> None:
    margins = torch.tensor([[3.0, -2.0], [0.5, 0.25], [0.0, 7.0], [-50.0, -1e30]])
    for goal in (Untargeted(), Targeted(1)):
        own, other = goal.worst(margins), endless(goal).worst(margins)
        assert not is_adversarial(other).any() and torch.equal(own.argsort(), other.argsort())
    assert is_adversarial(endless(Untargeted()).worst(torch.tensor([[float("nan"), 1.0]]))).all()


@dataclass(frozen=True)
class Spy:
    """An attack that notes which points it was asked for, and moves none."""

    asked: list[tuple[str, ...]]
    inner: Attack | None = None

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        self.asked.append(problem.names)
        if self.inner is not None:
            yield from self.inner(problem, seed=seed)
            return
        none = torch.zeros(len(problem), dtype=torch.long)
        yield Attempt(torch.arange(len(problem)), problem.x.clone(), none, none)


def test_only_nearly_broken_points_are_tried_again_and_broken_ones_never() -> None:
    problem, spy = digits("linf", 60), Spy([])
    first = broken(calipers.attacks.PGD(steps=10), problem)
    broken(
        AdaptiveRestarts(calipers.attacks.PGD(steps=10), spy, threshold=0.1, restarts=3), problem
    )
    again = set(spy.asked[0])
    assert spy.asked == [spy.asked[0]] * 3
    assert 0 < len(again) < int((~first).sum()) and not again & {
        n for n, hit in zip(problem.names, first.tolist(), strict=True) if hit
    }


def test_nearly_is_measured_as_a_linear_model_does() -> None:
    """At a share s of the exact distance a linear model lacks (1 - s) / s of the radius: 1 / 0.97 -
    1 is within 0.04, 1 / 0.95 - 1 is not.
    """
    for norm in RADII:
        for ratio, tried in ((0.97, True), (0.95, False)):
            spy = Spy([])
            broken(
                AdaptiveRestarts(calipers.attacks.APGD(steps=60, targets=3), spy, threshold=0.04),
                linear(norm, ratio, None),
            )
            assert bool(spy.asked) == tried, (norm, ratio)
            assert not tried or len(spy.asked[0]) == 20


def test_more_tries_break_more_and_keep_what_was_broken() -> None:
    problem = digits("l1", 200)
    once = broken(calipers.attacks.APGD(steps=40), problem)
    insisted = broken(
        AdaptiveRestarts(
            calipers.attacks.APGD(steps=40),
            MultiEpsilon(steps=60, targets=2),
            threshold=0.1,
            restarts=2,
        ),
        problem,
    )
    assert (insisted | ~once).all() and insisted.sum() > once.sum()


def test_neighbours_do_not_matter() -> None:
    problem = digits("linf", 40)
    attack = AdaptiveRestarts(
        calipers.attacks.PGD(steps=5), calipers.attacks.PGD(steps=10), threshold=0.3, restarts=2
    )
    whole = broken(attack, problem)
    halves = torch.cat(
        [
            broken(attack, problem.take(torch.arange(0, 11))),
            broken(attack, problem.take(torch.arange(11, len(problem)))),
        ]
    )
    assert torch.equal(whole, halves)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(calipers.BadInput, match="threshold > 0"):
        AdaptiveRestarts(calipers.attacks.PGD(), calipers.attacks.PGD(), threshold=0.0)
    with pytest.raises(calipers.BadInput, match="widest >= 1"):
        MultiEpsilon(widest=0.5)


def test_the_wider_balls_are_climbed_to_the_end_also_by_points_that_fall_there() -> None:
    """What lies deep in another class is wanted, not its boundary: six in ten of the steps are made
    at every point.
    """
    problem = digits("linf", 30)
    for attempt in MultiEpsilon(steps=50, targets=0)(problem):
        assert int(attempt.forwards.min()) >= 30
