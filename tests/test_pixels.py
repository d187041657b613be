"""Is a budget of pixels answered exactly? Supports and projections against all subsets of pixels,
bounds and attacks against enumerated truth.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import calipers
from calipers.attacks.apgd import APGD
from calipers.attacks.deepfool import DeepFool
from calipers.attacks.fmn import FMN
from calipers.attacks.pgd import PGD
from calipers.attacks.radius_bisection import RadiusBisection
from calipers.attacks.sigma_zero import SigmaZero
from calipers.attacks.square import Square
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.radius import CertifiedRadius
from calipers.errors import BadInput
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.problem.recorded import recorded_threat
from calipers.random_streams import Streams
from calipers.record.record import Record
from calipers.threats.ball import Ball
from calipers.threats.count_norms import L0
from calipers.threats.norms import distance_between, norm_for

F64 = torch.float64
SHAPE = (3, 2, 2)
PIXELS, CHANNELS = 4, 3


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, generator=drawn(seed), dtype=F64)


def subsets(k: int) -> list[Tensor]:
    """Return every choice of at most k pixels, as flags of the flattened features; written out once
    more, channel by channel.
    """
    found = []
    for count in range(k + 1):
        for chosen in itertools.combinations(range(PIXELS), count):
            found.append(
                torch.tensor([i in chosen for _ in range(CHANNELS) for i in range(PIXELS)])
            )
    return found


def linear(seed: int, classes: int = 3) -> nn.Sequential:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double().requires_grad_(False)
    model[1].weight.copy_(torch.randn(classes, 12, generator=drawn(seed), dtype=F64))
    model[1].bias.zero_()
    return model


def two_layers(seed: int, hidden: int = 3) -> nn.Sequential:
    model = (
        nn.Sequential(nn.Flatten(), nn.Linear(12, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        .double()
        .requires_grad_(False)
    )
    for layer in (model[1], model[3]):
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=drawn(seed), dtype=F64))
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=drawn(seed + 1), dtype=F64))
    return model


def images_net(seed: int) -> nn.Sequential:
    """Return a net that reads its image through windows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
    return model.double().requires_grad_(False)


def lowest_linear(model: nn.Sequential, x: Tensor, y: int, k: int) -> float:
    """Return the smallest margin of a linear model over all subsets of k pixels."""
    w, b = model[1].weight, model[1].bias
    worst = np.inf
    for j in (j for j in range(len(b)) if j != y):
        a, flat = w[y] - w[j], x.flatten()
        # how much each feature's own corner takes off
        gains = torch.where(a > 0, a * flat, -a * (1 - flat))
        worst = min(worst, *(float(a @ flat + b[y] - b[j] - gains[s].sum()) for s in subsets(k)))
    return worst


def lowest_two_layers(model: nn.Sequential, x: Tensor, y: int, k: int) -> float:
    """Return the smallest margin over all subsets of k pixels and all patterns of the units: a
    linear program each.
    """
    w, b, v, c = (
        t.numpy() for t in (model[1].weight, model[1].bias, model[3].weight, model[3].bias)
    )
    out, flat, found = v[y] - v[1 - y], x.flatten().numpy(), np.inf
    for chosen, on in itertools.product(
        subsets(k)[-len(list(itertools.combinations(range(PIXELS), k))) :],
        itertools.product((0.0, 1.0), repeat=len(b)),
    ):
        free, side = chosen.numpy(), np.array(on)
        bounds = [(0.0, 1.0) if f else (v_, v_) for f, v_ in zip(free, flat, strict=True)]
        solved = linprog(
            (out * side) @ w,
            A_ub=(1 - 2 * side)[:, None] * w,
            b_ub=(2 * side - 1) * b,
            bounds=bounds,
        )
        found = (
            min(found, float(solved.fun) + (out * side) @ b + c[y] - c[1 - y])
            if solved.success
            else found
        )
    return found


