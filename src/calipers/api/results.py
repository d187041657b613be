"""What `measure`, `attack` and `certify` return."""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from calipers.errors import BadInput
from calipers.record.bracket import Bracket
from calipers.record.record import Record
from calipers.report.report import (
    AtRadius,
    PointRow,
    Rate,
    RobustAccuracy,
    Summary,
    at_confidence,
    told_rows,
)


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Everything that a measurement found.

    Args:
        summary: All numbers that a report shows.
        bracket: Lower and upper bounds on the distance of every point, in the order of the points.
        ledger: The record with all evidence, in memory where no file was named.
        finished: Whether the plan was carried out to its end; False where the time limit or Ctrl-C
            stopped the run.

    Raises:
        OSError: By `report`, where the page cannot be written.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> found = calipers.measure(model, x, y, calipers.Ball("linf", 0.1), plan="quick")
        >>> [row.verdict for row in found.points]
        ['robust', 'robust', 'robust', 'robust']
    """

    summary: Summary
    bracket: Bracket
    ledger: Record
    finished: bool

    @property
    def robust_accuracy(self) -> RobustAccuracy:
        """Bounds on the robust accuracy at the radius of the threat.

        `certified <= truth <= attacked` holds on these points; `interval` is a confidence interval
        for the population that they were drawn from.
        """
        return self.summary.robust

    @property
    def clean_accuracy(self) -> Rate:
        """The share of points that the model classifies correctly."""
        return self.summary.clean

    @property
    def curve(self) -> tuple[AtRadius, ...]:
        """The robust accuracy at each radius of a run over several radii.

        Each entry has a `radius` and `robust`, which is read like `robust_accuracy`. Empty for a
        run at one radius.
        """
        return self.summary.at_radii

    @property
    def points(self) -> tuple[PointRow, ...]:
        """One row for each point: label, prediction, verdict, bounds, tools, cost."""
        return self.summary.rows

    def at_confidence(self, confidence: float) -> Result:
        """Return the same result with intervals at another confidence than 95 %.

        Raises:
            BadInput: The confidence is not between 0 and 1.

        Example:
            >>> import calipers
            >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
            >>> found = calipers.measure(model, x, y, calipers.Ball("linf", 0.1), plan="quick")
            >>> wider = found.at_confidence(0.99).robust_accuracy
            >>> wider.interval[0] < found.robust_accuracy.interval[0]
            True
        """
        return dataclasses.replace(self, summary=at_confidence(self.summary, confidence))

    def report(self, path: str | Path = "report.html") -> Path:
        """Write the report as one HTML page, and return its path."""
        from calipers.report.render import render_html

        return render_html([self.summary], path)

    def to_frame(self) -> Any:
        """Return `points` as a pandas data frame, one row a point.

        Where the classes have names, `label` and `prediction` are these. Where columns or symbols
        have names, `taken_for` and `changes` tell the nearest stored example of each point.

        Raises:
            BadInput: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise BadInput(
                "to_frame needs pandas: pip install pandas; `points` holds the same rows"
            ) from error
        return pandas.DataFrame(told_rows(self.ledger, self.summary))

    def __str__(self) -> str:
        from calipers.report.text import render_text

        return render_text([self.summary])

    def __repr__(self) -> str:
        return f"<Result: {self.robust_accuracy}>"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True, eq=False, repr=False)
class AttackResult:
    """The result of one attack, as far as the referee admits it.

    Args:
        candidates: The nearest adversarial example of each point (N, *D), and where none was found
            the last point tried.
        distance: Distance of that example (N,), float64: infinite where none was found, 0 where the
            model is wrong at the point itself.
        margin: The worst margin at the candidate (N,), in logits; negative where it is
            misclassified.
        success: Whether the example lies within the radius asked (N,). An attack that looks for the
            nearest example may end beyond it.
        forwards: Forward passes spent on each point (N,).
        backwards: Backward passes spent on each point (N,).
        notes: How model and data were read, where that is not obvious.

    Raises:
        Nothing: it holds what was found.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-plain"), calipers.load_data(None, points=4)
        >>> found = calipers.attack(model, x, y, calipers.Ball("linf", 0.1), "PGD(steps=20)")
        >>> found.candidates.shape, found.success.tolist()
        (torch.Size([4, 1, 28, 28]), [True, True, True, False])
    """

    candidates: Tensor
    distance: Tensor
    margin: Tensor
    success: Tensor
    forwards: Tensor
    backwards: Tensor
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        found = self.distance[self.distance.isfinite()]
        middle = f", median distance of examples {float(found.median()):.4g}" if len(found) else ""
        count = f"{int(self.success.sum())} of {len(self.success)}"
        return f"<AttackResult: {count} within the radius{middle}>"


@dataclass(frozen=True, eq=False, repr=False)
class CertifyResult:
    """The result of one certifier, as far as the referee admits it.

    Args:
        radius: Radius within which no adversarial example exists (N,), float64, in native units; 0
            where nothing is proven.
        certified: Whether that covers the radius asked (N,).
        margin: Lower bound on the worst margin within the radius (N,), float64, in logits; minus
            infinity where the tool's claim is not admitted.
        guarantee: What is proven, and in which arithmetic: "float64-checked" or "float32-executed".
        notes: How model and data were read, where that is not obvious.

    Raises:
        Nothing: it holds what was found.

    Example:
        >>> import calipers
        >>> model, (x, y) = calipers.load("mnist-robust"), calipers.load_data(None, points=4)
        >>> found = calipers.certify(model, x, y, calipers.Ball("linf", 0.1), "IBP")
        >>> found.guarantee, found.radius.shape
        ('float64-checked', torch.Size([4]))
    """

    radius: Tensor
    certified: Tensor
    margin: Tensor
    guarantee: str
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        proved = f"{int(self.certified.sum())} of {len(self.certified)} at the radius"
        return f"<CertifyResult: {proved}, {self.guarantee or 'nothing claimed'}>"


__all__ = ["AttackResult", "CertifyResult", "Result"]
