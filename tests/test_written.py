"""Is any bound of an operation, as people write it in torch or ONNX, above what the model itself
does inside the ball? Parameters at the edge and beyond.

Thousands of them: `python benchmarks/fuzz_ops.py`. A share runs here, more on the slow shelf;
mistakes that the judge must see are planted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import written_torch
from written import Verdicts, judged

from calipers.graph.activations import TwoPieces
from calipers.graph.affine import Generic
from calipers.graph.smooth_relaxation import Smooth

FIRST, BLOCK = 20_000, 250


def some(
    seeds: range, onnx: bool = False, names: list[str] | None = None, *, light: bool = False
) -> Verdicts:
    """Judge a model for each seed, the ways of writing one after the other; `light`: one question
    each, recurrent layers and searches left out.
    """
    if onnx:
        pytest.importorskip("onnx", reason="onnx is not installed")
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        import written_onnx as way
    else:
        way = written_torch  # type: ignore[assignment]
    ways, total = names or sorted(set(way.WAYS) - ({"sequence"} if light else set())), Verdicts()
    for seed in seeds:
        total.add(judged(lambda: way.written(ways[seed % len(ways)], seed), seed, light=light))  # noqa: B023
    return total


@pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])
def test_no_bound_of_what_people_write_is_contradicted(onnx: bool) -> None:
    seen = some(range(FIRST, FIRST + (150 if onnx else 40)), onnx, light=True)
    assert not seen.wrong
    assert seen.proved > seen.models and seen.refused < 0.4 * seen.models


@pytest.mark.slow
@pytest.mark.parametrize("block", range(40))
def test_no_bound_of_ten_thousand_models_is_contradicted(block: int) -> None:
    first = 100_000 + block * BLOCK
    seen = some(range(first, first + BLOCK), onnx=block % 3 == 2)
    print(seen)
    assert not seen.wrong


def far_off(
    monkeypatch: pytest.MonkeyPatch, op: type, fact: str, change: Callable[[Any], Any]
) -> None:
    """Change what a fact of an operation returns."""
    sound = getattr(op, fact)
    monkeypatch.setattr(
        op, fact, lambda self, *args, **options: change(sound(self, *args, **options))
    )


MISTAKES: dict[str, tuple[list[str], Callable[[pytest.MonkeyPatch], None]]] = {
    "a lower line too high": (
        ["leaky relu"],
        lambda m: far_off(
            m, TwoPieces, "relax", lambda v: v._replace(lower_intercept=v.lower_intercept + 0.1)
        ),
    ),
    "a range too narrow": (
        ["activation", "power"],
        lambda m: far_off(m, Smooth, "range", lambda v: (v[0] + 0.01, v[1] - 0.01)),
    ),
    "weights too small": (
        ["moves", "pool"],
        lambda m: far_off(m, Generic, "absolute", lambda v: 0.3 * v),
    ),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_the_judge_sees_a_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names, plant = MISTAKES[mistake]
    plant(monkeypatch)
    assert any(
        some(range(seed, seed + 6), names=names, light=True).wrong for seed in range(0, 60, 6)
    )


def test_another_exception_than_a_refusal_is_a_violation() -> None:
    def broken() -> Any:
        raise ZeroDivisionError("by accident")

    assert "ZeroDivisionError" in judged(broken, 0).wrong[0]


def test_verdicts_add_up() -> None:
    total = Verdicts(models=1, wrong=["a"])
    total.add(dataclasses.replace(Verdicts(models=2, refused=1), wrong=["b"]))
    assert (total.models, total.refused, total.wrong) == (
        3,
        1,
        ["a", "b"],
    ) and "2 violations" in str(total)
