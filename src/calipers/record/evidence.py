"""What is one admitted fact about one point? Plain numbers, no tensors."""

from __future__ import annotations

import hashlib
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
    the block again, and what it then does not find again is passed over. `run` is the number of the
    run that admitted it, 0 where none is known. `confidence` is the probability with which the
    claim holds: 1 for what was replayed or proved.
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
    run: int = field(default=0, compare=False, repr=False)
    confidence: float = 1.0

    @property
    def key(self) -> tuple[str, str, str, float]:
        """What makes two facts the same fact: admitting it twice changes nothing."""
        return (self.point, self.kind, self.tool, self.radius)


@dataclass(frozen=True)
class Point:
    """One input as the record keeps it; `name` is a digest of its bytes and label, so that any run
    recognises it.

    `array` is None where the record keeps a large input by its `digest` alone (see `digest_of`);
    `target` is the class of a targeted goal that has one for each point.
    """

    name: str
    position: int
    label: int
    radius: float
    array: NDArray[Any] | None = field(compare=False, repr=False)
    target: int | None = None
    digest: str = field(default="", compare=False, repr=False)


def digest_of(array: NDArray[Any]) -> str:
    """Return the name by which an input is known again: a digest of its type, shape and bytes."""
    h = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()


@dataclass(frozen=True)
class Question:
    """What was asked: model, threat, goal. The fingerprint names it; points are not part of it.

    `facts` are words for people, JSON-ready. `data` are the threat and the goal themselves, dicts
    with arrays from which both can be made again (None: they are known in words alone).
    """

    fingerprint: str
    title: str
    facts: dict[str, Any] = field(default_factory=dict, compare=False)
    data: dict[str, Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Run:
    """One call that measured a question: when, with which seed, plan, radius and versions.

    `radius` is the one asked, or the lowest and the highest where points have their own; `radii`
    are those of a curve. `argv` is the command line, empty where there was none. `notes` are what
    the run itself wrote down. `number` names it in evidence; 0 before it is kept.
    """

    question: str
    seed: int
    plan: tuple[str, ...]
    radius: tuple[float, ...]
    radii: tuple[float, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    title: str = ""
    argv: tuple[str, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    time: str = ""
    number: int = 0


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
