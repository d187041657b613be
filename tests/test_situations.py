"""Is a model measured as it is in the situations that people call from: inside no_grad, with layers
that write to their input, round or cut?
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers import calls
from calipers.attacks.pgd import PGD
from calipers.certificates.crown import IBP
from calipers.errors import BadInput, BadModel, CaptureError, Contradiction, UnsupportedOp
from calipers.graph import capture
from calipers.measurement.plan import Plan, Stage
from calipers.models import classifier
from calipers.models.classifier import Classifier
from calipers.problem.gradient_faults import gradients
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

BALL = Ball("linf", 0.1)


def net(seed: int = 0, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    first, last = nn.Linear(12, 16), nn.Linear(16, classes)
    with torch.no_grad():  # centred: points of the unit cube belong to all classes
        first.bias.copy_(-first.weight.sum(1) / 2)
        last.bias.copy_(-last(first.bias.abs()) / 2)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()


class Fn(nn.Module):
    """A model whose forward is a function of itself and its input; the network is its part
    `net`.
    """

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
    return int(calipers.attack(model, x, labels(model, x), ball, tool).success.sum())


def rates(model: nn.Module, ball: Ball = BALL, plan: str = "quick") -> tuple[int, int, int]:
    x = points()
    robust = calipers.measure(model, x, labels(model, x), ball, plan=plan).robust_accuracy
    return robust.certified.count, robust.attacked.count, robust.attacked.of


# ---- gradients, whatever surrounds the call
# --------------------------------------------------------------------------------------------------

SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_surroundings_without_gradients_change_nothing(surrounding: str) -> None:
    usual = fooled("PGD(steps=10)", net()), fooled("FMN(steps=10)", net()), rates(net())
    assert usual[0] > 0
    with SURROUNDINGS[surrounding]():
        assert (
            fooled("PGD(steps=10)", net()),
            fooled("FMN(steps=10)", net()),
            rates(net()),
        ) == usual
        assert (
            torch.is_inference_mode_enabled() == (surrounding == "inference_mode")
            and not torch.is_grad_enabled()
        )


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
    inside = calipers.attack(model, x, y, BALL, "PGD(steps=10)")
    outside = nn.Sequential(net(), nn.BatchNorm1d(3)).eval()
    assert x.is_inference() and inside.success.sum() == fooled("PGD(steps=10)", outside) > 0


# ---- models without gradients say so
# --------------------------------------------------------------------------------------------------

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
    result = calipers.measure(
        model, x, labels(model, x), BALL, plan="quick", record=tmp_path / "run.calipers"
    )
    told = result.summary.facts["gradients"]
    assert {k: told[k] for k in ("none", "zero", "not finite")} == {
        "none": 0,
        "zero": 0,
        "not finite": 0,
        kind: 20,
    } and told["asked"] == 20
    page = result.report(tmp_path / "page.html").read_text()
    for shown in (
        str(result),
        page,
        str(calipers.Record(tmp_path / "run.calipers").runs(result.summary.question.fingerprint)),
    ):
        assert "gradient" in shown
    assert "attacks by gradients see nothing there" in str(result) and "Square" in page
    spent = calipers.attack(model, x, labels(model, x), BALL, "PGD(steps=10)")
    assert (int(spent.backwards.sum()) == 0) == (kind == "none")


def test_a_model_with_gradients_says_nothing_of_them() -> None:
    x = points(80)
    result = calipers.measure(net(), x, labels(net(), x), BALL, plan="quick")
    assert "gradient" not in str(result) and "float32" not in str(result)
    assert result.summary.facts["gradients"] == {
        "asked": 64,
        "none": 0,
        "zero": 0,
        "not finite": 0,
        "why": "",
    }


def test_of_some_points_only_these_are_counted() -> None:
    x = points()
    problem = Problem.pose(
        Fn(lambda s, v: s.net(v * (v[:, :1, :1] > 0.5))), x, labels(net(), x), BALL
    )
    assert gradients(problem)["zero"] == int((x[:, 0, 0] <= 0.5).sum()) > 0


# ---- every call has a tensor of its own
# --------------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "round": (
        lambda s, v: s.net((v * 8).round_() / 8),
        lambda s, v: s.net(v.mul_(8).round_().div_(8)),
    ),
    "relu": (
        lambda s, v: s.net((v - 0.5).relu()),
        lambda s, v: s.net(nn.functional.relu(v.sub_(0.5), inplace=True)),
    ),
    "zero": (
        lambda s, v: s.net(v * torch.tensor([[0.0], [1.0], [1.0]])),
        lambda s, v: (v[:, 0].zero_(), s.net(v))[1],
    ),
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_model_that_writes_to_its_input_is_measured_like_one_that_does_not(writer: str) -> None:
    copies, writes = (Fn(f) for f in WRITERS[writer])
    for tool in (
        "PGD(steps=5)",
        "Square(queries=50)",
        "SPSA(steps=2)",
        "FiniteDifferences(queries=60, search=30)",
    ):
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


# ---- single precision inside
# --------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """The state is made in `forward`, as most people write it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.last = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x, torch.zeros(1, len(x), 6))[0][:, -1])  # type: ignore[no-any-return]


