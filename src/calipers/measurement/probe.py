"""Recognition of models: whether a model is the one of a record.

Its parts say so, and its logits at a few recorded points, which reveal what no part shows.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calipers.errors import RecordError
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.record.evidence import Model
from calipers.record.record import Record
from calipers.record.schema import now

_POINTS = 8
# multiple of the rounding unit of the largest logit by which logits may differ on another machine,
# library or number of threads
_ROUNDINGS = 1024
_MOST = 0.05  # share of the largest logit that is never exceeded, whatever the precision


def acquaint(problem: Problem, name: str, ledger: Record) -> None:
    """Enter the model into the record, or recognise it there.

    This is done before anything is asked under its name. Raises `RecordError` where the record
    holds evidence about another program of that name, or where the model's outputs differ from
    those recorded.
    """
    model = problem.classifier
    digest = model.digest()
    if digest in ledger.acquainted:
        return
    known = {m.digest: m for m in ledger.models()}
    for q in ledger.questions():
        held = q.facts.get("model")
        other = held.get("hash") if isinstance(held, dict) else None
        if q.title == name and other != digest:
            raise RecordError(
                f"{told_apart(model, name, known.get(str(other)), str(other), ledger)} "
                f"{_advice(ledger)}"
            )
    if digest in known:
        if wrong := answers_differ(model, known[digest]):
            raise RecordError(
                f"{_where(ledger)} holds evidence about {name} {digest[:8]}, "
                f"{_met(known[digest])}; {wrong}. {_advice(ledger)}"
            )
    else:
        points = problem.x[:_POINTS].detach().nan_to_num(0.0)
        ledger.meet(
            Model(
                digest,
                name,
                now(),
                _circumstances(model),
                dict(model.identity().parts),
                points.cpu().numpy(),
                _logits(model, points),
            )
        )
    ledger.acquainted.add(digest)


def told_apart(
    model: Classifier, name: str, held: Model | None, digest: str, ledger: Record
) -> str:
    """Return the sentence on how this program differs from the recorded one."""
    begin = f"{_where(ledger)} holds evidence about {held.name if held else name} {digest[:8]}"
    if held is None:
        return (
            f"{begin}, measured before a model's program belonged to its identity; whether {name} "
            f"{model.digest()[:8]} is the same program cannot be told."
        )
    return (
        f"{begin}, {_met(held)}; this is {name} {model.digest()[:8]}: "
        f"{model.identity().differences(held.parts)}."
    )


def answers_differ(model: Classifier, held: Model) -> str:
    """Return in words how the model's logits differ from the recorded ones.

    "" where they agree. Under the same circumstances no bit may differ, unless the model itself
    varies; under other circumstances rounding may.
    """
    points = torch.as_tensor(held.points).to(device=model.device, dtype=model.dtype)
    z, circumstances = _logits(model, points), _circumstances(model)
    if z.shape != held.logits.shape:
        return (
            f"the same code and weights now give logits of shape {z.shape[1:]}, not "
            f"{held.logits.shape[1:]}"
        )
    if np.array_equal(z, held.logits, equal_nan=True):
        return ""
    alike = circumstances == held.circumstances and bool(circumstances["repeats"])
    finite = np.abs(held.logits[np.isfinite(held.logits)])
    allowed = (
        0.0 if alike else min(_ROUNDINGS * _rounding(model), _MOST) * float(finite.max(initial=0.0))
    )
    with np.errstate(invalid="ignore"):
        apart = np.where(
            (z == held.logits) | (np.isnan(z) & np.isnan(held.logits)), 0.0, np.abs(z - held.logits)
        )
    apart = np.where(np.isnan(apart), np.inf, apart).max(1)
    if not bool((apart > allowed).any()):
        return ""
    i = int(apart.argmax())
    return (
        f"the same code and weights now answer otherwise: a logit at recorded point {i} differs by "
        f"{apart[i]:.3g}, where {allowed:.2g} is allowed. Something "
        "outside of what can be looked into has changed: a file, a session, a library"
    )


def _logits(model: Classifier, points: torch.Tensor) -> NDArray[np.float64]:
    """Return the model's logits at the points in one batch, not counted."""
    with model.frozen(), torch.no_grad():
        return np.asarray(model.network(points.clone()).double().cpu().numpy())


def _circumstances(model: Classifier) -> dict[str, Any]:
    """Return what the last bits of a logit depend on besides the model.

    `repeats` says whether two runs agree in them.
    """
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()} {_processor()} "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "device": f"{model.device.type} {gpu}".strip(),
        "repeats": model.device.type == "cpu" and model.repeats,
    }


def _rounding(model: Classifier) -> float:
    tensor_cores = model.device.type == "cuda" and (
        torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    )
    return max(torch.finfo(model.dtype).eps, 2.0**-11 if tensor_cores else 0.0)


@functools.cache
def _processor() -> str:
    """Return what distinguishes this processor from others.

    That is its name, or that of the host, and the sizes of its caches where the system tells them.
    """
    levels = [
        name
        for name in getattr(os, "sysconf_names", {})
        if name.startswith("SC_LEVEL") and name.endswith("SIZE")
    ]
    return " ".join(
        [
            platform.processor() or platform.node(),
            *(str(os.sysconf(name)) for name in sorted(levels)),
        ]
    )


def _where(ledger: Record) -> str:
    return ledger.path.name if ledger.path else "the record"


def _met(held: Model) -> str:
    return f"measured {held.met.replace('T', ' ').replace('+00:00', ' UTC')}"


def _advice(ledger: Record) -> str:
    again = (
        Path(ledger.path.name).with_stem(f"{ledger.path.stem}-2").name
        if ledger.path
        else "another ledger"
    )
    return (
        "Evidence about one says nothing about the other: measure into another record (--record "
        f"{again}), or give the model a name of its own (title)."
    )