# ---- the set
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_support_and_projection_are_exact_over_all_subsets(k: int) -> None:
    x, g = images(30), torch.randn(30, *SHAPE, generator=drawn(1), dtype=F64)
    g[:10, 1] = 0
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[0, 1, 1] = False
    region = Ball("pixels", k, mask=mask).region(x)
    found, wanted = region.support(g), torch.rand(30, *SHAPE, generator=drawn(2), dtype=F64) * 3 - 1
    projected = region.project(wanted)
    assert region.contains(region.snap(projected)).all()
    assert torch.allclose((g * found.point).flatten(1).sum(1), found.value)
    for i in range(30):
        ends = torch.where(g[i] > 0, 1.0, torch.where(g[i] < 0, 0.0, x[i])).flatten()
        near = wanted[i].clamp(0, 1).flatten()
        gains, distances = [], []
        for s in subsets(k):
            free = s & mask.flatten()
            gains.append((g[i].flatten() * torch.where(free, ends, x[i].flatten())).sum())
            distances.append(
                (torch.where(free, near, x[i].flatten()) - wanted[i].flatten()).square().sum()
            )
        assert found.value[i] == pytest.approx(float(torch.stack(gains).max()), abs=1e-12)
        assert (projected[i] - wanted[i]).square().sum() == pytest.approx(
            float(torch.stack(distances).min()), abs=1e-12
        )


@pytest.mark.parametrize("k", [1, 2])
def test_the_least_count_that_gains_so_much_is_found(k: int) -> None:
    norm, g = norm_for("pixels", SHAPE), torch.randn(40, 12, generator=drawn(3), dtype=F64)
    low, high = -images(40, 4).flatten(1), images(40, 5).flatten(1)
    most = [
        torch.stack([(g * torch.where(g > 0, high, low))[i][s].sum() for s in subsets(k)]).max()
        for i in range(40)
    ]
    for share, count in ((0.999, k), (1.001, k + 1)):
        delta = norm.reach(g, torch.stack(most) * share, low, high)
        assert ((g * delta).sum(1) >= torch.stack(most) * share - 1e-9).all()
        assert ((delta >= low) & (delta <= high)).all()
        assert (norm.of(delta) == count).all() or share > 1
        assert (norm.of(delta) <= count).all()


def test_distances_count_pixels_not_features() -> None:
    x = images(1)
    other = x.clone()
    other[0, :, 0, 0] = 0
    other[0, 1, 1, 1] = 1
    assert distance_between(x, other, "pixels").item() == 2
    assert distance_between(x, other, "l0").item() == 4
    assert Ball("pixel", 2).region(x).contains(other).all()
    assert not Ball("pixels", 1).region(x).contains(other).any()
    assert Ball("pixels", 1).widest(x).item() == PIXELS


def test_samples_and_snapped_points_are_inside() -> None:
    x = images(50)
    region = Ball("pixels", 2).region(x)
    points = region.sample(Streams.of(0, [str(i) for i in range(50)], x.device))
    assert region.contains(points).all()
    assert (region.distance(points) == 2).double().mean() > 0.9
    assert not region.contains(1 - x).any()
    assert region.contains(region.snap(1 - x)).all(), (
        "a mean of sparse points changes more than allowed: the nearest that does not is taken"
    )


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 12)])
def test_one_channel_is_the_count_of_features(shape: tuple[int, ...]) -> None:
    x, g = images(20, 1, shape), torch.randn(20, *shape, generator=drawn(2), dtype=F64)
    ones, features = (Ball(norm, 3).region(x) for norm in ("pixels", "l0"))
    streams = Streams.of(1, [str(i) for i in range(20)], x.device)
    for ask in (
        lambda r: r.support(g).value,
        lambda r: r.support(g).point,
        lambda r: r.project(x + 2 * g),
        lambda r: r.step(x, g, 1.0),
        lambda r: r.sample(streams),
        lambda r: r.norm.dual(g.flatten(1)),
        lambda r: r.norm.reach(g.flatten(1), torch.full((20,), 1.3, dtype=F64), r.low, r.high),
        lambda r: r.fall(g.flatten(1)[:, None], torch.arange(20)).value,
    ):
        assert torch.equal(ask(ones), ask(features))


@pytest.mark.parametrize("attack", [SigmaZero(steps=40), FMN(steps=40), DeepFool()], ids=repr)
def test_attacks_on_one_channel_are_those_on_features(attack: Any) -> None:
    x = images(10, 3, (1, 3, 4))
    model = linear(2)
    y = model(x).argmax(1)
    ones, features = (
        calipers.attack(model, x, y, Ball(norm, 3), attack) for norm in ("pixels", "l0")
    )
    assert torch.equal(ones.candidates, features.candidates)


