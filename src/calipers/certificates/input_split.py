"""Can the question be decided by cutting up the input? For few features that move: halve boxes
until every one is proved or breaks.

Boxes of intermediate values come from affine forms pushed forward, and from backward sweeps where
these leave something bent (without the sweeps one ACAS Xu property took 24,589 boxes, with them
129); everything is computed in checked float64 at once, so a closed box is a proof. A box is halved
along the feature on which its worst margin hangs most. Centres, minimising corners and points
spread evenly inside are tried as counterexamples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from calipers.bounds.forward import Form, forward
from calipers.bounds.interval import halves
from calipers.bounds.linear import joined_bounds, relax
from calipers.bounds.rounding import Guarantee, arithmetic_of, plain_sums
from calipers.certificates.crown import shifted
from calipers.certificates.examples import judged
from calipers.certificates.guaranteed import check_proofs, posed, stated
from calipers.certificates.split_proof import Closed
from calipers.errors import BadInput
from calipers.problem.ball import Ball
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import by_case, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.tools import Attempt, Claim

_SCATTERED = 4096  # points tried besides centres and corners, in every round
_AT_LEAST = 64  # boxes of a round after the first
_HELD = 2**30  # bytes of boxes held at once; beyond them the search gives up


@dataclass(frozen=True)
class InputSplit:
    """Decide every point within `seconds` of its own by halving its region, `batch` boxes at once;
    for norms that are boxes and at most `features` that move.

    Where more features move, or constraints tie them together, nothing is claimed. Complete but for
    time and memory, and for points whose worst margin is 0 exactly. `guarantee` as for `CROWN`.
    Cost of a box: as many forward passes as features move, and CROWN for what still bends. With
    `proofs` every claim comes with a proof file, for which CROWN has to close every box alone.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "decision at the radius",
        "halves of the input box, where few features move",
        needs="operations",
    )

    seconds: float = 30.0
    batch: int = 256
    features: int = 20
    proofs: bool = field(default=False, repr=False)
    guarantee: Guarantee = field(default="float64-checked", repr=False)

    __repr__ = stated

    def __post_init__(self) -> None:
        check_proofs(arithmetic_of(self.guarantee), proofs=self.proofs)
        if self.seconds <= 0 or self.batch < 1 or self.features < 1:
            raise BadInput(
                f"InputSplit takes seconds > 0, batch >= 1 and features >= 1, got {self}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim | Attempt]:
        """Yield a claim for every point, and a candidate for each where a counterexample was met on
        the way.
        """
        if not isinstance(problem.threat, Ball):
            raise BadInput(
                "InputSplit halves boxes, and between two letters there is nothing: take "
                "BranchAndBound or Enumeration"
            )
        for i in range(len(problem)):
            here = torch.tensor([i], device=problem.x.device)
            search = _Search(self, problem.take(here))
            found = search.run() if search.fits else None
            spent = torch.full_like(here, search.spent)
            if found is not None:
                yield Attempt(here, found, spent, spent)
            radius = problem.threat.radii(len(problem)).to(here.device)[here]
            proved = found is None and search.fits and not len(search.low)
            margin = torch.full_like(
                radius, torch.finfo(radius.dtype).tiny if proved else -torch.inf
            )
            file = search.closed.written(self) if proved and search.closed is not None else None
            yield Claim(
                here,
                torch.where(margin > 0, radius, 0.0),
                margin,
                self.guarantee,
                spent,
                spent,
                (file,) if self.proofs else None,
            )


class _Search:
    """The boxes of one point that are still open, `low`, `high (P, *D)`."""

    def __init__(self, tool: InputSplit, problem: Problem) -> None:
        self.tool, self.problem, self.arithmetic = tool, problem, arithmetic_of(tool.guarantee)
        self.graph, region = posed(problem, self.arithmetic)
        self.fits, self.spent, self.scattered = region.norm.is_box, 0, 0
        if self.fits:
            self.region = region
            self.low, self.high = region.outer_box()
            self.near, self.width = (
                torch.zeros(1, dtype=torch.float64, device=self.low.device),
                (self.high - self.low).flatten(),
            )
            self.fits = int((self.high > self.low).sum()) <= tool.features
        self.closed = (
            Closed(problem, self.graph, region, self.arithmetic)
            if tool.proofs and self.fits
            else None
        )

    def run(self) -> Tensor | None:
        """Halve until nothing is open or the time is up; return a counterexample (1, *D)."""
        ends = time.monotonic() + self.tool.seconds
        with torch.no_grad(), plain_sums():
            while len(self.low) and time.monotonic() < ends and self.low.numel() * 16 < _HELD:
                found = self._round()
                if found is not None:
                    return found
        return None

    def _round(self) -> Tensor | None:
        low, high = self._next()
        count, moving = len(low), torch.nonzero((high > low).flatten(1).any(0)).flatten()
        margins, form = self._bounds(low, high)
        goal = self.problem.goal
        decided = goal.worst(margins.nan_to_num(nan=-torch.inf)) > 0
        left = torch.nonzero(~decided).flatten()
        if self.closed is not None:
            self.closed.boxes.append((low[decided], high[decided]))
        self.spent += count * (margins.shape[1] + form.g.shape[1] + 2)
        if not len(left):
            return None
        low, high, margins, form = (
            low[left],
            high[left],
            margins[left],
            Form(*(t[left] for t in form)),
        )
        pulls = self._pulls(form, margins)
        found, near = self._counterexample(low, high, pulls, moving)
        if found is None:
            self._halve(low, high, pulls.abs(), moving, near)
        return found

    def _next(self) -> tuple[Tensor, Tensor]:
        """Take the next boxes: one half the youngest, so that few are open at a time, the other
        half those nearest to a counterexample.
        """
        order = torch.arange(len(self.low), device=self.low.device)
        if len(order) > self.tool.batch:
            young = self.tool.batch // 2
            rest = order[:-young]
            nearest = self.near[rest].argsort(stable=True)
            order = torch.cat(
                [
                    rest[nearest[self.tool.batch - young :]].sort().values,
                    rest[nearest[: self.tool.batch - young]],
                    order[-young:],
                ]
            )
        keep, taken = order[: -self.tool.batch], order[-self.tool.batch :]
        low, high = self.low[taken], self.high[taken]
        self.low, self.high, self.near = self.low[keep], self.high[keep], self.near[keep]
        return low, high

    def _bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Form]:
        boxes, form = forward(self.graph, low, high, self.arithmetic)
        region = self.region.boxes(low, high)
        state = relax(self.graph, region, self.arithmetic, boxes)
        y = self.problem.y.expand(len(low))
        rows = self.problem.goal.rows(y, self.problem.classes).double()
        return shifted(joined_bounds(state, rows), self.problem.goal, y, self.problem.classes), form

    def _pulls(self, form: Form, margins: Tensor) -> Tensor:
        """Return how the margin that decides each box changes along every feature that moves, (P,
        d): of the worst case, its best margin.
        """
        cases = self.problem.goal.cases(self.problem.classes).to(margins.device)
        deciding = torch.where(
            cases == by_case(margins, cases).argmin(1, keepdim=True), margins, -torch.inf
        ).argmax(1)
        rows = self.problem.goal.rows(self.problem.y, self.problem.classes)[0].double()[deciding]
        return (form.g.flatten(2) @ rows[..., None])[..., 0]

    def _halve(
        self, low: Tensor, high: Tensor, weight: Tensor, moving: Tensor, near: Tensor
    ) -> None:
        """Put both halves of each box with the open ones; while there are few, halves of halves: a
        round costs the same for one box as for a dozen.
        """
        while True:
            low, high = self._halves(low, high, weight, moving)
            weight, near = weight.repeat(2, 1), near.repeat(2)
            if len(self.low) + len(low) >= _AT_LEAST:
                break
        self.low, self.high, self.near = (
            torch.cat([self.low, low]),
            torch.cat([self.high, high]),
            torch.cat([self.near, near]),
        )

    def _halves(
        self, low: Tensor, high: Tensor, weight: Tensor, moving: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = (high - low).flatten(1)
        # A feature that the linear part does not see still matters through what bends: none is
        # forgotten for ever.
        share = wide[:, moving] / self.width[moving]
        score = (weight / weight.amax(1, keepdim=True).clamp_min(1e-300) + 0.1) * torch.where(
            wide[:, moving] > 0, share, 0.0
        )
        return halves(low, high, moving[score.argmax(1)])

    def _counterexample(
        self, low: Tensor, high: Tensor, pulls: Tensor, moving: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Return a centre or a minimising corner that the model gets wrong, and the smaller of both
        margins for each box.
        """
        corner = ((low + high) / 2).flatten(1)
        corner[:, moving] = torch.where(
            pulls > 0, low.flatten(1)[:, moving], high.flatten(1)[:, moving]
        )
        points = torch.cat(
            [(low + high) / 2, corner.view_as(low), *self._scattered(low, high, moving)]
        )
        inside, worst = judged(self.problem, points)
        self.spent += len(points)
        hit = torch.nonzero(is_adversarial(worst)).flatten()
        return inside[hit[:1]] if len(hit) else None, torch.minimum(
            *worst[: 2 * len(low)].double().chunk(2)
        )

    def _scattered(self, low: Tensor, high: Tensor, moving: Tensor) -> list[Tensor]:
        """Return points spread evenly inside the boxes, other ones each time: a Kronecker sequence
        of the generalised golden ratio (Roberts 2018), no draw.

        Where several inequalities have to hold at once slopes often lead nowhere, while a good
        share of a box breaks them.
        """
        count, d = max(1, _SCATTERED // len(low)), len(moving)
        ratio = 2.0
        for _ in range(30):
            ratio = (1 + ratio) ** (1 / (d + 1))
        step = ratio ** -torch.arange(1, d + 1, dtype=torch.float64, device=low.device)
        number = self.scattered + torch.arange(
            1, count * len(low) + 1, dtype=torch.float64, device=low.device
        )
        self.scattered += len(number)
        share = (number[:, None] * step).frac()
        flat, wide = low.flatten(1).repeat(count, 1), (high - low).flatten(1).repeat(count, 1)
        flat[:, moving] += share * wide[:, moving]
        return [flat.view(-1, *low.shape[1:])] if d else []
