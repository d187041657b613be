"""Does a run say at its end which tests need files that lie beside the project?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from beside import CASES, DATA, FOLDER, LONGEST, given, needs, reason, summary

HERE = Path(__file__).resolve().parent
TESTS = """
import pytest
import beside

@beside.needs(beside.DATA / "none of this")
@pytest.mark.parametrize("k", range(3))
def test_of_a_mark(k): pass

def test_of_a_call(): beside.given(beside.CASES / "nor of this")

@pytest.mark.skip("needs ../elsewhere")
def test_of_another_reason(): pass

def test_that_passes(): pass
"""


def ran(folder: Path, *words: str) -> str:
    """Return what a run of `TESTS` under the shelf's own conftest.py printed."""
    (folder / "test_some.py").write_text(TESTS)
    (folder / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    one_in(n)\n")
    plugins = ["-p", "no:cacheprovider", "-p", "no:logging"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, *words, "test_some.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=False,
    ).stdout


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_end_of_a_run_counts_and_names_what_was_skipped(tmp_path: Path, workers: str) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    printed = ran(tmp_path, "-n", workers)
    (line,) = [line for line in printed.splitlines() if "need ../" in line]
    assert line == (
        "1 test needs ../shared/cases: test_of_a_call; 3 tests need ../shared/data: test_of_a_mark"
    )
    assert re.search(r"1 passed, 5 skipped", printed)


def test_nothing_is_said_where_nothing_is_lacking(tmp_path: Path) -> None:
    printed = ran(tmp_path, "-k", "passes or another")
    assert "1 passed, 1 skipped" in printed
    assert "need" not in printed


def test_a_long_list_of_names_is_cut_between_two() -> None:
    nodes = [(f"t.py::test_number_{k}[x, y]", reason(DATA / "nets")) for k in range(90)]
    line = summary([*nodes, *((node, reason(CASES / "onnx")) for node, _ in nodes)])
    assert len(line) < LONGEST + 8
    assert line.count("90 tests need ../shared/") == 2 == line.count(" …")
    assert re.fullmatch(r"[^;]*(test_number_\d+, )+test_number_\d+ …; [^;]* …", line)


def test_what_is_there_is_no_reason_to_skip() -> None:
    assert given(HERE) == HERE
    assert needs(HERE).args == (False,)
    assert needs(FOLDER / "none").args == (True,)


def test_no_test_looks_beside_the_project_on_its_own() -> None:
    """Else its skip would not be counted."""
    own = {"beside.py", "test_beside.py"}
    for path in sorted(HERE.glob("*.py")):
        if path.name not in own:
            assert not re.search(r"""/ ["']shared["']""", path.read_text()), path.name
