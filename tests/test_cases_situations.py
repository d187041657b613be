"""Does every situation that strangers met give its right value, or a refusal in one sentence?
Scripts of a folder beside the project, where it is there.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import beside
import pytest
import torch

import calipers
from calipers.errors import CalipersError

SCRIPTS = beside.CASES / "situations"

pytestmark = [
    beside.needs(SCRIPTS),
    pytest.mark.one_in(1),
]

Right = dict[str, str]

NOW = {
    '"SPSA", "Differences"': '"SPSA", "FiniteDifferences"',
    "calipers.from_estimator(": "calipers.load(",
    "calipers.load_model(": "calipers.load(",
    'calipers.certify("CROWN", m, x, Y, calipers.Ball("linf", .05))': "calipers.certify("
    'm, x, Y, calipers.Ball("linf", .05), "CROWN")',
    'calipers.attack("PGD(steps=10)", base, x, y, calipers.Ball("linf", .1))': "calipers.attack("
    'base, x, y, calipers.Ball("linf", .1), "PGD(steps=10)")',
    'calipers.attack("PGD(steps=10)", base, x[p], y[p], calipers.Ball("linf", .1))': "calipers."
    'attack(base, x[p], y[p], calipers.Ball("linf", .1), "PGD(steps=10)")',
}
"""What the scripts call, and what it is called now."""

RIGHT: dict[str, Right] = {
    "01_no_grad.py": {
        "PGD(steps=40), as usual": r"success 8[5-7] of 100",
        "PGD(steps=40), in no_grad()": r"success 8[5-7] of 100",
    },
    "03_in_place.py": {
        "round, in place: Square(queries=300)": r"success 40 of 40",
        "zero a channel, in place: SPSA": r"success 40 of 40",
        "standardise, in place: FiniteDifferences": r"success 40 of 40",
        "ReLU first, in place: measure": r"clean 40, certified (29|3\d), attacked 40 of 40",
    },
    "04_float32_inside.py": {
        "GRU, PGD": r"success [2-4] of 30",
        "x.float() in forward": r"clean 40, certified (29|3\d), attacked 40 of 40",
        "matrix made in forward": r"clean 40, certified (29|3\d), attacked 40 of 40",
    },
    "05_wrapper_lambda.py": {
        "a plain class with __call__": r"BadModel: the function \w+ takes arguments",
        "ensemble in a plain list": r"clean 40, certified (29|3\d), attacked 40 of 40",
    },
    "08_no_grad_block_in_forward.py": {
        "with torch.no_grad(): constants certify": r"(29|3\d)",
        "with autocast(bfloat16)         measure": r"clean 40, certified 0, attacked (39|40) of 40",
        "with set_grad_enabled(training) PGD": r"success 0 of 40",
    },
    "09_half.py": {
        "torch.float16 DeepFool": r"success \d+ of 40",
        "torch.float16 FMN(steps=20)": r"success 1\d of 40",
        "torch.bfloat16 PGD(steps=10)": r"success [3-5] of 40",
    },
    "10_compiled_scripted_quantised.py": {
        "torch.compile(backend='aot_eager') PGD": r"success [3-5] of 40",
        "torch.compile(backend='aot_eager') DeepFool": r"success [5-9] of 40",
        "torch.jit.script                   PGD": r"success [3-5] of 40",
        "quantize_dynamic Square(queries=100)": r"BadModel: the model answers point \d+ "
        r"differently beside "
        r"other points than alone .* scale of quantisation",
    },
    "11_probabilities.py": {
        "softmax": r"clean 40, certified (29|3\d), attacked 40 of 40",
        "mean of two softmaxes (soft voting)": r"clean 40, certified \d+, attacked 40 of 40",
        "softmax in float16": r"clean 40, certified 0, attacked (39|40) of 40",
        "argmax labels": r"BadModel: the model returns torch\.int64",
        "one sigmoid, 9 points (it is right at 9 of 9)": r"clean 9, certified \d, attacked \d of 9",
        "one sigmoid, 40 points": r"clean 40, certified \d+, attacked \d+ of 40",
    },
    "14_labels.py": {
        "1, 2, 3, but only 1 and 2 among the points (classes_ [1, 2, 3], labels = its own "
        "predictions)": r"clean "
        r"40, certified 0, attacked 3\d of 40",
        "strings (classes_ ['a', 'b', 'c'], labels = its own predictions)": r"clean 40, certified "
        r"0, "
        r"attacked 3\d of 40",
        "float labels": r"BadInput: y must hold one integer label a point",
        "one-hot": r"BadInput: y must hold one integer label a point",
        "None": r"clean 40, certified (29|3\d), attacked 40 of 40",
    },
    "15_loader.py": {
        "DataLoader": r"robust accuracy, linf eps = 0.05, 40 points",
        "Dataset": r"robust accuracy, linf eps = 0.05, 40 points",
        "uint8 (control)": r"clean 40, certified (29|3\d), attacked (39|40) of 40",
    },
    "17_targeted.py": {
        "NumPy array": r"success (19|2[01]) of 40",
        "list": r"success (19|2[01]) of 40",
    },
    "18_regression.py": {"9 points": r"success 0 of 9", "20 points": r"success 0 of 20"},
}
"""By script and case: what is right."""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let scripts find their helper, and leave no trace of it: it turns warnings off and holds the
    shared generator.
    """
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(os, "system", lambda _: 0)
    level = logging.root.manager.disable
    with warnings.catch_warnings(), torch.random.fork_rng():
        yield
    logging.disable(level)
    sys.modules.pop("_h", None)


