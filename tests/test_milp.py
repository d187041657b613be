"""Are exact distances exact? Against enumeration of all pieces, fine grids, both jaws on random
networks, and deliberate mistakes in every rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import nets
import numpy as np
import pytest
import torch
from clocks import AMPLE
from nets import attacked, inside, random_case
from test_exact_distance import shortest
from torch import Tensor, nn

from calipers.attacks.fmn import FMN
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.exact import encoding, lp, tree
from calipers.certificates.exact import model as programs
from calipers.certificates.milp import MILP
from calipers.certificates.radius import CertifiedRadius
from calipers.errors import BadInput, Contradiction
from calipers.graph.kinds import Elementwise
from calipers.models.classifier import Classifier
from calipers.problem.goals import Targeted
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt
from calipers.problem.specification import Specification
from calipers.threats.ball import Ball

F64 = torch.float64
CLOSED = (
    3e-7  # of the distance: the proof stops 2e-7 short, the example oversteps by as little as shows
)
STRAIGHT = [
    "aten.relu.default",
    "aten.leaky_relu.default",
    "aten.abs.default",
    "aten.hardtanh.default",
    "aten.relu6.default",
    "aten.clamp.default",
]


@dataclass(frozen=True)
class Exact:
    """Both ends of one point's distance, and the example."""

    lower: float
    upper: float
    point: Tensor | None


def exact(problem: Problem, tool: MILP | None = None) -> list[Exact]:
    """Return both ends for every point; the examples are asked of the model here, and measured."""
    lower, upper, points = [0.0] * len(problem), [np.inf] * len(problem), [None] * len(problem)
    for result in (tool or MILP(seconds=AMPLE))(problem):
        i = int(result.index)
        if not isinstance(result, Attempt):
            lower[i] = float(result.radius)
            continue
        here = problem.take([i])
        logits = problem.classifier.logits64(result.candidate)
        assert bool(here.goal.worst(here.margins(logits)) <= 0) and bool(
            here.region.contains(result.candidate)
        )
        if float(here.region.distance(result.candidate)) < upper[i]:
            upper[i], points[i] = float(here.region.distance(result.candidate)), result.candidate
    return [Exact(*ends) for ends in zip(lower, upper, points, strict=True)]


# ---- enumeration
# --------------------------------------------------------------------------------------------------


Pieces = list[tuple[float, float, float, float]]
"""(slope, constant, from, to)."""

ACTIVATIONS: dict[str, tuple[nn.Module, Pieces]] = {
    "relu": (nn.ReLU(), [(0, 0, -np.inf, 0), (1, 0, 0, np.inf)]),
    "leaky": (nn.LeakyReLU(0.3), [(0.3, 0, -np.inf, 0), (1, 0, 0, np.inf)]),
    "steep": (nn.LeakyReLU(1.7), [(1.7, 0, -np.inf, 0), (1, 0, 0, np.inf)]),
    "abs": (nets.Apply(torch.abs), [(-1, 0, -np.inf, 0), (1, 0, 0, np.inf)]),
    "clip": (
        nn.Hardtanh(-0.3, 0.5),
        [(0, -0.3, -np.inf, -0.3), (1, 0, -0.3, 0.5), (0, 0.5, 0.5, np.inf)],
    ),
}


