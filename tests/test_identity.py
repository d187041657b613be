"""Is an edited model another model, and the same model the same in every process? Whatever can
change an answer is part of the identity, nothing else.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers.measurement.plan import Plan, Stage
from calipers.models.canonical import code_bytes, plain
from calipers.models.classifier import Classifier

pytestmark = pytest.mark.one_in(1)

SRC = Path(__file__).resolve().parent.parent / "src"
FEATURES = 6

NET = """
import functools
import numpy as np, torch
from torch import nn

SLOPE = 1.0
TABLE = {"gain": 2.0}
UNREAD = 1

def helper(z):
    return SLOPE * z

def scaled(z, by=1.5):
    return by * z

def made(shift):
    def moved(module, given, out):
        return out + shift
    return moved

class Part:
    def __init__(self):
        self.weight = 0.5
    def weigh(self, z):
        return self.weight * z

class Net(nn.Module):
    factor = 1.0
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Dropout(0.5)
        self.listed = [nn.Linear(3, 3)]
        self.named = {"last": nn.Linear(3, 3)}
        self.mean, self.names = np.zeros(6, np.float32), ["x", "y"]
        self.std = torch.ones(6)
        self.bend = functools.partial(scaled, by=1.25)
        self.part = Part()
        self.shift = lambda z, by=0.0: z + by
        self.a.register_forward_hook(made(0.25))
    def forward(self, x):
        x = (x - torch.from_numpy(self.mean)) / self.std
        z = helper(torch.relu(self.a(x)))
        z = self.named["last"](self.listed[0](self.b(z))) * TABLE["gain"] * self.factor
        return self.part.weigh(self.inner(self.bend(self.shift(z))))
    def inner(self, z):
        return z + 1
    def fit(self, data):
        return [self(x) for x in data]

def build():
    return Net().eval()
"""


def built(source: str = NET) -> nn.Module:
    """Return what the source builds, as a module of its own."""
    module = types.ModuleType("net")
    exec(compile(source, "net.py", "exec", dont_inherit=True), module.__dict__)
    return module.build()  # type: ignore[no-any-return]


def points(n: int = 4) -> Tensor:
    return torch.rand(n, FEATURES, generator=torch.Generator().manual_seed(1))


def digest(module: nn.Module, called: bool = True) -> str:
    """Return the model's name, as it is after it came through the door."""
    classifier = Classifier(module)
    if called:
        classifier.check(points())
    return classifier.digest()