def told(script: str, wanted: Callable[[str], bool]) -> dict[str, str]:
    """Run a script, only those of its cases that are wanted, and return what each shows: its value,
    or its error.
    """
    import _h  # type: ignore[import-not-found]

    def attacked(
        tool: Any,
        model: Any,
        x: Any = _h.x,
        y: Any = _h.y,
        threat: Any = calipers.Ball("linf", 0.1),  # noqa: B008
        **k: Any,
    ) -> str:
        found = calipers.attack(model, x, y, threat, tool, **k)
        return f"success {int(found.success.sum())} of {len(found.success)}"

    found: dict[str, str] = {}

    def show(name: str, case: Callable[[], Any]) -> None:
        if not wanted(name.strip()):
            return
        try:
            found[name.strip()] = str(case())
        except CalipersError as error:
            found[name.strip()] = f"{type(error).__name__}: {error}"

    _h.show, _h.attacked = show, attacked  # written when the tool came first
    path = SCRIPTS / script
    text = path.read_text()
    for before, now in NOW.items():
        text = text.replace(before, now)
    exec(compile(text, str(path), "exec"), {"__name__": "a script"})
    return found


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("script", RIGHT)
def test_every_situation_gives_its_value_or_its_refusal(script: str) -> None:
    right = {" ".join(name.split()): pattern for name, pattern in RIGHT[script].items()}
    found = {
        " ".join(name.split()): text
        for name, text in told(script, lambda name: " ".join(name.split()) in right).items()
    }
    assert found.keys() == right.keys()
    for name, pattern in right.items():
        assert re.match(pattern, found[name]), f"{name}: {found[name]}"
        assert len(found[name].splitlines()) == 1 or script == "15_loader.py"


@pytest.mark.usefixtures("scripts")
def test_a_model_without_gradients_says_so_in_text_and_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told("07_no_gradient_unsaid.py", lambda _: False)
    assert "the word gradient in the text: True | in the page: True" in capsys.readouterr().out


def test_a_model_that_reads_its_own_weights_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    path = beside.CASES / "models" / "conv_weight.py"
    with torch.random.fork_rng():
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "a script"})
    assert "clean    100.0 %" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("script", [*RIGHT, "07_no_gradient_unsaid.py", "22_ok_controls.py"])
def test_no_case_ends_in_an_error_that_is_not_ours(script: str) -> None:
    """All cases of every script; an error of torch or Python goes through."""
    known = {"the function that the error names"}  # it asks for a function that there never was
    assert told(script, lambda name: name not in known)
