"""Do generated and mutated files do nothing but be read or refused, and would it be seen if they
did?
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.one_in(1)

FEW = {"npz": 200, "vnnlib": 80, "pt2": 80, "proof": 80, "csv": 80, "record": 20}
MANY = {"npz": 5000, "vnnlib": 5000, "pt2": 2000, "proof": 2000, "csv": 2000, "record": 500}


def harness() -> ModuleType:
    """Return the fuzzer, which stands among the benchmarks."""
    if "fuzz_files" not in sys.modules:
        path = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_files.py"
        spec = importlib.util.spec_from_file_location("fuzz_files", path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["fuzz_files"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["fuzz_files"])
    return sys.modules["fuzz_files"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FEW)
def test_files_are_read_or_refused(kind: str) -> None:
    counts, told = harness().run(kind, FEW[kind], seed=2)
    assert not told
    assert set(counts) == {"read", "refused"}
    assert sum(counts.values()) == FEW[kind]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MANY)
def test_many_files_are_read_or_refused(kind: str) -> None:
    counts, told = harness().run(kind, MANY[kind], seed=3)
    assert not told
    assert sum(counts.values()) == MANY[kind]


def _forever() -> None:
    while True:
        pass


FAULTS: dict[str, Callable[[Path], object]] = {
    "traceback": lambda mark: {}["nothing"],
    "memory": lambda mark: bytearray(2**31),
    "hang": lambda mark: _forever(),
    "crash": lambda mark: os._exit(9),
    "code": lambda mark: mark.mkdir(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_counted(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz = harness()
    monkeypatch.setattr(fuzz, "_SECONDS", 0.5)
    read = fuzz.Lists.read

    def faulty(self: object, path: Path) -> str:
        if path.stat().st_size % 3 == 0:
            FAULTS[fault](self.mark)  # type: ignore[attr-defined]
        return str(read(self, path))

    monkeypatch.setattr(fuzz.Lists, "read", faulty)
    counts, told = fuzz.run("csv", 6, seed=5)
    assert counts[fault] >= 1
    assert len(told) == counts[fault]
    assert sum(counts.values()) == 6
