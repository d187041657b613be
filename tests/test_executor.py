"""Do results depend on where, and on how many workers, jobs run?"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from calipers.certificates import MILP, AlphaCROWN, BranchAndBound, CertifiedRadius, crown
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.exact import lp
from calipers.errors import BadInput
from calipers.problem.executor import Executor, LocalThreads
from calipers.problem.interrupts import OutOfTime, flattened, give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Certifier, Claim
from calipers.threats.ball import Ball

WORKERS = [1, 2, 5]
TOOLS: dict[str, Certifier] = {
    "IBP": IBP(proofs=True),
    "CROWN": CROWN(proofs=True),
    "AlphaCROWN": AlphaCROWN(steps=4, intermediate=2),
    "CertifiedRadius": CertifiedRadius(CROWN(), rounds=5),
    "BranchAndBound": BranchAndBound(seconds=600, steps=4, proofs=True),
    "MILP": MILP(seconds=600, steps=4, intermediate=2),
}


def posed(points: int = 11, radius: float = 0.06, executor: Executor | None = None) -> Problem:
    streams = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=streams)
    x = torch.rand(points, 6, generator=streams)
    threat = Ball("linf", radius, box=(0, 1))
    return Problem.pose(model, x, model(x).argmax(1), threat, executor=executor)


def told(answers: Iterable[Claim | Attempt]) -> list[tuple[object, ...]]:
    """Return all that the answers say, in their order."""
    return [
        tuple(
            value.tolist() if isinstance(value, Tensor) else value
            for value in (getattr(answer, f.name) for f in dataclasses.fields(answer))
        )
        for answer in answers
    ]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a dozen points need several jobs."""
    monkeypatch.setattr(crown, "_POINTS", 2)


