"""How near is the nearest example in one piece of the network, and is the model fooled there? What
a program ends at, asked of the model itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.relaxed import Relaxed
from calipers.certificates.exact.model import Ends, Floats, Model, ends_of
from calipers.certificates.exact.proving import Zero, zero_of
from calipers.certificates.exact.solving import Program
from calipers.certificates.examples import judged
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem

# share of the nearest distance that a proof may stop short of it: where the margin is 0 nobody can
# prove that it is positive
SHORT = 2e-7
# how much nearer a zero is that the model is asked about at once; zeros asked about at most
_SOON, _KEPT = 1e-3, 8
# points on the way from the point to an example, for the first one that is an example too; and how
# often
_TRIED, _TWICE = 64, 2
# shares of the distance by which the boundary is overstepped, until the model as it runs is fooled
_OVER = (
    0.0,
    1e-9,
    1e-8,
    1e-7,
    3e-7,
    1e-6,
    3e-6,
    1e-5,
    3e-5,
    1e-4,
    3e-4,
    1e-3,
)


class Examples:
    """The nearest examples met in a search for one point. `nearest` is the distance of the nearest,
    infinite before the first; `points` are to be proposed.

    A way of making all choices is a piece of the network, on which it is affine: its nearest
    example stands where the smallest margin of the piece reaches 0. `edge` is the least distance of
    such a zero, in real arithmetic: nobody can prove more. The model's own rounding may want a
    little more, see `_OVER`, so `settle` asks it about the nearest zeros.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.nearest = problem, np.inf
        self.points: list[Tensor] = []
        self.edge, self.zeros = np.inf, list[tuple[Zero, int, Ends]]()
        self.programs = 0

    def within(self, state: Relaxed, model: Model, ends: float) -> Examples:
        """Look inside this model from now on, until the time `ends`."""
        self.zeros.clear()
        self.state, self.model, self.seen = state, model, set[tuple[int, ...]]()
        self.program = Program(model, state.region)
        self.program.ends = ends
        return self

    def propose(self, point: Tensor) -> None:
        """Take over an example found elsewhere (1, *D), if it is one."""
        inside, worst = judged(self.problem, point)
        if bool(is_adversarial(worst)):
            self._keep(inside)

    def meet(self, delta: Floats, made: dict[int, int] | None) -> float | None:
        """Look at the piece of the network in which an offset lies (or that of the choices, where
        all are made); return the radius that is left to prove.
        """
        if made is not None:
            return self.look(made)
        values = self.state.graph.values(self._point(delta))
        return (
            self._beside(values)
            if bool(is_adversarial(self.problem.goal.worst(self.problem.margins(values[-1]))))
            else None
        )

    def beside(self, delta: Floats) -> float | None:
        """Look at the piece of the network in which an offset of the region (else: its nearest in
        the box) lies, fooled there or not: a solver's tolerances may have kept it just short of
        that.
        """
        delta = np.clip(delta, self.program.low, self.program.high)
        inside = self.program.length(delta) <= float(self.state.region.radius[0])
        return self._beside(self.state.graph.values(self._point(delta))) if inside else None

    def _beside(self, values: list[Tensor]) -> float | None:
        return self.look(dict(enumerate(self.model.pattern(self.model.of_values(values)))))

    def descend(self, point: Tensor) -> float | None:
        """Go from an example (1, *D) straight towards the point as far as the network is fooled,
        and look at the piece there.
        """
        center, (near, far) = self.state.region.center, (0.0, 1.0)
        for _ in range(_TWICE):
            shares = torch.linspace(near, far, _TRIED + 1, dtype=torch.float64)[1:]
            on_the_way = center + shares.view(-1, *[1] * (center.dim() - 1)) * (
                point.to(center) - center
            )
            values = self.state.graph.values(on_the_way)[-1]
            worst = self.problem.goal.worst(
                self.problem.goal.margins(
                    values, self.problem.y.expand(len(values)).to(values.device)
                )
            )
            fooled = is_adversarial(worst).tolist()
            if True not in fooled:
                return None
            first = fooled.index(True)
            near, far = (
                near + (far - near) * first / _TRIED,
                near + (far - near) * (first + 1) / _TRIED,
            )
        return self.meet((far * (point.to(center) - center)).flatten().numpy(), None)

    def look(self, made: dict[int, int]) -> float | None:
        """Return the radius that is left to prove once the nearest example of a piece is known;
        None where it has none that is nearer, or was looked at.
        """
        key = tuple(made[i] for i in range(len(self.model.choices)))
        if key in self.seen:
            return None
        self.seen.add(key)
        ends, before = ends_of(self.model, made), self.edge
        for goal in self.model.goals.values():
            top = min(self.edge, float(self.state.region.radius[0]))
            zero = zero_of(self.program, self.state.arithmetic, self.state.region, goal, ends, top)
            if zero is not None and zero.near < self.edge and zero.proved < top:
                self.edge = zero.near
                self.zeros.append((zero, goal, ends))
        if self.edge < (1 - _SOON) * self.nearest:
            self.settle()
        return self.edge * (1 - SHORT) if self.edge < before else None

    def settle(self) -> None:
        """Find a point near the nearest zero met since the last time where the model itself is
        fooled, then one where it is beyond all doubt.
        """
        zeros, self.zeros = self.zeros[: -_KEPT - 1 : -1], []
        for zero, goal, ends in zeros:
            fooled = False
            for share in _OVER:
                if zero.near * (1 + share) >= self.nearest and not fooled:
                    break
                inside = self._overstepped(zero, share, goal, ends)
                if inside is None:
                    continue
                if not fooled:
                    self.points.clear()
                    fooled = self._keep(inside)
                if bool(self.problem.clearance(inside) <= 0):
                    self.points.append(inside)
                    break
            if fooled:
                return

    def _overstepped(self, zero: Zero, share: float, goal: int, ends: Ends) -> Tensor | None:
        """Return a point beyond the boundary by that share of the distance, None if the model is
        not fooled there.
        """
        self.programs += 1
        delta = self.program.beyond(zero.delta, zero.near, share, goal, ends)
        if delta is None:
            return None
        point = self._point(delta)
        length = torch.maximum(
            self.state.region.distance(point), torch.tensor([zero.near * (1 + share)])
        )
        inside, worst = judged(self.problem.at(length), point)
        exact = self.problem.goal.worst(
            self.problem.margins(self.problem.classifier.logits64(inside))
        )
        return inside if bool(is_adversarial(worst) & is_adversarial(exact)) else None

    def _keep(self, point: Tensor) -> bool:
        distance = float(self.problem.region.distance(point)[0])
        if not 0 < distance < self.nearest:
            return False
        self.nearest = distance
        self.edge = min(self.edge, distance)
        self.points.append(point)
        return True

    def _point(self, delta: Floats) -> Tensor:
        center = self.state.region.center
        return center + torch.from_numpy(delta).view_as(center)
