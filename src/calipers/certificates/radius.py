"""The largest radius that a certifier proves, searched for each point."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from calipers.bounds.interval import Box
from calipers.bounds.rounding import SEARCH, arithmetic_of
from calipers.certificates.crown import Bounder, batches, written
from calipers.errors import BadInput
from calipers.problem.capabilities import Capabilities
from calipers.problem.interrupts import OutOfTime, give_way, shortened
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim, Forecast, Foreseeing

# shares of the found radius tried in the confirming pass
_BACK_OFF = (
    1.0,
    1 - 1e-6,
    1 - 5e-6,
    1 - 1e-4,
    0.99,
    0.98,
    0.96,
    0.93,
    0.9,
    0.8,
    0.5,
)
# largest factor by which a radius grows while nothing has failed: a failure at a large radius costs
# the most rows of all
_STRIDE = 1.5
_SEARCHING = 0.6  # share of a limited time; the rest confirms what was found
# times the tolerance: aim this much below the predicted zero, so that the proof there succeeds
_CAUTION = 0.5


@dataclass(frozen=True)
class CertifiedRadius:
    """The largest radius that a certifier proves, for each point.

    The lower bound of the worst margin falls with the radius. Each round asks all unsettled points
    at once, each at the zero of the line through its last success and failure (kept off both ends).
    Boxes of a failed, larger radius hold at every smaller one, and are intersected with the new
    ones. The search runs in float32; what is claimed is confirmed in float64 with rounding
    accounted for, and only radii confirmed in that pass are claimed (a bound need not be monotone
    in the radius: the claim is the largest radius *proved*). The guarantee is the certifier's. The
    problem's radius is where the search begins.

    Cost: up to `rounds` + 1 evaluations of the certifier, the later ones on fewer points and fewer
    unstable elements.

    Args:
        certifier: The certifier whose bound is searched, such as `CROWN()`.
        rounds: Largest number of rounds of the search.
        tolerance: A point is settled when the predicted gain is below this share of its radius.
        proofs: Write the certifier's proof file at the radius with every claim, if the certifier
            writes any.

    Raises:
        BadInput: If `rounds` < 1, or `tolerance` is not between 0 and 1.

    Example:
        >>> import torch
        >>> import calipers
        >>> from calipers.certificates import CROWN, CertifiedRadius
        >>> _ = torch.manual_seed(5)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
        ... )
        >>> x = torch.tensor([[0.2, 0.7]])
        >>> problem = calipers.Problem.pose(model, x, None, calipers.Ball("linf", 0.1))
        >>> [claim] = CertifiedRadius(CROWN())(problem)
        >>> f"{claim.radius.item():.2f}"
        '0.30'
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        "certifier",
        "largest certified radius",
        "a search over the radius of a bound such as CROWN",
        substitutions=True,
        inner=("certifier",),
        needs="operations",
    )

    certifier: Bounder
    rounds: int = 12
    tolerance: float = 1e-3
    proofs: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.tolerance < 1:
            raise BadInput(
                "CertifiedRadius takes rounds >= 1 (usually 12) and a tolerance between 0 and 1 "
                f"(usually 0.001), got {self.rounds}, {self.tolerance}"
            )

    def __call__(self, problem: Problem, *, seed: int = 0) -> Iterator[Claim]:
        """Yield a claim for every point, a batch of points at a time."""
        # The model is evaluated here, not in the threads: holding it still changes its flags.
        searches = [(_RadiusState(self, problem.take(index)), index) for index in batches(problem)]
        yield from problem.executor.map(
            lambda pair: pair[0].claim(pair[1]), searches, device=problem.x.device
        )
        # A search that was cut short claims what it has; only now is the interruption raised.
        give_way()

    def forecast(self, problem: Problem) -> Forecast:
        """Forecast the cost from the certifier's.

        Rounds in float32 take half of what the certifier does, and get cheaper; the confirming pass
        takes as long as it. That the certifier is hopeless at the problem's radius is dropped:
        smaller radii may be proved.
        """
        told = (
            self.certifier.forecast(problem)
            if isinstance(self.certifier, Foreseeing)
            else Forecast(0.0)
        )
        return Forecast(told.seconds * (1 + self.rounds / 4), told.held)


