"""Are models that can only be called measured as they are: estimators, sessions, plain functions of
scores, probabilities or labels?
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_attacks import F64, Fn, random, run
from test_black_box import nearest
from torch import nn

from calipers.attacks.hop_skip_jump import HopSkipJump
from calipers.attacks.pgd import PGD
from calipers.attacks.square import Square
from calipers.data import build, images
from calipers.errors import BadInput, BadModel
from calipers.interchange.estimators import from_estimator, from_session
from calipers.models.wrappers import BlackBox
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball


@pytest.mark.slow
def test_scores_break_nearly_as_many_digits_as_gradients_do() -> None:
    """Measured: 34 of 40 by gradients, 33 by 2000 queries of a copy without gradients (and 29 where
    the schedule is not fitted to the budget).
    """
    x, y = (part[:40] for part in images())
    net = build("mnist-plain")
    problem = Problem.pose(net, x, y, Ball("linf", 0.1))
    stopped = Problem.pose(Fn(lambda x: net(x.detach()), torch.float32), x, y, Ball("linf", 0.1))
    gradients, scores = (
        sum(run(PGD(steps=40), problem).broken),
        sum(run(Square(queries=2000), stopped).broken),
    )
    # gradients find nothing there but what was wrong
    assert sum(run(PGD(steps=40), stopped).broken) < 10
    assert gradients - 3 <= scores <= 40, (gradients, scores)


def test_estimators_of_scikit_learn_are_measured_as_they_are() -> None:
    datasets, linear = (
        pytest.importorskip("sklearn.datasets"),
        pytest.importorskip("sklearn.linear_model"),
    )
    digits = datasets.load_digits()
    data, labels = digits.data / 16, digits.target
    estimator = linear.LogisticRegression(max_iter=300).fit(data[:1000], labels[:1000])
    x, y = torch.from_numpy(data[1000:1010]).view(-1, 1, 8, 8), torch.from_numpy(labels[1000:1010])
    torch_model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    with torch.no_grad():
        torch_model[1].weight.copy_(torch.from_numpy(estimator.coef_))
        torch_model[1].bias.copy_(torch.from_numpy(estimator.intercept_))
    reference = Problem.pose(torch_model, x, y, Ball("linf", 0.1))
    for kind in ("scores", "probabilities", "labels"):
        model = from_estimator(estimator, kind)  # type: ignore[arg-type]
        problem = Problem.pose(model, x, y, Ball("linf", 0.1))
        assert torch.equal(
            problem.classifier.logits(x).argmax(1), reference.classifier.logits(x).argmax(1)
        )
        assert (
            problem.fingerprint()
            == Problem.pose(from_estimator(estimator, kind), x, y, Ball("linf", 0.1)).fingerprint()
        )  # type: ignore[arg-type]
        if kind != "labels":
            assert (
                sum(run(Square(queries=300), problem).broken)
                >= sum(run(PGD(steps=40), reference).broken) - 1
            )
    got = nearest(HopSkipJump(queries=400), problem)
    assert got.broken.all()


class _Session:
    """What is used of an onnxruntime session."""

    def get_inputs(self) -> list[Any]:
        return [type("Node", (), {"name": "x", "type": "tensor(float)"})]

    def get_outputs(self) -> list[Any]:
        return [type("Node", (), {"name": "z"})]

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        assert names == ["z"] and feed["x"].dtype == np.float32
        return [np.stack([feed["x"].sum(1) - 1, 0 * feed["x"].sum(1)], 1)]

    def __reduce__(self) -> Any:
        raise TypeError("a session cannot be copied")


def test_a_session_is_called_in_its_own_precision_and_never_copied() -> None:
    problem = Problem.pose(
        from_session(_Session()), random(4, 3) + 0.2, [0] * 4, Ball("l2", 0.5, box=None)
    )
    assert problem.classifier.logits64(problem.x).dtype == F64
    assert problem.clearance(problem.x).isfinite().all()
    assert nearest(HopSkipJump(queries=200), problem).broken.all()


def test_probabilities_and_labels_become_scores() -> None:
    sure = BlackBox(lambda x: np.stack([np.ones(len(x)), np.zeros(len(x))], 1), "probabilities")
    assert sure(torch.zeros(2, 3)).isfinite().all()
    single = BlackBox(lambda x: np.full(len(x), 0.25), "probabilities")
    assert torch.allclose(single(torch.zeros(1, 3)).exp(), torch.tensor([[0.75, 0.25]]))
    labels = BlackBox(lambda x: np.array([2, 0]), "labels", classes=3)
    assert labels(torch.zeros(2, 3)).tolist() == [[-1, -1, 1], [1, -1, -1]]
    for wrong in (
        lambda: BlackBox(3),
        lambda: BlackBox(abs, "votes"),
        lambda: BlackBox(abs, "labels"),
        lambda: from_estimator(object()),
    ):  # type: ignore[arg-type]
        with pytest.raises(BadInput):
            wrong()
    for shape in ((2, 3, 4), (5, 2)):
        with pytest.raises(BadModel):
            BlackBox(lambda x, shape=shape: np.zeros(shape))(torch.zeros(2, 3))
    with pytest.raises(BadModel):
        BlackBox(lambda x: np.array([7]), "labels", classes=3)(torch.zeros(1, 3))
