"""Do certifiers claim what is true, once for each point, and as much as can be claimed?

Closed forms on linear models, agreement between tools, and networks whose exact distances are
published.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import nets
import numpy as np
import pytest
import torch
from beside import DATA, needs
from torch import Tensor, nn

from calipers.bounds.backward import joined_bounds, margin_bounds, relax
from calipers.bounds.rounding import CHECKED, SEARCH
from calipers.certificates import crown
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.guaranteed import posed
from calipers.certificates.radius import CertifiedRadius
from calipers.errors import BadInput
from calipers.models.classifier import Classifier
from calipers.problem.goals import Goal, Targeted
from calipers.problem.problem import Problem
from calipers.problem.protocols import Certifier
from calipers.threats.ball import Ball

NORMS = ("linf", "l2", "l1")
needs_data = needs(DATA / "nets")


def claims(tool: Certifier, problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the claimed radii and margins in the problem's order; every point must be mentioned
    exactly once, in float64 with the checked guarantee.
    """
    found = list(tool(problem))
    index = torch.cat([claim.index for claim in found])
    assert sorted(index.tolist()) == list(range(len(problem)))
    for claim in found:
        assert (
            claim.guarantee == "float64-checked"
            and claim.radius.dtype == claim.margin.dtype == torch.float64
        )
        assert (
            claim.radius.shape
            == claim.margin.shape
            == claim.forwards.shape
            == claim.backwards.shape
            == claim.index.shape
        )
        assert bool((claim.radius >= 0).all()) and bool((claim.backwards >= 0).all())
    order = index.argsort()
    return torch.cat([claim.radius for claim in found])[order], torch.cat(
        [claim.margin for claim in found]
    )[order]


# ---- linear models: closed form
# --------------------------------------------------------------------------------------------------


def linear_problem(
    norm: str, radius: float | Tensor = 0.05, goal: Goal | None = None, points: int = 12
) -> Problem:
    """Return a linear model with random points without a box, labelled with the predictions but for
    the last point.
    """
    generator = torch.Generator().manual_seed(1)
    module = nn.Linear(6, 4).double().eval()
    with torch.no_grad():
        module.weight.copy_(torch.randn(4, 6, generator=generator, dtype=torch.float64))
        module.bias.copy_(torch.randn(4, generator=generator, dtype=torch.float64))
    x = torch.randn(points, 6, generator=generator, dtype=torch.float64)
    y = module(x).argmax(1)
    y[-1] = (y[-1] + 1) % 4
    if isinstance(goal, Targeted):
        goal = Targeted((y + 1) % 4)
    return Problem.pose(module, x, y, Ball(norm, radius, box=None), goal)


def dual(norm: str, g: Tensor) -> Tensor:
    """Return the dual norm over the last axis, written out once more."""
    return {"linf": g.abs().sum(-1), "l2": g.square().sum(-1).sqrt(), "l1": g.abs().amax(-1)}[norm]