EDITS = {
    "forward": ("torch.relu(", "torch.tanh("),
    "a constant of forward": ('TABLE["gain"] * self.factor', 'TABLE["gain"] * self.factor * 1.5'),
    "a method that forward calls": ("return z + 1\n", "return z + 2\n"),
    "a plain attribute": ("self.weight = 0.5", "self.weight = 0.25"),
    "an attribute that is an array": ("np.zeros(6, np.float32)", "np.ones(6, np.float32)"),
    "an attribute that is a tensor": ("torch.ones(6)", "torch.full((6,), 2.0)"),
    "a class attribute": ("factor = 1.0", "factor = 2.0"),
    "a hook": ("return out + shift", "return out - shift"),
    "a closure's constant": ("made(0.25)", "made(0.5)"),
    "no hook": ("self.a.register_forward_hook(made(0.25))", "pass"),
    "a partial's argument": ("by=1.25", "by=1.75"),
    "a lambda's default": ("by=0.0", "by=0.5"),
    "a global number": ("SLOPE = 1.0", "SLOPE = 3.0"),
    "a global table": ('"gain": 2.0', '"gain": 4.0'),
    "a global function": ("return SLOPE * z", "return SLOPE * z * z"),
    "a submodule's class": ("nn.Dropout(0.5)", "nn.Identity()"),
    "a submodule's setting": ("nn.Dropout(0.5)", "nn.Dropout(0.25)"),
    "a submodule in a list": (
        "self.listed = [nn.Linear(3, 3)]",
        "self.listed = [nn.Sequential(nn.Linear(3, 3), nn.ReLU())]",
    ),
    "a submodule in a dict": ('{"last": nn.Linear(3, 3)}', '{"last": nn.Linear(3, 3, bias=False)}'),
    "the order of calls": (
        'self.named["last"](self.listed[0](',
        'self.listed[0](self.named["last"](',
    ),
}
ALIKE = {
    "lines above": ("SLOPE = 1.0", "\n\n# a remark\nSLOPE = 1.0"),
    "a remark": ("return z + 1\n", "return z + 1  # one\n"),
    "a method that nothing calls": ("return [self(x) for x in data]", "return None"),
    "a global that nothing reads": ("UNREAD = 1", "UNREAD = object()"),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edit_makes_another_model(edit: str) -> None:
    old, new = EDITS[edit]
    assert NET.count(old) == 1
    assert digest(built(NET.replace(old, new))) != digest(built())
    assert digest(built(NET.replace(old, new)), called=False) != digest(built(), called=False)


@pytest.mark.parametrize("edit", list(ALIKE))
def test_what_changes_no_answer_makes_no_other_model(edit: str) -> None:
    old, new = ALIKE[edit]
    assert NET.count(old) == 1
    assert digest(built(NET.replace(old, new))) == digest(built())


def later(change: Callable[[nn.Module], object]) -> nn.Module:
    module = built()
    with torch.no_grad():
        change(module)
    return module


LATER: dict[str, Callable[[nn.Module], object]] = {
    "a weight": lambda m: m.a.weight.neg_(),
    "a weight of a listed module": lambda m: m.listed[0].weight.neg_(),
    "an attribute": lambda m: setattr(m.part, "weight", 3.0),
    "a name in a list": lambda m: m.names.append("z"),
    "a further hook": lambda m: m.b.register_forward_pre_hook(
        lambda module, given: (given[0] / 2,)
    ),
    "another forward": lambda m: setattr(
        m, "forward", types.MethodType(lambda self, x: self.b(self.a(x)), m)
    ),
    "another forward of a part": lambda m: setattr(
        m.a, "forward", lambda x: x[:, :1].expand(-1, 8)
    ),
    "an array": lambda m: m.mean.fill(1.0),
}


@pytest.mark.parametrize("change", list(LATER))
def test_a_change_of_a_living_model_makes_another_one(change: str) -> None:
    assert digest(later(LATER[change])) != digest(built())


def test_the_difference_is_told() -> None:
    before = Classifier(built()).identity().parts
    for old, new, said in [
        ("torch.relu(", "torch.tanh(", "code of Net.forward differs"),
        ("self.weight = 0.5", "self.weight = 0.25", "part.weight was 0.5, is 0.25"),
        ("made(0.25)", "made(0.5)", "shift in forward hook 1 of a was 0.25, is 0.5"),
    ]:
        assert Classifier(built(NET.replace(old, new))).identity().differences(before) == said
    assert "weights of a.weight differs" in Classifier(
        later(LATER["a weight"])
    ).identity().differences(before)


class Counting(nn.Module):
    """Counts its calls, keeps what it has seen, and makes a table by the size of a batch."""

    seen: list[Tensor] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.last, self.tables = (
            nn.Linear(FEATURES, 3),
            0,
            None,
            dict[int, Tensor](),
        )
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) -> (N, 3)."""
        self.calls += 1
        self.last = x
        self.seen.append(x)
        self.tables.setdefault(len(x), torch.zeros(len(x), 3))
        return self.inner(x) * self.scale + self.tables[len(x)]  # type: ignore[no-any-return]


def counting(calls: int = 0) -> Counting:
    torch.manual_seed(0)
    module = Counting().eval()
    for i in range(calls):
        module(points(i + 1))
    return module


def test_what_a_call_changes_is_no_part_of_the_model() -> None:
    assert digest(counting()) == digest(counting(5))
    edited = counting()
    edited.scale = 1.0
    assert digest(edited) != digest(counting())


def test_a_hook_that_collects_is_no_other_model_with_each_call() -> None:
    def collecting(calls: int, sign: int = 1) -> nn.Module:
        torch.manual_seed(0)
        held: dict[str, Tensor] = {}
        module = nn.Sequential(nn.Linear(FEATURES, 3))
        module[0].register_forward_hook(lambda m, given, out: held.update(out=out) or sign * out)  # type: ignore[func-returns-value]
        for _ in range(calls):
            module(points())
        return module

    assert digest(collecting(0)) == digest(collecting(3)) != digest(collecting(0, -1))


def test_a_measurement_of_a_model_that_counts_ends() -> None:
    module = counting()
    x = points(6)
    result = calipers.measure(
        module,
        x,
        module(x).argmax(1),
        calipers.Ball("linf", 0.01),
        plan=Plan("one", (Stage(calipers.attacks.FGSM(), "attack"),)),
    )
    assert result.clean_accuracy.count == 6


def test_other_processes_find_the_same_name(tmp_path: Path) -> None:
    """Another folder and file name, another seed of hashes, and other addresses."""
    (tmp_path / "other.py").write_text(NET)
    code = (
        "import other; from calipers.models.classifier import Classifier; "
        "print(Classifier(other.build()).digest())"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": f"{SRC}{os.pathsep}{tmp_path}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest(built(), called=False)


class Plain(nn.Module):
    """A small net for exporters."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.sign = nn.Linear(FEATURES, 8), nn.Linear(8, 3), sign

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) -> (N, 3)."""
        return self.b(torch.relu(self.sign * self.a(x)))  # type: ignore[no-any-return]


def exported(module: nn.Module) -> nn.Module:
    return torch.export.export(
        module, (points(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).module()


@pytest.mark.parametrize(
    "turned", [exported, lambda m: torch.jit.trace(m, points())], ids=["exported", "traced"]
)
def test_of_exported_and_traced_modules_the_program_counts(
    turned: Callable[[nn.Module], nn.Module],
) -> None:
    """The constant of the sign is written into the program, the weights are the same."""
    assert (
        digest(turned(Plain().eval()))
        == digest(turned(Plain().eval()))
        != digest(turned(Plain(-1.0).eval()))
    )


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_of_quantised_modules_the_packed_weights_count() -> None:
    def packed(scale: float) -> nn.Module:
        module = nn.Sequential(nn.Linear(FEATURES, 3))
        with torch.no_grad():
            module[0].weight.copy_(torch.linspace(-1, 1, 18).view(3, 6) * scale)
            module[0].bias.zero_()
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})

    assert (
        digest(packed(1.0), called=False)
        == digest(packed(1.0), called=False)
        != digest(packed(0.5), called=False)
    )


def test_of_functions_the_code_counts() -> None:
    def answers(by: float) -> nn.Module:
        return calipers.BlackBox(
            lambda x: by * np.stack([x.sum(1), -x.sum(1)], 1), dtype=torch.float64
        )

    assert digest(answers(1.0)) == digest(answers(1.0)) != digest(answers(-1.0))


# ---- mutants: each part of the identity forgotten
# --------------------------------------------------------------------------------------------------


def _nothing(*given: object) -> set[str]:
    return set()


MUTANTS: dict[str, tuple[str, str, object]] = {
    "code is not hashed": ("forward", "code_bytes", lambda code: b""),
    "globals are not read": ("a global number", "global_names", _nothing),
    "called methods are not followed": ("a method that forward calls", "words", _nothing),
    "values are not told": ("a plain attribute", "told", lambda value, data: "a value"),
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_forgetting_a_part_is_found_out(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, word, instead = MUTANTS[mutant]
    monkeypatch.setattr(f"calipers.models.identity.{word}", instead)
    with pytest.raises(AssertionError):
        test_an_edit_makes_another_model(edit)


def test_plain_data_by_content() -> None:
    assert plain({"a": 1}) != plain({"a": 1.0}) != plain({"a": True})
    assert plain({3, 1, 2}) == plain({1, 2, 3}) and plain([1, [2]]) != plain([1, 2])
    assert plain(("ab", "c")) != plain(("a", "bc")) and plain(object()) is None
    assert plain(torch.ones(2)) != plain(torch.ones(2, dtype=torch.float64)) and plain(
        np.ones(2)
    ) != plain(np.ones((2, 1)))
    itself: list[object] = []
    itself.append(itself)
    assert plain(itself) is None
    assert code_bytes((lambda: 1).__code__) != code_bytes((lambda: 2).__code__)


def test_a_model_that_contains_itself_has_a_name() -> None:
    module = built()
    module.me, module.ring = [module], functools.partial(print, module)  # type: ignore[assignment]
    assert digest(module, called=False) != digest(built(), called=False)
