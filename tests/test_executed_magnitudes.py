"""Does float32-executed hold where numbers are huge or tiny? Between 1e-45 and 1e38, in every order
of summation, tiny numbers kept or taken for 0.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import beside
import nets
import numpy as np
import pytest
import torch
from executions import executions
from test_executed import WORD, points_of
from torch import Tensor, nn

from calipers.bounds import float32_execution
from calipers.bounds.backward import interval_margin_bounds, margin_bounds, relax
from calipers.bounds.rounding import CHECKED, EXECUTED, Arithmetic
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.guaranteed import posed
from calipers.certificates.input_split import InputSplit
from calipers.errors import BadInput, CalipersError
from calipers.graph import capture, fusion
from calipers.graph.affine import Scale
from calipers.graph.generic import Generic
from calipers.graph.ir import Graph
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.threats.ball import Ball

NETS = 25
TOOLS = (
    IBP(guarantee=WORD),
    CROWN(guarantee=WORD),
    AlphaCROWN(steps=2, intermediate=1, guarantee=WORD),
    InputSplit(seconds=0.2, guarantee=WORD),
)


class Times(nn.Module):
    """A scaling by a number, one factor after another."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        for factor in self.factors:
            x = x * factor
        return x


def linear(draw: random.Random, rows: int, columns: int, size: float) -> nn.Linear:
    """A dense layer with weights of a size."""
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        layer.weight.copy_(
            torch.randn(rows, columns, generator=generator).double().mul(size).clamp(-3e38, 3e38)
        )
        layer.bias.copy_(
            (
                torch.randn(rows, generator=generator).double()
                * size
                * draw.choice([0.0, 0.3, 1.0])
            ).clamp(-3e38, 3e38)
        )
    return layer


def norm(draw: random.Random, width: int, size: float) -> nn.BatchNorm1d:
    """Batch norm for results of a size, some statistics far off it."""
    layer = nn.BatchNorm1d(width, eps=draw.choice([0.0, 1e-5, 1e-30]))
    assert layer.running_var is not None and layer.running_mean is not None
    with torch.no_grad():
        layer.running_var.fill_(min(3e38, size * size * draw.choice([1.0, 1e-3, 1e3])))
        layer.running_mean.fill_(min(1e38, size * draw.choice([0.0, 0.5, 10.0])))
        layer.weight.fill_(draw.choice([1.0, -1.0, 1e-20, 1e20]))
    return layer


def chain(seed: int) -> nn.Sequential:
    """Return layers that leave the usual sizes and come back: what merging them would hide."""
    draw = random.Random(seed)
    size = 10 ** draw.choice(
        [draw.uniform(-45, 38), draw.uniform(-45, -39), draw.uniform(37, 38.4)]
    )
    back = [
        10 ** (-np.log10(size) * share)
        for share in ((1.0,) if abs(np.log10(size)) < 37 else (0.5, 0.5))
    ]
    front = [linear(draw, 6, 4, size)]
    kind = draw.choice(["times", "norm", "dense", "times before"])
    if kind == "times":
        body = [*front, Times(*back)]
    elif kind == "norm":
        body = [*front, norm(draw, 6, size)]
    elif kind == "dense":
        body = [*front, linear(draw, 6, 6, min(1e38, 1 / size))]
    else:
        body = [Times(*[1 / b for b in back]), linear(draw, 6, 4, min(1e38, 1 / size))]
    ends = (
        [nn.ReLU(), linear(draw, 3, 6, 1.0)]
        if draw.random() < 0.8
        else [nn.Tanh(), linear(draw, 3, 6, 10.0)]
    )
    return nn.Sequential(*body, *ends).eval().requires_grad_(False)