def falls(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the margins (N, S) of a linear model, and how fast each falls with the radius."""
    module = problem.classifier.module
    rows = problem.goal.rows(problem.y, 4).double()
    return problem.margins(module(problem.x)), dual(problem.threat.norm, rows @ module.weight)


@pytest.mark.parametrize("goal", [None, Targeted(0)], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("norm", NORMS)
def test_crown_is_exact_on_a_linear_model(norm: str, goal: Goal | None) -> None:
    problem = linear_problem(norm, 0.3, goal)
    margin, fall = falls(problem)
    exact = problem.goal.worst(margin - 0.3 * fall)
    radii, bounds = claims(CROWN(), problem)
    torch.testing.assert_close(bounds, exact, rtol=0, atol=1e-12)
    assert bool((bounds <= exact).all())
    assert radii.tolist() == [0.3 if e > 0 else 0.0 for e in exact.tolist()]
    assert bool((radii == 0).any()) and bool((radii > 0).any())


def test_intervals_are_exact_on_a_linear_model_under_linf() -> None:
    problem = linear_problem("linf", 0.3)
    torch.testing.assert_close(
        claims(IBP(), problem)[1], claims(CROWN(), problem)[1], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("norm", NORMS)
def test_intervals_never_claim_more_than_crown_on_a_linear_model(norm: str) -> None:
    problem = linear_problem(norm, 0.2)
    assert bool((claims(IBP(), problem)[1] <= claims(CROWN(), problem)[1] + 1e-12).all())


@pytest.mark.parametrize("norm", NORMS)
def test_largest_radius_is_margin_over_dual_norm(norm: str) -> None:
    problem = linear_problem(norm)
    margin, fall = falls(problem)
    exact = (margin / fall).amin(1).clamp_min(0)
    radii, _ = claims(CertifiedRadius(CROWN(), rounds=40), problem)
    assert bool((radii <= exact).all())
    torch.testing.assert_close(radii, exact, rtol=2e-3, atol=0)
    assert float(radii[-1]) == 0.0


@pytest.mark.parametrize("norm", NORMS)
def test_largest_radius_towards_a_target_is_where_its_last_rival_falls(norm: str) -> None:
    problem = linear_problem(norm, goal=Targeted(0), points=8)
    margin, fall = falls(problem)
    # Resisting means that one class stays ahead of the target: CROWN proves the largest of the
    # lower bounds positive.
    exact = (margin / fall).amax(1)
    radii, _ = claims(CertifiedRadius(CROWN(), rounds=40), problem)
    assert bool((radii <= exact.clamp_min(0)).all())
    torch.testing.assert_close(radii, exact.clamp_min(0), rtol=2e-3, atol=0)


def test_weights_and_mask_change_the_closed_form_as_they_should() -> None:
    problem = linear_problem("l2")
    weights, mask = (
        torch.tensor([2.0, 1.0, 0.5, 3.0, 1.0, 1.0], dtype=torch.float64),
        torch.tensor([True, True, True, True, False, True]),
    )
    ball = Ball("l2", 0.1, None, mask, weights)
    asked = Problem.pose(problem.classifier, problem.x, problem.y, ball)
    g = problem.goal.rows(problem.y, 4).double() @ problem.classifier.module.weight
    margin = problem.margins(problem.classifier.module(problem.x))
    exact = (margin - 0.1 * dual("l2", g / weights * mask)).amin(1)
    torch.testing.assert_close(claims(CROWN(), asked)[1], exact, rtol=0, atol=1e-12)


# ---- small networks
# --------------------------------------------------------------------------------------------------


def small_problem(
    norm: str = "linf", radius: float | Tensor = 0.05, points: int = 10, goal: Goal | None = None
) -> Problem:
    """Return a float32 network with two hidden layers on points of the unit box."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        module = nn.Sequential(
            nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)
        ).eval()
        x = torch.rand(points, 5)
    return Problem.pose(module, x, module(x).argmax(1), Ball(norm, radius), goal)


TOOLS: list[tuple[str, Callable[[], Certifier]]] = [
    ("IBP", IBP),
    ("CROWN", CROWN),
    ("CertifiedRadius of IBP", lambda: CertifiedRadius(IBP())),
    ("CertifiedRadius of CROWN", lambda: CertifiedRadius(CROWN())),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "tool"), TOOLS, ids=[name for name, _ in TOOLS])
