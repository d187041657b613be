"""Does a measurement admit only what is true, go on past what it cannot measure, and lose nothing
when it is killed?
"""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import calipers
from calipers import data
from calipers.attacks.radius_bisection import RadiusBisection
from calipers.measurement.plan import Plan, Stage
from calipers.presets import PLANS
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim

EPSILON = 0.1
SMALL = Plan(
    "small",
    (
        Stage(calipers.attacks.PGD(steps=5, step=0.4), "attack"),
        Stage(calipers.certificates.CROWN(), "certifier"),
        Stage(
            RadiusBisection(calipers.attacks.PGD(steps=4, step=0.5), rounds=3), "attack", "distance"
        ),
    ),
)


@pytest.fixture(scope="module")
def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """The first 60 embedded images."""
    x, y = data.images()
    return x[:60], y[:60]


class Idle:
    """An attack that tries nothing."""

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        """Yield nothing."""
        yield from ()


NOTHING = Plan("nothing", (Stage(Idle(), "attack"),))


def measured(
    x: torch.Tensor,
    y: torch.Tensor,
    plan: Plan = SMALL,
    record: object = None,
    model: nn.Module | None = None,
    **options: object,
) -> calipers.Result:
    """Measure the robust embedded net, or another one."""
    return calipers.measure(
        model or data.build("mnist-robust"),
        x,
        y,
        calipers.Ball("linf", EPSILON),
        plan=plan,
        record=record,
        **options,
    )  # type: ignore[arg-type]


def assert_same(a: calipers.Bracket, b: calipers.Bracket, order: list[int] | None = None) -> None:
    """Both brackets agree to the last bit, `b` in the given order."""
    take = order if order is not None else list(range(len(b.lower)))
    np.testing.assert_array_equal(a.lower, b.lower[take])
    np.testing.assert_array_equal(a.upper, b.upper[take])


