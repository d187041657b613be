"""Is what an attack reports as its cost what the model was really asked?"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import arsenal
import pytest
import torch
from torch import Tensor, nn

from calipers.attacks import PGD
from calipers.attacks.engine import minimum_norm, targets
from calipers.models.classifier import Classifier
from calipers.models.passes import PassCounter, shared_out
from calipers.problem.executor import LocalThreads
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack
from calipers.threats.ball import Ball

N = 7
RADII = {"linf": 0.15, "l2": 0.3, "l0": 2.0}
ATTACKS = {n: found for n, found in arsenal.arsenal().items() if found[1] in RADII}


class _Watched(torch.autograd.Function):
    """The identity, which counts the points whose gradient passes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        Watched.backwards += len(slope)
        return slope


class Watched(nn.Module):
    """A model that counts by itself; its copies count for the class."""

    forwards: ClassVar[int] = 0
    backwards: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.inner = arsenal.net()

    def forward(self, x: Tensor) -> Tensor:
        """(N, 12) -> (N, 4)."""
        if torch.compiler.is_exporting():
            return self.inner(x)  # type: ignore[no-any-return]
        Watched.forwards += len(x)
        return self.inner(_Watched.apply(x))  # type: ignore[no-any-return, no-untyped-call]


def posed(threat: str) -> Problem:
    """Return a problem; what it costs to prepare it is spent."""
    model, x = Watched().eval(), arsenal.points(n=N)
    ball = Ball(threat, RADII[threat], box=(0, 1))
    problem = Problem.pose(model, x, model(x).argmax(1), ball)
    assert problem.size.isfinite().all()
    return problem


def costs(attack: Attack, problem: Problem) -> list[tuple[int, int]]:
    """Return forwards and backwards as the model, the classifier and the attack count them."""
    Watched.forwards = Watched.backwards = 0
    with problem.classifier.passes.counting() as spent:
        attempts = list(attack(problem))
    told = [sum(int(getattr(a, k).sum()) for a in attempts) for k in ("forwards", "backwards")]
    return [
        (Watched.forwards, Watched.backwards),
        (spent.forwards, spent.backwards),
        (told[0], told[1]),
    ]


@pytest.mark.one_in(1)
@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_attack_tells_what_it_asked(name: str) -> None:
    attack, threat = ATTACKS[name]
    problem = posed(threat)
    if name == "WarmStarted":
        list(attack(problem))  # captures the model, which asks it a few times
    true, counted, told = costs(attack, problem)
    assert true == counted == told


def test_two_threads_with_one_model_do_not_count_for_one_another() -> None:
    """Both at work at the same time, by a barrier in the model."""
    classifier, counts = Classifier(arsenal.net()), dict[int, tuple[int, int]]()
    x = arsenal.points(n=9)
    classifier.check(x)
    problem = Problem.pose(classifier, x, None, Ball("linf", 0.15, box=(0, 1)))
    assert problem.size.isfinite().all()
    meet = threading.Barrier(2, timeout=60)

    def work(points: int) -> None:
        part = problem.take(range(points))
        with classifier.passes.counting() as spent:
            meet.wait()
            for _ in range(3):
                classifier.logits(part.x)
                meet.wait()
            attempts = list(PGD(steps=points)(part))
            meet.wait()
        told = sum(int(a.forwards.sum()) for a in attempts)
        backwards = sum(int(a.backwards.sum()) for a in attempts)
        counts[points] = (spent.forwards - told - 3 * points, spent.backwards - backwards)

    threads = [threading.Thread(target=work, args=(n,)) for n in (4, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {4: (0, 0), 9: (0, 0)}


def test_workers_count_for_their_caller() -> None:
    counter = PassCounter()

    def work(job: int) -> int:
        with counter.counting() as own:
            for _ in range(job):
                counter.add(forwards=1, backwards=2)
        assert (own.forwards, own.backwards) == (job, 2 * job)
        return job

    with counter.counting() as spent:
        assert list(LocalThreads(workers=5).map(work, range(40))) == list(range(40))
    assert (spent.forwards, spent.backwards) == (780, 1560)


def test_another_model_is_not_counted() -> None:
    first, second = PassCounter(), PassCounter()
    with first.counting() as spent:
        second.add(forwards=5)
        first.add(forwards=1)
    first.add(forwards=1)
    assert (spent.forwards, spent.backwards) == (1, 0)


@pytest.mark.parametrize(("passes", "shares"), [(0, [0, 0, 0]), (7, [3, 2, 2]), (9, [3, 3, 3])])
def test_shares_add_up(passes: int, shares: list[int]) -> None:
    assert shared_out(passes, torch.tensor([5, 1, 2])).tolist() == shares


# ---- mistakes that must show
# --------------------------------------------------------------------------------------------------


def test_a_pass_that_nobody_counts_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "looked_at", lambda problem, count: problem.classes - 2)
    with pytest.raises(AssertionError):
        test_an_attack_tells_what_it_asked("APGD, targets")


def test_work_that_no_point_is_charged_for_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minimum_norm, "shared_out", lambda n, places: torch.zeros_like(places))
    with pytest.raises(AssertionError):
        test_an_attack_tells_what_it_asked("DDN")
