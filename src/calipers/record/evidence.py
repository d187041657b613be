"""What is one admitted fact about one point? Plain numbers, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["clean", "witness", "certificate", "attempt", "invalid"]
"""`clean`: the model's answer at the point itself. `witness`: an adversarial example.
`certificate`: a proof. `attempt`: a tool tried and settled nothing. `invalid`: the point cannot be
measured; the note says why.
"""

Guarantee = Literal["replayed", "real", "float64-checked", "float32-executed"]
"""In which arithmetic the claim holds; `replayed` is for witnesses, which were run rather than
proved.
"""


@dataclass(frozen=True)
class Evidence:
    """One admitted fact.

    `radius` is in native units: a witness's distance (float64), the radius a certificate proves
    (closed ball), 0 for a misclassified point, NaN where a fact states none. `margin` is the worst
    margin of the witness, or the proved lower bound of it, in logits. `tool` is the tool's repr:
    configuration and identity in one. `array` is the witness itself, the bytes of a certificate's
    proof file, or None. `asked` is the radius at which the tool was at work when it handed the fact
    over, NaN where it was not dealt a block of points: should the tool be interrupted, it begins
    the block again, and what it then does not find again is passed over.
    """

    point: str
    kind: Kind
    tool: str
    radius: float = float("nan")
    margin: float = float("nan")
    guarantee: Guarantee = "replayed"
    prediction: int = -1
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    note: str = ""
    array: NDArray[Any] | None = field(default=None, compare=False, repr=False)
    asked: float = field(default=float("nan"), compare=False, repr=False)

    @property
    def key(self) -> tuple[str, str, str, float]:
        """What makes two facts the same fact: admitting it twice changes nothing."""
        return (self.point, self.kind, self.tool, self.radius)


@dataclass(frozen=True)
class Point:
    """One input as the record keeps it; `name` is a digest of its bytes and label, so that any run
    recognises it.
    """

    name: str
    position: int
    label: int
    radius: float
    array: NDArray[Any] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Question:
    """What was asked, as JSON-ready facts: model, threat, goal. The fingerprint names it; points
    are not part of it.
    """

    fingerprint: str
    title: str
    facts: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Model:
    """A program that was measured: its digest, name and parts (see problem/identity.py), when and
    under what `circumstances` it was met first, and its `logits` (M, K) at a few `points` (M, *D),
    by which it is known again.
    """

    digest: str
    name: str
    met: str
    circumstances: dict[str, Any] = field(compare=False)
    parts: dict[str, str] = field(compare=False, repr=False)
    points: NDArray[Any] = field(compare=False, repr=False)
    logits: NDArray[Any] = field(compare=False, repr=False)


def as_array(values: Any) -> NDArray[np.float64]:
    """Return float64 numbers from any sequence."""
    return np.asarray(values, dtype=np.float64)
