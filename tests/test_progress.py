"""Is there one counter for a whole run, and does it move while a tool is at work?"""

import io
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import nn

import calipers
from calipers.api.display import Lines
from calipers.measurement.plan import Plan, Stage
from calipers.problem.interrupts import give_way
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.progress import Meter, Progress

N = 8
BALL = calipers.Ball("linf", 0.3)


class Slowly:
    """An attack that takes three steps at each point, and moves it towards class 1."""

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield the points one by one."""
        for i in range(len(problem)):
            for _ in range(3):
                give_way()
            moved = problem.x[i : i + 1] + torch.tensor([-0.25, 0.25])
            one = torch.tensor([1])
            yield Attempt(torch.tensor([i]), moved.clamp(0, 1), one, one)


def net() -> nn.Module:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
        model.bias.zero_()
    return model.eval()


def points() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.stack([torch.full((N,), 0.7), torch.linspace(0.0, 0.6, N)], 1)
    return x, torch.zeros(N, dtype=torch.long)


def told(stages: int = 1) -> tuple[list[Progress], calipers.Result]:
    seen = list[Progress]()
    plan = Plan("slow", tuple(Stage(Slowly(), "attack") for _ in range(stages)))
    return seen, calipers.measure(net(), *points(), BALL, plan=plan, progress=seen.append)


def moves_inside_a_block(seen: list[Progress]) -> bool:
    inside = [now for now in seen if 0 < now.share < 1]
    shares = sorted({now.share for now in inside})
    return shares == [k / N for k in range(1, N)] and len({now.steps for now in seen}) == 3 * N + 2


def test_the_counter_moves_inside_a_block_and_never_back() -> None:
    seen, found = told()
    assert moves_inside_a_block(seen)
    assert all(a.decided <= b.decided and a.steps <= b.steps for a, b in pairwise(seen))
    broken = sum(row.verdict == "broken" for row in found.points)
    assert {now.points for now in seen} == {N} and seen[-1].decided == broken > 0
    assert seen[-1].share == 1 and seen[-1].stage == found.points[-1].upper_tool


@pytest.mark.parametrize("part", ["within", "step"])
def test_without_its_ticks_the_counter_stands_still(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Meter, part, (lambda self, points=0: None) if part == "within" else lambda self: None
    )
    assert not moves_inside_a_block(told()[0])


def test_a_curve_counts_a_point_when_it_is_settled_everywhere() -> None:
    seen = list[Progress]()
    plan = Plan("slow", (Stage(Slowly(), "attack"),))
    calipers.curve(net(), *points(), BALL, [0.1, 0.2], plan=plan, progress=seen.append)
    assert {now.points for now in seen} == {N}
    assert all(a.decided <= b.decided for a, b in pairwise(seen))


def test_lines_are_written_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("slow", (Stage(Slowly(), "attack"),))
    model = calipers.Classifier(net(), name="tiny")
    calipers.measure(model, *points(), BALL, plan=plan, progress=True)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert not shown.out and 3 <= len(lines) <= 6
    assert all(line.startswith("tiny: ") and f"of {N} decided" in line for line in lines)
    calipers.measure(model, *points(), BALL, plan=plan, progress=False)
    assert capsys.readouterr().err == ""


def test_a_line_is_not_written_again_for_every_step() -> None:
    file = io.StringIO()
    lines = Lines("net", file)
    for step in range(1000):
        lines(Progress(3, 10, "PGD(steps=1000)", 0.3, step))
    assert file.getvalue() == "net: 3 of 10 decided; PGD(steps=1000): 30%, step 0\n"
