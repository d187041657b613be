"""Is the question well posed? Every nonsense of data, labels and goals is refused in words, and a
question has one name wherever it is asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calipers.errors import BadInput, BadModel
from calipers.models.classifier import Classifier
from calipers.problem.goals import Targeted, Untargeted, is_adversarial
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

N, K = 6, 3


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, K)).eval()


def points(n: int = N) -> Tensor:
    return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(1))


def labels(n: int = N) -> Tensor:
    return torch.arange(n) % K


def pose(**changes: Any) -> Problem:
    """Return a sound problem with some parts exchanged."""
    parts: dict[str, Any] = {
        "model": net(),
        "x": points(),
        "y": labels(),
        "threat": Ball("linf", 0.1),
    }
    return Problem.pose(**{**parts, **changes})


# ---- refusals
# --------------------------------------------------------------------------------------------------


def moved(*places: tuple[int, float]) -> Tensor:
    x = points()
    for i, value in places:
        x[i, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": points() * 255},
            r"6 of 6 points lie outside the box \[0, 1\].*The data look like 0\.\.255: divide by "
            r"255, or "
            r"give box=\(0, 255\) and the radius in grey",
        ),
        (
            {"x": moved((2, 1.25), (5, -0.5))},
            r"2 of 6 points lie outside the box \[0, 1\] \(first: point 2, values .*1\.25\)\. "
            r"Give the "
            r"data's own box",
        ),
        (
            {"x": moved((4, -0.01))},
            r"1 of 6 points lie outside the box \[0, 1\] \(first: point 4, values -0\.00999",
        ),
        (
            {"x": moved((0, float("inf")))},
            r"1 of 6 points lie outside the box \[0, 1\] \(first: point 0",
        ),
        (
            {"threat": Ball("linf", 8.0)},
            r"radius 8 is larger than the whole box \[0, 1\] \(linf diameter 1\): .*different "
            r"units\. "
            r".*write 8 / 255",
        ),
        (
            {"threat": Ball("l2", 2.5)},
            r"radius 2\.5 is larger than the whole box \[0, 1\] \(l2 diameter 2\)",
        ),
        (
            {"threat": Ball("linf", [0.1, 0.1, 8.0, 0.1, 0.1, 0.1])},
            "radius 8 is larger than the whole box",
        ),
        ({"threat": Ball("linf", [0.1, 0.1])}, "radius has 2 entries, but there are 6 points"),
        (
            {"threat": Ball("linf", 0.1, box=(torch.zeros(3), torch.ones(3)))},
            r"shape \(3,\) does not fit inputs of shape \(1, 2, 2\)",
        ),
        (
            {"threat": Ball("linf", 0.1, mask=torch.ones(3, dtype=torch.bool))},
            r"shape \(3,\) does not fit inputs of shape \(1, 2, 2\)",
        ),
        (
            {"threat": Ball("linf", 0.1, weights=torch.ones(3))},
            r"shape \(3,\) does not fit inputs of shape \(1, 2, 2\)",
        ),
        (
            {"y": torch.tensor([0, 1, 2, 3, 0, 1])},
            r"labels must lie in 0\.\.2 for a model of 3 classes, got 0\.\.3",
        ),
        (
            {"y": torch.tensor([0, 1, 2, -1, 0, 1])},
            r"labels must lie in 0\.\.2 for a model of 3 classes, got -1\.\.2",
        ),
        ({"y": labels(5)}, r"one integer label a point, shape \(6,\), got \(5,\) of torch\.int64"),
        (
            {"y": labels().float()},
            r"one integer label a point, shape \(6,\), got \(6,\) of torch\.float32",
        ),
        (
            {"y": nn.functional.one_hot(labels())},
            r"one integer label a point, shape \(6,\), got \(6, 3\)",
        ),
        ({"x": torch.zeros(N, 1, 2, 2, dtype=torch.long)}, r"x has dtype torch\.int64"),
        (
            {"x": torch.zeros(0, 4)},
            r"at least one point of at least one feature, shape \(N, \*D\), got \(0, 4\)",
        ),
        ({"x": torch.zeros(6)}, r"shape \(N, \*D\), got \(6,\)"),
        ({"x": torch.zeros(6, 0)}, r"at least one feature, shape \(N, \*D\), got \(6, 0\)"),
        (
            {"x": torch.rand(N, 5)},
            r"the model could not be called on inputs of shape \(5,\) and dtype torch\.float32: "
            r".*Check the "
            r"shape \(images are N, C, H, W\)",
        ),
        (
            {"goal": Targeted(1)},
            r"the target equals the label at 2 points \(first: point 1\): choose another class "
            r"there",
        ),
        (
            {"goal": Targeted((labels() + 1) % K * torch.tensor([1, 1, 1, 0, 1, 1]))},
            r"the target equals the label at 1 points \(first: point 3\)",
        ),
        ({"goal": Targeted(K)}, r"targets must lie in 0\.\.2, got 3\.\.3"),
        (
            {"goal": Targeted(torch.tensor([1, 2]))},
            "2 targets for 6 points: give one class, or one for each point",
        ),
    ],
)
def test_nonsense_is_refused_in_words(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        pose(**changes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4, K)).train(),
            r"training mode with active dropout or batch norm \(1\)",
        ),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (4, -1))).eval(), "must return logits"),
    ],
)
def test_a_bad_model_is_refused_at_the_same_door(model: nn.Module, message: str) -> None:
    with pytest.raises(BadModel, match=message):
        pose(model=model)


def test_data_in_grey_levels_are_welcome_with_their_box() -> None:
    problem = pose(x=points() * 255, threat=Ball("linf", 8.0, box=(0, 255)))
    assert len(problem) == N and problem.region.contains(problem.x).all()
    assert len(pose(x=points() * 255, threat=Ball("l2", 99.0, box=None))) == N


def test_the_hint_about_grey_levels_is_given_only_where_it_helps() -> None:
    with pytest.raises(BadInput) as caught:
        pose(x=points() * 255, threat=Ball("linf", 0.1, box=(0, 2)))
    assert "255:" not in str(caught.value) and "box=None if any value is allowed" in str(
        caught.value
    )


def test_numpy_arrays_lists_and_other_dtypes_are_taken() -> None:
    problem = pose(x=points().double().numpy(), y=labels().tolist())
    assert (
        problem.x.dtype == torch.float32
        and problem.y.dtype == torch.int64
        and problem.names == pose().names
    )
    assert pose(y=labels().numpy().astype(np.int32)).names == pose().names
    assert pose(model=net().double()).x.dtype == torch.float64
    assert not pose(x=points().requires_grad_()).x.requires_grad


def test_one_radius_for_each_point_passes_the_door_and_follows_its_point() -> None:
    problem = pose(threat=Ball("linf", [0.1, 0.2, 0.3, 0.0, 0.5, 0.6]))
    assert problem.take([4, 1]).region.radius.tolist() == [0.5, 0.2]
    assert problem.at(0.7).region.radius.tolist() == [0.7] * N
    assert problem.at(torch.arange(N) / 10).take([3]).region.radius.tolist() == pytest.approx([0.3])


def test_a_binary_model_of_one_logit_is_a_problem_of_two_classes() -> None:
    problem = pose(model=nn.Sequential(nn.Flatten(), nn.Linear(4, 1)).eval(), y=labels() % 2)
    assert problem.classes == 2 and problem.margins(problem.classifier.logits(problem.x)).shape == (
        N,
        1,
    )


# ---- names
# --------------------------------------------------------------------------------------------------


def test_names_are_digests_of_content_and_duplicates_get_their_own() -> None:
    x, y = points(), labels()
    base = pose().names
    assert len(set(base)) == N and base == pose(model=net(1), threat=Ball("l2", 0.2)).names
    order = torch.tensor([3, 0, 5])
    assert (
        pose(x=x[order], y=y[order]).names
        == tuple(base[i] for i in order)
        == pose().take(order).names
    )
    nudged = x.clone()
    nudged[2, 0, 0, 0] = torch.nextafter(nudged[2, 0, 0, 0], torch.tensor(2.0))
    assert [a == b for a, b in zip(base, pose(x=nudged).names, strict=True)] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    # the same image with another label is another point
    assert pose(y=(y + 1) % K).names[0] != base[0]
    twice = pose(x=torch.cat([x, x[:2]]), y=torch.cat([y, y[:2]]), threat=Ball("linf", 0.1)).names
    assert twice[:N] == base and twice[N:] == (base[0] + "-2", base[1] + "-2")


def test_the_fingerprint_is_model_threat_and_goal_but_neither_radius_nor_points() -> None:
    base = pose().fingerprint()
    same = [
        pose(threat=Ball("inf", 0.3)),
        pose(x=points(3), y=labels(3)),
        pose().take([1, 2]),
        pose().at(0.9),
        pose(goal=Untargeted()),
        pose(model=net().train()),
    ]
    assert {p.fingerprint() for p in same} == {base} and len(base) == 16
    mask, weights = (
        torch.tensor([[True, False], [True, True]]),
        torch.tensor([[1.0, 2.0], [1.0, 1.0]]),
    )
    others: list[dict[str, Any]] = [
        {"threat": Ball("l2", 0.1)},
        {"threat": Ball("linf", 0.1, box=(0, 2))},
        {"threat": Ball("linf", 0.1, box=None)},
        {"threat": Ball("linf", 0.1, mask=mask)},
        {"threat": Ball("linf", 0.1, weights=weights)},
        {"model": net(1)},
        {"model": Classifier(net(), 0.5, 0.5)},
        {"goal": Targeted(2), "y": labels() % 2},
        {"goal": Targeted(1), "y": labels() * 0},
    ]
    assert len({base} | {pose(**change).fingerprint() for change in others}) == 1 + len(others)


# ---- goals
# --------------------------------------------------------------------------------------------------


def test_margins_are_the_rows_times_the_logits() -> None:
    logits, y = (
        torch.randn(5, 4, generator=torch.Generator().manual_seed(2)),
        torch.tensor([0, 3, 1, 2, 0]),
    )
    for goal in (Untargeted(), Targeted((y + 1) % 4), Targeted(torch.tensor(1))):
        margins = goal.margins(logits, y)
        assert margins.shape == (5, 3) and torch.allclose(
            (goal.rows(y, 4) @ logits[..., None])[..., 0], margins, atol=1e-6
        )
        picked = goal.margin_classes(y, 4)
        assert all(len(set(row)) == 3 for row in picked.tolist())
    top = logits.argmax(1)
    assert torch.equal(
        is_adversarial(Untargeted().worst(Untargeted().margins(logits, y))), top != y
    )
    aimed = Targeted((y + 1) % 4)
    assert torch.equal(is_adversarial(aimed.worst(aimed.margins(logits, y))), top == (y + 1) % 4)


def test_the_smooth_stand_in_is_the_cross_entropy() -> None:
    logits, y = (
        torch.randn(5, 4, generator=torch.Generator().manual_seed(3)),
        torch.tensor([0, 3, 1, 2, 0]),
    )
    untargeted, aimed = Untargeted(), Targeted((y + 1) % 4)
    softplus, entropy = nn.functional.softplus, nn.functional.cross_entropy
    assert torch.allclose(
        softplus(-untargeted.smooth(untargeted.margins(logits, y))),
        entropy(logits, y, reduction="none"),
        atol=1e-6,
    )
    assert torch.allclose(
        softplus(aimed.smooth(aimed.margins(logits, y))),
        entropy(logits, (y + 1) % 4, reduction="none"),
        atol=1e-6,
    )


def test_ties_and_nan_are_not_robust() -> None:
    assert is_adversarial(
        torch.tensor([1.0, 0.0, -1.0, float("nan"), float("inf"), -float("inf")])
    ).tolist() == [False, True, True, True, False, True]
    y = torch.tensor([0])
    assert is_adversarial(
        Untargeted().worst(Untargeted().margins(torch.tensor([[2.0, 2.0, 1.0]]), y))
    ).all()
    for goal in (Untargeted(), Targeted(2)):
        assert goal.worst(goal.margins(torch.tensor([[3.0, float("nan"), 1.0]]), y)).isnan().all()


def test_a_single_logit_near_zero_is_doubtful_however_small_it_is() -> None:
    """The logit is a difference of terms of size 100: in single precision its sign is a matter of
    the order of summation.
    """
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[100.0, -100.0]]))
    problem = Problem.pose(model, torch.tensor([[0.73, 0.71]]), torch.tensor([1]), Ball("l2", 0.1))
    barely = torch.tensor([[0.7200000, 0.7200001]])
    assert float(problem.classifier.logits64(barely)[0, 1]) < 0 < float(problem.clearance(barely))
    assert float(problem.clearance(torch.tensor([[0.72, 0.73]]))) < 0
    assert torch.equal(problem.take([0]).at(0.2).size, problem.size)


class Moody(nn.Module):
    """Right about a point; wrong in a batch, alone or in float64 where `mood` says so, or without
    an answer.
    """

    mood = frozenset[str]()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        where = "float64" if x.dtype == torch.float64 else "batch" if len(x) > 1 else "alone"
        second = (
            -1.0
            if where not in self.mood
            else torch.inf
            if f"{where} without end" in self.mood
            else 1.0
        )
        return torch.stack([0 * x[:, 0], 0 * x[:, 0] + second * self.one], 1)


@pytest.mark.parametrize("fooled", [True, False])
def test_a_model_is_fooled_beyond_doubt_in_a_batch_alone_and_in_float64(
    fooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, everywhere = Moody(), {"batch", "alone", "float64"}
    problem = Problem.pose(
        model, torch.rand(3, 2), torch.zeros(3, dtype=torch.long), Ball("linf", 0.1)
    )
    doubts = [
        *(everywhere - {where} for where in everywhere),
        *({*everywhere, f"{where} without end"} for where in everywhere),
    ]
    moods = [everywhere] if fooled else doubts
    for mood in moods:
        # of the class: the float64 copy sees it too
        monkeypatch.setattr(Moody, "mood", frozenset(mood))
        assert problem.fooled(problem.x)[0].tolist() == [fooled] * 3, mood