def test_what_is_no_image_is_refused() -> None:
    model = nn.Linear(12, 3).double()
    with pytest.raises(BadInput, match=r"counts pixels of inputs \(channels, height, width\)"):
        Problem.pose(
            model, images(2).flatten(1), torch.zeros(2, dtype=torch.long), Ball("pixels", 1)
        )
    with pytest.raises(BadInput, match="give a box"):
        Ball("pixels", 1, box=None)
    with pytest.raises(BadInput, match="larger than the whole box"):
        Problem.pose(linear(0), images(2), torch.zeros(2, dtype=torch.long), Ball("pixels", 5))
    for tool in (Square(queries=10), calipers.attacks.FAB()):
        with pytest.raises(BadInput, match="pixels"):
            calipers.attack(
                linear(0), images(2), torch.zeros(2, dtype=torch.long), Ball("pixels", 1), tool
            )


# ---- the lower jaw
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("tool", [CROWN(), AlphaCROWN()], ids=["CROWN", "AlphaCROWN"])
def test_on_a_linear_model_the_bound_is_the_lowest_of_all_subsets(tool: Any, k: int) -> None:
    for seed in range(2):
        model, x = linear(seed), images(10, seed)
        y = model(x).argmax(1)
        bound = calipers.certify(model, x, y, Ball("pixels", k), tool).margin
        truth = torch.tensor(
            [lowest_linear(model, x[i], int(y[i]), k) for i in range(10)], dtype=F64
        )
        assert (bound <= truth + 1e-9).all()
        close = torch.isclose(bound, truth, rtol=1e-9, atol=1e-9)
        assert close.all()


def bounds_of_two_layers(k: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    found = []
    for seed in range(3):
        model, x = two_layers(seed), images(5, seed)
        y = model(x).argmax(1)
        truth = torch.tensor(
            [lowest_two_layers(model, x[i], int(y[i]), k) for i in range(5)], dtype=F64
        )
        bounds = [
            calipers.certify(model, x, y, Ball("pixels", k), tool).margin
            for tool in (IBP(), CROWN(), AlphaCROWN())
        ]
        found.append((*bounds, truth))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("k", [1, 2])
def test_bounds_never_cross_the_enumerated_minimum(k: int) -> None:
    for intervals, plain, chosen, truth in bounds_of_two_layers(k):
        assert (intervals <= truth + 1e-9).all()
        assert (plain <= truth + 1e-9).all()
        assert (chosen <= truth + 1e-9).all()
        assert (chosen >= plain - 1e-12).all()


def test_a_count_of_features_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(L0, "over", lambda self, shape: self)
    assert any(bool((plain > truth + 1e-6).any()) for _, plain, _, truth in bounds_of_two_layers(1))


def test_windows_hold_all_channels_of_their_pixels() -> None:
    """Convolutions ask about windows of the image: no example found among single pixels at their
    ends may lie below a bound.
    """
    model, x = images_net(0), images(6, 7, (3, 4, 4))
    y = model(x).argmax(1)
    threat = Ball("pixels", 1)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=F64)
    truth = torch.full((6,), torch.inf, dtype=F64)
    problem = Problem.pose(model, x, y, threat)
    for i, j in itertools.product(range(4), range(4)):
        changed = x[:, None].repeat(1, 8, 1, 1, 1)
        changed[:, :, :, i, j] = corners
        worst = problem.goal.worst(
            problem.goal.margins(model(changed.flatten(0, 1)), y.repeat_interleave(8))
        )
        truth = torch.minimum(truth, worst.view(6, 8).amin(1))
    for tool in (CROWN(), AlphaCROWN()):
        assert (calipers.certify(model, x, y, threat, tool).margin <= truth).all()


