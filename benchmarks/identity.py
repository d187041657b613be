"""What does it cost that a record knows its models and chains its rows? Shares of the plan quick on
500 images, in processor time.

python benchmarks/identity.py
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import calipers
from calipers.interchange import load, load_data
from calipers.measurement import run
from calipers.models.classifier import Classifier
from calipers.record import chain
from calipers.record.evidence import Evidence, Question
from calipers.record.record import Record

SPENT: defaultdict[str, float] = defaultdict(float)
FACTS, BLOCK = 4096, 256


def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the function, with its time noted."""

    def called(*given: Any, **named: Any) -> Any:
        begun = time.process_time()
        try:
            return call(*given, **named)
        finally:
            SPENT[name] += time.process_time() - begun

    return called


def appending() -> float:
    """Return the seconds that appending witnesses of 28 x 28 takes."""
    facts = [
        Evidence(f"p{i}", "witness", "PGD()", 0.1, array=np.zeros(784, np.float32))
        for i in range(FACTS)
    ]
    with tempfile.TemporaryDirectory() as folder, Record(Path(folder) / "run.calipers") as ledger:
        ledger.ask(Question("q", "q"), [])
        begun = time.process_time()
        for i in range(0, FACTS, BLOCK):
            ledger.append("q", facts[i : i + BLOCK])
        return time.process_time() - begun


def main() -> None:
    """Print the shares."""
    torch.set_num_threads(1)
    run.acquaint = timed(run.acquaint, "known again")  # type: ignore[attr-defined]
    Classifier.identity = timed(Classifier.identity, "program looked at")  # type: ignore[method-assign]
    x, y = load_data(None, None, 500)
    threat = calipers.Ball("linf", 0.1)
    calipers.measure(load("mnist-robust"), x[:10], y[:10], threat, plan="quick")
    SPENT.clear()
    with tempfile.TemporaryDirectory() as folder, Record(Path(folder) / "run.calipers") as ledger:
        begun = time.process_time()
        calipers.measure(load("mnist-robust"), x, y, threat, plan="quick", record=ledger)
        whole = time.process_time() - begun
        begun = time.process_time()
        ledger.ask(Question("q", "q"), [])  # so that the chain is read again
        facts = ledger.trust().facts
        print(
            f"quick, 500 images: {whole:.2f} s; reading the chain of {facts} facts: "
            f"{1000 * (time.process_time() - begun):.0f} ms"
        )
    for name, seconds in SPENT.items():
        print(f"  {name}: {1000 * seconds:.1f} ms, {100 * seconds / whole:.2f} %")
    chained = appending()
    chain.Chain.add = lambda self, table, row: None  # type: ignore[method-assign]
    print(f"appending {FACTS} witnesses: {chained:.3f} s, without the chain {appending():.3f} s")


if __name__ == "__main__":
    main()