def test_every_point_is_mentioned_once_in_batches_of_any_size(
    monkeypatch: pytest.MonkeyPatch, name: str, tool: Callable[[], Certifier]
) -> None:
    problem = small_problem()
    whole = claims(tool(), problem)
    for size in (1, 3, 64):
        monkeypatch.setattr(crown, "_POINTS", size)
        assert len(list(tool()(problem))) == -(-len(problem) // size)
        for a, b in zip(claims(tool(), problem), whole, strict=True):
            # A search in float32 may stop a step earlier in other company; what is bounded at a
            # given radius may not move.
            torch.testing.assert_close(
                a,
                b,
                rtol=2e-3 if "CertifiedRadius" in name else 1e-9,
                atol=1e-4 if "CertifiedRadius" in name else 1e-9,
            )


@pytest.mark.parametrize("norm", NORMS)
def test_largest_radius_claims_only_what_crown_proves_in_checked_arithmetic(norm: str) -> None:
    problem = small_problem(norm)
    radii, margins = claims(CertifiedRadius(CROWN()), problem)
    assert bool((radii > 0).all())
    bound = CROWN().bound(problem.at(radii), CHECKED)
    assert bool((bound.worst > 0).all())
    torch.testing.assert_close(bound.worst, margins, rtol=1e-9, atol=1e-12)
    assert claims(CROWN(), problem.at(radii))[0].tolist() == radii.tolist()


@pytest.mark.parametrize("norm", NORMS)
def test_largest_radius_is_nearly_the_largest(norm: str) -> None:
    problem = small_problem(norm)
    radii, _ = claims(CertifiedRadius(CROWN(), tolerance=1e-4, rounds=30), problem)
    wide = problem.threat.widest(problem.x)
    beyond = CROWN().bound(problem.at(torch.minimum(radii * 1.01, wide)), CHECKED).worst
    assert bool(((beyond <= 0) | (radii * 1.01 > wide)).all())


@pytest.mark.parametrize("norm", NORMS)
def test_a_smaller_radius_is_proved_too(norm: str) -> None:
    problem = small_problem(norm)
    radii, _ = claims(CertifiedRadius(CROWN()), problem)
    for share in (0.0, 0.1, 0.5, 0.9):
        assert bool((CROWN().bound(problem.at(radii * share), CHECKED).worst > 0).all())


@pytest.mark.parametrize("bounder", [IBP(), CROWN()], ids=repr)
def test_margins_fall_with_the_radius(bounder: IBP | CROWN) -> None:
    problem = small_problem()
    worst = torch.stack(
        [bounder.bound(problem.at(radius), CHECKED).worst for radius in (0.0, 0.01, 0.03, 0.1, 0.3)]
    )
    assert bool((worst.diff(dim=0) <= 1e-9).all())
    torch.testing.assert_close(
        worst[0],
        problem.goal.worst(problem.margins(problem.classifier.logits64(problem.x))),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("norm", NORMS)
def test_crown_proves_at_least_what_intervals_prove(norm: str) -> None:
    problem = small_problem(norm)
    interval, linear = (
        claims(CertifiedRadius(bounder), problem)[0] for bounder in (IBP(), CROWN())
    )
    assert bool((linear >= interval * 0.999).all()) and float(linear.mean()) > float(
        interval.mean()
    )


def test_where_the_search_begins_does_not_matter() -> None:
    near, _ = claims(
        CertifiedRadius(CROWN(), tolerance=1e-4, rounds=40), small_problem(radius=1e-4)
    )
    far, _ = claims(CertifiedRadius(CROWN(), tolerance=1e-4, rounds=40), small_problem(radius=0.9))
    each, _ = claims(
        CertifiedRadius(CROWN(), tolerance=1e-4, rounds=40),
        small_problem(radius=torch.logspace(-4, -0.1, 10, dtype=torch.float64)),
    )
    torch.testing.assert_close(near, far, rtol=1e-3, atol=0)
    torch.testing.assert_close(each, far, rtol=1e-3, atol=0)


def test_a_start_at_radius_zero_is_a_start() -> None:
    radii, _ = claims(CertifiedRadius(CROWN(), rounds=120), small_problem(radius=0.0, points=3))
    torch.testing.assert_close(
        radii, claims(CertifiedRadius(CROWN()), small_problem(points=3))[0], rtol=1e-2, atol=0
    )


def test_each_point_is_asked_at_its_own_radius() -> None:
    found, _ = claims(CertifiedRadius(CROWN()), small_problem())
    asked = torch.where(torch.arange(10) % 2 == 0, found * 0.9, found * 1.5)
    radii, _ = claims(CROWN(), small_problem(radius=asked))
    assert radii.tolist() == torch.where(torch.arange(10) % 2 == 0, asked, 0.0).tolist()


def test_a_point_alone_gets_the_radius_it_gets_in_company() -> None:
    problem = small_problem("l2")
    together, _ = claims(CertifiedRadius(CROWN()), problem)
    alone = torch.cat(
        [claims(CertifiedRadius(CROWN()), problem.take([i]))[0] for i in range(len(problem))]
    )
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=0)


def test_targeted_claims_are_at_least_as_large_as_untargeted_ones() -> None:
    problem = small_problem()
    untargeted, _ = claims(CertifiedRadius(CROWN()), problem)
    for shift in (1, 2):
        targeted, _ = claims(
            CertifiedRadius(CROWN()), small_problem(goal=Targeted((problem.y + shift) % 3))
        )
        assert bool((targeted >= untargeted * 0.995).all())


def test_misclassified_and_tied_points_get_nothing() -> None:
    module = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(3 * torch.eye(2))
    x = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]], dtype=torch.float64)
    problem = Problem.pose(module, x, torch.tensor([0, 0, 0]), Ball("linf", 0.1))
    for _, tool in TOOLS:
        radii, margins = claims(tool(), problem)
        assert (
            float(radii[0]) > 0
            and radii[1:].tolist() == [0.0, 0.0]
            and bool((margins[1:] <= 0).all())
        )


