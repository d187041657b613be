"""Do batches hold as many points as their bytes allow, however large a point is, and does nothing
on the way take a matrix of outputs by inputs?

Bytes are counted; one process of its own is measured, for max-pool at 224 x 224.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from test_memory import measurable
from torch import Tensor, nn

import calipers
from calipers.attacks import warm_start
from calipers.attacks.engine import batches, query_loop, targets
from calipers.attacks.engine.batches import BATCH, in_flight
from calipers.attacks.engine.targets import looked_at, rank_targets
from calipers.attacks.warm_start import WarmStarted
from calipers.bounds import backward
from calipers.bounds.backward import interval_margin_bounds, margin_bounds, relax
from calipers.bounds.rounding import CHECKED
from calipers.certificates.attack_starts import RelaxationMinimizers
from calipers.graph.capture import graph_of
from calipers.problem.problem import Problem

GIB = 2**30


class Scores(nn.Module):
    """A mean of each of some parts of an image, for many classes: little to compute."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, classes)."""
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))  # type: ignore[no-any-return]


def posed(model: nn.Module, n: int, *shape: int) -> Problem:
    """Return a question about random points and the model's own answers."""
    torch.manual_seed(0)
    x = torch.rand(n, *shape)
    with torch.no_grad():
        y = model(x).argmax(1)
    return Problem.pose(model.eval(), x, y, calipers.Ball("linf", 1e-3))


@pytest.fixture(scope="module")
def large() -> Problem:
    """Four images of 3 x 224 x 224, a thousand classes."""
    torch.manual_seed(0)
    return posed(Scores(1000), 4, 3, 224, 224)


# ---- points in flight
# --------------------------------------------------------------------------------------------------


def test_small_points_are_as_many_as_ever() -> None:
    assert (
        in_flight(posed(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), 3, 1, 28, 28), BATCH)
        == BATCH
    )


def test_large_points_are_fewer(large: Problem) -> None:
    count, size = in_flight(large, BATCH), large.x[0].numel() * 4
    assert 1 < count < BATCH and count * batches._COPIES * size <= GIB


def deep(width: int) -> Problem:
    """Small points, of which a pass keeps much."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)]
    return posed(nn.Sequential(nn.Linear(8, width), *layers, nn.Linear(width, 3)), 3, 8)


def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_HELD", 2**20)
    problem = deep(2000)
    assert in_flight(problem, BATCH) * 5 * 2000 * 4 <= 2**20  # the results of five layers


def test_what_a_pass_keeps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    kept(monkeypatch)


def test_a_pass_that_is_not_measured_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_measure", lambda classifier, point: 0)
    with pytest.raises(AssertionError):
        kept(monkeypatch)


@pytest.mark.parametrize("limit", [query_loop._BYTES, 2**40])
def test_questions_of_a_round_are_as_many_as_fit(
    large: Problem, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPSA asks 129 at once of each point: of four points 310 MB, held about ten times."""
    asked = list[int]()

    class Stop(Exception):
        pass

    def ask(
        self: object, look: query_loop.PointsInFlight, memory: dict[str, Tensor]
    ) -> query_loop.Queries:
        asked.append(len(look.spent) * 129 * large.x[0].numel() * 4)
        raise Stop

    monkeypatch.setattr("calipers.attacks.spsa._Estimate.ask", ask)
    monkeypatch.setattr(query_loop, "_BYTES", limit)
    with pytest.raises(Stop):
        list(calipers.attacks.SPSA()(large))
    assert (asked[0] <= 2**27) == (limit == 2**27)


# ---- many classes
# --------------------------------------------------------------------------------------------------


