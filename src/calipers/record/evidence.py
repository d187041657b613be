"""Facts, points, questions, runs and models as a record keeps them.

Plain numbers and NumPy arrays, no tensors.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["clean", "witness", "certificate", "attempt", "invalid"]
"""The kinds of facts.

`clean`: the model's answer at the point itself. `witness`: an adversarial example. `certificate`: a
proof. `attempt`: a tool was tried on the point; what it found or proved, if anything, is a fact of
its own. `invalid`: the point cannot be measured; the note says why.
"""

Guarantee = Literal["replayed", "real", "float64-checked", "float32-executed"]
"""In which arithmetic a claim holds.

`replayed` is for witnesses, which were run rather than proved.
"""


@dataclass(frozen=True)
class Evidence:
    """One admitted fact about one point.

    Args:
        point: Name of the point.
        kind: What sort of fact it is, see `Kind`.
        tool: The tool's repr, which is its configuration and its identity in the record.
        radius: In native units: the distance of a witness (computed in float64), the radius that a
            certificate proves (closed ball), the radius asked of an attempt, 0 for a misclassified
            point, NaN where a fact states none.
        margin: The worst margin of the witness, or the proved lower bound on it, in logits.
        guarantee: The arithmetic in which the claim holds, see `Guarantee`.
        prediction: The class that the model predicts, -1 where a fact states none.
        forwards: Forward passes spent on the point.
        backwards: Backward passes spent on the point.
        seconds: Time spent on the point.
        note: Remark in words.
        array: The witness itself, the bytes of a certificate's proof file, or None.
        asked_radius: The radius at which the tool was at work when it handed the fact over, NaN
            where it was not run on a block of points. A tool that is interrupted begins its block
            again; what it then does not find again is disregarded (see `Record.finish`).
        run: Number of the run that admitted the fact, 0 where none is known.
        confidence: Probability with which the claim holds: 1 for what was replayed or proved.

    Returns:
        A frozen dataclass. `array`, `asked_radius` and `run` do not count when facts are compared.

    Raises:
        Nothing: the referee judges facts before a record admits them.

    Example:
        >>> from calipers.record.evidence import Evidence
        >>> fact = Evidence("a", "certificate", "CROWN()", 0.01, guarantee="float64-checked")
        >>> fact.key
        ('a', 'certificate', 'CROWN()', 0.01)
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
    asked_radius: float = field(default=float("nan"), compare=False, repr=False)
    run: int = field(default=0, compare=False, repr=False)
    confidence: float = 1.0

    @property
    def key(self) -> tuple[str, str, str, float]:
        """The cells that identify a fact: admitting it twice changes nothing."""
        return (self.point, self.kind, self.tool, self.radius)


@dataclass(frozen=True)
class Point:
    """An input as the record keeps it.

    Args:
        name: Digest of the input's bytes and label, so that any run recognises it.
        position: Place of the point in its data set.
        label: The true class.
        radius: The radius asked, in native units.
        array: The input, or None where the record keeps a large input by its `digest` alone.
        target: Class of a targeted goal that has one for each point, else None.
        digest: Digest of the array (see `digest_of`), "" where the array itself is kept.
    """

    name: str
    position: int
    label: int
    radius: float
    array: NDArray[Any] | None = field(compare=False, repr=False)
    target: int | None = None
    digest: str = field(default="", compare=False, repr=False)


def digest_of(array: NDArray[Any]) -> str:
    """Return the hexadecimal digest of an array's type, shape and bytes."""
    h = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()


@dataclass(frozen=True)
class Question:
    """What was asked: model, threat model and goal, but not the points.

    Args:
        fingerprint: Digest that names the question.
        title: Name of the model.
        facts: Descriptions for people, JSON-ready.
        data: The threat model and the goal themselves: dicts with arrays, from which both can be
            built again. None where they are known in words alone.
    """

    fingerprint: str
    title: str
    facts: dict[str, Any] = field(default_factory=dict, compare=False)
    data: dict[str, Any] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Run:
    """One call that measured a question.

    Args:
        question: Fingerprint of the question.
        seed: Seed of all random draws.
        plan: Name of the plan, then the names of its tools.
        radius: The radius asked, or the lowest and the highest where points have their own.
        radii: The radii of a curve, () where none was asked.
        versions: Versions of calipers, torch and NumPy.
        title: Name of the model.
        argv: The command line, () where there was none.
        notes: What the run itself wrote down.
        time: When it began, in UTC.
        number: Names the run in evidence; 0 before it is kept.
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
    """A program that was measured, and what it is recognised by.

    Args:
        digest: Digest of the program and its weights.
        name: Name under which it was measured.
        met: When it was first measured, in UTC.
        circumstances: Machine, libraries and threads of that first time.
        parts: Parts of its identity, see models/identity.py.
        points: (M, *D), a few inputs.
        logits: (M, K), its outputs there, by which it is recognised.
    """

    digest: str
    name: str
    met: str
    circumstances: dict[str, Any] = field(compare=False)
    parts: dict[str, str] = field(compare=False, repr=False)
    points: NDArray[Any] = field(compare=False, repr=False)
    logits: NDArray[Any] = field(compare=False, repr=False)