def test_a_point_that_nothing_in_the_box_can_change_gets_the_whole_box() -> None:
    module = nn.Linear(2, 2).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        module.bias.copy_(torch.tensor([5.0, 0.0]))
    problem = Problem.pose(
        module,
        torch.tensor([[0.2, 0.7]], dtype=torch.float64),
        torch.tensor([0]),
        Ball("linf", 0.05),
    )
    radii, _ = claims(CertifiedRadius(CROWN()), problem)
    assert float(radii) >= 0.8 * (1 - 2e-3)


def test_search_and_proof_are_the_same_bound_up_to_rounding() -> None:
    problem = small_problem()
    for bounder in (IBP(), CROWN()):
        rough, proof = (
            bounder.bound(problem, SEARCH).worst.double(),
            bounder.bound(problem, CHECKED).worst,
        )
        torch.testing.assert_close(rough, proof, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rounds", "tolerance"), [(0, 1e-3), (5, 0.0), (5, 1.0), (5, float("nan"))]
)
def test_senseless_settings_are_refused(rounds: int, tolerance: float) -> None:
    with pytest.raises(BadInput, match="rounds >= 1"):
        CertifiedRadius(CROWN(), rounds=rounds, tolerance=tolerance)


# ---- published networks
# --------------------------------------------------------------------------------------------------


def reference_problem(
    net: str,
    images: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    radius: float,
    norm: str = "linf",
) -> Problem:
    """Return the problem of 8-bit images for a network of the reference data."""
    spec = importlib.util.spec_from_file_location("reference_load", DATA / "load.py")
    assert spec is not None and spec.loader is not None
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    x = torch.from_numpy(images[:, None].astype(np.float32) / 255)
    return Problem.pose(
        load.load_net(str(DATA / "nets" / f"{net}.npz")),
        x,
        torch.from_numpy(labels.astype(np.int64)),
        Ball(norm, radius),
    )


def exact_distances(file: str) -> dict[int, float]:
    """Return the proved upper end of the distance by test index, infinite where none is known."""
    with (DATA / "truth" / file).open() as rows:
        return {
            int(row["mnist_test_index"]): float(row["upper"] or "inf")
            for row in csv.DictReader(rows)
        }


