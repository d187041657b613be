"""Do networks of attention, norms and recurrent layers have the same bounds read from an ONNX file as captured from the module that wrote it?"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import Case, attacked
from test_soundness import relaxed, violations
from torch import Tensor, nn

import calipers
from calipers.bounds.backward import lower_bounds
from calipers.bounds.coefficients import Dense
from calipers.bounds.rounding import plain_sums
from calipers.graph import rewrites
from calipers.graph.capture import capture, graph_of
from calipers.graph.ir import Graph
from calipers.graph.onnx.network import OnnxNet
from calipers.graph.products import Product
from calipers.graph.smooth_table import GELU, MISH, RSQRT, SILU, SQRT
from calipers.interchange import load_onnx
from calipers.models.classifier import Classifier
from calipers.threats.ball import Ball

onnx = pytest.importorskip("onnx", reason="onnx is not installed")


def _dense_norm() -> nn.Module:
    """A perceptron with layer norms."""
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.LayerNorm(6),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.LayerNorm(5, elementwise_affine=False),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


OWN: dict[str, tuple[tuple[int, ...], Any]] = {
    "layer norms": (nets.FLAT, _dense_norm),
    "gelu, silu and quick gelu": (
        nets.FLAT,
        lambda: nn.Sequential(
            nn.Linear(4, 5),
            nn.GELU(),
            nn.Linear(5, 5),
            nn.SiLU(),
            nn.Linear(5, 4),
            nets.Apply(lambda x: x * torch.sigmoid(1.7 * x)),
            nn.Linear(4, 3),
        ),
    ),
}
FROM_THE_ZOO = (
    "vision transformer", "transformer layer", "transformer layer, norm first", "mixer", "gru", "lstm", "group norm", "instance norm", "softmax", "quotient",
    "attention of torch", "matrix product", "product", "product, broadcast", "square", "largest of two", "prelu on images", "prelu, mish and silu",
)  # fmt: skip
NAMES = (*OWN, *FROM_THE_ZOO)


def module_of(name: str) -> tuple[nn.Module, Tensor]:
    """Return a module in evaluation mode and points for it."""
    if name not in OWN:
        return nets.module_of(name), nets.points_of(name)
    torch.manual_seed(0)
    return OWN[name][1]().eval(), torch.rand(
        5, *OWN[name][0], generator=torch.Generator().manual_seed(7)
    )


def exported(module: nn.Module, x: Tensor, folder: Path) -> OnnxNet:
    """Write the module by torch's exporter, float64 as it is in the captured graph, and read the file."""
    buffer = BytesIO()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (x[:1],),
                buffer,
                dynamo=False,
                opset_version=17,
                input_names=["x"],
                dynamic_axes={"x": {0: "n"}},
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    (folder / "net.onnx").write_bytes(buffer.getvalue())
    return load_onnx(folder / "net.onnx")


@cache
def both(name: str, folder: Path) -> tuple[Graph, Graph]:
    """Return the module's graph as captured, and as read from its file."""
    module, x = module_of(name)
    net = exported(module, x, folder)
    return capture(Classifier(module), x), graph_of(Classifier(net), x)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all files."""
    return tmp_path_factory.mktemp("onnx")


def logit_bounds(case: Case) -> tuple[Tensor, Tensor]:
    """Return the ends of every logit (N, K) by CROWN sweeps."""
    state, rows = (
        relaxed(case),
        torch.eye(case.classes, dtype=torch.float64).repeat(len(case.x), 1, 1),
    )
    with torch.no_grad(), plain_sums():
        low, negative = (
            lower_bounds(state, len(case.graph.nodes), Dense(sign * rows, None)) for sign in (1, -1)
        )
    return low, -negative


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_computes_what_the_module_computes(name: str, folder: Path) -> None:
    module, x = module_of(name)
    expected = module.double()(x.double())
    torch.testing.assert_close(
        both(name, folder)[1].values(x.double())[-1], expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", NAMES)
def test_bounds_of_a_file_hold_every_attacked_point(name: str, folder: Path) -> None:
    for seed in range(2):
        case = nets.case_of(both(name, folder)[1], seed)
        assert not violations(case, attacked(case, seed)), f"seed {seed}"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("radius", [0.01, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_bounds_of_a_file_are_those_of_the_module(name: str, radius: float, folder: Path) -> None:
    captured, read = both(name, folder)
    case = nets.case_of(captured, 0, ball=Ball("linf", radius))
    for ours, theirs in zip(
        logit_bounds(replace(case, graph=read)), logit_bounds(case), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def gated(function: Any) -> list[Any]:
    """Return the operations of a function of three numbers, captured, those that nothing asks for left out."""
    graph = capture(
        Classifier(nn.Sequential(nn.Linear(4, 3), nets.Apply(function)).eval()), torch.rand(3, 4)
    )
    needed = {len(graph.nodes)}
    for number in range(len(graph.nodes), 0, -1):
        needed |= set(graph.nodes[number - 1].inputs) if number in needed else set()
    return [graph.nodes[k - 1].op for k in sorted(needed) if k]


@pytest.mark.parametrize(("function", "curve"), [
    (lambda x: x * x.sigmoid(), SILU), (lambda x: (-2.5 * x).sigmoid() * (0.3 * x), SILU), (lambda x: 0.5 * x * (1 + torch.erf(x * 0.8)), GELU),
    (lambda x: (1 + torch.erf(-x)) * x, GELU), (lambda x: x * nn.functional.softplus(x).tanh(), MISH), (lambda x: x.flip(1) / (x.exp() + 1).sqrt(), RSQRT),
])  # fmt: skip
def test_a_product_of_a_number_and_its_gate_is_one_curve(function: Any, curve: Any) -> None:
    ops = gated(function)
    # a gated curve is a copy that remembers its gate
    names = [getattr(op, "name", "") for op in ops]
    assert curve.name in names and SQRT.name not in names
    assert curve is RSQRT or not any(isinstance(op, Product) for op in ops)


@pytest.mark.parametrize("function", [
    lambda x: x.flip(1) * x.sigmoid(), lambda x: x * (x + 0.1).sigmoid(), lambda x: (x + 0.1) * x.sigmoid(), lambda x: x * (2 + torch.erf(x)),
    lambda x: x * (1 + 2 * torch.erf(x)), lambda x: x * (1 + x.sigmoid()), lambda x: x * nn.functional.softplus(2 * x).tanh(), lambda x: x * x.tanh(),
    lambda x: x * (x * torch.arange(1.0, 4.0, dtype=x.dtype)).sigmoid(), lambda x: x * nn.functional.softplus(x, 2.0).tanh(),
])  # fmt: skip
def test_a_product_with_another_gate_stays_a_product(function: Any) -> None:
    assert any(isinstance(op, Product) for op in gated(function))


def test_a_wrong_factor_of_a_gate_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrites, "_times", lambda w, x, factor: x)
    with pytest.raises(calipers.errors.CaptureError, match="disagree"):
        gated(lambda x: (1.5 * x) * x.sigmoid())
