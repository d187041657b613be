"""Does float32-executed hold for networks as float32 runs them? Every order of summation that comes
to mind, against every box and margin claimed.

What is claimed about an execution is compared with executions, without any tolerance.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from executions import executions
from torch import Tensor, nn

from calipers.api.check import check
from calipers.api.measure import measure
from calipers.bounds import backward, float32_execution, relaxation
from calipers.bounds.backward import interval_margin_bounds, margin_bounds, relax
from calipers.bounds.forward import forward
from calipers.bounds.interval import Box
from calipers.bounds.rounding import CHECKED, EXECUTED, Arithmetic
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.enumeration import Enumeration
from calipers.certificates.guaranteed import posed
from calipers.certificates.input_split import InputSplit
from calipers.certificates.radius import CertifiedRadius
from calipers.errors import BadInput
from calipers.graph.activations import ACTIVATIONS
from calipers.measurement.plan import Plan, Stage
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.problem.specification import Specification
from calipers.record.record import Record
from calipers.report.caveats import limits
from calipers.threats.ball import Ball

WORD = "float32-executed"


# ---- networks
# --------------------------------------------------------------------------------------------------


def dense(*layers: tuple[Tensor, Tensor]) -> nn.Sequential:
    """Return the network of (weight, bias) pairs with ReLUs between them, in float32."""
    modules: list[nn.Module] = []
    for weight, bias in layers:
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1]).eval()


def random_net(seed: int) -> nn.Sequential:
    """Return a network of two to six layers whose last rows nearly cancel; weights spread over a
    few powers of ten now and then.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    widths = [
        draw.choice([3, 20]),
        *[draw.choice([8, 40, 90]) for _ in range(draw.randrange(1, 6))],
    ]
    spread = draw.choice([0.0, 1.0])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 10 ** (
            spread * torch.randn(*shape, generator=generator)
        )

    layers = [(normal(b, a) / a**0.5, normal(b) * 0.3) for a, b in itertools.pairwise(widths)]
    row = normal(1, widths[-1])
    last = torch.cat(
        [row, row * (1 + 1e-5 * torch.randn(row.shape, generator=generator)), normal(1, widths[-1])]
    )
    return dense(*layers, (last, normal(3) * 0.1))


def absorbing(place: int) -> nn.Sequential:
    """Return a network whose layer `place` adds 200 small terms to a large one that later leaves
    again: the order decides how many of them are kept.

    The other layers hand on what they get, and have next to nothing to round.
    """
    n, large = 200, 2.0**22
    one = torch.ones(1, 1)
    wide, shut = (
        (torch.cat([one * large, torch.full((n, 1), 0.3), one * large]), torch.zeros(n + 2)),
        torch.cat([one[0], torch.ones(n), -one[0]])[None],
    )
    keep = (one, torch.zeros(1))
    if place == 0:
        # Here the large terms are inputs: 2^22 x_0 + 0.3 (x_1 + ...) - 2^22 x_n.
        first = torch.cat([one * large, torch.full((1, n), 0.3), -one * large], 1)
        return dense((first, torch.zeros(1)), keep, (torch.tensor([[0.0], [1.0]]), torch.zeros(2)))
    front = [keep] * (place - 1)
    return dense(
        *front, wide, (shut, torch.zeros(1)), (torch.tensor([[0.0], [1.0]]), torch.zeros(2))
    )


# ---- judging
# --------------------------------------------------------------------------------------------------