def runs(network: nn.Sequential, points: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield logits of every execution, numbers below the normal ones kept, and taken for 0."""
    for flushed in (False, True):
        torch.set_flush_denormal(flushed)
        try:
            with np.errstate(all="ignore"):
                for name, values in executions(network, points):
                    yield f"{name}{', flushed' if flushed else ''}", values[-1]
        finally:
            torch.set_flush_denormal(False)


def asked(network: nn.Sequential, seed: int) -> Problem:
    """A question about four points, at a radius of 0 now and then."""
    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)) * 0.8 + 0.1
    radius = random.Random(seed).choice([0.0, 1e-4, 0.02])
    classifier = Classifier(network)
    logits = classifier.logits(x).nan_to_num(0.0, 0.0, 0.0)
    return Problem.pose(classifier, x, logits.argmax(1), Ball("linf", radius, (0.0, 1.0)))


def bounds_of(problem: Problem, arithmetic: Arithmetic = EXECUTED) -> Tensor:
    """Return the better of CROWN's and the intervals' bounds of the margins, (N, S)."""
    graph, region = posed(problem, arithmetic)
    rows = problem.goal.rows(problem.y, problem.classes)
    with torch.no_grad():
        state = relax(graph, region, arithmetic)
        return torch.maximum(margin_bounds(state, rows), interval_margin_bounds(state, rows))


def crossed(network: nn.Sequential, seed: int) -> tuple[list[str], int]:
    """Name every execution whose margins fall below what is claimed, NaN included; and count what
    is claimed to be positive.
    """
    try:
        problem = asked(network, seed)
        bound = bounds_of(problem)
    except CalipersError:
        return [], 0
    points, rows = (
        points_of(problem, seed, 8),
        problem.goal.rows(problem.y, problem.classes).double(),
    )
    found = []
    for name, logits in runs(network, points):
        few = len(logits) // len(problem) * len(problem)
        where = torch.arange(len(problem)).repeat(few // len(problem))
        margins = (rows[where] @ logits[:few].double()[..., None])[..., 0]
        if not bool((margins >= bound[where]).logical_or(bound[where] == -torch.inf).all()):
            found.append(f"seed {seed}, {name}")
    return found, int((bound > 0).sum())


def test_no_execution_of_huge_and_tiny_numbers_crosses_a_bound() -> None:
    results = [crossed(chain(seed), seed) for seed in range(NETS)]
    assert not [line for found, _ in results for line in found]
    assert sum(count for _, count in results) > NETS


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_no_execution_of_huge_and_tiny_numbers_crosses_a_bound_asked_often(block: int) -> None:
    for seed in range(1000 + block * 100, 1100 + block * 100):
        assert not crossed(chain(seed), seed)[0]


# ---- cases that were once certified
# --------------------------------------------------------------------------------------------------


def overflowing() -> nn.Sequential:
    """A layer overflows inside the ball; behind it a batch norm makes it small again, and the two
    merged are harmless.
    """
    torch.manual_seed(0)
    front, bn = nn.Linear(4, 4), nn.BatchNorm1d(4, eps=0.0)
    assert bn.running_var is not None
    front.weight.data.fill_(3.4028e38 / 2.001)
    front.bias.data.zero_()
    bn.running_var.fill_(3e38)
    return nn.Sequential(front, bn, nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def underflowing() -> nn.Sequential:
    """Weights of 2^-147: their products are multiples of 2^-149, and a scaling behind makes that as
    much as the values themselves.
    """
    torch.manual_seed(2)
    front = nn.Linear(4, 4)
    front.weight.data = torch.eye(4) * 2.0**-147
    front.bias.data.zero_()
    return nn.Sequential(
        front, Times(2.0**120, 2.0**27), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)
    ).eval()


def averaging() -> nn.Sequential:
    """A mean is executed as a sum, which overflows where the mean does not."""
    torch.manual_seed(3)
    return nn.Sequential(
        Times(1e20, 1.65e18),
        nn.Unflatten(1, (1, 4)),
        nn.AvgPool1d(4),
        nn.Flatten(),
        Times(1e-37),
        nn.Linear(1, 3),
    ).eval()


def detouring() -> nn.Sequential:
    """Batch norm whose factors undo each other: what is between them overflows."""
    torch.manual_seed(4)
    bn = nn.BatchNorm1d(4, eps=0.0)
    assert bn.running_var is not None
    bn.running_var.fill_(1e-36)
    bn.weight.data.fill_(1e-18)
    return nn.Sequential(Times(1e22), bn, Times(1e-21), nn.Linear(4, 3)).eval()


BREAKING: dict[str, Callable[[], nn.Sequential]] = {
    "overflow": overflowing,
    "underflow": underflowing,
    "a mean": averaging,
    "batch norm": detouring,
}


def claimed(network: nn.Sequential, tool: object) -> int:
    """Count the points claimed at a radius of 0.01."""
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.49
    classifier = Classifier(network)
    problem = Problem.pose(
        classifier, x, classifier.logits(x).nan_to_num().argmax(1), Ball("linf", 0.01)
    )
    return sum(int((claim.radius > 0).sum()) for claim in tool(problem) if isinstance(claim, Claim))  # type: ignore[operator]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: type(tool).__name__)
@pytest.mark.parametrize("name", sorted(BREAKING))
def test_nothing_is_claimed_about_executions_that_break(name: str, tool: object) -> None:
    assert not claimed(BREAKING[name](), tool)


def test_the_same_networks_are_proved_in_real_arithmetic() -> None:
    assert all(claimed(build(), CROWN()) for build in BREAKING.values())


@pytest.mark.parametrize("name", ["overflow.py", "denormal.py"])
def test_given_cases_certify_nothing_that_breaks(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = beside.given(beside.CASES / "float32" / name)
    before = torch.get_num_threads()
    try:
        text = path.read_text()
        for tool in ("tool", """'CROWN(guarantee="float32-executed")'"""):  # which comes last now
            text = re.sub(rf"certify\({re.escape(tool)}, (.*\))\)", rf"certify(\1, {tool})", text)
        settings = '"quick", guarantee="float32-executed"'  # which a plan holds now
        text = text.replace(f"plan={settings}", f"plan=calipers.Plan({settings})")
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
    finally:
        torch.set_num_threads(before)
    said = capsys.readouterr().out
    assert "certified, but" not in said
    assert all(
        line.endswith(" 0")
        for line in said.splitlines()
        if "false" in line or "float32 example" in line
    )


# ---- refusals and mutants
# --------------------------------------------------------------------------------------------------


def test_constants_that_the_model_computes_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.p = nn.Linear(4, 3), nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.a(x) * (self.p.exp() * 1e4 - 1e4)
            return z

    problem = Problem.pose(
        Classifier(Net().eval()),
        torch.rand(2, 4),
        torch.zeros(2, dtype=torch.long),
        Ball("linf", 0.01),
    )
    with pytest.raises(BadInput, match="computed"):
        posed(problem, EXECUTED)
    posed(problem, CHECKED)


def test_a_plain_quotient_of_constants_is_none_of_these() -> None:
    mean, deviation = torch.rand(4), torch.rand(4) + 0.5
    problem = Problem.pose(
        Classifier(
            nn.Sequential(
                nets.Apply(lambda x: (x - mean.to(x)) / deviation.to(x)), nn.Linear(4, 3)
            ).eval()
        ),
        torch.rand(2, 4),
        torch.zeros(2, dtype=torch.long),
        Ball("linf", 0.01),
    )
    posed(problem, EXECUTED)


def test_a_variance_is_refused() -> None:
    net = nn.Sequential(
        nn.Linear(4, 4), nets.Apply(lambda x: x.var(1, keepdim=True)), nn.Linear(1, 3)
    ).eval()
    problem = Problem.pose(
        Classifier(net), torch.rand(2, 4), torch.zeros(2, dtype=torch.long), Ball("linf", 0.01)
    )
    with pytest.raises(BadInput, match="variance"):
        posed(problem, EXECUTED)


def merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "fused", lambda graph: replace(fusion.fused(graph), apart=None))


def without_detours(graph: Graph) -> Graph:
    nodes = tuple(
        replace(n, op=replace(n.op, detour=None)) if isinstance(n.op, Scale) else n
        for n in graph.nodes
    )  # type: ignore[type-var]
    return replace(graph, nodes=nodes)


MUTANTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "allowances of merged layers": ("overflow", merged),
    "nothing for underflow": ("underflow", lambda m: m.setattr(float32_execution, "_LOST", 0.0)),
    "nothing for overflow": (
        "overflow",
        lambda m: m.setattr(float32_execution, "_guarded", lambda room, largest, dtype: room),
    ),
    "a mean without its sum": ("a mean", lambda m: m.setattr(Generic, "sums_first", False)),
    "batch norm in one step": (
        "batch norm",
        lambda m: m.setattr(capture, "fused", lambda graph: fusion.fused(without_detours(graph))),
    ),
}


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_a_mutant_claims_what_breaks(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = MUTANTS[mutant]
    plant(monkeypatch)
    assert claimed(BREAKING[name](), CROWN(guarantee=WORD))


@pytest.mark.parametrize(
    ("mutant", "seeds"),
    [
        ("allowances of merged layers", (13, 21)),
        ("nothing for underflow", (21, 22)),
        ("nothing for overflow", (1, 8)),
    ],
)
def test_mutants_are_caught_by_executions(
    mutant: str, seeds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTANTS[mutant][1](monkeypatch)
    assert any(crossed(chain(seed), seed)[0] for seed in seeds)