class _RadiusState:
    """The state of the search for one batch of points.

    `low` proved and `high` failed radii with the margins bounded there, and `known`, the boxes of
    the failure.
    """

    def __init__(self, tool: CertifiedRadius, problem: Problem) -> None:
        self.tool, self.problem, self.arithmetic = (
            tool,
            problem,
            arithmetic_of(tool.certifier.guarantee),
        )
        clean = problem.goal.worst(problem.margins(problem.classifier.logits64(problem.x))).double()
        n, device = len(problem), problem.x.device
        self.low, self.low_margin = torch.zeros(n, dtype=torch.float64, device=device), clean
        self.high, self.high_margin = (
            torch.full_like(self.low, torch.inf),
            torch.full_like(self.low, -torch.inf),
        )
        self.next = problem.threat.radii(n).to(device)
        # a radius of 0 is no hint where to begin: take 1e-3, or the next count
        self.next = torch.where(
            self.next > 0,
            self.next,
            torch.maximum(problem.threat.next(self.low), torch.full_like(self.low, 1e-3)),
        )
        self.rows = torch.zeros(n, dtype=torch.long, device=device)
        self.known: dict[int, Box] | None = None
        self.open, self.clean = clean > 0, clean
        self.side = torch.zeros(n, dtype=torch.bool, device=device)  # was the last radius proved?

    def claim(self, index: Tensor) -> Claim:
        """Search, then confirm.

        Where the time is limited, the confirmation has what the search leaves of it.
        """
        wide = self.problem.threat.widest(self.problem.x)
        with contextlib.suppress(OutOfTime), shortened(_SEARCHING):
            for _ in range(self.tool.rounds):
                active = torch.nonzero(self.open).flatten()
                if not len(active):
                    break
                self._ask(active)
                self._aim(wide)
        radius, margin, files = self._confirm()
        return Claim(
            index,
            radius,
            margin,
            self.arithmetic.guarantee,
            torch.zeros_like(self.rows),
            self.rows,
            files,
        )

    def _ask(self, active: Tensor) -> None:
        radius = self.next[active]
        known = (
            None if self.known is None else {k: box.take(active) for k, box in self.known.items()}
        )
        bound = self.tool.certifier.bound(self.problem.take(active).at(radius), SEARCH, known)
        self.rows[active] += bound.rows
        worst = bound.worst.double()
        proved = worst > 0
        # The Illinois rule: the margin of an end that stays while the other moves twice is halved,
        # or the zero of a curved bound would be approached from one side only.
        again = proved == self.side[active]
        self.side[active] = proved
        self.high_margin[active] = torch.where(
            proved & again, self.high_margin[active] / 2, self.high_margin[active]
        )
        self.low_margin[active] = torch.where(
            ~proved & again, self.low_margin[active] / 2, self.low_margin[active]
        )
        self.low[active] = torch.where(proved, radius, self.low[active])
        self.low_margin[active] = torch.where(proved, worst, self.low_margin[active])
        self.high[active] = torch.where(proved, self.high[active], radius)
        self.high_margin[active] = torch.where(proved, self.high_margin[active], worst)
        self._remember(
            active[~proved],
            {k: box.take(torch.nonzero(~proved).flatten()) for k, box in bound.boxes.items()},
        )

    def _remember(self, failed: Tensor, boxes: dict[int, Box]) -> None:
        """Keep the boxes of each point's smallest failed radius.

        Where none failed yet nothing is known.
        """
        if self.known is None:
            shape = {k: (len(self.low), *box.lower.shape[1:]) for k, box in boxes.items()}
            self.known = {
                k: Box(
                    box.lower.new_full(shape[k], -torch.inf),
                    box.lower.new_full(shape[k], torch.inf),
                )
                for k, box in boxes.items()
            }
        for k, box in boxes.items():
            self.known[k].lower[failed], self.known[k].upper[failed] = box.lower, box.upper

    def _aim(self, wide: Tensor) -> None:
        """Choose each point's next radius, and settle those that gain little."""
        unbounded = self.high.isinf()
        zero = self.low + (self.high - self.low) * self.low_margin / (
            self.low_margin - self.high_margin
        )
        inside = torch.where(self.high_margin.isfinite(), zero, (self.low + self.high) / 2)
        # The bound is steeper near the failure, so its zero lies beyond a chord's only when the
        # chord is long: keep off both ends while far apart.
        edge = 0.05 * (self.high - self.low)
        guarded = torch.maximum(
            torch.minimum(inside, self.high - edge),
            self.low + torch.minimum(edge, inside - self.low),
        )
        aim = guarded * (1 - _CAUTION * self.tool.tolerance)
        # Nothing has failed yet: the bound falls faster and faster, so its zero lies before that of
        # the line from the clean margin through the last success.
        beyond = self.low * self.clean / (self.clean - self.low_margin).clamp_min(1e-300)
        wanted = self.problem.threat.least(
            torch.where(
                unbounded, torch.minimum(torch.minimum(beyond, _STRIDE * self.low), wide), aim
            )
        )
        # where radii are counts and none lies in between, the next count
        self.next = torch.where(wanted > self.low, wanted, self.problem.threat.next(self.low))
        gain = torch.where(unbounded, wide - self.low, torch.minimum(self.high, inside) - self.low)
        self.open = (
            self.open
            & (gain > self.tool.tolerance * self.low)
            & (self.next > self.low)
            & (self.next < self.high)
            & (self.next <= wide)
        )

    def _confirm(self) -> tuple[Tensor, Tensor, tuple[bytes | None, ...] | None]:
        """Return the radii proved in checked float64.

        With them the margins bounded there, and the proofs where they are written.
        """
        certifier: Any = self.tool.certifier
        if self.tool.proofs and hasattr(certifier, "proofs"):
            certifier = replace(certifier, proofs=True)
        radius, margin = (
            torch.zeros_like(self.low),
            torch.where(self.low > 0, -torch.inf, self.low_margin),
        )
        left = torch.nonzero(self.low > 0).flatten()
        files: list[bytes | None] | None = (
            [None] * len(radius) if getattr(certifier, "proofs", False) else None
        )
        for share in _BACK_OFF:
            if not len(left):
                break
            asked = self.problem.threat.least(self.low[left] * share)
            try:
                bound = certifier.bound(self.problem.take(left).at(asked), self.arithmetic)
            except OutOfTime:
                break
            self.rows[left] += bound.rows
            proved = bound.worst > 0
            radius[left[proved]], margin[left] = asked[proved], bound.worst
            new = written(bound.prove, proved, left, len(radius))
            files = (
                files
                if new is None
                else [a if b is None else b for a, b in zip(files or new, new, strict=True)]
            )
            left = left[~proved]
        return radius, margin, None if files is None else tuple(files)
