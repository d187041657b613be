"""Are examples on the grid of 8-bit images, inside ball and box to the last bit?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers import Ball, Classifier
from calipers.errors import BadInput
from calipers.measurement import ask
from calipers.threats.region import is_on_grid, levels, on_level

STEP = 1 / 255


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))
    return nn.Sequential(*layers).eval().to(dtype)


def images(n: int = 24, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes, some of them at the ends of the box."""
    luck = torch.Generator().manual_seed(seed)
    x = torch.randint(-20, 276, (n, 1, 4, 4), generator=luck).clamp(0, 255)
    return x.to(dtype) / 255


def test_every_byte_is_on_the_grid_and_its_neighbours_are_not() -> None:
    for dtype in (torch.float32, torch.float64):
        values = (torch.arange(256).to(dtype) / 255)[:, None]
        assert torch.equal(on_level(levels(values, STEP), STEP, dtype), values)
        assert is_on_grid(values, STEP).all()
        for side in (torch.inf, -torch.inf):
            beside = torch.nextafter(values[1:], torch.full_like(values[1:], side))
            assert not is_on_grid(beside, STEP).any()
    grey = torch.arange(256.0)[:, None]
    assert is_on_grid(grey, 1.0).all() and not is_on_grid(grey + 0.5, 1.0).any()


ATTACKS = {
    "linf": ("PGD(steps=20)", "APGD(steps=20)", "FMN(steps=30)", "DeepFool", "Square(queries=60)"),
    "l2": ("PGD(steps=20)", "DDN(steps=30)", "FMN(steps=30)", "FAB(steps=10)"),
    "l1": ("PGD(steps=20)", "FMN(steps=30)"),
    "l0": ("SigmaZero(steps=30)", "FMN(steps=30)"),
}
RADII = {"linf": 8 / 255, "l2": 0.2, "l1": 0.8, "l0": 2}


@pytest.mark.parametrize(
    ("norm", "tool", "dtype"),
    [
        (norm, tool, dtype)
        for norm, tools in ATTACKS.items()
        for tool in tools
        for dtype in (torch.float32, torch.float64)
    ],
)
@pytest.mark.one_in(3)
def test_witnesses_are_on_the_grid_inside_ball_and_box(
    norm: str, tool: str, dtype: torch.dtype
) -> None:
    model, x = net(dtype=dtype), images(dtype=dtype)
    y = model(x).argmax(1)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, 0] = norm == "l0"
    threat = Ball(norm, RADII[norm], mask=mask, grid=STEP)
    found = calipers.attack(model, x, y, threat, tool)
    hit = found.distance.isfinite()
    assert hit.any()
    points, there = found.candidates[hit], x[hit]
    as_bytes = (points.double() * 255).round().to(dtype) / 255
    assert torch.equal(points, as_bytes)
    assert ((points >= 0) & (points <= 1)).all() and torch.equal(
        points[:, :, 0], there[:, :, 0]
    ) | (norm == "l0")
    delta = (points.double() - there.double()).flatten(1)
    p: Any = {"linf": torch.inf, "l2": 2, "l1": 1, "l0": 0}[norm]
    assert torch.allclose(torch.linalg.vector_norm(delta, p, 1), found.distance[hit], rtol=1e-15)
    assert (found.distance[found.success] <= threat.radii(1)).all()
    assert (model(points).argmax(1) != y[hit]).all()


def test_whole_steps_are_allowed_and_little_is_lost() -> None:
    """Eight steps of 1/255 are no more than the radius, whatever they are rounded to."""
    threat = Ball("linf", 8 / 255, grid=STEP)
    assert float(threat.radii(1)) == float(threat.at(threat.radii(1)).radii(1))
    assert 0 < float(threat.radii(1)) - 8 / 255 < 2e-7
    x = torch.arange(248.0)[:, None] / 255
    assert threat.region(x).contains(torch.arange(8.0, 256)[:, None] / 255).all()
    assert not threat.region(x[1:]).contains(torch.arange(10.0, 257)[:, None] / 255).any()
    assert float(Ball("l2", 8 / 255, grid=STEP).radii(1)) == 8 / 255
    assert float(Ball("linf", 8.5 / 255, grid=STEP).radii(1)) == 8.5 / 255
    x = images(60)
    y = net()(x).argmax(1)
    free, held = (
        calipers.attack(net(), x, y, Ball("linf", 24 / 255, grid=g), "PGD(steps=40)").success.sum()
        for g in (None, STEP)
    )
    assert free >= held >= free - 3 and held > 5


