"""Branch and bound on the input, for inputs of few features.

Boxes of the input are halved until every one is proved or breaks. Boxes of intermediate values come
from affine forms pushed forward, and from backward bound propagation where these leave neurons
unstable (without the latter one ACAS Xu property took 24,589 boxes, with it 129). Everything is
computed in checked float64 at once, so a closed box is a proof. A box is halved along the feature
on which its worst margin depends most. Centres, minimising corners and points spread evenly inside
are tried as adversarial examples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from calipers.bounds.backward import joined_bounds, relax
from calipers.bounds.forward import Form, forward
from calipers.bounds.interval import halves
from calipers.bounds.rounding import Guarantee, arithmetic_of, plain_sums
from calipers.certificates.crown import shifted
from calipers.certificates.examples import judged
from calipers.certificates.guaranteed import check_proofs, posed, stated
from calipers.certificates.input_split_proof import ClosedBoxes
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.goals import by_case, is_adversarial
from calipers.problem.problem import Problem
from calipers.problem.protocols import Attempt, Claim
from calipers.threats.ball import Ball

_SCATTERED = 4096  # points tried in every round, besides centres and corners
_AT_LEAST = 64  # boxes of a round after the first
_HELD = 2**30  # bytes of boxes held at once; beyond them the search gives up


@dataclass(frozen=True)
class InputSplit:
    """Branch and bound on the input: its box is halved until decided.

    For inputs of few features (ACAS Xu, control). Decides every point within `seconds` of its own:
    the whole radius is certified, or an adversarial example found. Complete but for time and
    memory, and for points whose worst margin is 0 exactly. Where more than `features` features can
    move, the norm's ball is no box, or constraints tie features together, nothing is claimed.

    Cost of a box: as many forward passes as features can move, and CROWN for what is still
    unstable.

    Args:
        seconds: Time limit for each point.
        batch: Boxes bounded at once.
        features: Largest number of features that may move; more make halving hopeless.
        proofs: Write a proof file with every claim, for which CROWN alone has to close every box.
            Only for "float64-checked".
        guarantee: "float64-checked" (real arithmetic) or "float32-executed" (the network as float32
            runs it), as for `CROWN`.

    Raises:
        BadInput: If `seconds` <= 0, `batch` or `features` < 1, if `guarantee` is unknown, or if
            proof files are asked for together with "float32-executed"; when called, if the threat
            is not a `Ball`.
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
        """Yield a claim for every point, and the adversarial examples found.

        An `Attempt` precedes the claim of a point where an adversarial example was met on the way.
        """
        if not isinstance(problem.threat, Ball):
            raise BadInput(
                "InputSplit halves boxes, and between two symbols there is nothing: take "
                "BranchAndBound or Enumeration"
            )
        for i in range(len(problem)):
            here = torch.tensor([i], device=problem.x.device)
            search = _BoxSearch(self, problem.take(here))
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


class _BoxSearch:
    """The search for one point: its open boxes `low`, `high (P, *D)`."""

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
            ClosedBoxes(problem, self.graph, region, self.arithmetic)
            if tool.proofs and self.fits
            else None
        )

    def run(self) -> Tensor | None:
        """Halve until nothing is open, a witness is found, or time is up.

        Return the adversarial example (1, *D), or None.
        """
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
        """Take the next boxes out of the open ones.

        Half are the youngest, so that few are open at a time, the other half those nearest to an
        adversarial example.
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
        """Return the gradient of each box's deciding margin, (P, d).

        Along every feature that moves, by the linear part of the affine form; the deciding margin
        is the best margin of the worst case.
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
        """Add both halves of each box to the open ones.

        While there are few, the halves are halved again: a round costs the same for one box as for
        a dozen.
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
        # A feature with gradient 0 in the linear part may still matter through unstable neurons:
        # the 0.1 makes sure that every feature is halved sooner or later.
        share = wide[:, moving] / self.width[moving]
        score = (weight / weight.amax(1, keepdim=True).clamp_min(1e-300) + 0.1) * torch.where(
            wide[:, moving] > 0, share, 0.0
        )
        return halves(low, high, moving[score.argmax(1)])

    def _counterexample(
        self, low: Tensor, high: Tensor, pulls: Tensor, moving: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Return a centre or corner that the model gets wrong, if any.

        With it the smaller margin of the centre and the minimising corner of each box, (P,).
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
        """Return points spread evenly inside the boxes, new ones each time.

        A Kronecker sequence of the generalised golden ratio (Roberts 2018), nothing random. Where
        several inequalities have to hold at once gradients often lead nowhere, while a good share
        of a box satisfies them.
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