@cache
def perceptron(seed: int, activation: nn.Module, widths: tuple[int, ...]) -> nn.Sequential:
    """Return a network of a few units whose kinks pass near the middle of the unit box, float64."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for k, (a, b) in enumerate(itertools.pairwise(widths)):
        layer = nn.Linear(a, b).double()
        layer.weight.data = torch.randn(b, a, generator=generator, dtype=F64) * 1.5 / a**0.5
        layer.bias.data = 0.3 * torch.randn(b, generator=generator, dtype=F64) - (
            layer.weight.sum(1) / 2 if k == 0 else 0
        )
        layers += [layer, activation]
    return nn.Sequential(*layers[:-1]).eval()


def by_enumeration(model: nn.Sequential, pieces: Pieces, problem: Problem) -> float:
    """Return the distance of the only point: a convex program for every rival and every way of
    putting each unit on one of its pieces.
    """
    layers = [
        (m.weight.detach().numpy(), m.bias.detach().numpy())
        for m in model
        if isinstance(m, nn.Linear)
    ]
    region, x, y, best = problem.region, problem.x[0].numpy(), int(problem.y[0]), np.inf
    unit = np.ones(x.size) if region.weight is None else region.weight.numpy()
    hidden = sum(len(b) for _, b in layers[:-1])
    hyperplanes = (
        ([], [])
        if problem.threat.constraints is None
        else tuple([t.numpy()] for t in problem.threat.constraints)
    )
    for pattern in itertools.product(pieces, repeat=hidden):
        a, c, rows, ends, k = np.eye(x.size), np.zeros(x.size), [], [], 0
        for w, b in layers[:-1]:
            a, c = w @ a, w @ c + b
            slope, at, low, high = np.array(pattern[k : k + len(b)]).T
            rows += [a, -a]
            ends += [high - c, c - low]
            a, c, k = slope[:, None] * a, slope * c + at, k + len(b)
        a, c = layers[-1][0] @ a, layers[-1][0] @ c + layers[-1][1]
        for j in (j for j in range(len(c)) if j != y):
            sides, limits = (
                np.vstack([*rows, *hyperplanes[0], a[y] - a[j]]),
                np.concatenate([*ends, *hyperplanes[1], [c[j] - c[y]]]),
            )
            kept = np.isfinite(limits)
            low, high = region.low[0].numpy() * unit, region.high[0].numpy() * unit
            best = min(
                best,
                shortest(
                    problem.threat.norm, sides[kept] / unit, (limits - sides @ x)[kept], low, high
                ),
            )
    return best


def asked(model: nn.Module, seed: int, features: int, norm: str, **threat: object) -> Problem:
    """Return the question about one random point, within a radius that holds the whole box."""
    x = torch.rand(1, features, generator=torch.Generator().manual_seed(seed + 90), dtype=F64)
    ball = Ball(norm, 0.1, **threat)  # type: ignore[arg-type]
    radius = {"linf": 1.0, "l2": features**0.5, "l1": float(features)}[norm]
    return Problem.pose(captured_once(model), x, model(x).argmax(1), ball).at(radius)


@cache
def captured_once(model: nn.Module) -> Classifier:
    """Return the model as one classifier for all tests: it is captured once, and anew if its
    weights change.
    """
    return Classifier(model)


SETTINGS: dict[str, dict[str, object]] = {
    "box": {},
    "no box": {"box": None},
    "mask": {"mask": torch.tensor([True, False, True])},
    "weights": {"weights": torch.tensor([0.5, 1.0, 2.0], dtype=F64)},
    "constraints": {
        "constraints": (torch.tensor([[1.0, 1.0, 1.0]], dtype=F64), torch.tensor([1.9], dtype=F64))
    },
}


@cache
def enumerated(norm: str, name: str, seed: int, setting: str, widths: tuple[int, ...]) -> float:
    """Return the distance that enumeration finds."""
    activation, pieces = ACTIVATIONS[name]
    model = perceptron(seed, activation, widths)
    return by_enumeration(model, pieces, asked(model, seed, widths[0], norm, **SETTINGS[setting]))


def against_enumeration(
    norm: str, name: str, seed: int, setting: str = "box", widths: tuple[int, ...] = (3, 3, 2, 3)
) -> None:
    """Assert that both ends stand at the distance that enumeration finds."""
    model = perceptron(seed, ACTIVATIONS[name][0], widths)
    problem = asked(model, seed, widths[0], norm, **SETTINGS[setting])
    (ends,) = exact(problem)
    truth = enumerated(norm, name, seed, setting, widths)
    if truth > float(problem.threat.radii(1)[0]):
        assert ends.upper == np.inf and ends.lower == float(problem.threat.radii(1)[0])
    else:
        assert (
            truth * (1 - 1e-6) - 1e-9 <= ends.lower <= truth * (1 + 1e-7) + 1e-9
            and abs(ends.upper - truth) <= 1e-6 * truth + 1e-9
        )


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=[pytest.mark.slow]) for seed in (1, 2))]
)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_enumeration_of_all_pieces_gives_the_same_distance(norm: str, name: str, seed: int) -> None:
    against_enumeration(norm, name, seed, widths=(3, 2, 2, 3) if name == "clip" else (3, 3, 2, 3))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=[pytest.mark.slow]) for seed in (2, 3))]
)
@pytest.mark.parametrize("name", ["relu", "abs", "clip"])
def test_enumeration_in_l2(name: str, seed: int) -> None:
    against_enumeration("l2", name, seed, widths=(3, 2, 3))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("setting", ["no box", "mask", "weights"])
@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
def test_enumeration_whatever_the_ball(norm: str, setting: str) -> None:
    for seed in range(3):
        against_enumeration(
            norm, "relu", seed, setting, widths=(3, 2, 3) if norm == "l2" else (3, 3, 3)
        )


def test_a_network_of_one_feature_by_hand() -> None:
    """z = 1 - relu(x) - relu(-x) = 1 - |x| is positive on ]-1, 1[, so from 0.3 the nearest zero is
    0.7 away.
    """
    first, last = nn.Linear(1, 2).double(), nn.Linear(2, 2).double()
    first.weight.data, first.bias.data = (
        torch.tensor([[1.0], [-1.0]], dtype=F64),
        torch.zeros(2, dtype=F64),
    )
    last.weight.data, last.bias.data = (
        torch.tensor([[-1.0, -1.0], [0.0, 0.0]], dtype=F64),
        torch.tensor([1.0, 0.0], dtype=F64),
    )
    x = torch.tensor([[0.3]], dtype=F64)
    for norm in ("linf", "l1", "l2"):
        problem = Problem.pose(
            nn.Sequential(first, nn.ReLU(), last), x, torch.tensor([0]), Ball(norm, 2.0, None)
        )
        (ends,) = exact(problem)
        assert (
            ends.lower == pytest.approx(0.7, rel=CLOSED)
            and ends.upper == pytest.approx(0.7, rel=1e-6)
            and ends.lower < 0.7
        )


# ---- other operations, on a grid
# --------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Max pooling over four places of three, between linear layers."""

    def __init__(self, residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last, self.residual = (
            nn.Linear(2, 8),
            nn.Linear(6 if residual else 4, 3),
            residual,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2) -> (N, 3)."""
        z = self.first(x - 0.5)
        h = nn.functional.max_pool1d(z[:, None], 2)[:, 0]
        return self.last(torch.cat([h.relu(), (x + z[:, :2]).abs()], 1) if self.residual else h)


def on_a_grid(model: nn.Module, norm: str, seeds: range = range(4)) -> None:
    """Assert that both ends meet, and that no point of a fine grid of the box is adversarial within
    the lower one.
    """
    model = model.double().eval()
    steps = torch.linspace(0, 1, 301, dtype=F64)
    grid = torch.cartesian_prod(steps, steps)
    for seed in seeds:
        problem = asked(model, seed, 2, norm)
        (ends,) = exact(problem)
        wrong = grid[model(grid).argmax(1) != problem.y]
        nearest = (
            float(
                problem.region.take(torch.zeros(len(wrong), dtype=torch.long)).distance(wrong).min()
            )
            if len(wrong)
            else np.inf
        )
        assert ends.lower <= nearest and (
            ends.upper - ends.lower <= CLOSED * ends.upper
            or (ends.upper == np.inf and not len(wrong))
        )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("norm", ["linf", "l1", "l2"])
def test_pooling_and_residual_sums_on_a_grid(norm: str) -> None:
    on_a_grid(Pooled(), norm)
    on_a_grid(Pooled(residual=True), norm)


# ---- random networks, both jaws
# --------------------------------------------------------------------------------------------------


def violations(seed: int) -> tuple[list[str], int]:
    """Name what contradicts on one random network, and count the points whose both ends meet."""
    case = random_case(seed, STRAIGHT[seed % len(STRAIGHT)])
    case = case.take(torch.arange(2))
    # quadratic programs of images take a while
    if case.ball.norm == "l2" and case.x[0].numel() > 6:
        case = replace(case, ball=replace(case.ball, norm="linf"))
    case = case.at(torch.minimum(case.ball.radii(2), case.ball.widest(case.x)))
    problem = Problem.pose(nets.Carrier(case).eval(), case.x, case.y, case.ball, case.goal)
    ends, said = exact(problem, MILP(seconds=AMPLE)), []
    met = sum(
        e.lower >= float(r) or e.upper - e.lower <= 1e-5 * e.upper
        for e, r in zip(ends, case.ball.radii(len(ends)), strict=True)
    )
    for tool in (CertifiedRadius(IBP()), CertifiedRadius(CROWN())):
        for claim in tool(problem):
            said += [
                f"{tool} claims beyond the example of point {i}"
                for i, r in zip(claim.index.tolist(), claim.radius.tolist(), strict=True)
                if r >= ends[i].upper
            ]
    nearest = [e.lower for e in ends]
    points = attacked(case, seed, steps=4)
    broken = (
        case.worst(case.graph.values(points.flatten(0, 1))[-1], len(points)).view(len(points), -1)
        <= 0
    )
    region = problem.region
    for r, i in torch.nonzero(broken & inside(case, points)).tolist():
        said += (
            [f"point {i} is broken within {nearest[i]}"]
            if float(region.distance(points[r])[i]) < nearest[i]
            else []
        )
    for attempt in FMN(steps=20)(problem):
        for i, point in zip(attempt.index.tolist(), attempt.candidate, strict=True):
            here = problem.take([i])
            wrong = bool(here.clearance(point[None]) <= 0)
            said += (
                [f"an attack breaks point {i} within {nearest[i]}"]
                if wrong and float(here.region.distance(point[None])) < nearest[i]
                else []
            )
    return said, met - len(ends)


@pytest.mark.parametrize(
    "seed",
    [pytest.param(k, marks=[pytest.mark.slow] if k in (6, 8, 10, 12) else []) for k in range(16)],
)
def test_no_certificate_above_and_no_attack_below(seed: int) -> None:
    said, missing = violations(seed)
    assert not said and missing == 0


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
def test_no_certificate_above_and_no_attack_below_on_two_hundred(block: int) -> None:
    for seed in range(1000 + 25 * block, 1025 + 25 * block):
        said, missing = violations(seed)
        assert not said and missing == 0, f"seed {seed}: {said}, {missing}"


# ---- questions and ends
# --------------------------------------------------------------------------------------------------


def small(seed: int = 0, norm: str = "linf", radius: float = 1.0, goal: object = None) -> Problem:
    """Return the question about three points of a small network."""
    model = perceptron(seed, nn.ReLU(), (3, 4, 3, 3))
    x = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return Problem.pose(captured_once(model), x, model(x).argmax(1), Ball(norm, 0.5), goal).at(
        radius
    )  # type: ignore[arg-type]


def test_a_targeted_question_is_never_nearer_than_an_untargeted_one() -> None:
    plain = small()
    each = [exact(small(goal=Targeted((plain.y + k) % 3))) for k in (1, 2)]
    for either, ends in zip(zip(*each, strict=True), exact(plain), strict=True):
        nearest = min(e.upper if e.upper < np.inf else e.lower for e in either)
        assert nearest == pytest.approx(ends.upper if ends.upper < np.inf else ends.lower, rel=1e-6)


def test_a_case_of_two_inequalities_asks_for_both() -> None:
    problem = small()
    both = Specification(
        torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]]),
        torch.tensor([0.1, -0.2]),
        torch.tensor([0, 0]),
    )
    asked_for = Problem.pose(problem.classifier, problem.x, problem.y, problem.threat, both)
    alone = [
        Problem.pose(
            problem.classifier,
            problem.x,
            problem.y,
            problem.threat,
            Specification(both.matrix[[k]], both.offset[[k]], torch.tensor([0])),
        )
        for k in (0, 1)
    ]
    for joint, first, second in zip(exact(asked_for), *map(exact, alone), strict=True):
        if joint.upper < np.inf:
            assert joint.upper >= max(first.lower, second.lower)
            assert joint.upper - joint.lower <= CLOSED * joint.upper


def test_where_no_example_exists_the_whole_box_is_claimed() -> None:
    model = perceptron(1, nn.ReLU(), (3, 4, 2))
    model[-1].bias.data = torch.tensor([100.0, 0.0], dtype=F64)
    (ends,) = exact(asked(model, 0, 3, "linf"))
    assert ends.lower == 1.0 and ends.upper == np.inf


def test_a_point_that_is_wrong_has_no_distance() -> None:
    problem = small()
    wrong = Problem.pose(problem.classifier, problem.x, (problem.y + 1) % 3, problem.threat)
    assert all(e.lower == 0 and e.upper == np.inf for e in exact(wrong))


def test_the_radius_asked_bounds_what_is_claimed() -> None:
    whole = exact(small())
    part = exact(small(radius=0.5 * whole[0].lower))
    assert part[0].lower == 0.5 * whole[0].lower and part[0].upper == np.inf


def test_an_attack_makes_the_region_smaller_and_changes_nothing_else() -> None:
    for plain, helped in zip(
        exact(small()), exact(small(), MILP(seconds=AMPLE, attack=FMN(steps=20))), strict=True
    ):
        assert helped.lower == pytest.approx(plain.lower, rel=3e-7)


def test_the_model_of_float32_gets_an_example_that_it_falls_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()
    x = torch.rand(4, 6)
    problem = Problem.pose(model, x, model(x).argmax(1), Ball("linf", 0.5))
    for ends in exact(problem):
        assert ends.upper == np.inf or ends.upper - ends.lower <= 1e-4 * ends.upper


def test_out_of_time_both_ends_are_still_right(monkeypatch: pytest.MonkeyPatch) -> None:
    full = exact(small(seed=3))
    clock = itertools.count()
    monkeypatch.setattr("calipers.certificates.milp.time.monotonic", lambda: float(next(clock)))
    for ends, whole in zip(exact(small(seed=3), MILP(seconds=0.5)), full, strict=True):
        assert ends.lower <= whole.lower * (1 + 1e-6) and ends.upper >= whole.lower


def test_smooth_curves_are_refused_with_their_place() -> None:
    model = perceptron(0, nn.Tanh(), (3, 4, 2))
    with pytest.raises(BadInput, match=r"tanh.*not piecewise linear"):
        exact(asked(model, 0, 3, "linf"))


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings in ({"seconds": 0.0}, {"steps": 0}, {"look": 0}, {"intermediate": -1}):
        with pytest.raises(BadInput):
            MILP(**settings)  # type: ignore[arg-type]


def test_an_interrupt_hands_over_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, calls, real = small(), itertools.count(), lp.BallPrograms.solve
    truth, threads = exact(problem), torch.get_num_threads()

    def breaking(self: lp.BallPrograms, *args: object, **more: object) -> object:
        if next(calls) == 0:
            raise KeyboardInterrupt
        return real(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(lp.BallPrograms, "solve", breaking)
    torch.set_num_threads(1)
    told, interrupted = list[tuple[int, float]](), 0
    try:
        for begin in (0, -3, -9, -25):
            calls, results = itertools.count(begin), MILP()(problem)
            try:
                told += [
                    (int(r.index), float(r.radius)) for r in results if not isinstance(r, Attempt)
                ]
            except KeyboardInterrupt:
                interrupted += 1
    finally:
        torch.set_num_threads(threads)
    assert interrupted and all(radius <= min(truth[i].upper, 1.0) for i, radius in told)


# ---- mistakes that must show
# --------------------------------------------------------------------------------------------------


def wrong_somewhere(check: Callable[[], None]) -> bool:
    try:
        check()
    except (AssertionError, ArithmeticError, Contradiction):
        return True
    return False


def _turned(op: Elementwise, low: Tensor, high: Tensor) -> list[encoding._LineRows]:
    """Lines a tenth inside the function."""
    lines = op.relax(low, high)
    return [encoding._LineRows(lines.upper_slope, lines.upper_intercept * 0.5, above=True)]


def _one_piece(
    pieces: Callable[..., list[encoding._Pieces]],
) -> Callable[..., list[encoding._Pieces]]:
    """The last piece is forgotten."""
    return lambda *args: pieces(*args)[:-1]


def _both_sides(
    pieces: Callable[..., list[encoding._Pieces]],
) -> Callable[..., list[encoding._Pieces]]:
    """Every line is taken for one above the function."""
    return lambda *args: [p._replace(over=torch.ones_like(p.over)) for p in pieces(*args)]


def _without_intercepts(
    back: Callable[..., Iterator[tuple[Tensor, int, Tensor]]],
) -> Callable[..., Iterator[tuple[Tensor, int, Tensor]]]:
    """Constants of layers are lost on the way."""
    return lambda *args: ((0 * offset, i, a) for offset, i, a in back(*args))


def _far_pieces(norm: str, name: str) -> Callable[[], None]:
    return lambda: (
        [against_enumeration(norm, name, seed, widths=(3, 3, 3)) for seed in range(4)] and None
    )


def _deep_pieces(norm: str, name: str) -> Callable[[], None]:
    return lambda: [against_enumeration(norm, name, seed) for seed in (6, 8, 9)] and None


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "lines inside the function": (
        lambda m: m.setattr(encoding, "_hull", _turned),
        _deep_pieces("linf", "relu"),
    ),
    "a piece is forgotten": (
        lambda m: m.setattr(encoding, "_pieces", _one_piece(encoding._pieces)),
        _far_pieces("linf", "relu"),
    ),
    "a piece of three is forgotten": (
        lambda m: m.setattr(encoding, "_pieces", _one_piece(encoding._pieces)),
        _far_pieces("linf", "clip"),
    ),
    "lines on the wrong side": (
        lambda m: m.setattr(encoding, "_pieces", _both_sides(encoding._pieces)),
        _far_pieces("l1", "leaky"),
    ),
    "constants are lost": (
        lambda m: m.setattr(encoding, "_back", _without_intercepts(encoding._back)),
        _far_pieces("linf", "relu"),
    ),
    "a budget twice as large": (
        lambda m: m.setattr(tree.MultiplierBound, "at", _at_half(tree.MultiplierBound.at)),
        _far_pieces("l1", "relu"),
    ),
}


def _at_half(at: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A bound at half the radius passes for one at the radius."""
    return lambda self, radii: at(self, radii / 2)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_a_rule_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, check = MUTANTS[name]
    check()
    change(monkeypatch)
    assert wrong_somewhere(check)


def test_a_forgotten_member_of_a_window_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs.MIPModel, "pattern", lambda self, v: [0 for _ in self.choices])
    real = encoding.Choice
    monkeypatch.setattr(
        encoding,
        "Choice",
        lambda k, y, z, options, first, last: real(k, y, z, options[:1], first, last),
    )
    assert wrong_somewhere(lambda: on_a_grid(Pooled(), "linf", range(8)))
