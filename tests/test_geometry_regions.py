"""Are linear regions measured right? Against enumeration, dense sampling and mixed-integer
programs; and do wrong rules get caught?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from calipers.errors import BadInput, UnsupportedOp
from calipers.geometry import hyperplanes, linear_pieces, regions, segments
from calipers.geometry.linear_pieces import Pieces
from calipers.geometry.regions import regions_of
from calipers.geometry.segments import exit_distance, path, steps_to_leave
from calipers.graph.capture import graph_of
from calipers.measurement.referee import Referee
from calipers.models.classifier import Classifier
from calipers.problem.goals import Targeted
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.threats.ball import Ball
from calipers.threats.region import Reached
from calipers.threats.substitutions import Substitutions, one_hot_groups

NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
DUALS = {"linf": 1.0, "l2": 2.0, "l1": math.inf}


class Absolute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double().eval()


def dense(seed: int, width: int = 8, inputs: int = 4) -> nn.Module:
    return seeded(
        seed,
        lambda: nn.Sequential(
            nn.Linear(inputs, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 3),
        ),
    )


def mixed(seed: int) -> nn.Module:
    """Leaky, clipped and absolute values."""
    parts = [
        nn.Linear(4, 6),
        nn.LeakyReLU(0.2),
        nn.Linear(6, 6),
        nn.Hardtanh(-0.4, 0.5),
        nn.Linear(6, 6),
        Absolute(),
        nn.Linear(6, 3),
    ]
    return seeded(
        seed,
        lambda: nn.Sequential(
            *[
                p
                for p in parts
                if not hasattr(p, "reset_parameters") or p.reset_parameters() is None
            ]
        ),
    )


def convolutional(seed: int) -> nn.Module:
    return seeded(
        seed,
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
    )


NETS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "dense": (dense, (4,)),
    "mixed": (mixed, (4,)),
    "convolutional": (convolutional, (1, 6, 6)),
}


def posed(
    name: str, seed: int, norm: str, n: int = 4, box: tuple[float, float] | None = None
) -> Problem:
    x = torch.rand(
        n, *NETS[name][1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    model = classifier(name, seed)
    return Problem.pose(model, x, model.logits(x).argmax(1), Ball(norm, 0.1, box=box))


@cache
def classifier(name: str, seed: int) -> Classifier:
    """The net, whose graph is captured once."""
    return Classifier(NETS[name][0](seed))


def unit(norm: str, count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Directions of norm 1, many of them at corners."""
    u = torch.randn(
        count, math.prod(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    u = torch.where(
        torch.arange(count)[:, None] % 2 == 0,
        u.sign() if norm == "linf" else u.abs().pow(3) * u.sign(),
        u,
    )
    return (u / torch.linalg.vector_norm(u, ORDERS[norm], 1, keepdim=True)).view(count, *shape)


# ---- closed forms
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_model_is_one_region_and_its_distance_is_exact(norm: str) -> None:
    net = seeded(0, lambda: nn.Linear(5, 3))
    x = torch.rand(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem = Problem.pose(net, x, net(x).argmax(1), Ball(norm, 0.1, box=None))
    found = regions_of(problem)
    assert (
        bool(found.border.isinf().all() and found.proved_border.isinf().all() and found.exact.all())
        and found.node.tolist() == [-1] * 6
    )
    w, z = net.weight.detach(), net(x).detach()
    for i, y in enumerate(problem.y.tolist()):
        nearest = min(
            float((z[i, y] - z[i, j]) / torch.linalg.vector_norm(w[y] - w[j], DUALS[norm]))
            for j in range(3)
            if j != y
        )
        assert float(found.decision[i]) == pytest.approx(nearest, rel=1e-12)
        assert nearest * (1 - 1e-6) <= float(found.lower[i]) <= nearest


@pytest.mark.parametrize("norm", NORMS)
def test_one_layer_by_hand(norm: str) -> None:
    net = seeded(3, lambda: nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2)))
    x = torch.rand(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = regions_of(Problem.pose(net, x, net(x).argmax(1), Ball(norm, 0.1, box=None)))
    each = net[0](x).detach().abs() / torch.linalg.vector_norm(
        net[0].weight.detach(), DUALS[norm], 1
    )
    torch.testing.assert_close(found.border, each.amin(1))
    assert torch.equal(found.element, each.argmin(1))


@pytest.mark.parametrize("norm", NORMS)
def test_two_layers_by_writing_the_affine_maps_out(norm: str) -> None:
    problem = posed("dense", 5, norm)
    net = problem.classifier.module
    found = regions_of(problem)
    for i, x in enumerate(problem.x):
        first, second = net[0], net[2]
        z1 = first(x).detach()
        g1 = first.weight.detach()
        z2 = second(z1.clamp(min=0)).detach()
        g2 = second.weight.detach() @ (g1 * (z1 > 0)[:, None])
        each = torch.cat([z1, z2]).abs() / torch.linalg.vector_norm(
            torch.cat([g1, g2]), DUALS[norm], 1
        )
        assert float(found.border[i]) == pytest.approx(float(each.min()), rel=1e-12)


# ---- sampling
# --------------------------------------------------------------------------------------------------


def patterns_change(problem: Problem, i: int, points: Tensor) -> Tensor:
    """Does the pattern of point i change at other points (M, *D), (M,) bool?"""
    graph = graph_of(problem.classifier, problem.x)
    own, others = (
        Pieces.at(graph, problem.x[i : i + 1]).pattern(),
        Pieces.at(graph, points).pattern(),
    )
    return (others != own).any(1)


def survives_sampling(problem: Problem, found: regions.Regions) -> bool:
    """No sampled point inside the radius has another pattern, and just outside it along the nearest
    hyperplane's direction there is one.
    """
    norm = problem.threat.norm
    for i, radius in enumerate(found.border.tolist()):
        inside = problem.x[i] + radius * (1 - 1e-9) * unit(norm, 400, tuple(problem.x.shape[1:]), i)
        if problem.threat.box is not None:
            inside = inside.clamp(*problem.threat.box)
        if bool(patterns_change(problem, i, inside).any()):
            return False
    graph = graph_of(problem.classifier, problem.x)
    hyperplane = hyperplanes.nearest_hyperplane(Pieces.at(graph, problem.x), problem.region)
    region = problem.region.at(hyperplane.distance * (1 + 1e-6))
    outside = region.center + region.offset_support(hyperplane.normal)[1].view_as(problem.x)
    return all(bool(patterns_change(problem, i, outside[i : i + 1])) for i in range(len(problem)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("box", [None, (0.0, 1.0)])
def test_no_pattern_changes_inside_and_one_does_just_outside(
    name: str, norm: str, box: tuple[float, float] | None
) -> None:
    for seed in range(3):
        problem = posed(name, seed, norm, box=box)
        found = regions_of(problem)
        assert survives_sampling(problem, found)
        assert bool((found.proved_border <= found.border).all()) and bool(
            (found.proved_border >= found.border * (1 - 1e-5)).all()
        )


@pytest.mark.parametrize("norm", NORMS)
def test_a_box_only_pushes_hyperplanes_away(norm: str) -> None:
    for name in NETS:
        free, boxed = (regions_of(posed(name, 1, norm, box=box)) for box in (None, (0.0, 1.0)))
        assert bool((boxed.border >= free.border * (1 - 1e-12)).all()) and bool(
            (boxed.decision >= free.decision * (1 - 1e-12)).all()
        )


def test_masked_features_and_weights_are_kept() -> None:
    net = dense(2)
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask, weights = (
        torch.tensor([True, True, False, True]),
        torch.tensor([1.0, 2.0, 1.0, 0.5], dtype=torch.float64),
    )
    free = Problem.pose(
        net, x, net(x).argmax(1), Ball("l2", 0.1, box=None, mask=mask, weights=weights)
    )
    found = regions_of(free)
    scale = torch.where(mask, 1 / weights, 0.0)
    small = seeded(2, lambda: nn.Linear(4, 8))
    with torch.no_grad():
        small.weight.copy_(net[0].weight), small.bias.copy_(net[0].bias)
    each = small(x).detach().abs() / torch.linalg.vector_norm(small.weight.detach() * scale, 2, 1)
    assert bool((found.border <= each.amin(1) * (1 + 1e-12)).all())
    for i, radius in enumerate(found.border.tolist()):
        u = unit("l2", 300, (4,), i) * scale
        assert not bool(patterns_change(free, i, x[i] + radius * (1 - 1e-9) * u).any())


# ---- the free exact distance
# --------------------------------------------------------------------------------------------------


def exact_distance(net: nn.Sequential, x: Tensor, label: int, reach: float = 3.0) -> float:
    """The linf distance by a mixed-integer program written out here: big-M rows of each ReLU, one
    program for each other class.
    """
    layers = [m for m in net if isinstance(m, nn.Linear)]
    best = math.inf
    low, high = x.numpy() - reach, x.numpy() + reach
    for target in range(layers[-1].out_features):
        if target != label:
            best = min(best, _program(layers, x.numpy(), label, target, low, high))
    return best


def _program(
    layers: list[nn.Linear],
    x: np.ndarray,
    label: int,
    target: int,
    low: np.ndarray,
    high: np.ndarray,
) -> float:
    hidden = [layer.out_features for layer in layers[:-1]]
    # inputs, values and switches of each hidden layer, the distance
    d, total = len(x), len(x) + 2 * sum(hidden) + 1
    rows, lower, upper = [], [], []

    def add(entries: dict[int, float], a: float, b: float) -> None:
        row = np.zeros(total)
        for k, v in entries.items():
            row[k] += v
        rows.append(row), lower.append(a), upper.append(b)

    start, place, bounds_low, bounds_high = 0, d, low, high
    for layer, width in zip(layers, hidden, strict=False):
        w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        middle, radius = (bounds_low + bounds_high) / 2, (bounds_high - bounds_low) / 2
        z_low, z_high = w @ middle + b - abs(w) @ radius, w @ middle + b + abs(w) @ radius
        for e in range(width):
            inputs = {start + k: -w[e, k] for k in range(w.shape[1])}
            value, switch = place + e, place + width + e
            add({value: 1, **inputs}, b[e], np.inf)
            add({value: 1, **inputs, switch: -z_low[e]}, -np.inf, b[e] - z_low[e])
            add({value: 1, switch: -max(z_high[e], 0)}, -np.inf, 0)
        bounds_low, bounds_high = np.maximum(z_low, 0), np.maximum(z_high, 0)
        start, place = place, place + 2 * width
    w, b = layers[-1].weight.detach().numpy(), layers[-1].bias.detach().numpy()
    add(
        {start + k: w[label, k] - w[target, k] for k in range(w.shape[1])},
        -np.inf,
        b[target] - b[label],
    )
    for i in range(d):
        add({i: 1, total - 1: -1}, -np.inf, x[i])
        add({i: 1, total - 1: 1}, x[i], np.inf)
    floor, ceiling, whole = np.zeros(total), np.full(total, np.inf), np.zeros(total)
    floor[:d], ceiling[:d] = low, high
    place = d
    for width in hidden:
        ceiling[place + width : place + 2 * width] = 1
        whole[place + width : place + 2 * width] = 1
        place += 2 * width
    cost = np.zeros(total)
    cost[-1] = 1
    found = scipy.optimize.milp(
        cost,
        integrality=whole,
        bounds=scipy.optimize.Bounds(floor, ceiling),
        constraints=scipy.optimize.LinearConstraint(np.array(rows), lower, upper),
        options={"mip_rel_gap": 0.0},
    )
    return float(found.fun) if found.success else math.inf


def test_where_the_decision_is_inside_the_region_its_distance_is_exact() -> None:
    exact, others = 0, 0
    for seed in range(3):
        problem = posed("dense", seed, "linf", n=64)
        # Near the decision boundary the region holds it, far from it it does not: two points of
        # each kind.
        margin = problem.goal.worst(
            problem.margins(problem.classifier.logits64(problem.x))
        ).argsort()
        problem = problem.take(margin[[0, 1, 40, 63]])
        found = regions_of(problem)
        for i in range(len(problem)):
            true = exact_distance(problem.classifier.module, problem.x[i], int(problem.y[i]))
            assert float(found.lower[i]) <= true * (1 + 1e-6)
            if bool(found.exact[i]):
                exact += 1
                assert float(found.decision[i]) == pytest.approx(true, abs=1e-6)
            else:
                others += 1
                assert min(true, 3.0) >= min(float(found.border[i]), 3.0) * (1 - 1e-6)
    assert exact >= 3 and others >= 3, "the test must see both cases"


@pytest.mark.parametrize("norm", NORMS)
def test_both_sides_are_proved_to_the_referee(norm: str) -> None:
    proved = 0
    for seed in range(6):
        problem = posed("dense", seed, norm, n=12, box=(0.0, 1.0))
        found = regions_of(problem)
        at = torch.nonzero(found.exact).flatten()
        none = torch.zeros(len(at), dtype=torch.long)
        ruling = Referee(problem).attempt(
            Attempt(torch.arange(len(at)), found.candidate[at], none, none),
            at,
            "nearest hyperplane",
            0.0,
        )
        assert len(ruling.evidence) == len(at)
        for fact, i in zip(ruling.evidence, at.tolist(), strict=True):
            assert (
                fact.radius == pytest.approx(float(found.decision[i]), rel=1e-6)
                and float(found.lower[i]) < fact.radius
            )
            assert float(found.lower[i]) >= fact.radius * (1 - 1e-5)
        proved += len(at)
    assert proved >= 3


def test_a_target_is_bounded_and_a_wrong_point_is_at_distance_nothing() -> None:
    net = dense(1)
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = net(x).argmax(1)
    wrong = regions_of(Problem.pose(net, x, (y + 1) % 3, Ball("linf", 0.1, box=None)))
    assert not bool(wrong.decision.any() or wrong.lower.any() or wrong.exact.any()) and bool(
        (wrong.border > 0).all()
    )
    any_rival = regions_of(Problem.pose(net, x, y, Ball("linf", 0.1, box=None)))
    one = regions_of(Problem.pose(net, x, y, Ball("linf", 0.1, box=None), Targeted((y + 1) % 3)))
    assert bool((one.decision >= any_rival.decision * (1 - 1e-12)).all()) and not bool(
        one.exact.any()
    )


# ---- lines
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", NETS)
def test_steps_match_a_simulation(name: str) -> None:
    for seed in range(34):
        problem = posed(name, seed, "linf", n=1)
        u = unit("linf", 1, tuple(problem.x.shape[1:]), seed)
        distance = exit_distance(problem, u)
        if not bool(distance.isfinite()):
            continue
        eta = float(distance) / (1.5 + seed % 7)
        steps = int(steps_to_leave(distance, eta))
        walked = (
            problem.x
            + eta
            * torch.arange(1, steps + 1, dtype=torch.float64).view(-1, *[1] * (problem.x.dim() - 1))
            * u
        )
        changed = patterns_change(problem, 0, walked)
        assert bool(changed[-1]) and not bool(changed[:-1].any())


@pytest.mark.parametrize("name", NETS)
def test_regions_along_a_segment_match_dense_sampling(name: str) -> None:
    for seed in range(4):
        problem = posed(name, seed, "l2", n=2)
        wide = (1 if name == "convolutional" else 10) * (problem.x - problem.x.mean(0))
        problem = Problem.pose(problem.classifier, wide, problem.y, problem.threat)
        found = path(problem, 0, problem.x[1])
        t = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
        points = problem.x[0] + t.view(-1, *[1] * (problem.x.dim() - 1)) * (
            problem.x[1] - problem.x[0]
        )
        graph = graph_of(problem.classifier, problem.x)
        pattern = Pieces.at(graph, points).pattern()
        jumps = t[1:][(pattern[1:] != pattern[:-1]).any(1)]
        widths = torch.diff(torch.cat([torch.zeros(1), found.breaks, torch.ones(1)]))
        assert found.regions > 3 and bool((widths > 1.1 / 40_000).all()), (
            "this seed's regions are too narrow to be sampled"
        )
        assert len(jumps) == len(found.breaks) and bool(
            ((jumps - found.breaks).abs() < 1 / 20_000).all()
        )
        torch.testing.assert_close(found.logits[0], problem.classifier.logits64(problem.x)[0])
        torch.testing.assert_close(found.logits[-1], problem.classifier.logits64(problem.x)[1])


def test_the_first_break_of_a_segment_is_the_exit() -> None:
    problem = posed("convolutional", 2, "l2", n=2)
    u = (problem.x[1] - problem.x[0])[None].expand(2, -1, -1, -1)
    assert float(exit_distance(problem, u)[0]) == pytest.approx(
        float(path(problem, 0, problem.x[1]).breaks[0]), rel=1e-9
    )


# ---- what has no regions
# --------------------------------------------------------------------------------------------------


def test_what_has_no_linear_regions_is_refused() -> None:
    x, y = torch.rand(2, 4, dtype=torch.float64), torch.tensor([0, 1])
    curved = seeded(0, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    with pytest.raises(UnsupportedOp, match="not piecewise linear"):
        regions_of(Problem.pose(curved, x, y, Ball("linf", 0.1)))
    with pytest.raises(BadInput, match="linf, l2 or l1"):
        regions_of(Problem.pose(dense(0), x, y, Ball("l0", 1)))
    one_hot = torch.eye(2, dtype=torch.float64).repeat(2, 1)[:2].repeat(1, 2)
    with pytest.raises(BadInput, match="linf, l2 or l1"):
        regions_of(Problem.pose(dense(0), one_hot, y, Substitutions(one_hot_groups(2, 2), 1)))
    with pytest.raises(BadInput, match="positive length"):
        steps_to_leave(torch.ones(1), 0.0)


# ---- mutants
# --------------------------------------------------------------------------------------------------


def test_a_primal_norm_in_place_of_the_dual_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = posed("dense", 0, "l1")
    monkeypatch.setattr(
        hyperplanes, "distance_to", lambda region, g, gap: Reached(gap / region.norm.of(g), g)
    )
    monkeypatch.setattr(
        hyperplanes, "free_distance", lambda region, g, gap: gap / region.norm.of(g)
    )
    wrong = regions.nearest_hyperplane(
        Pieces.at(graph_of(problem.classifier, problem.x), problem.x), problem.region
    )
    assert not torch.allclose(wrong.distance, regions_hyperplane(problem))


def regions_hyperplane(problem: Problem) -> Tensor:
    """d_B of a net of two hidden layers, from affine maps written out."""
    net, found = problem.classifier.module, []
    for x in problem.x:
        z1, g1 = net[0](x).detach(), net[0].weight.detach()
        z2, g2 = net[2](z1.clamp(min=0)).detach(), net[2].weight.detach() @ (g1 * (z1 > 0)[:, None])
        found.append(
            (
                torch.cat([z1, z2]).abs()
                / torch.linalg.vector_norm(torch.cat([g1, g2]), DUALS[problem.threat.norm], 1)
            ).min()
        )
    return torch.stack(found)


def every_hyperplane(
    monkeypatch: pytest.MonkeyPatch, own: Pieces, problem: Problem, factor: float
) -> Tensor:
    """The nearest distances, with the lower bounds that decide which hyperplanes are measured
    multiplied by a factor.
    """
    bound = hyperplanes._at_least
    with monkeypatch.context() as patch:
        patch.setattr(hyperplanes, "_at_least", lambda *given: bound(*given) * factor)
        patch.setattr(hyperplanes, "_AT_ONCE", 1)
        return hyperplanes.nearest_hyperplane(own, problem.region).distance


@pytest.mark.parametrize("norm", NORMS)
def test_hyperplanes_that_are_passed_over_are_farther(
    monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    """Measuring all of them finds the same; with lower bounds that are none (the mutant) some
    nearest hyperplanes are missed.
    """
    missed = 0
    for name, seed, box in (
        (name, seed, box) for name in NETS for seed in range(3) for box in (None, (0.0, 1.0))
    ):
        problem = posed(name, seed, norm, n=8, box=box)
        own = Pieces.at(graph_of(problem.classifier, problem.x), problem.x)
        quick, all_of_them, mutant = (
            every_hyperplane(monkeypatch, own, problem, factor) for factor in (1.0, 0.0, 40.0)
        )
        assert torch.equal(quick, all_of_them)
        missed += int((mutant > quick).sum())
    assert missed


def test_hyperplanes_of_the_first_layer_alone_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The radius would be too large, and sampling sees the pattern change."""
    problem = posed("dense", 3, "linf")
    whole = Pieces.nonlinear_nodes
    monkeypatch.setattr(Pieces, "nonlinear_nodes", lambda self: iter(list(whole(self))[:1]))
    hyperplane = hyperplanes.nearest_hyperplane(
        Pieces.at(graph_of(problem.classifier, problem.x), problem.x), problem.region
    )
    monkeypatch.undo()
    shares = (
        (i, r * (1 - 1e-9) * unit("linf", 4000, (4,), i))
        for i, r in enumerate(hyperplane.distance.tolist())
    )
    assert any(bool(patterns_change(problem, i, problem.x[i] + delta).any()) for i, delta in shares)


def test_pools_walled_by_the_second_largest_member_alone_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A member that trails by more can win sooner: all of them are hyperplanes."""
    net = seeded(
        0,
        lambda: nn.Sequential(
            nn.Linear(2, 3), nn.Unflatten(1, (1, 3)), nn.MaxPool1d(3), nn.Flatten(), nn.Linear(1, 2)
        ),
    )
    with torch.no_grad():
        (
            net[0].weight.copy_(torch.tensor([[1.0, 0], [1, 0.01], [-5, 0]])),
            net[0].bias.copy_(torch.tensor([0.0, -0.1, 0])),
        )
    problem = Problem.pose(
        net,
        torch.tensor([[1.0, 0.0]], dtype=torch.float64),
        net(torch.tensor([[1.0, 0.0]]).double()).argmax(1),
        Ball("l2", 0.1, box=None),
    )
    own = Pieces.at(graph_of(problem.classifier, problem.x), problem.x)
    # (1 - -5) / 6
    assert float(hyperplanes.nearest_hyperplane(own, problem.region).distance) == pytest.approx(1.0)
    trailing = Pieces.trailing

    def second(self: Pieces, number: int) -> tuple[Tensor, Tensor]:
        behind, windows = trailing(self, number)
        return torch.where(behind == behind.amin(2, keepdim=True), behind, torch.inf), windows

    monkeypatch.setattr(Pieces, "trailing", second)
    wrong = hyperplanes.nearest_hyperplane(own, problem.region)
    assert float(wrong.distance) == pytest.approx(10.0)
    monkeypatch.undo()
    assert bool(patterns_change(problem, 0, torch.tensor([[-0.5, 0.0]], dtype=torch.float64))), (
        "the wrong radius holds a point of another pattern"
    )


def test_the_border_as_a_robustness_radius_is_caught() -> None:
    """A decision boundary may cut the region: d_B alone claims too much, and a point inside it
    shows that.
    """
    caught = 0
    for seed in range(6):
        problem = posed("dense", seed, "linf", n=12)
        found = regions_of(problem)
        lying = found.exact & (found.decision < found.border * 0.99)
        worst = problem.goal.worst(problem.margins(problem.classifier.logits64(found.candidate)))
        caught += int((lying & (worst <= 0)).sum())
        assert bool((found.lower <= found.decision).all())
    assert caught


def test_an_unproved_radius_claims_less_not_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the finder were wrong and twice too generous, the confirming sweep would not confirm
    it.
    """
    problem = posed("convolutional", 1, "linf")
    honest = regions_of(problem)
    right = regions.nearest_hyperplane

    def generous(own: Pieces, region: object) -> hyperplanes.Hyperplane:
        hyperplane = right(own, region)  # type: ignore[arg-type]
        return hyperplanes.Hyperplane(
            2 * hyperplane.distance, hyperplane.node, hyperplane.element, hyperplane.normal
        )

    monkeypatch.setattr(regions, "nearest_hyperplane", generous)
    found = regions_of(problem)
    assert bool((honest.proved_border > 0).all()) and not bool(found.proved_border.any())


def test_ceil_in_place_of_floor_plus_one_is_caught() -> None:
    on_the_border = torch.tensor([0.5], dtype=torch.float64)
    assert math.ceil(0.5 / 0.1) == 5 != int(steps_to_leave(on_the_border, 0.1))


def test_slopes_taken_left_of_the_breakpoint_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = posed("mixed", 0, "linf", n=2)
    true = path(problem, 0, problem.x[1])
    from calipers.geometry import subdivision

    monkeypatch.setattr(subdivision, "line", lambda op, z: linear_pieces.line(op, -z))
    wrong = path(problem, 0, problem.x[1])
    assert segments.Path is type(wrong) and not torch.allclose(wrong.logits[-1], true.logits[-1])