def test_two_sides_meet_in_one_result(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    result = measured(*sample)
    robust = result.robust_accuracy
    assert 0 < robust.certified.count <= robust.attacked.count <= 60
    assert robust.interval[0] < robust.certified.share <= robust.attacked.share < robust.interval[1]
    assert result.finished and len(result.points) == 60
    assert "at least" in str(result) and "unknown" in str(result)
    for row, low, high in zip(
        result.points, result.bracket.lower, result.bracket.upper, strict=True
    ):
        assert (row.lower, row.upper) == (low, high)


def test_the_same_command_again_changes_nothing(
    sample: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    first = measured(*sample, record=tmp_path / "run.calipers")
    facts = len(first.ledger.evidence(first.summary.question.fingerprint))
    again = measured(*sample, record=tmp_path / "run.calipers")
    assert_same(first.bracket, again.bracket)
    assert len(again.ledger.evidence(again.summary.question.fingerprint)) == facts


def test_two_halves_joined_are_one_whole(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = sample
    whole = measured(x, y)
    left, right = measured(x[:25], y[:25]), measured(x[25:], y[25:])
    joined = calipers.Record()
    joined.merge(right.ledger)
    joined.merge(left.ledger)
    bracket = measured(x, y, plan=NOTHING, record=joined).bracket
    np.testing.assert_array_equal(bracket.lower, whole.bracket.lower)
    # The last step onto the boundary follows a gradient, whose sums BLAS may add in another order
    # for another number of points.
    np.testing.assert_allclose(bracket.upper, whole.bracket.upper, rtol=1e-6)


def test_order_of_points_does_not_matter(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = sample
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    assert_same(measured(x[order], y[order]).bracket, measured(x, y).bracket, order.tolist())


def test_a_smaller_radius_reads_the_same_record(
    sample: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    x, y = sample
    model = data.build("mnist-robust")
    wide = calipers.measure(
        model, x, y, calipers.Ball("linf", 0.1), plan=SMALL, record=tmp_path / "r"
    )
    narrow = calipers.measure(
        model, x, y, calipers.Ball("linf", 0.05), plan=NOTHING, record=tmp_path / "r"
    )
    assert narrow.robust_accuracy.certified.count >= wide.robust_accuracy.certified.count > 0
    assert narrow.robust_accuracy.attacked.count >= wide.robust_accuracy.attacked.count


KILLED = textwrap.dedent(
    """
    import sys, calipers
    from calipers import data
    sys.path.insert(0, {tests!r})
    from test_run import SMALL, EPSILON
    x, y = data.images()
    def tell(now):
        print("stage" if now.share == 0 else "dealt", now.stage, now.share, flush=True)
    calipers.measure(data.build("mnist-robust"), x[:400], y[:400], calipers.Ball("linf", EPSILON), plan=SMALL, record={record!r}, progress=tell)
    print("finished", flush=True)
    """
)


def _start(record: Path) -> subprocess.Popen[str]:
    code = KILLED.format(tests=str(Path(__file__).parent), record=str(record))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_kill_9_loses_nothing_and_the_same_command_ends_with_the_same_brackets(
    tmp_path: Path,
) -> None:
    x, y = data.images()
    x, y = x[:400], y[:400]
    whole = measured(x, y)
    record = tmp_path / "run.calipers"
    for wait_for in ("stage PGD", "stage CROWN", "dealt CROWN", "stage RadiusBisection"):
        process = _start(record)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(wait_for):
                break
        time.sleep(0.15)
        before = set(_facts(record))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.communicate()
        assert before <= set(_facts(record)), "admitted evidence was lost"
    resumed = measured(x, y, record=record)
    assert_same(resumed.bracket, whole.bracket)


def _facts(record: Path) -> list[tuple[str, str, str, float]]:
    with calipers.Record(record, read_only=True) as ledger:
        return [
            (e.point, e.kind, e.tool, e.radius if e.radius == e.radius else -1.0)
            for q in ledger.questions()
            for e in ledger.evidence(q.fingerprint)
        ]


def test_an_interrupt_keeps_what_is_known(
    sample: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    """Ctrl-C in the middle of an attack: no exception, the rest of the record stands, and the run
    can go on.
    """

    class Interrupting(calipers.certificates.CROWN):
        def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
            raise KeyboardInterrupt

    whole = measured(*sample)
    first, _, last = SMALL.stages
    stopped = measured(
        *sample,
        plan=Plan("stopped", (first, Stage(Interrupting(), "certifier"), last)),
        record=tmp_path / "r",
    )
    assert not stopped.finished
    assert (
        stopped.robust_accuracy.attacked.count < 60 and stopped.robust_accuracy.certified.count == 0
    )
    assert_same(measured(*sample, record=tmp_path / "r").bracket, whole.bracket)


def test_a_time_limit_stops_between_blocks(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    result = measured(*sample, plan=dataclasses.replace(SMALL, seconds=0.0))
    assert not result.finished and result.clean_accuracy.of == 60


@dataclass(frozen=True)
class Lying:
    """Proposes the point itself as an adversarial example, or a far point, or one outside the
    box.
    """

    offset: float

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Attempt]:
        n = torch.arange(len(problem))
        yield Attempt(n, problem.x + self.offset, n * 0, n * 0)


@pytest.mark.parametrize("offset", [0.0, 1e-4, 5.0, float("nan")])
def test_a_lying_attack_enters_nothing(
    sample: tuple[torch.Tensor, torch.Tensor], offset: float
) -> None:
    plan = Plan("lie", (Stage(Lying(offset), "attack"),))
    result = measured(*sample, plan=plan)
    assert result.robust_accuracy.attacked.count == result.clean_accuracy.count


@dataclass(frozen=True)
class Overclaiming:
    """Claims a radius for every point without proof."""

    radius: float

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        n = torch.arange(len(problem))
        yield Claim(
            n,
            torch.full((len(problem),), self.radius, dtype=torch.float64),
            torch.ones(len(problem), dtype=torch.float64),
            "float64-checked",
            n,
            n,
        )


def test_a_certificate_above_a_witness_stops_the_run(
    sample: tuple[torch.Tensor, torch.Tensor],
) -> None:
    attack = Stage(calipers.attacks.PGD(steps=10, step=0.25), "attack")
    claim = Stage(Overclaiming(0.3), "certifier", "distance")
    for stages in (
        (attack, claim),
        (claim, Stage(calipers.attacks.PGD(steps=20, step=0.2, restarts=2), "attack", "distance")),
    ):
        with pytest.raises(
            calipers.Contradiction, match=r"Overclaiming\(radius=0.3\) certifies 0.3"
        ):
            calipers.measure(
                data.build("mnist-plain"),
                *sample,
                calipers.Ball("linf", 0.1),
                plan=Plan("lie", stages),
            )


def test_a_claim_that_a_random_point_refutes_is_not_recorded(
    sample: tuple[torch.Tensor, torch.Tensor],
) -> None:
    plan = Plan("lie", (Stage(Overclaiming(1.0), "certifier", "distance"),))
    with pytest.raises(calipers.Contradiction, match="a random point at distance"):
        measured(*sample, plan=plan)


class Uncapturable(nn.Module):
    """Decides in Python on the data, which cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = data.build("mnist-robust")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.inner(x)
        return z if float(x.detach().sum()) > -1e9 else z * 2


def test_a_model_that_cannot_be_captured_keeps_its_upper_jaw(
    sample: tuple[torch.Tensor, torch.Tensor],
) -> None:
    result = measured(*sample, model=Uncapturable())
    assert result.robust_accuracy.certified.count == 0
    assert 0 < result.robust_accuracy.attacked.count < 60
    assert "no certificates: the model cannot be exported as a graph" in str(result)
    assert (result.bracket.upper < np.inf).sum() > 50


class Spoilt(nn.Module):
    """Returns NaN where the first pixel is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = data.build("mnist-robust")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bad = (x[:, 0, 0, 0] > 0.99)[:, None]
        return torch.where(bad, torch.full_like(self.inner(x), torch.nan), self.inner(x))


def test_one_bad_point_is_recorded_and_the_run_goes_on(
    sample: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x, y = sample[0].clone(), sample[1]
    x[7, 0, 0, 0] = 1.0
    result = measured(x, y, model=Spoilt(), plan=Plan("attack", SMALL.stages[:1]))
    assert result.points[7].verdict == "invalid" and "not finite" in result.points[7].note
    assert result.robust_accuracy.certified.of == 59
    assert "point 7 is in no rate" in str(result)


def test_nan_inputs_are_named(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    x = sample[0].clone()
    x[3, 0, 5, 5] = torch.nan
    result = measured(x, sample[1], plan=Plan("attack", SMALL.stages[:1]))
    assert result.points[3].verdict == "invalid" and "NaN" in result.points[3].note


def test_per_point_radius_and_zero(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = sample
    radius = torch.full((60,), 0.1, dtype=torch.float64)
    radius[::2] = 0.0
    result = calipers.measure(
        data.build("mnist-robust"), x, y, calipers.Ball("linf", radius), plan=SMALL
    )
    rows = result.points[::2]
    assert all(r.verdict == ("broken" if r.is_clean_error else "robust") for r in rows)


def test_targeted_goal(sample: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, y = sample
    goal = calipers.Targeted((y + 1) % 10)
    result = measured(x, y, goal=goal)
    untargeted = measured(x, y)
    assert result.robust_accuracy.certified.count >= untargeted.robust_accuracy.certified.count
    assert result.robust_accuracy.attacked.count >= untargeted.robust_accuracy.attacked.count


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "plan",
    [plan for name, plan in PLANS.items() if name != "categorical"],
    ids=lambda plan: plan.name,
)
def test_presets_run_on_vectors_of_two_classes(plan: Plan) -> None:
    """A tabular model of two classes with a single logit, no box."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).eval()
    x = torch.randn(12, 5)
    with torch.no_grad():
        y = (model(x)[:, 0] > 0).long()
    result = calipers.measure(model, x, y, calipers.Ball("l2", 0.2, box=None), plan=plan)
    certifies = any(stage.kind == "certifier" for stage in plan.stages)
    assert result.finished and (result.robust_accuracy.certified.count > 0) == certifies
    assert plan.name not in ("brackets", "distance") or (result.bracket.upper < np.inf).all()


def test_check_replays_and_finds_a_forgery(
    sample: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    record = tmp_path / "run.calipers"
    result = measured(*sample, record=record)
    model = data.build("mnist-robust")
    (sound,) = calipers.check(record, model)
    assert sound.sound and sound.witnesses > 50 and sound.certificates > 30
    name = next(
        r.name
        for r in result.points
        if (r.verdict == "robust" and r.upper == np.inf) or r.verdict == "unknown"
    )
    forged = calipers.Evidence(
        name, "certificate", repr(calipers.certificates.CROWN()), 0.29, 1.0, "float64-checked"
    )
    result.ledger.append(result.summary.question.fingerprint, [forged])
    (caught,) = calipers.check(record, model)
    assert any("does not prove 0.29 again" in line for line in caught.failures)
    # of each point the strongest one is tried: the forgery in place of what held
    held = any(r.name == name and r.verdict == "robust" for r in result.points)
    assert caught.certificates == sound.certificates - held
    with pytest.raises(calipers.BadInput, match="no question about this model"):
        calipers.check(record, data.build("mnist-plain"))
