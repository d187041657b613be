"""Does every tool end within a step of its time, whoever runs it, and keep what it has proved or
found by then? All clocks are counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

import calipers
from calipers import data
from calipers.attacks.engine import query_loop, queue
from calipers.bounds import backward, optimise
from calipers.certificates import alpha_crown, radius
from calipers.problem.executor import LocalThreads
from calipers.problem.interrupts import Limit, OutOfTime, give_way, limited, shortened
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim


class Looks:
    """A clock that moves on by one whenever it is looked at."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> float:
        self.count += 1
        return float(self.count)


def posed(points: int = 6, epsilon: float = 0.1) -> Problem:
    """The robust embedded network on a few digits."""
    x, y = data.images()
    return Problem.pose(
        data.build("mnist-robust"), x[:points], y[:points], calipers.Ball("linf", epsilon)
    )


TOOLS: dict[str, Callable[[Problem], Iterator[Attempt | Claim]]] = {
    "IBP": calipers.certificates.IBP(),
    "CROWN": calipers.certificates.CROWN(),
    "AlphaCROWN": calipers.certificates.AlphaCROWN(steps=4, intermediate=2),
    "BranchAndBound": calipers.certificates.BranchAndBound(seconds=1e6),
    "CertifiedRadius": calipers.certificates.CertifiedRadius(
        calipers.certificates.CROWN(), rounds=4
    ),
    "PGD": calipers.attacks.PGD(steps=20, restarts=3),
    "Square": calipers.attacks.Square(queries=300),
}  # type: ignore[dict-item]


def looks(name: str, problem: Problem, ends: float) -> tuple[int, list[Attempt | Claim], bool]:
    """Run a tool under a limit; return how often the clock was looked at, what was handed over, and
    whether it was cut short.
    """
    clock, got = Looks(), list[Attempt | Claim]()
    try:
        with limited(Limit(clock, ends)):
            for answer in TOOLS[name](problem):
                got.append(answer)
    except OutOfTime:
        return clock.count, got, True
    return clock.count, got, False


@pytest.mark.one_in(1)
@pytest.mark.parametrize("name", list(TOOLS))
def test_a_tool_ends_within_a_step_of_its_time(name: str) -> None:
    problem = posed(3, 0.2) if name == "BranchAndBound" else posed()
    ends = looks(name, problem, 1e9)[0] // 2
    count, _, cut = looks(name, problem, ends)
    assert count <= ends + 12, "it went on after its time"
    assert cut or name == "CertifiedRadius"  # which searches for less long, and confirms


WHERE = {
    "IBP": (backward,),
    "CROWN": (backward,),
    "PGD": (queue,),
    "Square": (query_loop,),
    "AlphaCROWN": (backward, optimise),
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("name", list(WHERE))
def test_a_tool_that_does_not_give_way_is_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = posed()
    ends = looks(name, problem, 1e9)[0] // 2
    for module in WHERE[name]:
        monkeypatch.setattr(module, "give_way", lambda: None)
    assert not looks(name, problem, ends)[2]


def proved(problem: Problem, name: str, ends: float) -> int:
    """How many points does a tool claim under a limit?"""
    _, got, _ = looks(name, problem, ends)
    return sum(int((a.radius > 0).sum()) for a in got if isinstance(a, Claim))


def test_slopes_cut_short_keep_what_plain_crown_proved() -> None:
    problem = posed(40)
    crown, plain = looks("CROWN", problem, 1e9)[0], proved(problem, "CROWN", 1e9)
    assert 0 < plain < 40 and proved(problem, "AlphaCROWN", crown + 8) == plain


def test_slopes_that_lose_it_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpha_crown, "OutOfTime", ZeroDivisionError)
    problem = posed(40)
    assert proved(problem, "AlphaCROWN", looks("CROWN", problem, 1e9)[0] + 8) == 0


def largest(share: float) -> float:
    """Return the mean radius claimed by a search that has that share of the looks it would take."""
    problem = posed(4)
    whole = looks("CertifiedRadius", problem, 1e9)[0]
    _, got, _ = looks("CertifiedRadius", problem, whole * share)
    claims = [a for a in got if isinstance(a, Claim)]
    return float(claims[0].radius.mean()) if claims else 0.0


def test_a_search_for_a_radius_confirms_what_it_has() -> None:
    assert 0 < largest(0.75) <= largest(2.0)


def test_a_search_that_spends_all_its_time_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radius, "_SEARCHING", 1.0)
    assert largest(0.75) == 0.0


def test_branch_and_bound_counts_its_root_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bounded before there are branches takes from the seconds of its points."""
    clock = Looks()
    monkeypatch.setattr("calipers.certificates.branch_and_bound.time.monotonic", clock)
    claims = list(calipers.certificates.BranchAndBound(seconds=2.0)(posed(4, 0.2)))
    assert (
        all(isinstance(c, Claim) and not bool((c.radius > 0).any()) for c in claims)
        and clock.count < 40
    )
    assert sorted(i for c in claims for i in c.index.tolist()) == [0, 1, 2, 3]


# ---- limits themselves
# --------------------------------------------------------------------------------------------------


def test_limits_end_with_their_block_and_the_outer_one_counts_first() -> None:
    clock = Looks()
    outer, inner = Limit(lambda: 1.0, 0.0), Limit(clock, 0.0)
    with limited(outer), limited(inner), pytest.raises(OutOfTime) as up:
        give_way()
    assert up.value.limit is outer
    give_way()  # nothing holds any more


def test_a_share_of_what_is_left() -> None:
    now = [0.0]
    with limited(Limit(lambda: now[0], 10.0)), shortened(0.5):
        now[0] = 4.9
        give_way()
        now[0] = 5.1
        with pytest.raises(OutOfTime):
            give_way()


@pytest.mark.parametrize("how", ["the user leaves", "the time is up"])
def test_threads_stop_with_whoever_listens(how: str) -> None:
    """Two threads would go on for ever; one answer comes, then nobody listens any more."""
    limit, ended = Limit(lambda: 0.0, 1.0), threading.Barrier(3, timeout=60)

    def work(part: int) -> int:
        if part == 0:
            return part
        try:
            while True:
                give_way()
        finally:
            ended.wait()

    with limited(limit):
        answers = LocalThreads(workers=2).map(work, range(3))
        assert next(answers) == 0
        closing = threading.Thread(target=answers.close) if how == "the user leaves" else None
        if closing is None:
            limit.ends = 0.0
        else:
            closing.start()
        ended.wait()
        if closing is not None:
            closing.join()
        else:
            with pytest.raises(OutOfTime):
                next(answers)