def test_branch_and_bound_is_right_about_pixels() -> None:
    decided = 0
    for seed in range(3):
        model, x = two_layers(seed), images(5, seed)
        problem = Problem.pose(model, x, model(x).argmax(1), Ball("pixels", 1))
        truth = [lowest_two_layers(model, x[i], int(problem.y[i]), 1) for i in range(5)]
        for answer in BranchAndBound(seconds=1)(problem):
            for place, i in enumerate(answer.index.tolist()):
                if isinstance(answer, Attempt):
                    part = problem.take(answer.index)
                    assert part.region.contains(answer.candidate).all()
                    assert truth[i] <= 1e-9
                    decided += 1
                elif answer.margin[place] > 0:
                    assert truth[i] > -1e-9
                    decided += 1
    assert decided >= 12


def test_the_largest_count_proved_is_whole_and_holds() -> None:
    model, x = linear(3), images(10, 3)
    y = model(x).argmax(1)
    radius = calipers.certify(model, x, y, Ball("pixels", 1), CertifiedRadius(CROWN())).radius
    truth = [
        next((k - 1 for k in range(1, 5) if lowest_linear(model, x[i], int(y[i]), k) <= 0), 4)
        for i in range(10)
    ]
    assert radius.tolist() == [float(t) for t in truth]


# ---- the upper jaw
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [SigmaZero(targets=2), FMN(targets=2), DeepFool(), RadiusBisection(PGD(steps=20), rounds=6)],
    ids=repr,
)
def test_attacks_find_the_fewest_pixels_of_linear_models(attack: Any) -> None:
    ratios = []
    for seed in range(3):
        model, x = linear(seed), images(12, seed)
        y = model(x).argmax(1)
        truth = torch.tensor(
            [
                next(
                    (k for k in range(1, 5) if lowest_linear(model, x[i], int(y[i]), k) <= 0),
                    np.inf,
                )
                for i in range(12)
            ]
        )
        threat = Ball("pixels", 4)
        found = calipers.attack(model, x, y, threat, attack)
        worst = Problem.pose(model, x, y, threat)
        adversarial = is_adversarial(worst.goal.worst(worst.margins(model(found.candidates))))
        distance = torch.where(
            adversarial, distance_between(x, found.candidates, "pixels"), torch.inf
        )
        assert (distance >= truth).all()
        ratios.append((distance == truth)[truth.isfinite()])
    assert float(torch.cat(ratios).double().mean()) >= 0.85


@pytest.mark.parametrize("attack", [PGD(steps=20), APGD(steps=20)], ids=repr)
def test_attacks_within_a_budget_of_pixels_keep_to_it(attack: Any) -> None:
    model, x = linear(1), images(20, 9)
    y = model(x).argmax(1)
    truth = torch.tensor([lowest_linear(model, x[i], int(y[i]), 2) <= 0 for i in range(20)])
    found = calipers.attack(model, x, y, Ball("pixels", 2), attack)
    assert (found.success <= truth).all()
    assert float(found.success[truth].double().mean()) >= 0.85


# ---- the record
# --------------------------------------------------------------------------------------------------


def test_a_measurement_in_pixels_is_recorded_and_comes_back(tmp_path: Path) -> None:
    model, x = linear(4), images(8, 4).float()
    model = model.float()
    y = model(x).argmax(1)
    result = calipers.measure(
        model, x, y, Ball("pixels", 1), plan="quick", record=tmp_path / "run.calipers"
    )
    truth = [lowest_linear(linear(4), x[i].double(), int(y[i]), 1) > 0 for i in range(8)]
    assert (
        result.robust_accuracy.certified.count
        == result.robust_accuracy.attacked.count
        == sum(truth)
    )
    question = Record(tmp_path / "run.calipers", read_only=True).questions()[0]
    assert question.data is not None
    back = recorded_threat(question.data["threat"], torch.ones(8, dtype=F64))
    assert back.norm == "pixels"
    assert back.identity() == Ball("pixels", 1).identity()
    (checked,) = calipers.check(tmp_path / "run.calipers", model)
    assert checked.sound


@pytest.mark.one_in(3)
@pytest.mark.parametrize("norm", ["l0", "pixels"])
@pytest.mark.parametrize("plan", ["quick", "standard", "thorough", "complete", "autoattack"])
def test_plans_answer_counts(norm: str, plan: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 3)
    ).eval()
    x = torch.rand(6, 2, 4, 4)
    result = calipers.measure(model, x, model(x).argmax(1), calipers.Ball(norm, 3), plan=plan)
    assert result.finished and sum(row.verdict == "broken" for row in result.points) > 0
