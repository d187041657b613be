"""Layers and reductions made of other operations: captured, bounded soundly, or refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from nets import Apply
from torch import Tensor, nn
from torch.nn import functional as F
from written import judged
from written_torch import First, bound

from calipers.errors import UnsupportedOp
from calipers.graph import compositions, reductions
from calipers.graph.capture import capture
from calipers.graph.products import MaxPool
from calipers.models.classifier import Classifier

pytestmark = pytest.mark.one_in(1)

ENDS = torch.tensor([-0.1, 0.0, 0.2, 0.3], dtype=torch.float64)
READ: dict[str, tuple[Callable[[Tensor], Tensor] | nn.Module, tuple[int, ...]]] = {
    "normalize": (bound(F.normalize, dim=1), (4,)),
    "norm of order 3": (bound(torch.linalg.vector_norm, 3, 1), (3,)),
    "norm of order 1": (bound(torch.linalg.vector_norm, 1, 1), (3,)),
    "largest size": (bound(torch.linalg.vector_norm, float("inf"), -1), (2, 3)),
    "clamp by tensors": (bound(torch.clamp, ENDS, 2 * ENDS), (4,)),
    "clamp by crossed tensors": (bound(torch.clamp, ENDS, -ENDS), (4,)),
    "clamp from below": (bound(torch.clamp, ENDS), (4,)),
    "amax": (bound(torch.amax, (1, 2)), (2, 3)),
    "amin": (bound(torch.amin, 1, keepdim=True), (2, 3)),
    "values of max": (lambda t: t.max(1).values, (4,)),
    "glu": (bound(F.glu, dim=1), (4, 2)),
    "rms norm": (nn.RMSNorm(4, eps=1e-5), (4,)),
    "rms norm over two axes": (nn.RMSNorm((2, 3), eps=0.1), (2, 3)),
    "choice of slopes": (lambda t: torch.where(t > 0, t, 0.1 * t), (4,)),
    "choice of curves": (lambda t: torch.where(t < 0.5, torch.exp(t - 0.5) - 1, t - 0.5), (4,)),
    "choice of a constant": (lambda t: torch.where(t > 0.2, t, 0.2), (4,)),
    "softshrink": (bound(F.softshrink, 0.3), (4,)),
    "threshold": (bound(F.threshold, 0.1, 0.1), (4,)),
    "adaptive max pool": (nn.AdaptiveMaxPool2d((2, 3)), (2, 5, 4)),
    "adaptive max pool of one axis": (nn.AdaptiveMaxPool1d(2), (2, 5)),
    "std": (bound(torch.std, 1, keepdim=True), (4,)),
    "cumsum": (bound(torch.cumsum, 1), (4,)),
    "prod": (bound(torch.prod, 1), (5,)),
    "rnn": (First(nn.RNN(3, 2, batch_first=True)), (3, 3)),
    "rnn of two layers, both ways": (
        First(nn.RNN(2, 2, 2, batch_first=True, bidirectional=True)),
        (2, 2),
    ),
    "rnn with relu": (First(nn.RNN(3, 2, batch_first=True, nonlinearity="relu")), (2, 3)),
}


def model_of(function: Callable[[Tensor], Tensor] | nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Return a classifier around a function: a dense layer behind it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        front = (function if isinstance(function, nn.Module) else Apply(function)).double()
        for weight in front.parameters():
            nn.init.normal_(weight)
        with torch.no_grad():
            width = front(torch.rand(2, *shape, dtype=torch.float64)).reshape(2, -1).shape[1]
        whole = nn.Sequential(
            front, Apply(lambda t: t.flatten(1) if t.dim() > 1 else t[:, None]), nn.Linear(width, 3)
        )
    return whole.double().eval()


@pytest.mark.parametrize("name", READ)
def test_bounds_of_what_is_read_are_not_contradicted(name: str) -> None:
    model = model_of(*READ[name])
    for seed in range(1 if isinstance(READ[name][0], First) else 2):
        seen = judged(lambda: (model, READ[name][1], name, model), seed, light=True)
        assert not seen.wrong and not seen.refused and seen.proved


JUMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "threshold": bound(F.threshold, 0.1, 0.5),
    "hardshrink": F.hardshrink,
    "step": lambda t: torch.where(t > 0, 1.0, 0.0),
    "mask": lambda t: (t > 0).to(t.dtype) * t,
    "far apart": lambda t: torch.where(t > 0, t, t + 1),
    "of another number": lambda t: torch.where(t.flip(1) > 0, t, 2 * t),
    "norm of order 0": bound(torch.linalg.vector_norm, 0, 1, True),
}


@pytest.mark.parametrize("name", JUMPS)
def test_what_jumps_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedOp, match=r"jumps|compared number itself|an order above 0"):
        capture(Classifier(model_of(JUMPS[name], (4,))), torch.rand(3, 4, dtype=torch.float64))


def test_an_eps_that_depends_on_the_number_type_is_asked_for() -> None:
    with pytest.raises(UnsupportedOp, match=r"RMSNorm\(size, eps=1e-6\)"):
        capture(Classifier(model_of(nn.RMSNorm(4), (4,))), torch.rand(3, 4, dtype=torch.float64))


MISTAKES = {
    "a window too small": (
        "amin", reductions, "MaxPool", lambda run, windows, shape: MaxPool(run, windows[:, :1], shape),
    ),
    "windows of others": (
        "adaptive max pool", compositions, "MaxPool",
        lambda run, windows, shape: MaxPool(run, windows.roll(1, 0), shape),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, module, what, wrong = MISTAKES[mistake]
    model = model_of(*READ[name])
    monkeypatch.setattr(module, what, wrong)
    assert any(
        judged(lambda: (model, READ[name][1], name, model), seed, light=True).wrong
        for seed in range(10)
    )


def test_functions_that_do_not_meet_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compositions, "_CONTINUOUS", 1.0)
    model = model_of(lambda t: torch.where(t > 0.3, t, t + 0.5), (4,))
    seen = judged(lambda: (model, (4,), "", model), 0, light=True)
    assert seen.wrong or seen.refused  # graph and model disagree


def test_an_elman_network_is_that_of_torch() -> None:
    class LastStates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.RNN(3, 2, 2, bidirectional=True)  # the second axis is the batch

        def forward(self, t: Tensor) -> Tensor:
            last: Tensor = self.layer(t.transpose(0, 1))[1]
            return last.transpose(0, 1).flatten(1)

    model = LastStates()
    classifier = Classifier(model.eval())
    graph = capture(classifier, torch.rand(3, 4, 3))
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(graph.values(x)[-1], classifier.logits64(x))


def test_kept_axes_stay_in_their_order() -> None:
    x = torch.rand(4, 2, 3, 4, dtype=torch.float64)
    front = nn.Sequential(Apply(bound(torch.amax, (1, 3))), nn.Linear(3, 2)).double()
    graph = capture(Classifier(front.eval()), x)
    (pool,) = (node.op for node in graph.nodes if isinstance(node.op, MaxPool))
    gathered = x.flatten(1)[:, pool.windows].amax(-1).reshape(4, *pool.shape)
    torch.testing.assert_close(gathered, dataclasses.replace(pool).value(x))
