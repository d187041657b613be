"""What people hand over at the door: models, data and arguments of every kind, and what is said."""

from __future__ import annotations

import dataclasses
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers import Ball, Classifier
from calipers.errors import BadInput, BadModel

BALL = Ball("linf", 0.05)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def points(n: int = 4) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def labels(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@pytest.mark.parametrize("call", [calipers.attack, calipers.certify])
@pytest.mark.parametrize("tool", ["PGD", calipers.attacks.PGD(), calipers.certificates.CROWN()])
def test_a_tool_given_first_is_told_the_order(call: Any, tool: Any) -> None:
    model, x = net(), points()
    with pytest.raises(BadInput, match=r"the order is \(model, x, y, threat\).*after the threat"):
        call(tool, model, x, labels(model, x), BALL)


def test_a_tool_may_be_left_out_or_named() -> None:
    model, x = net(), points()
    y = labels(model, x)
    usual, named = (
        calipers.certify(model, x, y, BALL),
        calipers.certify(model, x, y, BALL, tool="CROWN"),
    )
    assert torch.equal(usual.margin, named.margin)
    found = calipers.attack(model, x, y, BALL)
    assert bool(found.forwards.any())
    assert torch.equal(
        found.distance, calipers.attack(model, x, y, BALL, "PGD(steps=100, restarts=20)").distance
    )


class Returns(nn.Module):
    """The net inside, and what a function makes of its logits."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.inner, self.function = net(), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner(x))


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor


Pair = namedtuple("Pair", "scores hidden")

WRAPPED: dict[str, tuple[Any, str | int | None, str]] = {
    "an object with logits": (lambda z: Output(z, z * 2), None, "'logits' is taken"),
    "a dict with logits": (
        lambda z: {"loss": 1.0, "logits": z, "h": -z},
        None,
        "'logits' is taken",
    ),
    "one tensor in a tuple": (lambda z: (z, None), None, "0 is taken"),
    "one tensor in a dict": (lambda z: {"scores": z}, None, "'scores' is taken"),
    "a number": (lambda z: (z * 2, z), 1, ""),
    "a name": (lambda z: {"h": -z, "scores": z}, "scores", ""),
    "a field": (lambda z: Pair(z, -z), "scores", ""),
    "a functional softmax": (lambda z: nn.functional.softmax(z, dim=-1), None, "the softmax"),
    "a method": (lambda z: z.softmax(1), None, "the softmax"),
    "sigmoids": (lambda z: torch.sigmoid(z), None, "the sigmoid"),
    "a softmax in a tuple": (lambda z: (z.softmax(1),), None, "the softmax"),
    "a softmax of its own making": (
        lambda z: z.exp() / z.exp().sum(1, keepdim=True),
        None,
        "logarithms",
    ),
    "soft voting": (lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2, None, "logarithms"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_a_model_returns_is_read_and_told(name: str) -> None:
    function, output, told = WRAPPED[name]
    model, x = Classifier(Returns(function).eval(), output=output), points(6)
    y = labels(net(), x)
    found = calipers.certify(model, x, y, Ball("linf", 0.01))
    assert told in " ".join(found.notes) and told in repr(model)
    assert torch.equal(model.logits(x).argmax(1), y)
    plain = calipers.certify(net(), x, y, Ball("linf", 0.01))
    if "logarithms" not in told:
        assert torch.allclose(found.margin, plain.margin, atol=1e-9)
        assert torch.equal(model.logits(x), net()(x))
    assert found.certified.any()
    wide = Ball("linf", 0.3)
    assert torch.equal(
        calipers.attack(model, x, y, wide, "PGD(steps=5)").success,
        calipers.attack(net(), x, y, wide, "PGD(steps=5)").success,
    )


def test_a_last_layer_is_taken_off_a_sequence() -> None:
    x = points()
    for last in (nn.Softmax(1), nn.Softmax(-1), nn.Sigmoid()):
        model = Classifier(nn.Sequential(*net(), last).eval())
        assert torch.equal(model.check(x), net()(x))
    along_batch = nn.Sequential(*net(), nn.Softmax(0)).eval()
    with pytest.raises(BadModel, match="differently beside other points"):
        Classifier(along_batch).check(x)


def test_a_softmax_stays_where_a_property_speaks_of_it() -> None:
    goal = calipers.Specification(
        torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([-0.2]), torch.tensor([0])
    )
    model, x = Classifier(nn.Sequential(*net(), nn.Softmax(1)).eval()), points()
    calipers.attack(model, x, [0] * 4, BALL, "PGD(steps=2)", goal=goal)
    assert torch.allclose(model.logits(x).sum(1), torch.ones(4))
    calipers.certify(model, x, labels(net(), x), BALL)  # its graph is made anew
    assert not torch.allclose(model.logits(x).sum(1), torch.ones(4))
    found = calipers.certify(model, x, [0] * 4, BALL, goal=goal)
    assert (found.margin <= 0.8 + 1e-6).all()


def test_outputs_that_cannot_be_told_apart_are_named() -> None:
    x = points()
    for function, output, said in (
        (lambda z: (z, -z), None, r"0 \(2, 3\), 1 \(2, 3\): say which are the logits.*output=0"),
        (lambda z: {"a": z, "b": z}, "c", r"no output 'c'; it returns 'a' \(2, 3\), 'b'"),
        (lambda z: z, "logits", "returns one tensor: there is no output 'logits'"),
        (lambda z: ("text", 3), None, "returned a tuple without tensors"),
        (lambda z: None, None, "returned a NoneType without tensors"),
    ):
        with pytest.raises(BadModel, match=said):
            Classifier(Returns(function).eval(), output=output).check(x)


def test_a_softmax_in_some_calls_only_is_refused() -> None:
    state = {"on": True}
    model = Classifier(Returns(lambda z: z.softmax(1) if state["on"] else z * 1).eval())
    model.check(points())
    state["on"] = False
    with pytest.raises(BadModel, match="in some calls and not in others"):
        model.logits(points())


def test_wrappers_come_off() -> None:
    model, x = nn.DataParallel(net()), points()
    classifier = Classifier(model)
    assert classifier.module is model.module
    assert Classifier(torch.compile(nn.DataParallel(net()))).module.__class__ is nn.Sequential
    assert torch.equal(classifier.check(x), net()(x))


def test_a_classifier_says_what_it_understood() -> None:
    model = Classifier(net(), 0.5, 0.25)
    assert (
        repr(model) == "Classifier(Sequential; not asked yet; float32 on cpu; mean 0.5; std 0.25)"
    )
    model.check(points())
    assert "input (1, 4, 4); 3 classes" in repr(model)
    half = Classifier(net().half())
    half.check(points())
    assert "half precision" in repr(half)
    double = Classifier(net().double())
    found = calipers.attack(double, points(), None, BALL, "PGD(steps=2)")
    assert found.candidates.dtype == torch.float64 and "float64" in repr(double)


class Words(nn.Module):
    """Token ids through an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.last(self.table(ids).mean(1))
        return result


@pytest.mark.parametrize("call", [calipers.attack, calipers.certify, calipers.measure])
def test_token_ids_are_no_points_of_a_ball(call: Any) -> None:
    ids = torch.randint(0, 10, (3, 5))
    with pytest.raises(BadInput, match=r"token ids are no points.*embeddings.*Substitutions"):
        call(Words().eval(), ids, [0, 1, 0], BALL)
    with pytest.raises(BadModel, match=r"token ids up in an embedding.*inputs_embeds.*Substitutio"):
        call(Words().eval(), ids.float(), [0, 1, 0], Ball("linf", 1.0, box=None))


def training() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train()


def test_builders_classes_functions_and_nonsense() -> None:
    x = points()
    found = calipers.measure(training, x, None, BALL, plan="quick")
    assert "put into evaluation mode" in str(found)
    assert calipers.load(net).check(x).shape == (4, 3)
    scored = calipers.load(lambda a: a.reshape(len(a), -1)[:, :3], kind="scores")
    assert scored.check(x).shape == (4, 3)
    labelled = calipers.load(lambda a: a.sum((1, 2, 3)) > 8, kind="labels", classes=2)
    assert labelled.check(x).abs().max() == 1
    same = Classifier(net())
    assert calipers.load(same) is same
    for source, said in (
        (nn.ReLU, r"ReLU is a class; give a model made of it: ReLU\(\.\.\.\)\.eval\(\)"),
        (lambda a: a, r"takes arguments.*calipers\.load\(function, kind='scores'\)"),
        (3, r"int is no model.*calipers\.load\('net\.onnx'\)"),
    ):
        with pytest.raises(BadModel, match=said):
            calipers.measure(source, x, None, BALL)
    for made, settings, said in (
        (net(), {"kind": "scores"}, "this is a torch.nn.Module"),
        (net(), {"builder": "net.py:build"}, "for a file of weights: leave it out"),
        (same, {"mean": 0.5}, "holds its own mean, std and output"),
        ("mnist-plain", {"builder": "net.py:build"}, "mnist-plain is none of these"),
    ):
        with pytest.raises(BadInput, match=said):
            calipers.load(made, **settings)  # type: ignore[arg-type]


def test_old_names_say_what_they_are_called_now() -> None:
    for name in ("load_model", "load_onnx", "from_onnx", "from_estimator"):
        with pytest.raises(AttributeError, match=rf"calipers\.{name} is called calipers\.load now"):
            getattr(calipers, name)
        assert name not in dir(calipers)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(), nn.ReLU(), "
        "nn.Linear(8, 3))\n"
    )
    return tmp_path


