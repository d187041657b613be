"""Is what is claimed about an operation, as somebody wrote it, contradicted by what the operation
does? One judge for torch modules and ONNX nodes.

The model is asked itself, in float64: the graph that bounds are about stands trial with them.
"""

from __future__ import annotations

import random
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import nets
import torch
from torch import Tensor, nn

from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.input_split import InputSplit
from calipers.errors import CalipersError, CaptureError, UnsupportedOp
from calipers.graph.capture import graph_of
from calipers.models.classifier import Classifier
from calipers.problem.goals import Untargeted
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.threats.ball import Ball

ROOM = 1e-9  # of the largest logit: two float64 executions of small networks differ by less
Ask = Callable[[Tensor], Tensor]
"""Points (M, *D) to logits (M, K), by somebody else than the graph."""


class NotWritten(Exception):
    """The drawn parameters are none that the framework itself runs with."""


@dataclass
class Verdicts:
    """What came of many models: counts, and every violation by name."""

    models: int = 0
    refused: int = 0
    unwritten: int = 0
    questions: int = 0
    claims: int = 0
    proved: int = 0
    wrong: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: Verdicts) -> None:
        """Count another one's in."""
        for name in ("models", "refused", "unwritten", "questions", "claims", "proved"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.wrong += other.wrong
        self.reasons += other.reasons

    def __str__(self) -> str:
        return (
            f"{self.models} models ({self.refused} refused by name, {self.unwritten} more that no "
            f"framework runs), {self.questions} questions of three points, {self.claims} bounds, "
            f"{self.proved} points proved, {len(self.wrong)} violations"
        )


def judged(
    make: Callable[[], tuple[nn.Module, tuple[int, ...], str, Ask]],
    seed: int,
    *,
    light: bool = False,
) -> Verdicts:
    """Make a model, ask two questions about it, or one, and say what was wrong; a refusal in words
    is none.
    """
    found, said = Verdicts(models=1), ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, shape, said, ask = make()
            _asked(found, model, shape, ask, seed, said, light=light)
    except NotWritten:
        found.models, found.unwritten = 0, 1
    except (UnsupportedOp, CaptureError) as refused:
        found.refused += 1
        found.reasons[str(refused).split(" at ")[0][:60]] += 1
    except CalipersError as refused:
        found.refused += 1
        found.reasons[f"{type(refused).__name__}: {str(refused)[:50]}"] += 1
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        found.wrong.append(
            f"seed {seed}, {said}: {type(error).__name__}: {str(error)[:160]} "
            f"({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
        )
    return found


def _asked(
    found: Verdicts,
    model: nn.Module,
    shape: tuple[int, ...],
    ask: Ask,
    seed: int,
    said: str,
    *,
    light: bool,
) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    classifier = Classifier(model)
    x = torch.rand(3, *shape, generator=generator, dtype=torch.float64) * draw.choice(
        [1.0, 1.0, 3.0]
    ) - draw.choice([0.0, 0.5])
    with torch.no_grad():
        logits = ask(x)
    graph, y = graph_of(classifier, x), logits.argmax(1)
    for k in range(1 if light else 2):
        norm = draw.choice(["linf", "linf", "l2", "l1"])
        sizes = [
            10 ** draw.uniform(-6, -2),
            10 ** draw.uniform(-2, -0.5),
            10 ** draw.uniform(-1, 1),
        ]
        ball = Ball(norm, torch.tensor(sizes, dtype=torch.float64), None)
        case = nets.Case(graph, x, y, ball, Untargeted())
        points = nets.attacked(case, seed + k, steps=1)
        with torch.no_grad():
            worst = case.goal.worst(
                case.goal.margins(ask(points.flatten(0, 1)), y.repeat(len(points)))
            ).view(len(points), -1)
        found.questions += 1
        problem = Problem.pose(classifier, x, y, ball)
        for tool in tools(draw, light=light):
            _compared(
                found,
                tool,
                problem,
                worst,
                f"seed {seed}, {said}, {norm} {sizes}, {type(tool).__name__}",
            )


def tools(draw: random.Random, *, light: bool) -> Iterable[Any]:
    """The certifiers of one question; those that search come now and then."""
    yield from (IBP(), CROWN())
    if draw.random() < (0.2 if light else 0.5):
        yield AlphaCROWN(steps=2, intermediate=draw.choice([0, 0, 1]))
    if not light and draw.random() < 0.06:
        yield draw.choice([BranchAndBound(seconds=0.05), InputSplit(seconds=0.05)])


def _compared(found: Verdicts, tool: Any, problem: Problem, worst: Tensor, said: str) -> None:
    """Compare the margins claimed with those met; where the model has no value inside a region,
    nothing may be claimed.
    """
    met, undefined = worst.nan_to_num(nan=torch.inf).amin(0), worst.isnan().any(0)
    room = ROOM * (1 + worst.nan_to_num(0.0, 0.0, 0.0).abs().amax(0))
    for claim in tool(problem):
        if not isinstance(claim, Claim):
            continue
        at, positive = claim.index, claim.margin > 1e-300
        found.claims += len(at)
        found.proved += int((claim.radius > 0).sum())
        certified = claim.radius > 0
        crossed = (claim.margin > met[at] + room[at]) & (
            positive | ~torch.tensor(isinstance(tool, InputSplit))
        )
        wrong = torch.where(certified, (met[at] <= -room[at]) | undefined[at] | crossed, crossed)
        for i in torch.nonzero(wrong).flatten().tolist():
            p = int(at[i])
            found.wrong.append(
                f"{said}: point {p}, claimed {float(claim.margin[i]):.6g}, met "
                f"{float(met[p]):.6g}{', no value' if bool(undefined[p]) else ''}"
            )