class Reversed(LocalThreads):
    """An executor that begins with the last job: results must not depend on it."""

    def map(self, function, jobs, *, device=None):  # type: ignore[no-untyped-def, override]
        return reversed([function(job) for job in reversed(list(jobs))])


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("name", list(TOOLS))
def test_results_do_not_depend_on_the_workers(name: str) -> None:
    points = 5 if name == "MILP" else 11
    once = told(TOOLS[name](posed(points, executor=LocalThreads(workers=1))))
    assert len(once) >= points / 2
    for executor in (LocalThreads(2), LocalThreads(5), Reversed()):
        assert told(TOOLS[name](posed(points, executor=executor))) == once


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", ["CROWN", "CertifiedRadius"])
def test_a_job_that_dies_takes_nothing_before_it_along(
    name: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the third of six batches: the two before it come, whatever the workers."""
    bound, problem = CROWN.bound, posed(executor=LocalThreads(workers))
    dear = {problem.names[4]}

    def dying(self: CROWN, part: Problem, *given: object) -> object:
        if dear & set(part.names):
            raise MemoryError("a batch too large")
        return bound(self, part, *given)  # type: ignore[arg-type]

    whole = told(TOOLS[name](problem))
    monkeypatch.setattr(CROWN, "bound", dying)
    got = list[Claim | Attempt]()
    with pytest.raises(MemoryError, match="a batch too large"):
        got.extend(TOOLS[name](problem))
    assert told(got) == whole[:2]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("end", ["through", "an error", "left alone"])
def test_torch_has_its_threads_back(workers: int, end: str) -> None:
    before, seen = torch.get_num_threads(), list[int]()

    def work(job: int) -> int:
        seen.append(torch.get_num_threads())
        if job == 3 and end == "an error":
            raise ZeroDivisionError
        return job

    torch.set_num_threads(3)
    try:
        results = LocalThreads(workers).map(work, range(8))
        if end == "left alone":
            assert next(results) == 0
            del results
        elif end == "an error":
            with pytest.raises(ZeroDivisionError):
                list(results)
        else:
            assert list(results) == list(range(8))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_as_many_jobs_at_once_as_workers() -> None:
    """All five wait for one another: with fewer workers none would ever end."""
    met = threading.Barrier(5, timeout=60)
    assert list(LocalThreads(5).map(lambda job: (met.wait(), job)[1], range(5))) == [0, 1, 2, 3, 4]


def test_no_workers_are_refused() -> None:
    with pytest.raises(BadInput, match="workers >= 1"):
        LocalThreads(0)


# ---- interrupts
# --------------------------------------------------------------------------------------------------


def interrupted(first: int) -> tuple[Callable[[int], int], threading.Event]:
    """Return jobs of which the first breaks off when two others have ended."""
    done, ended = [0], threading.Event()

    def work(job: int) -> int:
        if job == first:
            assert ended.wait(60)
            raise KeyboardInterrupt
        done[0] += 1
        if done[0] == 2:
            ended.set()
        return job

    return work, ended


def test_an_interrupt_keeps_what_had_ended() -> None:
    work, _ = interrupted(0)
    got = list[int]()
    with pytest.raises(KeyboardInterrupt):
        got.extend(LocalThreads(2).map(work, range(3)))
    # the extend of a list keeps what came before the error
    assert got == [1, 2]


def test_a_caller_that_throws_gets_what_had_ended() -> None:
    all_in = threading.Barrier(3, timeout=60)

    def work(job: int) -> list[int]:
        all_in.wait()
        return [job, -job]

    results = LocalThreads(3).map(work, [1, 2, 3])
    members = flattened(results)
    assert next(members) == 1
    assert members.throw(KeyboardInterrupt()) == -1  # type: ignore[attr-defined]
    rest = list[int]()
    with pytest.raises(KeyboardInterrupt):
        rest.extend(members)
    assert rest in ([], [2, -2], [3, -3], [2, -2, 3, -3])


def test_a_job_that_notices_the_stop_counts_as_not_ended() -> None:
    """It may have done less than it would have: its result is dropped, and it is asked again."""
    inside = threading.Event()

    def work(job: int) -> str:
        if job == 0:
            assert inside.wait(60)
            raise KeyboardInterrupt
        inside.set()
        try:
            while True:
                give_way()
        except OutOfTime:
            return "half"

    got = list[str]()
    with pytest.raises(KeyboardInterrupt):
        got.extend(LocalThreads(2).map(work, range(2)))
    assert got == []


@pytest.mark.parametrize("workers", [2, 3])
def test_what_searches_know_comes_after_an_interrupt(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the searches breaks off: all that have begun are told, as not final."""
    problem, real = posed(4, executor=LocalThreads(workers)), lp.BallPrograms.solve
    whole = {int(c.index): c for c in TOOLS["MILP"](problem) if isinstance(c, Claim)}
    calls = [0]

    def breaking(self: lp.BallPrograms, *args: object, **more: object) -> object:
        calls[0] += 1
        if calls[0] == 12:
            raise KeyboardInterrupt
        return real(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(lp.BallPrograms, "solve", breaking)
    claims = list[Claim]()
    with pytest.raises(KeyboardInterrupt):
        claims.extend(c for c in TOOLS["MILP"](problem) if isinstance(c, Claim))
    assert claims and not all(claim.final for claim in claims)
    assert len({int(claim.index) for claim in claims}) == len(claims)
    for claim in claims:
        known = whole[int(claim.index)]
        assert float(claim.radius) <= float(known.radius) * (1 + 1e-9)
        assert not claim.final or float(claim.radius) == float(known.radius)


# ---- mistakes that must show
# --------------------------------------------------------------------------------------------------


class AsTheyEnd(LocalThreads):
    """An executor that yields results in another order."""

    def map(self, function, jobs, *, device=None):  # type: ignore[no-untyped-def, override]
        return iter([function(job) for job in jobs][::-1])


class Generous(LocalThreads):
    """An executor that leaves torch's threads as they are."""

    def map(self, function, jobs, *, device=None):  # type: ignore[no-untyped-def, override]
        return map(function, jobs)


@pytest.mark.usefixtures("small_batches")
def test_another_order_shows() -> None:
    once = told(CROWN()(posed(executor=LocalThreads(1))))
    assert told(CROWN()(posed(executor=AsTheyEnd()))) != once


def test_threads_that_are_not_set_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalThreads, "map", Generous.map)
    with pytest.raises(AssertionError):
        test_torch_has_its_threads_back(2, "through")