def weights() -> dict[str, Tensor]:
    return calipers.load("net.py:build").module.state_dict()


@pytest.mark.parametrize(
    "kept",
    [
        lambda w: w,
        lambda w: {"model": w, "epoch": 3},
        lambda w: {"state_dict": {f"model.{k}": v for k, v in w.items()}, "lr": 0.1},
        lambda w: {f"module.{k}": v for k, v in w.items()},
        lambda w: {"model": {f"module._orig_mod.{k}": v for k, v in w.items()}},
    ],
)
def test_checkpoints_are_read_as_training_scripts_write_them(folder: Path, kept: Any) -> None:
    wanted = weights()
    torch.save(kept(wanted), folder / "weights.pt")
    loaded = calipers.load("weights.pt", builder="net.py:build")
    assert all(torch.equal(v, wanted[k]) for k, v in loaded.module.state_dict().items())
    assert not loaded.module.training and loaded.check(points()).shape == (4, 3)


def test_whole_models_are_refused_with_the_cure(folder: Path) -> None:
    model = calipers.load("net.py:build").module
    torch.save(model, folder / "whole.pt")
    torch.jit.script(model).save(str(folder / "script.pt"))
    torch.save(model.state_dict(), folder / "weights.pt")
    for builder in (None, "net.py:build"):
        with pytest.raises(BadInput, match=r"whole pickled object.*state_dict\(\).*torch\.export"):
            calipers.load("whole.pt", builder=builder)
        with pytest.raises(BadInput, match=r"TorchScript.*torch\.jit\.load\('script\.pt'\)"):
            calipers.load("script.pt", builder=builder)
    with pytest.raises(BadInput, match=r"holds weights only.*--builder"):
        calipers.load("weights.pt")


def test_a_pickle_runs_nothing(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, ("made",)

    torch.save({"model": Evil()}, folder / "evil.pt")
    for builder in (None, "net.py:build"):
        with pytest.raises(BadInput, match="runs code when it is opened"):
            calipers.load("evil.pt", builder=builder)
    assert not (folder / "made").exists()