def test_rounding_alone_would_lose_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest examples sit on the boundary: rounded, they fall back; pushed on, they do not."""
    x = images(60)
    y = net()(x).argmax(1)
    threat = Ball("l2", 0.3, grid=STEP)
    found = calipers.attack(net(), x, y, threat, "DDN(steps=40)")
    free = calipers.attack(net(), x, y, Ball("l2", 0.3), "DDN(steps=40)")
    assert found.distance.isfinite().sum() >= free.distance.isfinite().sum() - 1
    both = found.distance.isfinite() & free.distance.isfinite()
    assert (found.distance[both] - free.distance[both]).median() < 2 * STEP
    monkeypatch.setattr(ask, "on_grid", lambda problem, attempt: attempt)
    skipped = calipers.attack(net(), x, y, threat, "DDN(steps=40)")
    right = found.distance > 0
    assert not skipped.distance[right].isfinite().any()  # the referee admits nothing beside it


def test_certificates_of_the_ball_stand_and_brackets_are_whole() -> None:
    model, x = net(), images(10)
    y = model(x).argmax(1)
    threat = Ball("linf", 4 / 255, grid=STEP)
    on, off = (
        calipers.certify(model, x, y, t, "CROWN") for t in (threat, Ball("linf", threat.radius))
    )
    assert torch.equal(on.margin, off.margin) and torch.equal(on.certified, off.certified)
    result = calipers.measure(model, x, y, threat, plan="quick")
    assert all(row.lower <= row.upper for row in result.points)
    record = result.summary.question.facts["threat"]
    assert record["grid"] == STEP  # type: ignore[index]
    other = calipers.measure(model, x, y, Ball("linf", 4 / 255), plan="quick")
    assert other.summary.question.fingerprint != result.summary.question.fingerprint


def test_data_beside_the_grid_and_nonsense_are_refused() -> None:
    x = images(3)
    x[1, 0, 0, 0] = 0.3
    with pytest.raises(BadInput, match=r"1 of 3 points do not lie on the grid of 0\.003.*point 1"):
        calipers.attack(net(), x, [0] * 3, Ball("linf", 0.1, grid=STEP))
    for grid in (0, -1, float("nan"), float("inf"), "8-bit", True):
        with pytest.raises(BadInput, match="grid is the step between neighbouring values"):
            Ball("linf", 0.1, grid=grid)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="numeric columns takes"):
        calipers.Substitutions([[0, 1]], 1, continuous=Ball("linf", 0.1, grid=0.5))


def test_a_model_without_gradients_has_its_examples_rounded_too() -> None:
    inner = net()
    model = calipers.load(lambda a: inner(torch.from_numpy(a)).detach().numpy(), kind="scores")
    x = images(12)
    found = calipers.attack(
        model, x, None, Ball("linf", 30 / 255, grid=STEP), "Square(queries=200)"
    )
    assert found.success.any() and is_on_grid(found.candidates[found.success], STEP).all()


def test_passes_are_counted() -> None:
    x = images(8)
    classifier = Classifier(net())
    y = classifier.check(x).argmax(1)
    spent = calipers.attack(classifier, x, y, Ball("l2", 0.2), "DDN(steps=5)").forwards
    more = calipers.attack(classifier, x, y, Ball("l2", 0.2, grid=STEP), "DDN(steps=5)").forwards
    assert ((more - spent)[spent > 0] >= 2).all()
