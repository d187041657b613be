"""Is a model measured as it is in the situations that people call from: inside no_grad, with layers that write to their input, round or cut?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers.attacks.pgd import PGD
from calipers.problem import calls, classifier
from calipers.problem.ball import Ball
from calipers.problem.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.slopes import gradients

BALL = Ball("linf", 0.1)


def net(seed: int = 0, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    first, last = nn.Linear(12, 16), nn.Linear(16, classes)
    with torch.no_grad():  # centred: points of the unit cube belong to all classes
        first.bias.copy_(-first.weight.sum(1) / 2)
        last.bias.copy_(-last(first.bias.abs()) / 2)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()


class Fn(nn.Module):
    """A model whose forward is a function of itself and its input; the network is its part `net`."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function, self.net = function, net()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def points(n: int = 20) -> Tensor:
    return torch.rand(n, 3, 4, generator=torch.Generator().manual_seed(1))


def labels(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(x.clone()).argmax(1)
    return answer.clone()


def fooled(tool: str, model: nn.Module, ball: Ball = BALL) -> int:
    x = points()
    return int(calipers.attack(tool, model, x, labels(model, x), ball).success.sum())


def rates(model: nn.Module, ball: Ball = BALL, plan: str = "quick") -> tuple[int, int, int]:
    x = points()
    robust = calipers.measure(model, x, labels(model, x), ball, plan=plan).robust_accuracy
    return robust.certified.count, robust.attacked.count, robust.attacked.of


# ---- gradients, whatever surrounds the call --------------------------------------------------------------------------------------------------------

SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_surroundings_without_gradients_change_nothing(surrounding: str) -> None:
    usual = fooled("PGD(steps=10)", net()), fooled("FMN(steps=10)", net()), rates(net())
    assert usual[0] > 0
    with SURROUNDINGS[surrounding]():
        assert (fooled("PGD(steps=10)", net()), fooled("FMN(steps=10)", net()), rates(net())) == usual
        assert torch.is_inference_mode_enabled() == (surrounding == "inference_mode") and not torch.is_grad_enabled()


def test_a_tool_called_directly_inside_no_grad_finds_the_same() -> None:
    x = points()
    problem = Problem.pose(net(), x, labels(net(), x), BALL)
    usual = torch.cat([a.candidate for a in PGD(steps=10)(problem)])
    with torch.no_grad():
        found = []
        for attempt in PGD(steps=10)(problem):
            assert not torch.is_grad_enabled()  # nothing leaks out of a generator that waits
            found.append(attempt.candidate)
    assert torch.equal(torch.cat(found), usual) and not torch.equal(usual, x)


def test_without_the_guard_the_attack_would_find_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "with_gradients", nullcontext)
    x = points()
    problem = Problem.pose(net(), x, labels(net(), x), BALL)
    with torch.no_grad():
        assert torch.equal(torch.cat([a.candidate for a in PGD(steps=10)(problem)]), x)


def test_weights_and_points_made_in_inference_mode_are_measured() -> None:
    with torch.inference_mode():
        model, x = nn.Sequential(net(), nn.BatchNorm1d(3)).eval(), points() + 0
        y = model(x).argmax(1)
    inside = calipers.attack("PGD(steps=10)", model, x, y, BALL)
    outside = nn.Sequential(net(), nn.BatchNorm1d(3)).eval()
    assert x.is_inference() and inside.success.sum() == fooled("PGD(steps=10)", outside) > 0


# ---- models without gradients say so ---------------------------------------------------------------------------------------------------------------

CUTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "detached": (lambda s, v: s.net(v.detach()), "none"),
    "NumPy": (lambda s, v: s.net(torch.from_numpy(v.numpy() * np.float32(1))), "none"),
    "rounded": (lambda s, v: s.net((v * 255).round() / 255), "zero"),
    "steep": (lambda s, v: s.net(v + (v * 0).sqrt()), "not finite"),
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("cut", CUTS)
def test_points_without_a_gradient_are_counted_and_told(cut: str, tmp_path: Path) -> None:
    function, kind = CUTS[cut]
    model, x = Fn(function), points()
    result = calipers.measure(model, x, labels(model, x), BALL, plan="quick", record=tmp_path / "run.calipers")
    told = result.summary.question.facts["gradients"]
    assert {k: told[k] for k in ("none", "zero", "not finite")} == {"none": 0, "zero": 0, "not finite": 0, kind: 20} and told["asked"] == 20
    page = result.report(tmp_path / "page.html").read_text()
    for shown in (str(result), page, str(calipers.Ledger(tmp_path / "run.calipers").questions()[0].facts)):
        assert "gradient" in shown
    assert "attacks by gradients see nothing there" in str(result) and "Square" in page
    spent = calipers.attack("PGD(steps=10)", model, x, labels(model, x), BALL)
    assert (int(spent.backwards.sum()) == 0) == (kind == "none")


def test_a_model_with_gradients_says_nothing_of_them() -> None:
    x = points(80)
    result = calipers.measure(net(), x, labels(net(), x), BALL, plan="quick")
    assert "gradient" not in str(result) and "float32" not in str(result)
    assert result.summary.question.facts["gradients"] == {"asked": 64, "none": 0, "zero": 0, "not finite": 0, "why": ""}


def test_of_some_points_only_these_are_counted() -> None:
    x = points()
    problem = Problem.pose(Fn(lambda s, v: s.net(v * (v[:, :1, :1] > 0.5))), x, labels(net(), x), BALL)
    assert gradients(problem)["zero"] == int((x[:, 0, 0] <= 0.5).sum()) > 0


# ---- every call has a tensor of its own ------------------------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "round": (lambda s, v: s.net((v * 8).round_() / 8), lambda s, v: s.net(v.mul_(8).round_().div_(8))),
    "relu": (lambda s, v: s.net((v - 0.5).relu()), lambda s, v: s.net(nn.functional.relu(v.sub_(0.5), inplace=True))),
    "zero": (lambda s, v: s.net(v * torch.tensor([[0.0], [1.0], [1.0]])), lambda s, v: (v[:, 0].zero_(), s.net(v))[1]),
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_model_that_writes_to_its_input_is_measured_like_one_that_does_not(writer: str) -> None:
    copies, writes = (Fn(f) for f in WRITERS[writer])
    for tool in ("PGD(steps=5)", "Square(queries=50)", "SPSA(steps=2)", "Differences(queries=60, search=30)"):
        assert fooled(tool, writes) == fooled(tool, copies), tool
    x, before = points(), points()
    calipers.measure(writes, x, labels(copies, x), BALL, plan="quick")
    assert torch.equal(x, before)


def test_without_the_copy_the_input_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls.Fresh, "forward", lambda self, x: self.of(x))
    x = points()
    Classifier(Fn(WRITERS["round"][1])).logits(x)
    assert not torch.equal(x, points())


def test_copies_of_a_model_are_given_copies_too() -> None:
    model = Classifier(Fn(WRITERS["round"][1]))
    x, before = points(), points()
    for answer in (model.logits, model.logits64, model.step(), model.step(torch.bfloat16)):
        answer(x)
        assert torch.equal(x, before)
    assert copy.deepcopy(model.network)(x).shape == (20, 3) and torch.equal(x, before)
