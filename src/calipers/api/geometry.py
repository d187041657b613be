"""Geometric portrait of a model: gradients, linear regions and bounds.

One call measures them at a few points, and draws them, to show why the model is fragile there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calipers.api.measure import exact_tool
from calipers.api.settings import checked
from calipers.calls import with_gradients
from calipers.errors import CaptureError, ToolFailed, UnsupportedOp
from calipers.geometry.gradients import Sensitivity, dual_norm, margin_gradients, sensitivity
from calipers.geometry.hyperplanes import check_ball
from calipers.geometry.plane_sections import Slice, plane_slices
from calipers.geometry.regions import Regions, regions_of
from calipers.geometry.segments import exit_distance, path
from calipers.interchange.door import pose
from calipers.measurement.ask import ask
from calipers.measurement.referee import Referee
from calipers.presets import CERTIFIERS, plan_for, stage_of, tool_from
from calipers.problem.capabilities import capabilities_of, check_fit
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attack, Attempt, Certifier, Claim
from calipers.record.bracket import Bracket
from calipers.record.evidence import Evidence
from calipers.report.geometry import GeometryResult, Pictures, PointGeometry
from calipers.report.ladder import Ladder, Rung
from calipers.report.maps import Map, gradient_map
from calipers.report.report import short_name
from calipers.threats.ball import Ball

_REGION = "linear region"
_ROUNDS, _TOLERANCE = 6, 0.02  # of a search for a radius: more would not show in a drawing


@checked
@with_gradients()
def local_geometry(
    model: Any,
    x: Any,
    y: Any,
    threat: Ball,
    *,
    tools: Sequence[str | Attack | Certifier] | None = None,
    exact: bool | float = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> GeometryResult:
    """Measure the geometry of a model at a few points.

    What the tools find is admitted by the referee. Networks that are not piecewise linear have no
    linear regions; everything else is measured all the same.

    Cost: that of the tools; for each point a backward product for each neuron that may bound its
    linear region. The pictures of a page have a cost of their own (`GeometryResult.drawn`).

    Args:
        model: As for `measure`.
        x: Points (N, *D), as for `measure`.
        y: Labels (N,), as for `measure`.
        threat: A `Ball` in linf, l2 or l1.
        tools: The rungs of each point's ladder of bounds, tools or their texts, attacks first:
            their examples tell the searches for proofs where to look. By default the attacks of the
            plan "distance", and its search for a radius with every certifier that can bound.
        exact: Whether mixed-integer programs close the ladder, if the network is piecewise linear.
            A number limits the programs of each point, in seconds (True: 60).
        seed: Seed of all random starts.
        progress: Is called with the name of each step as it begins.

    Returns:
        A `GeometryResult`: print it for a table, or write the page with `.report("geometry.html")`.

    Raises:
        BadInput: For a threat other than a ball in linf, l2 or l1, and as `measure`.
        BadModel: As `measure`.
        Contradiction: As `measure`.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=1)
        >>> ball = calipers.Ball("linf", 0.1)
        >>> found = calipers.local_geometry(model, x, y, ball, tools=["PGD", "CROWN"])
        >>> len(found.points), found.points[0].lower < found.points[0].upper
        (1, True)
    """
    problem = pose(model, x, y, threat)
    check_ball(problem)
    study = _Study(problem, seed, progress or (lambda words: None))
    study.look()
    for tool in _usual(threat) if tools is None else tools:
        study.ask(tool_from(tool) if isinstance(tool, str) else tool)
    if exact and study.regions is not None:
        study.ask(exact_tool(exact))
    return GeometryResult(
        problem.classifier.name,
        f"{threat.norm} distance",
        float(threat.radii(len(problem)).max()),
        tuple(study.point(i) for i in range(len(problem))),
        study.ladder(),
        study.reason,
        study.pictures,
    )


def _usual(threat: Ball) -> list[Attack | Certifier]:
    """Return the rungs of a ladder where none are named."""
    stages = plan_for(threat, None, "distance").stages
    attacks = [stage.tool for stage in stages if stage.kind == "attack"]
    bounders = [make() for make in CERTIFIERS.values() if hasattr(make, "bound")]
    search: Any = next(stage.tool for stage in stages if _seeks_radii(stage.tool))
    return [
        *attacks,
        *(
            dataclasses.replace(search, certifier=b, rounds=_ROUNDS, tolerance=_TOLERANCE)
            for b in bounders
        ),
    ]


def _seeks_radii(tool: object) -> bool:
    known = capabilities_of(tool)
    return known is not None and known.task == "largest certified radius"


@dataclass(eq=False)
class _Study:
    """What is known of the points so far."""

    problem: Problem
    seed: int
    watch: Callable[[str], None]
    rungs: list[Rung] = field(default_factory=list)
    examples: dict[int, Tensor] = field(default_factory=dict)
    reason: str = ""
    regions: Regions | None = None

    def look(self) -> None:
        """Measure what needs no tool: predictions, gradients, linear regions."""
        problem, n = self.problem, len(self.problem)
        self.watch("gradients")
        logits = problem.classifier.logits(problem.x)
        self.prediction = logits.argmax(1).tolist()
        out = {
            e.point
            for e in self.referee.open(torch.arange(n, device=problem.x.device))
            if e.kind in ("witness", "invalid")
        }
        self.right = torch.tensor(
            [i for i, name in enumerate(problem.names) if name not in out], dtype=torch.long
        )
        self.sensitivity: Sensitivity = sensitivity(problem)
        self.lower, self.upper = np.zeros(n), np.full(n, np.inf)
        self.upper[[i for i in range(n) if i not in set(self.right.tolist())]] = 0.0
        self.watch("linear regions")
        try:
            self.regions = regions_of(problem)
        except (UnsupportedOp, CaptureError) as error:
            self.reason = str(error)
            return
        self._admit_regions(self.regions)
        self._meet()

    def _admit_regions(self, found: Regions) -> None:
        """Admit the bounds that each point's own linear region gives."""
        claim = Claim(
            self.right,
            found.lower[self.right],
            found.margin[self.right],
            "float64-checked",
            *(torch.zeros_like(self.right),) * 2,
        )
        self._proved(
            _REGION,
            self.referee.claim(
                claim, torch.arange(len(self.problem)), _REGION, 0.0, self.seed
            ).evidence,
        )
        exact = torch.nonzero(found.exact).flatten()
        if len(exact):
            none = torch.zeros(len(exact), dtype=torch.long)
            attempt = Attempt(torch.arange(len(exact)), found.candidate[exact], none, none)
            self._found(_REGION, self.referee.attempt(attempt, exact, _REGION, 0.0).evidence)

    @property
    def referee(self) -> Referee:
        """The referee that admits or refuses what the tools propose."""
        return Referee(self.problem)

    def ask(self, tool: Attack | Certifier) -> None:
        """Run a tool on all points that the model gets right.

        The radii are chosen to suit what is known so far.
        """
        check_fit(tool, self.problem.threat)
        if not len(self.right):
            return
        self.watch(_name(tool))
        stage, known = stage_of(tool), self.upper[self.right.cpu().numpy()]
        asked = self.problem.threat.radii(len(self.problem))[self.right].numpy()
        if stage.kind == "certifier":
            search = stage.objective == "distance"
            near = (
                self.problem.threat.below(known, self.lower[self.right.cpu().numpy()])
                if search
                else known * (1 + 1e-9)
            )
            asked = np.where(np.isfinite(known), near, asked)
        part = self.problem.take(self.right).at(torch.from_numpy(asked))
        name, facts = _name(tool), list[Evidence]()
        try:
            for told in ask(
                stage, part, lambda _, ruling: ruling.evidence, seed=self.seed, name=name
            ):
                facts += told
        except (UnsupportedOp, CaptureError, ToolFailed):
            return  # this tool cannot bound the network: its rung is missing
        proofs, examples = (
            [fact for fact in facts if fact.kind == kind] for kind in ("certificate", "witness")
        )
        if proofs or stage.kind == "certifier":
            self._proved(name, proofs)
        if examples or stage.kind == "attack":
            self._found(name, examples)
        self._meet()

    def _meet(self) -> None:
        """Raise `Contradiction` where a certificate exceeds a witness's distance."""
        tools = tuple(
            ", ".join(rung.name for rung in self.rungs if rung.side == side)
            for side in ("lower", "upper")
        )
        Bracket(self.lower, self.upper, *((names,) * len(self.problem) for names in tools))

    def _proved(self, name: str, facts: Sequence[Evidence]) -> None:
        """Add a rung of lower bounds."""
        values = self._values(facts, np.zeros(len(self.problem)), max)
        self.lower = np.maximum(self.lower, values)
        self.rungs.append(Rung(name, "lower", tuple(values)))

    def _found(self, name: str, facts: Sequence[Evidence]) -> None:
        """Add a rung of upper bounds, and keep the nearest example of each point."""
        for fact in facts:
            i = self.problem.names.index(fact.point)
            if fact.radius < self.upper[i] and fact.array is not None:
                self.examples[i] = torch.from_numpy(np.array(fact.array))
        values = self._values(facts, np.full(len(self.problem), np.inf), min)
        self.upper = np.minimum(self.upper, values)
        self.rungs.append(Rung(name, "upper", tuple(np.where(np.isfinite(values), values, np.nan))))

    def _values(
        self, facts: Sequence[Evidence], start: np.ndarray, better: Callable[[float, float], float]
    ) -> np.ndarray:
        """Return the best radius of each point among the facts, from `start` on."""
        for fact in facts:
            i = self.problem.names.index(fact.point)
            start[i] = better(start[i], fact.radius)
        return start

    def point(self, i: int) -> PointGeometry:
        """Return everything about one point."""
        seen, found = self.sensitivity, self.regions
        nothing = (math.nan, 0.0, math.nan, False, "")
        border, proved_border, decision, exact, where = (
            nothing
            if found is None
            else (
                float(found.border[i]),
                float(found.proved_border[i]),
                float(found.decision[i]),
                bool(found.exact[i]),
                found.where[i].split(" (")[0],
            )
        )
        crossed = self._crossed(i)
        values = (
            float(seen.margin[i]),
            float(seen.dual[i]),
            float(seen.estimate[i]),
            border,
            proved_border,
            decision,
        )
        ends = float(self.lower[i]), float(self.upper[i])
        return PointGeometry(
            i,
            int(self.problem.y[i]),
            self.prediction[i],
            *values,
            exact,
            self._exit(i),
            crossed,
            *ends,
            f"module {where}" if where else "",
        )

    def _exit(self, i: int) -> float:
        """Return how far the steepest step stays inside the linear region."""
        if self.regions is None:
            return math.nan
        one = self.problem.take([i]).at(1.0)
        region = dataclasses.replace(
            one.region,
            low=torch.full_like(one.region.low, -torch.inf),
            high=torch.full_like(one.region.high, torch.inf),
        )
        _, delta = region.offset_support(-self.sensitivity.gradient[i : i + 1])
        return float(exit_distance(one, delta.view_as(one.x)))

    def _crossed(self, i: int) -> int:
        """Return how many linear regions lie on the way to the example.

        0 where there is no example, or the network has no linear regions.
        """
        return (
            path(self.problem, i, self.examples[i]).regions
            if self.regions is not None and i in self.examples
            else 0
        )

    def ladder(self) -> Ladder:
        """Return the rungs of the points that the model gets right."""
        keep = self.right.tolist()
        rungs = tuple(
            dataclasses.replace(r, values=tuple(float(r.values[i]) for i in keep))
            for r in self.rungs
        )
        return Ladder(tuple(f"point {i}" for i in keep), rungs, f"{self.problem.region.norm.name}")

    @with_gradients()
    def pictures(self, slices: int, maps: int) -> Pictures:
        """Return the slices of so many points, and the gradient maps."""
        return tuple(self.slices(slices)), tuple(self.maps(maps))

    def slices(self, count: int) -> list[tuple[Slice, ...]]:
        """Return the planes of the first points that have an example."""
        chosen = sorted(self.examples)[:count]
        for i in chosen:
            self.watch(f"slices of point {i}")
        return [
            plane_slices(
                self.problem, i, self.examples[i], across=self._across(i), reach=1.8, seed=self.seed
            )
            for i in chosen
        ]

    def _across(self, i: int) -> tuple[Tensor, str] | None:
        """Return the direction of the second-nearest class, to first order.

        It is the steepest way down the margin over the class that is nearest after that of the
        example: a plane that meets two decision boundaries says more. None where there is no such
        class.
        """
        part = self.problem.take([i])
        margins, slopes, _ = margin_gradients(part)
        if margins.shape[1] < 2:
            return None
        each = torch.stack(
            [
                margins[0, s].double() / dual_norm(part.region, slopes[:, s])[0]
                for s in range(margins.shape[1])
            ]
        )
        margin_classes = part.goal.margin_classes(part.y, part.classes)[0]
        answer = int(self.problem.classifier.logits(self.examples[i][None]).argmax(1))
        second = next(
            (k for k in each.argsort().tolist() if int(margin_classes[k]) != answer), None
        )
        if second is None:
            return None
        flat = slopes[0, second].flatten()[None].double()
        free = torch.full_like(flat, torch.inf)
        step = part.region.norm.step(-flat, torch.ones(1, dtype=torch.float64), -free, free)
        return step.view_as(part.x[0]), f"down the margin over class {int(margin_classes[second])}"

    def maps(self, count: int) -> list[Map]:
        """Return the gradients of the first points as pictures."""
        x, found = self.problem.x.detach().cpu().double().numpy(), []
        gradients = self.sensitivity.gradient.detach().cpu().double().numpy()
        span = float(x.min()), float(x.max())
        for i in self.right.tolist()[:count]:
            change = None if i not in self.examples else self.examples[i].double().numpy() - x[i]
            words = (
                f"class {int(self.problem.y[i])}, dual norm {float(self.sensitivity.dual[i]):.3g}"
            )
            found.append(gradient_map(i, x[i], gradients[i], change, span, words))
        return found


def _name(tool: object) -> str:
    """Return the tool's short name; for a search, that of its certifier."""
    return short_name(repr(getattr(tool, "certifier", tool)))


__all__ = ["GeometryResult", "local_geometry"]