def points_of(problem: Problem, seed: int, count: int = 12) -> Tensor:
    """Return points (R * N, *D) of the regions, the problem's order repeated: centres, corners, and
    others, some of them float64 points rounded.
    """
    generator = torch.Generator().manual_seed(seed)
    x, n = problem.x, len(problem)
    radius = problem.threat.radii(n).view(-1, *[1] * (x.dim() - 1))
    offsets = torch.rand(count, *x.shape, generator=generator, dtype=torch.float64) * 2 - 1
    offsets[: count // 2] = offsets[: count // 2].sign()
    offsets[0] = 0
    points = (x.double() + offsets * radius).flatten(0, 1)
    return problem.region.take(torch.arange(n).repeat(count)).snap(points.float())


def crossed(network: nn.Sequential, problem: Problem, seed: int = 0) -> list[str]:
    """Name every execution that leaves a box or falls below a margin claimed."""
    graph, region = posed(problem, EXECUTED)
    rows = problem.goal.rows(problem.y, problem.classes)
    with torch.no_grad():
        tight, loose = (relax(graph, region, EXECUTED, refine=refine) for refine in (True, False))
        bounds = {
            "CROWN": margin_bounds(tight, rows),
            "intervals": interval_margin_bounds(loose, rows),
        }
        pushed, _ = forward(graph, *region.outer_box(), EXECUTED)
    points = points_of(problem, seed)
    repeats, found = len(points) // len(problem), []
    for name, values in executions(network, points):
        few = len(values[0]) // len(problem)
        where = torch.arange(len(problem)).repeat(repeats)[: few * len(problem)]
        values = [v[: len(where)] for v in values]
        margins = (rows.double()[where] @ values[-1].double()[..., None])[..., 0]
        found += [
            f"{name}: {what}"
            for what, bound in bounds.items()
            if not bool((margins >= bound[where]).all())
        ]
        for boxes in (tight.boxes, loose.boxes, pushed):
            found += [
                f"{name}: number {k}"
                for k, v in enumerate(values)
                if not _inside(boxes[k], v, where)
            ]
    return found


def _inside(box: Box, values: Tensor, where: Tensor) -> bool:
    return bool(((values >= box.lower[where]) & (values <= box.upper[where])).all())


def question(network: nn.Sequential, seed: int, radius: float, points: int = 3) -> Problem:
    """Ask about random points and the classes they are given."""
    x = torch.rand(
        points, network[0].weight.shape[1], generator=torch.Generator().manual_seed(seed)
    )  # type: ignore[union-attr]
    return Problem.pose(
        Classifier(network), x, network(x).argmax(1), Ball("linf", radius, (0.0, 1.0))
    )


# ---- executions against claims
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("block", range(4))
def test_no_order_of_summation_leaves_a_box_or_crosses_a_margin(block: int) -> None:
    for seed in range(block * 10, block * 10 + 10):
        network = random_net(seed)
        assert not crossed(
            network,
            question(network, seed, random.Random(seed).choice([0.0, 1e-6, 0.01, 0.1])),
            seed,
        ), f"seed {seed}"


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("radius", [0.0, 0.01])
def test_terms_that_a_large_one_absorbs_are_allowed_for(place: int, radius: float) -> None:
    network = absorbing(place)
    assert not crossed(network, question(network, place, radius))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(nets.ZOO))
