"""Are bounds functions of a model's own parameters? Their gradients against finite differences, and
three steps uphill with a model that is traced once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calipers.bounds import backward
from calipers.bounds.backward import interval_margin_bounds, margin_bounds, relax
from calipers.bounds.rounding import CHECKED, SEARCH, Arithmetic, plain_sums
from calipers.errors import CaptureError
from calipers.graph import capture as capturing
from calipers.graph.capture import graph_of
from calipers.graph.ir import Graph
from calipers.models.classifier import Classifier
from calipers.problem.goals import Untargeted
from calipers.threats.ball import Ball

pytestmark = pytest.mark.one_in(1)

F64, PLAIN = torch.float64, Arithmetic(torch.float64, checked=False)
RADIUS = {"linf": 0.05, "l2": 0.2, "l1": 0.3}


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.LeakyReLU(0.1),
        nn.Linear(8, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """Convolutions with batch norm, a residual sum, average pooling and a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 4, 4) -> (N, 3)."""
        h = torch.relu(self.norm(self.first(x)))
        h = torch.relu(self.second(h) + h)
        return self.out(nn.functional.avg_pool2d(h, 2).flatten(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": Residual}


def posed(name: str, dtype: torch.dtype = F64) -> tuple[nn.Module, Classifier, Tensor, Tensor]:
    """Return a model with statistics of its own, and points of the unit square."""
    torch.manual_seed(1)
    module = MODELS[name]()
    x = torch.rand(4, 1, 4, 4)
    for _ in range(3):
        module(x + torch.randn_like(x))  # batch norm learns its statistics
    module = module.to(dtype).eval()
    return module, Classifier(module), x.to(dtype), torch.tensor([0, 1, 2, 0])


def lower(
    classifier: Classifier,
    x: Tensor,
    y: Tensor,
    method: str,
    norm: str = "linf",
    arithmetic: Arithmetic = PLAIN,
) -> Tensor:
    """Return the points' worst margin bounds (N,), of the parameters as they are."""
    graph = graph_of(classifier, x, live=True)
    state = relax(graph, Ball(norm, RADIUS[norm]).region(x), arithmetic, refine=method == "CROWN")
    rows = Untargeted().rows(y, 3).to(x.dtype)
    with plain_sums():
        return (interval_margin_bounds if method == "IBP" else margin_bounds)(state, rows).amin(1)


@pytest.mark.parametrize("arithmetic", [PLAIN, CHECKED], ids=["plain", "checked"])
@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP", "CROWN"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_a_bound_is_that_of_finite_differences(
    name: str, method: str, arithmetic: Arithmetic
) -> None:
    module, classifier, x, y = posed(name)
    bound = lower(classifier, x, y, method, arithmetic=arithmetic).sum()
    gradients = torch.autograd.grad(bound, [*module.parameters()])
    generator = torch.Generator().manual_seed(2)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        step = torch.randn(parameter.shape, generator=generator, dtype=F64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * step)
                ends.append(lower(classifier, x, y, method, arithmetic=arithmetic).sum())
                parameter.sub_(sign * 1e-6 * step)
        slope = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-5, atol=1e-7)
        assert bool(gradient.any())


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_gradient_is_right_for_other_norms(norm: str) -> None:
    module, classifier, x, y = posed("mlp")
    weight = next(module.parameters())
    (gradient,) = torch.autograd.grad(lower(classifier, x, y, "CROWN-IBP", norm).sum(), weight)
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * 1e-6 * step)
            ends.append(lower(classifier, x, y, "CROWN-IBP", norm).sum())
            weight.sub_(sign * 1e-6 * step)
    torch.testing.assert_close(
        (gradient * step).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP"])
@pytest.mark.parametrize("name", MODELS)
def test_steps_raise_the_bound_of_a_model_that_is_traced_once(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, classifier, x, y = posed(name, torch.float32)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.02)
    exports, export = [], capturing.exported
    monkeypatch.setattr(
        capturing,
        "exported",
        lambda *args, **options: exports.append(1) or export(*args, **options),
    )
    bounds = []
    for _ in range(4):
        optimiser.zero_grad()
        bound = lower(classifier, x, y, method, arithmetic=SEARCH).mean()
        bounds.append(float(bound.detach()))
        (-bound).backward()
        optimiser.step()
    assert bounds == sorted(bounds) and bounds[-1] > bounds[0] + 0.01
    assert len(exports) == 1


@pytest.mark.parametrize("name", MODELS)
def test_a_live_graph_computes_what_the_module_does_now(name: str) -> None:
    module, classifier, x, _ = posed(name)
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand_like(tensor))
        graph_of(classifier, x, live=True)
        for parameter in module.parameters():
            parameter.add_(0.1)
        values = graph_of(classifier, x, live=True).values(x)[-1]
    torch.testing.assert_close(values, module(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_frozen_and_live_graphs_give_the_same_bounds(name: str) -> None:
    _, classifier, x, y = posed(name)
    rows = Untargeted().rows(y, 3)
    with torch.no_grad():
        region = Ball("linf", 0.05).region(x)
        for refine in (False, True):
            frozen, live = (
                margin_bounds(relax(graph, region, CHECKED, refine=refine), rows)
                for graph in (graph_of(classifier, x), graph_of(classifier, x, live=True))
            )
            torch.testing.assert_close(frozen, live, rtol=1e-12, atol=1e-12)


def test_a_graph_of_old_weights_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant that binds a copy has no gradient, and does not follow a step."""
    module, classifier, x, y = posed("mlp")
    real, held = capturing.Trace.graph, {}

    def stale(self: capturing.Trace, sample: Tensor, live: dict[str, Tensor]) -> object:
        held.update({k: t.detach().clone() for k, t in live.items()} if not held else {})
        return real(self, sample, held)

    monkeypatch.setattr(
        capturing.Trace,
        "graph",
        lambda self, x, live=None: real(self, x) if live is None else stale(self, x, live),
    )
    before = lower(classifier, x, y, "IBP")
    assert not before.requires_grad
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    assert torch.equal(before, lower(classifier, x, y, "IBP"))
    monkeypatch.undo()
    assert not torch.equal(before, lower(classifier, x, y, "IBP"))


def test_mutant_that_counts_a_repeated_row_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    module, classifier, x, y = posed("mlp")
    parameters = [*module.parameters()]
    right = torch.autograd.grad(lower(classifier, x, y, "CROWN").sum(), parameters)
    monkeypatch.setattr(backward, "_once", lambda values, real: values)
    wrong = torch.autograd.grad(lower(classifier, x, y, "CROWN").sum(), parameters)
    assert not all(torch.allclose(a, b) for a, b in zip(right, wrong, strict=True))


def test_what_was_read_from_a_file_has_nothing_to_train() -> None:
    class Read(nn.Linear):
        """A module that knows its own graph."""

        def graph(self) -> Graph:
            """Whatever it is."""
            raise AssertionError("it is not asked for")

    with pytest.raises(CaptureError, match="no parameters to train"):
        graph_of(Classifier(Read(3, 2)), torch.rand(2, 3), live=True)