class Shown:
    """A guide that starts at the point, and remembers how many bytes of starts it gave at once."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, problem: Problem, columns: Tensor | None = None) -> Tensor:
        count = problem.classes - 1 if columns is None else columns.shape[1]
        self.most = max(self.most, len(problem) * 2 * count * problem.x[0].numel() * 4)
        return problem.x[:, None, None].expand(-1, 2, count, *problem.x.shape[1:])


def started(large: Problem) -> int:
    guide = Shown()
    attempts = list(
        WarmStarted(
            calipers.attacks.APGD(steps=1, restarts=2, targets=3, successive_halving=True), guide
        )(large)
    )
    assert sorted(i for a in attempts for i in a.index.tolist()) == [0, 1, 2, 3]
    return guide.most


def test_guided_starts_are_those_of_chosen_targets(large: Problem) -> None:
    assert started(large) <= warm_start._BYTES


def test_starts_for_all_targets_are_noticed(
    large: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_start, "looked_at", lambda problem, count: problem.classes - 1)
    assert started(large) > warm_start._BYTES


def test_guided_results_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = posed(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 60)), 20, 3, 2, 2
    )
    tool = WarmStarted(
        calipers.attacks.APGD(steps=5, restarts=2, targets=3), RelaxationMinimizers(2)
    )

    def found() -> Tensor:
        best = problem.x.clone()
        for attempt in tool(problem):
            best[attempt.index] = attempt.candidate
        return best

    whole = found()
    monkeypatch.setattr(warm_start, "_BYTES", 1)
    torch.testing.assert_close(found(), whole, rtol=1e-5, atol=1e-6)


def test_of_many_classes_the_nearest_by_margin_are_ranked() -> None:
    """As far as these are looked at, in the order of a ranking of all."""
    torch.manual_seed(1)
    problem = posed(nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 200)), 8, 6)
    few = rank_targets(problem, 3)
    assert looked_at(problem, 3) == targets._NEAR
    margins = problem.margins(problem.classifier.logits(problem.x))
    allowed = margins.topk(targets._NEAR, dim=1, largest=False).indices
    assert all(
        set(row.tolist()) <= set(near.tolist()) for row, near in zip(few, allowed, strict=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "_NEAR", 199)
        every = rank_targets(problem, 199)
    for row, order, near in zip(few, every, allowed, strict=True):
        assert row.tolist() == [c for c in order.tolist() if c in near.tolist()][:3]


@pytest.mark.parametrize("bounds", [margin_bounds, interval_margin_bounds])
def test_rows_of_margins_in_shares_are_the_same_rows(
    bounds: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = posed(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 50)),
        3,
        3,
        8,
        8,
    )
    graph = graph_of(problem.classifier, problem.x)
    region = problem.threat.region(problem.x.double(), outward=True)
    with torch.no_grad():
        state = relax(graph, region, CHECKED)
        rows = problem.goal.rows(problem.y, problem.classes)
        whole = bounds(state, rows)  # type: ignore[operator]
        seen, true = list[int](), backward.lower_bounds
        monkeypatch.setattr(
            backward,
            "lower_bounds",
            lambda state, number, start: (seen.append(start.a.numel()), true(state, number, start))[
                1
            ],
        )
        monkeypatch.setattr(backward, "_TOGETHER", 3 * graph.largest * 8 * 7)
        shares = bounds(state, rows)  # type: ignore[operator]
    torch.testing.assert_close(shares, whole, rtol=1e-12, atol=1e-12)
    assert bounds is interval_margin_bounds or len(seen) == 7


# ---- windows
# --------------------------------------------------------------------------------------------------

RUN = textwrap.dedent(
    """
    import torch
    from torch import nn
    from calipers.graph import products
    from calipers.graph.capture import graph_of
    from calipers.models.classifier import Classifier

    def status(key):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

    torch.set_num_threads(1)
    graph_of(Classifier(nn.Sequential(nn.Conv2d(3, 2, 3), nn.MaxPool2d(2)).append(nn.Flatten()).eval()), torch.rand(3, 3, 8, 8))
    model = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Upsample(scale_factor=2), nn.Flatten()).eval()
    x = torch.rand(3, 3, 224, 224)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = status("VmRSS")
    graph_of(Classifier(model), x)
    print((status("VmHWM") - before) / 1024)
    """
)


@measurable
def test_pooling_at_224_is_read_from_its_strides() -> None:
    """A row of the image for each output took 7.3 GB."""
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400