class Kernel:
    """An object of one's own that holds a tensor."""

    def __init__(self) -> None:
        self.weight = torch.full((4, 4), 0.25)


PRECISE: dict[str, Callable[[], nn.Module]] = {
    "state of zeros": Recurrent,
    "plain attribute": lambda: Fn(lambda s, v: s.net(v @ s.blur), blur=torch.full((4, 4), 0.25)),
    "in a dict of an object": lambda: Fn(
        lambda s, v: s.net(v @ s.held["k"].weight), held={"k": Kernel()}
    ),
    "cast in forward": lambda: Fn(lambda s, v: s.net(v.float().to(torch.float32))),
    "cast on the way": lambda: Fn(lambda s, v: s.net(v).log_softmax(1, torch.float32).to(v.dtype)),
    "made in forward": lambda: Fn(lambda s, v: s.net(v @ torch.eye(4))),
    "ensemble in a list": lambda: Fn(
        lambda s, v: sum(m(v) for m in s.all), all=[net(k) for k in range(3)]
    ),
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("kind", PRECISE)
def test_single_precision_held_or_made_inside_is_copied_into_double(kind: str) -> None:
    model, x = PRECISE[kind](), points()
    own = Classifier(model)
    own.check(x)
    exact = own.logits64(x)
    assert not own.no_float64 and exact.dtype == torch.float64
    gap = (exact - own.logits(x).double()).abs().max()
    assert 0 < gap < 1e-5, "rounding, and no more"
    assert rates(model, Ball("linf", 1e-3))[0] >= 16, "certificates are about the same network"
    assert all(p.requires_grad and p.dtype == torch.float32 for p in Classifier(model)._tensors())


@pytest.mark.parametrize(
    "behind", [lambda z: z, lambda z: z.float(), lambda z: z.to(torch.float32)]
)
def test_nothing_is_proved_of_a_model_that_autocast_rounds(behind: Any) -> None:
    def rounding(s: Any, v: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = s.net(v)
        return behind(z)

    own = Classifier(Fn(rounding))
    own.check(points())
    own.logits64(points())
    assert "autocast" in own.no_float64
    with pytest.raises(CaptureError, match="autocast"):
        calipers.certify(own, points(), None, Ball("linf", 1e-3))
    assert calipers.attack(own, points(), None, Ball("linf", 0.5), "PGD(steps=5)").success.any()


def test_networks_in_lists_are_held_still_and_known() -> None:
    parts = [net(0).double(), net(1).double()]
    model = Classifier(Fn(lambda s, v: sum(m(v) for m in s.all), all=parts, net=None))
    assert model.dtype == torch.float64
    with model.frozen():
        assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert all(p.requires_grad for part in parts for p in part.parameters())
    before = model.state()
    with torch.no_grad():
        parts[1][1].weight += 1.0  # type: ignore[operator]
    assert model.state() != before


FIXED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a type by name": lambda s, v: s.net(v.type("torch.FloatTensor")),
    "NumPy": lambda s, v: s.net(torch.from_numpy(v.detach().numpy().astype("float32"))),
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("kind", FIXED)
def test_single_precision_that_cannot_be_changed_is_judged_in_and_said(kind: str) -> None:
    x, model = points(), Fn(FIXED[kind])
    result = calipers.measure(model, x, labels(model, x), BALL, plan="quick")
    assert "Margins are judged in float32 alone: no float64 copy" in str(result)
    assert result.clean_accuracy.count == 20 and result.robust_accuracy.certified.count == 0
    assert fooled("PGD(steps=10)", model) == (
        fooled("PGD(steps=10)", net()) if kind == "a type by name" else 0
    )
    judged, usual = (Problem.pose(m, x, labels(net(), x), BALL) for m in (model, net()))
    assert (judged.clearance(x) > usual.clearance(x)).all(), (
        "without a float64 copy more is allowed for rounding"
    )


class Locked(nn.Module):
    """A model that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.lock = net(), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.net(x)
        return answer


class Remembering(nn.Module):
    """A model that keeps an activation, graph and all."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.net[0](x)
        answer: Tensor = self.net(x)
        return answer


def test_models_that_cannot_be_copied_or_keep_activations_are_measured() -> None:
    assert (
        fooled("PGD(steps=10)", Locked())
        == fooled("PGD(steps=10)", Remembering())
        == fooled("PGD(steps=10)", net())
    )
    assert rates(Locked())[1] == rates(net())[1]
    assert rates(Remembering()) == rates(net())


# ---- blocks and wrappers
# --------------------------------------------------------------------------------------------------


def constants(s: Any, v: Tensor) -> Any:
    with torch.no_grad():
        shift = torch.linspace(0, 0.1, 4, dtype=v.dtype)
    return s.net(v + shift)


def cut_block(s: Any, v: Tensor) -> Any:
    with torch.set_grad_enabled(s.training):
        v = v * 1
    return s.net(v)


def plain_block(s: Any, v: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        return s.net(v)


@pytest.mark.parametrize(
    "block", [constants, cut_block, plain_block], ids=["no_grad", "set_grad_enabled", "autocast"]
)
def test_blocks_in_forward_are_read_through(block: Callable[[Any, Tensor], Any]) -> None:
    certified = rates(Fn(block), Ball("linf", 0.01))
    assert certified[0] >= 16
    if block is not constants:
        assert certified[0] == rates(net(), Ball("linf", 0.01))[0]


def test_any_error_of_the_translation_leaves_the_upper_jaw(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("submod_3")

    monkeypatch.setattr(capture, "_graph", fails)
    x = points()
    with pytest.raises(CaptureError, match=r"cannot be turned into a graph.*submod_3"):
        calipers.certify(net(), x, labels(net(), x), BALL, "CROWN")
    result = calipers.measure(net(), x, labels(net(), x), BALL, plan="quick")
    assert "no certificates" in str(result) and result.robust_accuracy.attacked.count < 20


def test_a_branch_on_data_is_refused_by_name() -> None:
    model = Fn(lambda s, v: torch.cond(v.sum() > 0, lambda z: z * 1, lambda z: z * 2, (s.net(v),)))
    with pytest.raises(
        (CaptureError, UnsupportedOp), match=r"graph|program of its own|mixes points"
    ):
        calipers.certify(model, points(), labels(net(), points()), BALL, "CROWN")


def test_compiled_models_are_measured_as_the_code_they_were_made_of() -> None:
    whole, part = (
        torch.compile(net(), backend="aot_eager"),
        Fn(lambda s, v: s.inner(v), inner=torch.compile(net(), backend="aot_eager")),
    )
    assert Classifier(whole).module is whole._orig_mod
    for model in (whole, part):
        for tool in ("PGD(steps=10)", "APGD(steps=5, targets=2)"):
            assert fooled(tool, model) == fooled(tool, net())


def test_scripted_models_are_attacked_and_their_missing_graph_is_said() -> None:
    scripted = torch.jit.script(net())
    assert fooled("PGD(steps=10)", scripted) == fooled("PGD(steps=10)", net())
    x = points()
    result = calipers.measure(scripted, x, labels(net(), x), BALL, plan="quick")
    assert (
        "no certificates" in str(result)
        and result.robust_accuracy.attacked.count == rates(net())[1]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_judged_as_it_is_deployed(dtype: torch.dtype) -> None:
    model, x = net().to(dtype), points()
    own = Classifier(model)
    assert own.dtype == torch.float32 and own.in_half
    assert torch.equal(own.logits(x), model(x.to(dtype)).float().detach())
    y = own.logits(x).argmax(1)
    for tool in (
        "PGD(steps=10)",
        "FMN(steps=10)",
        "DeepFool",
        "Square(queries=50)",
        "HopSkipJump(queries=150)",
    ):
        found = calipers.attack(model, x, y, Ball("linf", 0.2), tool)
        deployed = (
            model(found.candidates.to(dtype)).detach().scatter(1, y[:, None], -torch.inf).amax(1)
        )
        ahead = model(found.candidates.to(dtype)).gather(1, y[:, None])[:, 0] > deployed
        assert found.success.any() and not ahead[found.success].any(), tool
    assert all(p.dtype == dtype for p in model.parameters())


# ---- company
# --------------------------------------------------------------------------------------------------

MIXERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "mean of the batch": lambda s, v: s.net(v - 0.01 * v.mean(0)),
    "scale of the batch": lambda s, v: s.net(v / v.abs().max()),
    "place in the batch": lambda s, v: s.net(v + 1e-3 * torch.arange(len(v))[:, None, None]),
    "number of points": lambda s, v: s.net(v) / len(v),
}


@pytest.mark.one_in(1)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_whose_answer_hangs_on_its_company_is_refused(mixer: str) -> None:
    with pytest.raises(
        BadModel,
        match=r"answers point \d+ differently beside other points than alone \(a logit moves by "
        r"[\d.e-]+\)",
    ):
        Classifier(Fn(MIXERS[mixer])).check(points())


def test_rounding_alone_is_no_company(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        wide = nn.Sequential(
            nn.Flatten(),
            nn.Linear(12, 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Linear(512, 3),
        ).eval()
        Classifier(wide).check(points())
        Classifier(Fn(lambda s, v, wide=wide: (wide(v) * 255).round() / 255)).check(points())
    monkeypatch.setattr(classifier, "in_company", lambda *_: None)
    for mixer in MIXERS.values():
        Classifier(Fn(mixer)).check(points())  # the mutant without the question lets them in


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_a_single_probability_is_told_however_few_the_points(n: int) -> None:
    x, logit = points(n), Classifier(Fn(lambda s, v: s.net(v)[:, :1])).check(points(n))
    shown = Classifier(Fn(lambda s, v: s.net(v)[:, :1].sigmoid()))
    assert torch.equal(shown.check(x), logit)
    hidden = Classifier(Fn(lambda s, v: 1 / (1 + (-s.net(v)[:, :1]).exp())))
    assert torch.equal(hidden.check(x).argmax(1), logit.argmax(1))
    assert "the probability of class 1" in repr(hidden) and "sigmoid" in repr(shown)
    # within [0, 1] at these points, but not elsewhere
    assert not Classifier(Fn(lambda s, v: v.mean((1, 2)))).check(x)[:, 0].any()


def test_a_value_between_0_and_1_may_be_specified() -> None:
    value = Fn(lambda s, v: s.net(v)[:, :1].sigmoid())
    goal = calipers.Specification(
        torch.tensor([[0.0, 1.0]]), torch.tensor([-0.5]), torch.tensor([0])
    )
    for n in (5, 20):
        calipers.attack(
            value, points(n), torch.zeros(n, dtype=torch.long), BALL, "PGD(steps=2)", goal=goal
        )


# ---- what callers hand over
# --------------------------------------------------------------------------------------------------


def test_arrays_and_lists_are_read_like_tensors() -> None:
    x, mask = points(), torch.arange(12).view(3, 4) % 2 == 0
    y = labels(net(), x)
    usual = calipers.attack(
        net(),
        x,
        y,
        Ball("linf", 0.2, (0.0, 1.0), mask),
        "PGD(steps=5)",
        goal=calipers.Targeted((y + 1) % 3),
    )
    box = (np.zeros((3, 4)), [[1.0] * 4] * 3)
    ball = Ball("linf", np.float64(0.2), box, mask.numpy())  # type: ignore[arg-type]
    for xs, ys, target in (
        (x.numpy(), y.numpy(), ((y + 1) % 3).numpy()),
        (x.numpy()[::-1][::-1], y[:, None], ((y + 1) % 3).tolist()),
        (list(x), y.tolist(), (y + 1) % 3),
    ):
        found = calipers.attack(net(), xs, ys, ball, "PGD(steps=5)", goal=calipers.Targeted(target))  # type: ignore[arg-type]
        assert torch.equal(found.candidates, usual.candidates)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (points(), ["a"] * 20, "y must be numbers, a tensor or an array; got strings"),
        ([[1.0, 2.0], [1.0]], torch.zeros(2).long(), "got a list that holds no table"),
        (None, torch.zeros(2).long(), "x must be numbers, a tensor or an array; got nothing"),
        (np.array(["a", "b"]), torch.zeros(2).long(), "got strings"),
    ],
    ids=["strings", "ragged", "nothing", "texts"],
)
def test_what_is_no_table_is_named(x: Any, y: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        calipers.attack(net(), x, y, BALL, "PGD(steps=2)")


def test_other_wrong_settings_are_named() -> None:
    for make, said in (
        (lambda: Ball("linf", "wide"), "radius must be numbers"),
        (lambda: Ball("linf", 0.1, "box"), r"box must be \(low, high\)"),
        (lambda: Ball("linf", 0.1, (0, "high")), "an end of the box must be numbers"),
        (lambda: Ball("linf", 0.1, mask=[0, 1]), "mask must be of dtype bool"),
        (lambda: calipers.Targeted("cat"), "targets must be numbers"),
        (lambda: calipers.Targeted([0.5]), "as integers"),
    ):
        with pytest.raises(BadInput, match=said):
            make()  # type: ignore[no-untyped-call]


class Estimator:
    """Linear, as scikit-learn has it: scores in the order of `classes_`."""

    def __init__(self, classes: Any) -> None:
        self.classes_ = np.asarray(classes)

    def decision_function(self, x: Any) -> Any:
        return np.stack([x[:, 0] - 0.5, x[:, 1] - 0.5, 0.2 - x[:, 0]], 1)


@pytest.mark.one_in(1)
@pytest.mark.parametrize("classes", [[0, 1, 2], [1, 2, 3], [-1, 0, 7], ["a", "b", "c"]], ids=str)
def test_labels_of_an_estimator_are_its_own(classes: list[Any], tmp_path: Path) -> None:
    model, x = calipers.load(Estimator(classes)), points(30).flatten(1).double()
    place = np.argmax(Estimator(classes).decision_function(x.numpy()), 1)
    few = np.flatnonzero(place < 2)  # of the classes only some occur: nothing tells a shift
    named = np.asarray(classes)[place]
    result = calipers.measure(
        model, x[few], named[few], Ball("linf", 0.05), plan="quick", record=tmp_path / "r.calipers"
    )
    assert result.clean_accuracy.count == len(few)
    (checked,) = calipers.check(tmp_path / "r.calipers", model)
    assert checked.sound
    with pytest.raises(
        BadInput, match=r"labels must be among the model's own classes|labels must lie in"
    ):
        calipers.measure(model, x, np.full(30, 99), Ball("linf", 0.05))


def test_a_convolution_keeps_its_face_in_the_copy_that_is_searched() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = (
                self.conv(x.to(self.conv.weight.dtype))
                + 0 * self.conv.bias[0]
                + self.conv.padding[0]
            )
            return self.last(z.relu().flatten(1))  # type: ignore[no-any-return]

    model, x = Reads().eval(), torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = calipers.attack(model, x, labels(model, x), Ball("linf", 0.5), "PGD(steps=10)")
    assert found.success.any()


# ---- the upper jaw outlives the lower one
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails:
    """A certifier that runs out of memory."""

    error: type[BaseException] = MemoryError

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Any]:
        yield from ()
        raise self.error("cannot hold 12 GB\nand more lines")


def test_a_certifier_that_fails_ends_itself_alone() -> None:
    x, said = points(), "Fails ended on an error of its own (MemoryError: cannot hold 12 GB)"
    y = labels(net(), x)
    plan = Plan(
        "own",
        (Stage(Fails(), "certifier"), Stage(PGD(steps=10), "attack"), Stage(IBP(), "certifier")),
    )
    result = calipers.measure(net(), x, y, Ball("linf", 0.01), plan=plan)
    assert result.finished and result.robust_accuracy.certified.count > 0 and said in str(result)
    with pytest.raises(calipers.ToolFailed, match=re.escape(said)):
        calipers.certify(net(), x, y, BALL, Fails())
    for error in (KeyboardInterrupt, Contradiction):
        with pytest.raises(error):
            calipers.certify(net(), x, y, BALL, Fails(error))


def test_two_threads_leave_the_default_type_as_it_was() -> None:
    """The second may only come in once the first has put its own back: else it would put back the
    first one's.
    """
    import threading

    from calipers.models.hidden_state import made_in

    inside, entered, go_on, gone = (threading.Event() for _ in range(4))

    def first() -> None:
        with made_in(torch.float64):
            inside.set()
            go_on.wait(10)
        gone.set()

    def second() -> None:
        inside.wait(10)
        with made_in(torch.float64):
            entered.set()
            gone.wait(10)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    try:
        for thread in threads:
            thread.start()
        assert inside.wait(10) and not entered.wait(0.2)
        go_on.set()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() == torch.float32
    finally:
        go_on.set()
        torch.set_default_dtype(torch.float32)
