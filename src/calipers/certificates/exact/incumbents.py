"""Nearest adversarial examples in single linear regions of the network.

A point at which a linear program ends is run through the model itself, and the nearest example of
the linear region around it is looked for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from calipers.bounds.relaxation import Relaxed
from calipers.certificates.exact.lp import BallPrograms
from calipers.certificates.exact.model import Ends, Floats, MIPModel, ends_of
from calipers.certificates.exact.tree import Zero, zero_of
from calipers.certificates.examples import judged
from calipers.problem.goals import is_adversarial
from calipers.problem.problem import Problem

# share of the nearest distance by which a proof may fall short of it: where the margin is 0 it
# cannot be proved positive
SHORT = 2e-7
# by which share a zero must be nearer for the model to be run there at once; zeros tried at most
_SOON, _KEPT = 1e-3, 8
# points on the segment to an example, to find the first that is adversarial too; and how often the
# segment is refined
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
    """The nearest adversarial examples found in the search for one point.

    `nearest` is the distance of the nearest one, infinite before the first; `points` are the
    examples to be proposed.

    With all choices made the network is affine on what is left (a linear region); its nearest
    example is where the region's smallest margin reaches 0. `edge` is the least distance of such a
    zero, in real arithmetic: no larger lower bound can be proved. The model's own rounding may need
    a slightly larger perturbation, see `_OVER`, so `settle` runs the model near the nearest zeros.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.nearest = problem, np.inf
        self.points: list[Tensor] = []
        self.edge, self.zeros = np.inf, list[tuple[Zero, int, Ends]]()
        self.programs = 0

    def within(self, state: Relaxed, model: MIPModel, ends: float) -> Examples:
        """Search inside this model from now on, until the time `ends`."""
        self.zeros.clear()
        self.state, self.model, self.seen = state, model, set[tuple[int, ...]]()
        self.program = BallPrograms(model, state.region)
        self.program.ends = ends
        return self

    def propose(self, point: Tensor) -> None:
        """Keep a point (1, *D) found elsewhere, if it is an adversarial example."""
        inside, worst = judged(self.problem, point)
        if bool(is_adversarial(worst)):
            self._keep(inside)

    def meet(self, delta: Floats, made: dict[int, int] | None) -> float | None:
        """Search the linear region in which a perturbation lies.

        Where all choices are made, `made` gives the region. Otherwise it is searched only if the
        network is fooled there. Returns the radius that is left to prove if a nearer zero is found,
        else None.
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
        """Search the linear region around a perturbation, fooled there or not.

        A solver's tolerances may have kept the perturbation just short of fooling the network. It
        is clipped to the box; one that is outside the region all the same is not searched.
        """
        delta = np.clip(delta, self.program.low, self.program.high)
        inside = self.program.length(delta) <= float(self.state.region.radius[0])
        return self._beside(self.state.graph.values(self._point(delta))) if inside else None

    def _beside(self, values: list[Tensor]) -> float | None:
        return self.look(dict(enumerate(self.model.pattern(self.model.of_values(values)))))

    def descend(self, point: Tensor) -> float | None:
        """Move an example (1, *D) directly towards the point, and search there.

        It is moved as far as the network is still fooled, and the linear region there is searched.
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
        """Search the linear region of the choices `made` for its nearest example.

        Returns the radius that is left to prove; None where the region has no nearer example, or
        has been searched before.
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
        """Find points near the nearest zeros where the model itself is fooled.

        The zeros are those found since the last call. First any such point is looked for, then one
        that is adversarial beyond the model's rounding.
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
        """Return a point beyond the decision boundary, or None.

        It is beyond by the given share of the distance; None if the model is not fooled there.
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