def mnist(indices: Sequence[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return test images and labels by index."""
    arrays = np.load(DATA / "data" / "mnist_test_2k.npz")
    return arrays["x"][list(indices)], arrays["y"][list(indices)]


def assert_below_exact(
    radii: Tensor, indices: Sequence[int], exact: dict[int, float], last_digit: float
) -> None:
    """Assert that no claim lies above the published distance, as far as its digits go."""
    above = [
        (i, r, exact[i])
        for i, r in zip(indices, radii.tolist(), strict=True)
        if r > exact[i] * (1 + last_digit)
    ]
    assert not above


@needs_data
def test_reference_network_at_a_tenth_agrees_with_the_exact_answers() -> None:
    exact = exact_distances("wk17a_linf_exact_idx0-249.csv")
    indices = range(60)
    radii, _ = claims(CROWN(), reference_problem("mnist_wk17a", *mnist(indices), 0.1))
    assert_below_exact(radii, indices, exact, 0.0)
    assert sum(radii.tolist()) > 0.1 * 50  # of 59 that are robust at 0.1


@needs_data
def test_radii_of_the_reference_network_lie_below_the_exact_distances() -> None:
    exact = exact_distances("wk17a_linf_exact_idx0-249.csv")
    indices = [i for i, distance in exact.items() if distance < np.inf] + list(range(23))
    radii, _ = claims(
        CertifiedRadius(CROWN()), reference_problem("mnist_wk17a", *mnist(indices), 0.1)
    )
    assert_below_exact(radii, indices, exact, 1e-6)
    assert float(radii.median()) > 0.08


@needs_data
@pytest.mark.slow
def test_all_radii_of_the_reference_network_lie_below_the_exact_distances() -> None:
    exact = exact_distances("wk17a_linf_exact_idx0-249.csv")
    indices = range(250)
    radii, _ = claims(
        CertifiedRadius(CROWN()), reference_problem("mnist_wk17a", *mnist(indices), 0.1)
    )
    assert_below_exact(radii, indices, exact, 1e-6)


@needs_data
@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_radii_of_the_tiny_network_lie_below_the_exact_distances(norm: str) -> None:
    exact = exact_distances(f"tiny_mlp20_{norm}_exact.csv")
    indices = list(exact)
    radii, _ = claims(
        CertifiedRadius(CROWN()), reference_problem("mnist_tiny_mlp20", *mnist(indices), 0.1, norm)
    )
    assert_below_exact(radii, indices, exact, 1e-4 if norm == "l1" else 1e-6)
    assert float(radii.max()) > 0


@needs_data
@pytest.mark.parametrize("tool", [IBP(), CROWN()], ids=repr)
def test_images_with_a_known_adversarial_example_are_never_certified(tool: Certifier) -> None:
    hard = np.load(DATA / "truth" / "madry_tiny_hard_images.npz")
    radii, margins = claims(tool, reference_problem("mnist_madry_tiny", hard["x"], hard["y"], 0.3))
    assert not radii.any() and not bool((margins > 0).any())


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t[:, :1] * t[:, 1:2],
        lambda t: (
            torch.minimum(t[:, :1].clamp(min=0.3) * 2, torch.tensor(0.5, dtype=t.dtype)) - t[:, 1:2]
        ),
    ],
    ids=["a product", "a minimum of a maximum"],
)
def test_no_bound_is_looser_than_that_of_intervals(function: Any) -> None:
    module = nets.Apply(lambda t: torch.cat([function(t), 0 * t[:, :1] - 0.05], 1)).eval()
    x = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    classifier = Classifier(module)
    problem = Problem.pose(classifier, x, classifier.logits(x).argmax(1), Ball("linf", 0.3))
    by_boxes, *others = (
        torch.cat([c.margin for c in tool(problem)])
        for tool in (IBP(), CROWN(), AlphaCROWN(steps=2, intermediate=0))
    )
    assert all(bool((margin >= by_boxes - 1e-12).all()) for margin in others)


class Clipped(nn.Module):
    """A maximum below a clip: lines through both are looser than the boxes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x.sum(1, keepdim=True).clamp(min=-1.0).clamp(max=1.0)
        return torch.cat([z, 0 * z], 1)


def test_bounds_joined_with_the_boxes_are_the_better_ones_and_no_better() -> None:
    x = torch.zeros(1, 2, dtype=torch.float64)
    problem = Problem.pose(
        Clipped().double(), x, torch.zeros(1, dtype=torch.long), Ball("linf", 4.0, None)
    )
    graph, region = posed(problem, CHECKED)
    rows = problem.goal.rows(problem.y, problem.classes)
    state = relax(graph, region, CHECKED)
    joined, sweep = joined_bounds(state, rows), margin_bounds(state, rows)
    assert float(sweep) < -1.1 and -1.0 - 1e-9 < float(joined) <= -1.0  # -1 is met at (-4, -4)
