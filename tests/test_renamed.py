"""Do former names tell the new ones, and do the texts of tools in older records still name tools?"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import calipers
from calipers.errors import BadInput
from calipers.presets import ATTACKS, CERTIFIERS, tool_from
from calipers.renamed import NAMES, SETTINGS, TOOLS, modern

TODAY = {**ATTACKS, **CERTIFIERS}


@pytest.mark.parametrize("old", [*NAMES, *TOOLS])
def test_a_former_name_of_the_package_tells_the_new_one(old: str) -> None:
    new = NAMES.get(old, TOOLS.get(old, ""))
    with pytest.raises(AttributeError, match=rf"is called calipers\.(\w+\.)?{new} now"):
        getattr(calipers, old)


@pytest.mark.parametrize("old", TOOLS)
def test_a_former_tool_tells_the_new_one(old: str) -> None:
    with pytest.raises(BadInput, match=f"{old} is called {TOOLS[old]} now"):
        tool_from(old)


@pytest.mark.parametrize("old", SETTINGS)
def test_every_new_setting_is_one_of_its_tool(old: str) -> None:
    tool = TODAY[TOOLS.get(old, old)]
    names = {field.name for field in dataclasses.fields(tool)}
    assert set(SETTINGS[old].values()) <= names
    # a former name that another setting bears now can only be told by the tool's former name
    assert old in TOOLS or not set(SETTINGS[old]) & names


def test_a_former_setting_tells_the_new_one() -> None:
    with pytest.raises(BadInput, match=r"'halving'; it is called successive_halving now"):
        tool_from("APGD(halving=True)")


@pytest.mark.parametrize(
    ("text", "now"),
    [
        ("LargestRadius(bounder=CROWN(refine=False))", "CertifiedRadius(certifier=CROWN(refine=False))"),
        ("Closer(first=FMN(steps=5), attack=PGD(steps=9), share=0.9)",
         "IterativeTightening(attack=FMN(steps=5), refine=PGD(steps=9), fraction=0.9)"),
        ("Guided(APGD(targets=9, halving=True), Minimisers(2))",
         "WarmStarted(APGD(targets=9, successive_halving=True), RelaxationMinimizers(2))"),
        ("PGD(steps=5)", "PGD(steps=5)"),
    ],
)  # fmt: skip
def test_the_text_of_an_older_record_names_a_tool_of_today(text: str, now: str) -> None:
    assert modern(text) == now == modern(now)
    assert ast.unparse(ast.parse(repr(tool_from(now)))).startswith(now.split("(")[0])


def test_what_is_no_expression_is_left_alone() -> None:
    assert modern("my tool, at night") == "my tool, at night"


def test_no_message_begins_with_a_former_name() -> None:
    sources = Path(calipers.__file__).parent.rglob("*.py")
    found = [
        f"{path.name}:{node.lineno}: {node.value[:40]}"
        for path in sources
        if path.name != "renamed.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.match(rf"({'|'.join([*NAMES, *TOOLS])}) (takes|answers|goes|searches) ", node.value)
    ]
    assert not found
