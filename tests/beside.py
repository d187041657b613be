"""What may lie beside the project and is no part of it: published networks and distances, other
people's files.

A test that needs some of it says so by `needs` or `given`, and is skipped where it is absent; the
end of the run counts and names these tests (`summary`, printed by conftest.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared"
DATA, CASES = FOLDER / "data", FOLDER / "cases"
LONGEST = 400  # characters of the line at the end; the skipped tests are listed above it
_NEEDS = "needs ../"


def reason(path: Path) -> str:
    """Say which path is needed, as seen from the project."""
    return f"{_NEEDS}{path.relative_to(FOLDER.parent)}"


def needs(path: Path) -> pytest.MarkDecorator:
    """Mark a test that is skipped where the path is absent."""
    return pytest.mark.skipif(not path.exists(), reason=reason(path))


def given(path: Path) -> Path:
    """Return the path; inside a test that is skipped where it is absent."""
    if not path.exists():
        pytest.skip(reason(path))
    return path


def summary(skipped: Iterable[tuple[str, str]]) -> str:
    """Return the line that ends a run, of pairs of a node and why it was skipped; "" for none.

    Example:
        >>> summary([("tests/test_a.py::test_b[1]", "Skipped: needs ../shared/data/nets")])
        '1 test needs ../shared/data: test_b'
    """
    lacking: dict[str, list[str]] = {}
    for node, why in skipped:
        folder = why.partition(_NEEDS)[2].split("/")
        if why.removeprefix("Skipped: ").startswith(_NEEDS) and len(folder) > 1:
            test = node.rpartition("::")[2].partition("[")[0]
            lacking.setdefault("/".join(folder[:2]), []).append(test)
    parts = [
        f"{len(tests)} {'test needs' if len(tests) == 1 else 'tests need'} ../{folder}: "
        + ", ".join(dict.fromkeys(tests))
        for folder, tests in sorted(lacking.items())
    ]
    share = LONGEST // max(1, len(parts))
    return "; ".join(p if len(p) <= share else p[: p.rindex(", ", 0, share)] + " …" for p in parts)