def test_captured_modules_run_by_torch_stay_inside(name: str) -> None:
    """Convolutions, batch norm, pooling, residual connections: merged in the graph, step by step in
    the execution.
    """
    classifier, x = nets.classifier_of(name), nets.points_of(name, 3)
    problem = Problem.pose(classifier, x, classifier.logits(x).argmax(1), Ball("linf", 0.01, None))
    if any(
        not node.op.executed_as_written and not node.op.affine for node in nets.captured(name).nodes
    ):
        with pytest.raises(BadInput, match="multiplied with each other"):
            posed(problem, EXECUTED)
        return
    graph, region = posed(problem, EXECUTED)
    rows = problem.goal.rows(problem.y, problem.classes)
    with torch.no_grad():
        bound = margin_bounds(relax(graph, region, EXECUTED), rows)
    points = points_of(problem, 3)
    for batch in (1, len(points)):
        logits = torch.cat([classifier.logits(part) for part in points.split(batch)])
        margins = (rows.double().repeat(len(points) // 3, 1, 1) @ logits.double()[..., None])[
            ..., 0
        ]
        assert bool((margins >= bound.repeat(len(points) // 3, 1)).all()), batch


@pytest.mark.parametrize(("name", "args"), nets.activations(), ids=str)
def test_functions_of_one_number_err_by_less_than_is_allowed(
    name: str, args: tuple[Any, ...]
) -> None:
    op = ACTIVATIONS[name](args)
    assert op is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            torch.randn(20_000, generator=generator) * 10 ** torch.linspace(-6, 1.5, 20_000),
            torch.linspace(-12, 12, 4001),
        ]
    )
    exact, got = op.value(x.double()), op.value(x)
    allowed = float32_execution.departure(op, [Box(x.double(), x.double())], EXECUTED)
    known = exact.isfinite() & allowed.isfinite() & (exact.abs() < 1e30)
    assert int(known.sum()) > 10_000
    assert bool(((got.double() - exact).abs() <= allowed)[known].all())


def test_overflow_in_the_execution_is_never_certified() -> None:
    big = torch.full((1, 1), 1e30)
    network = dense(
        (big, torch.zeros(1)),
        (big, torch.zeros(1)),
        (torch.tensor([[0.0], [1e-30]]), torch.tensor([1.0, 0.0])),
    )
    problem = Problem.pose(
        Classifier(network),
        torch.full((1, 1), 1e-20),
        torch.tensor([0]),
        Ball("linf", 0.1, (0.0, 1.0)),
    )
    for tool in (
        IBP(guarantee=WORD),
        CROWN(guarantee=WORD),
        AlphaCROWN(steps=2, intermediate=2, guarantee=WORD),
        InputSplit(seconds=0.3, guarantee=WORD),
    ):
        assert not any(
            bool((claim.radius > 0).any()) for claim in tool(problem) if isinstance(claim, Claim)
        ), tool


# ---- tools
# --------------------------------------------------------------------------------------------------

TOOLS = (
    IBP(guarantee=WORD),
    CROWN(guarantee=WORD),
    AlphaCROWN(steps=4, intermediate=2, guarantee=WORD),
    BranchAndBound(seconds=2, guarantee=WORD),
    InputSplit(seconds=2, guarantee=WORD),
    CertifiedRadius(CROWN(guarantee=WORD), rounds=5),
)


def well_conditioned(seed: int) -> tuple[nn.Sequential, Problem]:
    """Return a small network and points of which some can be proved."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (torch.randn(b, a, generator=generator) / a**0.5, torch.randn(b, generator=generator) * 0.3)
        for a, b in ((3, 12), (12, 12), (12, 3))
    ]
    network = dense(*layers)
    return network, question(network, seed, 0.05, 6)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda t: type(t).__name__)
def test_tools_claim_about_the_execution_and_say_so(tool: Any) -> None:
    proved = 0
    for seed in range(3):
        network, problem = well_conditioned(seed)
        claims = [c for c in tool(problem) if isinstance(c, Claim)]
        assert all(c.guarantee == WORD for c in claims)
        radius = torch.zeros(len(problem), dtype=torch.float64)
        for c in claims:
            radius[c.index] = c.radius
        proved += int((radius > 0).sum())
        inside = problem.at(radius)
        points = points_of(inside, seed, 40)
        for _, values in executions(network, points):
            few = len(values[-1]) // len(problem) * len(problem)
            margins = problem.goal.margins(
                values[-1][:few].double(), problem.y.repeat(few // len(problem))
            )
            assert bool(
                (problem.goal.worst(margins) > 0)[(radius > 0).repeat(few // len(problem))].all()
            )
    assert proved >= 4
    assert WORD in repr(tool)


def test_names_of_tools_with_the_usual_guarantee_stay_as_they_were() -> None:
    assert (
        repr(CROWN()) == "CROWN()"
        and repr(CROWN(guarantee=WORD)) == "CROWN(guarantee='float32-executed')"
    )
    assert repr(InputSplit()) == "InputSplit(seconds=30.0, batch=256, features=20)"


def test_the_allowance_costs_little_where_layers_are_small() -> None:
    _, problem = well_conditioned(0)
    checked, run = (
        torch.cat([c.margin for c in CROWN(guarantee=g)(problem)])
        for g in (CHECKED.guarantee, WORD)
    )
    assert bool((run < checked).all()) and float((checked - run).max()) < 1e-4


def test_a_measurement_records_and_reports_the_guarantee_and_its_certificates_are_proved_again() -> (
    None
):
    network, problem = well_conditioned(1)
    plan = Plan(
        "both",
        (
            Stage(IBP(), "certifier"),
            Stage(CertifiedRadius(CROWN(), rounds=3), "certifier", "distance"),
            Stage(CROWN(), "certifier"),
        ),
    )
    with Record(None) as ledger:
        result = measure(
            network,
            problem.x,
            problem.y,
            problem.threat,
            plan=dataclasses.replace(plan, guarantee="float32-executed"),
            record=ledger,
        )
        certificates = [
            e for e in ledger.evidence(problem.fingerprint()) if e.kind == "certificate"
        ]
        assert certificates and all(e.guarantee == WORD and WORD in e.tool for e in certificates)
        assert dict(result.summary.guarantees).keys() == {WORD}
        assert any(WORD in line for line in limits(result.summary))
        (checked,) = check(ledger, network)
        assert checked.sound and checked.certificates > 0


def test_a_plan_with_a_tool_that_cannot_is_refused() -> None:
    network, problem = well_conditioned(1)
    with pytest.raises(BadInput, match="Enumeration"):
        measure(
            network,
            problem.x,
            problem.y,
            problem.threat,
            plan=Plan("p", (Stage(Enumeration(), "certifier"),), guarantee="float32-executed"),
        )


# ---- refusals
# --------------------------------------------------------------------------------------------------


def refused(module: nn.Module, match: str, x: Tensor | None = None, **asked: Any) -> None:
    x = torch.rand(3, 4) if x is None else x
    problem = Problem.pose(
        Classifier(module.eval()), x, torch.zeros(3, dtype=torch.long), Ball("linf", 0.1), **asked
    )
    with pytest.raises(BadInput, match=match):
        list(CROWN(guarantee=WORD)(problem))


def test_models_in_float64_are_refused() -> None:
    refused(nn.Linear(4, 3).double(), "float64", torch.rand(3, 4, dtype=torch.float64))


def test_weights_that_the_model_computes_are_refused() -> None:
    refused(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), "computed")


def test_products_of_two_numbers_are_refused() -> None:
    refused(
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        "multiplied with each other",
    )
    refused(
        nn.Sequential(nn.Linear(4, 3), nn.Softmax(1), nn.Linear(3, 3)),
        "multiplied with each other or weighed",
    )


def test_margins_with_factors_of_their_own_are_refused() -> None:
    half = Specification(
        torch.tensor([[0.3, -0.2, 0.1]]), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    )
    refused(nn.Linear(4, 3), "plain differences", goal=half)


def test_proof_files_about_executions_are_refused() -> None:
    for tool in (CROWN, AlphaCROWN, BranchAndBound):
        with pytest.raises(BadInput, match="proof files"):
            tool(proofs=True, guarantee=WORD)


def test_a_word_that_is_no_guarantee_is_refused() -> None:
    with pytest.raises(BadInput, match="float32-executed"):
        IBP(guarantee="float16-executed")  # type: ignore[arg-type]


# ---- mutants
# --------------------------------------------------------------------------------------------------


def mutant_caught(
    monkeypatch: pytest.MonkeyPatch, place: int, change: Callable[[Any, Tensor], Tensor]
) -> bool:
    """Is a `departure` whose result is changed caught on the network whose layer `place`
    absorbs?
    """
    network = absorbing(place)
    problem = question(network, place, 0.0)
    sound = float32_execution.departure

    def wrong(op: Any, inputs: list[Box], arithmetic: Arithmetic) -> Tensor:
        return change(op, sound(op, inputs, arithmetic))

    assert not crossed(network, problem)
    with monkeypatch.context() as mutated:
        mutated.setattr(relaxation, "departure", wrong)
        return bool(crossed(network, problem))


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_mutant_with_the_gamma_of_float64_is_caught(
    monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    assert mutant_caught(monkeypatch, place, lambda op, room: room * 2.0**-29)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_mutant_that_forgets_the_layer_is_caught(
    monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    terms = 202
    assert mutant_caught(
        monkeypatch,
        place,
        lambda op, room: room * (getattr(op, "weight", torch.zeros(1, 1)).shape[1] != terms),
    )


@pytest.mark.parametrize("place", [1, 2])
def test_mutant_that_counts_one_rounding_a_sum_is_caught(
    monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    assert mutant_caught(
        monkeypatch,
        place,
        lambda op, room: room / getattr(op, "weight", torch.zeros(1, 1)).shape[1],
    )


def test_mutant_that_takes_nothing_off_the_sweep_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    network = absorbing(2)
    problem = question(network, 2, 0.0)
    monkeypatch.setattr(backward._BackwardPass, "_depart", lambda self, number, a: None)
    assert any("CROWN" in text for text in crossed(network, problem))


def test_mutant_that_leaves_boxes_as_they_are_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    network = absorbing(1)
    problem = question(network, 1, 0.0)
    monkeypatch.setattr(backward, "widened", lambda box, room: box)
    assert any("number" in text for text in crossed(network, problem))
