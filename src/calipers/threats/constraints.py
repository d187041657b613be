"""Admissible sets cut by half-spaces A x' <= b.

Such as features in an order, or of bounded sum. Bounds need the largest fall of a linear function
over the set, and get an upper bound of it by Lagrangian duality: for every lambda >= 0

    min {<a, x'> : x' in the ball and the box, A x' <= b}
        >=  min {<a + A^T lambda, x'> : x' in the ball and the box} - <lambda, b>,

so a few subgradient steps on lambda make the bound tight, and a bad choice makes it loose, never
wrong. lambda = 0 is among the choices.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.random_streams import Streams
from calipers.threats.norms import L2
from calipers.threats.region import Attained, Fall, Region

_EUCLIDEAN = L2()
Constraints = tuple[Tensor, Tensor]
"""A (m, d) over the flattened input and b (m,), float64, in the data's units."""

_STEPS, _LENGTH, _DECAY = 60, 0.7, 0.91  # of the ascent on the multipliers of a bound
_NEAREST_STEPS = 100  # of the ascent on the multipliers of a projection
_SNAP_ROUNDS = 6
# shares of the way from the center to the first face met, tried where other points fail
_PULLS = 1.0, 0.999, 0.5


@dataclass(frozen=True, eq=False)
class ConstrainedRegion(Region):
    """The admissible set around each of M points, cut by the constraints.

    Its outer box is that of the uncut set: larger than necessary, hence sound. Windows of an image
    (`window_fall`) are bounded without the constraints, which involve all features.
    """

    @cached_property
    def cut(self) -> Constraints:
        """A and b in the dtype of the center.

        For float64 bounds these are the constraints themselves.
        """
        a, b = self._exact
        return a.to(self.center.dtype), b.to(self.center.dtype)

    @property
    def _exact(self) -> Constraints:
        """A and b in float64, on the device of the center."""
        assert self.ball.constraints is not None
        a, b = self.ball.constraints
        return a.to(self.center.device), b.to(self.center.device)

    def take(self, index: Tensor | slice) -> ConstrainedRegion:
        """Return the regions of the chosen points, repetitions allowed."""
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[index] for name in ("center", "radius", "low", "high")},
        )

    def contains(self, points: Tensor) -> Tensor:
        """Return whether each point is admissible, (M,) bool.

        Exact: the constraints, too, are decided for the numbers as they are, not for a rounded sum
        of products.
        """
        return super().contains(points) & satisfied(points, self._exact)

    # ---- bounds
    # ----------------------------------------------------------------------------------------------

    def fall(self, a: Tensor, points: Tensor) -> Fall:
        """Return how far <a, x'> can fall below <a, x>.

        For directions a (P, S, d) at the chosen points (P,): an upper bound, the uncut fall along a
        + A^T lambda plus <lambda, b - A x>, for the best multipliers lambda >= 0 found.

        Rounding. A relative error allowed by the caller for sums of d terms is multiplied with
        `terms`. Besides those of the uncut fall: a + A^T lambda errs in feature j by m + 1
        roundings of |a_j| + (|A|^T lambda)_j, which moves the fall by at most as much times the
        farthest that j can move; b - A x errs by d + 1 roundings of |b| + |A| |x|, and its product
        with lambda by m more. The factor 1 + (m + 8) / (d + 16) turns an allowance for d + 16
        roundings into one for d + m + 24. The multipliers are exact numbers, however they were
        found.
        """
        return Fall(*self._relaxed(a, points, self._multipliers(a, points)))

    def _relaxed(self, a: Tensor, points: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the fall for given multipliers, and the size of its terms."""
        rows, bound = self.cut
        x = self.center.flatten(1)[points]
        slack, size = bound - x @ rows.T, bound.abs() + x.abs() @ rows.abs().T
        uncut = super().fall(a + multipliers @ rows, points)
        moved = _products(a.abs() + multipliers @ rows.abs(), self._farthest[points])
        own = moved + (multipliers @ size[:, :, None])[:, :, 0]
        factor = 1 + (len(bound) + 8) / (a.shape[2] + 16)
        return uncut.value + (multipliers @ slack[:, :, None])[:, :, 0], uncut.terms + factor * own

    @cached_property
    def _farthest(self) -> Tensor:
        """How far each feature can move, (M, d), rounded up.

        Infinite where it is not bounded.
        """
        reach = self.norm.alone(self.radius.to(self.low.dtype))[:, None]
        reach = reach if self.weight is None else reach / self.weight
        return torch.minimum(torch.maximum(-self.low, self.high), reach) * (
            1 + 8 * torch.finfo(self.low.dtype).eps
        )

    def _multipliers(self, a: Tensor, points: Tensor) -> Tensor:
        """Return multipliers (P, S, m) >= 0 that make the bound tight.

        Subgradient steps of decreasing length; the best of all iterates is kept, 0 among them. The
        slope of the bound along lambda_i is by how much its maximiser violates constraint i. Steps
        are in natural units: the most that |a| can change the function, over the most that the
        constraint's own row can.
        """
        rows, bound = self.cut
        wide = self._farthest[points]
        span = _products(rows.abs().expand(len(wide), -1, -1), wide)[:, None]
        span = span.clamp_min(torch.finfo(a.dtype).tiny)
        unit = _products(a.abs(), wide)[:, :, None] / span
        slack = (bound - self.center.flatten(1)[points] @ rows.T)[:, None]
        index = points.repeat_interleave(a.shape[1])
        region = Region.take(self, index)
        current = a.new_zeros(*a.shape[:2], len(bound))
        best, least = current, torch.full_like(a[:, :, 0], torch.inf)
        for step in range(_STEPS + 1):
            value, delta = region.offset_support(
                -(a + current @ rows).flatten(0, 1).view(-1, *self.center.shape[1:])
            )
            height = value.view(a.shape[:2]) + (current * slack).sum(2)
            better = height < least
            best, least = (
                torch.where(better[:, :, None], current, best),
                torch.where(better, height, least),
            )
            broken = ((delta @ rows.T).view_as(current) - slack) / span
            broken = torch.where((current > 0) | (broken > 0), broken, 0.0)
            way = broken / broken.abs().amax(2, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
            current = (current + _LENGTH * _DECAY**step * unit * way).clamp_min(0)
        return torch.where(best.isfinite(), best, 0.0)

    def offset_support(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return an upper bound of <g, delta> (M,), and an offset (M, d).

        The bound is tight where the multipliers are optimal. The offset is admissible and near the
        maximiser.
        """
        value, delta = self._highest(g)
        return value, (
            self.project(self.center + delta.view_as(self.center)) - self.center
        ).flatten(1)

    def lowest(self, a: Tensor) -> Attained:
        """Return a lower bound of the minimum of <a, x'>, and a point.

        The point is the minimiser over the uncut region for the multipliers that prove the bound.
        """
        value, delta = self._highest(-a)
        return Attained(
            (a * self.center).flatten(1).sum(1) - value, self.center + delta.view_as(self.center)
        )

    def _highest(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return an upper bound of <g, delta>, and a maximiser of its Lagrangian."""
        a, points = -g.flatten(1)[:, None], torch.arange(len(g), device=g.device)
        multipliers = self._multipliers(a, points)
        along = -(a + multipliers @ self.cut[0])[:, 0]
        return self._relaxed(a, points, multipliers)[0][:, 0], super().offset_support(along)[1]

    # ---- points
    # ----------------------------------------------------------------------------------------------

    def step(
        self, points: Tensor, g: Tensor, share: float | Tensor, spread: Tensor | None = None
    ) -> Tensor:
        """Return the points moved along g itself.

        As far as the ball's own step would move them: the projection is Euclidean, and after any
        other step it would end beside the maximum.
        """
        far = _EUCLIDEAN.of((super().step(points, g, share, spread) - points).flatten(1))
        way = g.flatten(1) * (self.low < self.high)
        return points + _EUCLIDEAN.step(way, far, self.low, self.high).view_as(points)

    def project(self, points: Tensor) -> Tensor:
        """Return the nearest admissible point of each, approximately.

        A hundred steps are made on the multipliers of the projection; `snap` removes the violation
        that is left.
        """
        return self._nearest(points, self.cut[1])

    def _nearest(self, points: Tensor, bound: Tensor) -> Tensor:
        """Project by accelerated gradient ascent on the dual.

        Beck and Teboulle 2009, with the restarts of O'Donoghue and Candes 2015; `bound (m,)` or (M,
        m).
        """
        near = super().project(points)
        rows = self.cut[0].to(points.dtype)
        if points.device.type == "cpu" and bool((near.flatten(1) @ rows.T <= bound).all()):
            return near
        size = rows.square().sum(1).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
        rows, bound = rows / size[:, None], bound / size
        stride = 1 / torch.linalg.matrix_norm(rows, 2).square().clamp_min(
            torch.finfo(rows.dtype).tiny
        )
        old = ahead = points.new_zeros(len(points), len(rows))
        pace = points.new_ones(len(points), 1)
        for _ in range(_NEAREST_STEPS):
            near = super().project(points - (ahead @ rows).view_as(points))
            broken = near.flatten(1) @ rows.T - bound
            new = (ahead + stride * broken).clamp_min(0)
            back = (broken * (new - old)).sum(1, keepdim=True) < 0
            faster = torch.where(back, 1.0, (1 + (1 + 4 * pace.square()).sqrt()) / 2)
            ahead = (new + torch.where(back, 0.0, (pace - 1) / faster) * (new - old)).clamp_min(0)
            old, pace = new, faster
        return super().project(points - (old @ rows).view_as(points))

    def snap(self, points: Tensor) -> Tensor:
        """Return nearly the same points, moved inward to be exactly admissible.

        `contains` then holds: they are projected onto half-spaces tightened a little more each
        time, and where that fails moved towards the center, which is admissible itself.
        """
        snapped = super().snap(points)
        for k in range(_SNAP_ROUNDS):
            over = torch.nonzero(~satisfied(snapped, self._exact)).flatten()
            if not len(over):
                return snapped
            part = self.take(over)
            rows, bound = (t.to(points.dtype) for t in self.cut)
            flat = snapped[over].flatten(1)
            room = (flat @ rows.T - bound).clamp_min(0) + 4 * torch.finfo(points.dtype).eps * (
                flat.abs() @ rows.abs().T + bound.abs()
            )
            snapped = snapped.index_copy(
                0, over, Region.snap(part, part._nearest(snapped[over], bound - room * 2.0**k))
            )
        return self._pulled(snapped)

    def _pulled(self, points: Tensor) -> Tensor:
        """Return the points, those that violate a constraint moved inward.

        They move towards the center; to the center itself where nothing nearer is admissible.
        """
        rows, bound = self._exact
        center = self.center.double()
        delta = points.double() - center
        for share in _PULLS:
            gain = delta.flatten(1) @ rows.T
            slack = (bound - center.flatten(1) @ rows.T).clamp_min(0)
            room = (
                torch.where(gain > 0, slack / gain.clamp_min(1e-300), torch.inf)
                .amin(1)
                .clamp(max=1)
                * share
            )
            trial = Region.snap(
                self, (center + delta * room.view(-1, *[1] * (delta.dim() - 1))).to(points.dtype)
            )
            fine = satisfied(points, self._exact).view(-1, *[1] * (delta.dim() - 1))
            points = torch.where(fine, points, trial)
        fine = satisfied(points, self._exact).view(-1, *[1] * (delta.dim() - 1))
        return torch.where(fine, points, self.center.to(points.dtype))

    def sample(self, streams: Streams) -> Tensor:
        """Return one admissible point per region.

        A sample of the ball, projected.
        """
        return self.project(super().sample(streams))


def _products(rows: Tensor, wide: Tensor) -> Tensor:
    """Return <row, wide> of rows (P, S, d) and wide (P, d) >= 0, as (P, S).

    A feature that is not bounded counts where its coefficient is not 0: infinity times 0 would be
    no number.
    """
    unbounded = wide.isinf()
    finite = (rows @ wide.masked_fill(unbounded, 0.0)[:, :, None])[:, :, 0]
    return finite.masked_fill((rows @ unbounded.to(rows)[:, :, None])[:, :, 0] > 0, torch.inf)


def satisfied(points: Tensor, constraints: Constraints) -> Tensor:
    """Return whether A x' <= b holds at each point (M, *D), (M,) bool.

    Decided in float64 where rounding cannot matter, else in rational arithmetic; a NaN does not
    satisfy it.
    """
    a, b = constraints
    x = points.double().flatten(1)
    value, size = x @ a.T, x.abs() @ a.abs().T + b.abs()
    close = size * ((x.shape[1] + 8) * torch.finfo(torch.float64).eps) + 2.0**-1000
    fine, doubt = value <= b, ((value - b).abs() <= close) & size.isfinite()
    places = torch.nonzero(doubt).tolist()
    if places:
        held, table, limits = {}, a.tolist(), b.tolist()
        exact = []
        for i, j in places:
            if i not in held:
                held[i] = x[i].tolist()
            exact.append(_exactly(table[j], held[i]) <= Fraction(limits[j]))
        fine = fine.masked_scatter(doubt, torch.tensor(exact, device=fine.device))
    return fine.all(1)


def _exactly(row: list[float], x: list[float]) -> Fraction:
    """Return an inner product in rational arithmetic."""
    return sum(
        (Fraction(c) * Fraction(v) for c, v in zip(row, x, strict=True) if c and v), Fraction(0)
    )


def read_constraints(given: tuple[object, object]) -> Constraints:
    """Return A (m, d) and b (m,) in float64.

    Raises `BadInput` where they are no finite inequalities.
    """
    a, b = (torch.as_tensor(t, dtype=torch.float64) for t in given)
    if a.dim() != 2 or b.shape != a.shape[:1] or not a.numel():
        raise BadInput(
            f"constraints are A (m, features) and b (m,) of A x <= b, got shapes {tuple(a.shape)} "
            f"and {tuple(b.shape)}"
        )
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise BadInput("constraints A x <= b must be finite numbers: leave out what always holds")
    return a, b


def check_satisfied(x: Tensor, constraints: Constraints) -> None:
    """Raise `BadInput` unless points x (N, *D) satisfy the constraints."""
    a, b = constraints
    if a.shape[1] != x[0].numel():
        raise BadInput(
            f"constraints are about {a.shape[1]} features, but inputs of shape "
            f"{tuple(x.shape[1:])} have {x[0].numel()}"
        )
    a, b = a.to(x.device), b.to(x.device)
    bad = torch.nonzero(~satisfied(x, (a, b))).flatten()
    if len(bad):
        row = next(
            j
            for j in range(len(b))
            if not bool(satisfied(x[bad[:1]], (a[j : j + 1], b[j : j + 1])))
        )
        value = float(x[bad[0]].double().flatten() @ a[row])
        raise BadInput(
            f"{len(bad)} of {len(x)} points break the constraints A x <= b themselves (first: "
            f"point {int(bad[0])}, row {row}: {value:.17g} > {float(b[row]):.17g}): leave them "
            "out, or give constraints that the data satisfy"
        )
