"""Do the scripts in examples/ run as they are, in an empty folder, and find what they say?

Each runs in this process, which saves the start; what it writes lands in a temporary folder.
"""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.one_in(1)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ESSENTIAL = {
    "both_bounds.py": ["certified 90.0 % (18 of 20), not broken 95.0 % (19 of 20)", "sound: True"],
    "own_model.py": [
        "input (3, 8, 8); 2 classes",
        "certified: IBP ",
        "and 64 of 64 points are robust",
    ],
    "table.py": ["27 of 40 applications change their answer by one category and two years"],
    "onnx_property.py": [
        "can y reach 1.5? sat",
        "can y reach 2.5? unsat",
        "proved again by the checker alone: True",
    ],
    "exact_distance.py": ["point 3: 0.53410", "proved again: True"],
    "own_attack.py": ["'Blend': ", "alone: <AttackResult: "],
}


def test_every_example_is_listed_and_short() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == ESSENTIAL.keys()
    assert all(20 <= text.count("\n") <= 60 for text in scripts.values())
    assert all(
        f"python {name}" in (ast.get_docstring(ast.parse(text)) or "")
        for name, text in scripts.items()
    )


def test_the_readme_names_every_example() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in ESSENTIAL if f"(examples/{name})" not in readme] == []


@pytest.mark.parametrize("name", ESSENTIAL)
def test_it_says_what_it_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    skipped = ""
    with torch.random.fork_rng():
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        except SystemExit as ended:
            skipped = str(ended.code)
    if skipped.startswith("skipped: "):
        pytest.skip(skipped)
    assert not skipped
    said = capsys.readouterr().out
    assert [line for line in ESSENTIAL[name] if line not in said] == [], said
