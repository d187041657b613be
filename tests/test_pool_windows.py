"""Does max-pool know its windows from its strides alone, as the operation itself has them, and
without a matrix of outputs by inputs?
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from calipers.graph import products
from calipers.graph.products import SELECTIONS

POOLS = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
CASES = 120


def probed(run: Any, shape: tuple[int, ...]) -> list[set[int]]:
    """Return the members of each window by asking the operation: which single raised element does
    an output see?
    """
    count = torch.Size(shape).numel()
    seen = run(torch.eye(count).view(count, *shape)).flatten(1) > 0
    return [set(torch.nonzero(column).flatten().tolist()) for column in seen.T]


def settings(seed: int) -> tuple[int, tuple[int, ...], tuple[Any, ...]]:
    """Return a rank, an input shape and arguments that the operation takes."""
    draw = np.random.default_rng(seed)
    rank = int(draw.integers(1, 4))
    while True:
        kernel, stride, dilation = (draw.integers(1, 4, rank).tolist() for _ in range(3))
        padding = [int(draw.integers(0, k // 2 + 1)) for k in kernel]
        shape = (
            int(draw.integers(1, 3)),
            *(int(n) for n in draw.integers(2, 8 if rank < 3 else 5, rank)),
        )
        arguments = (
            kernel,
            stride if draw.random() < 0.8 else [],
            padding,
            dilation,
            bool(draw.random() < 0.5),
        )
        if draw.random() < 0.2:  # one number for all axes
            arguments = tuple([a[0]] if isinstance(a, list) and a else a for a in arguments)
        try:
            pooled(rank, arguments, torch.zeros(1, *shape))
        except RuntimeError:
            continue
        return rank, shape, arguments


def pooled(rank: int, arguments: tuple[Any, ...], x: Tensor) -> Tensor:
    """Run the operation."""
    kernel, stride, padding, dilation, ceil = arguments
    return POOLS[rank - 1](x, kernel, stride or kernel, padding, dilation, ceil)  # type: ignore[no-any-return]


def built(seed: int) -> tuple[products.MaxPool, list[set[int]], int]:
    """Return the operation as the graph has it, the members of its windows as probed, and how many
    inputs there are.
    """
    rank, shape, arguments = settings(seed)
    out = tuple(pooled(rank, arguments, torch.zeros(1, *shape)).shape[1:])
    op = SELECTIONS[f"aten.max_pool{rank}d.default"]((None, *arguments), shape, out)
    assert op is not None
    return op, probed(lambda x: pooled(rank, arguments, x), shape), torch.Size(shape).numel()


def differing() -> Iterator[int]:
    """Yield the cases in which windows and probing disagree."""
    for seed in range(CASES):
        op, members, count = built(seed)
        held = [set(row) - {count} for row in op.windows.tolist()]  # type: ignore[attr-defined]
        if held != members:
            yield seed


def test_windows_are_those_of_the_operation() -> None:
    assert not list(differing())


@pytest.mark.parametrize("change", ["padding", "stride", "dilation", "edge"])
def test_a_wrong_window_is_noticed(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = products.windows

    def wrong(size: Any, out: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
        if change == "edge":  # the border's first element stands for what lies outside
            found = true(size, out, kernel, stride, padding, dilation)
            return torch.where(found == torch.Size(size).numel(), 0, found)
        ignored = {
            "padding": lambda v: tuple(0 for _ in v),
            "stride": lambda v: tuple(1 for _ in v),
            "dilation": lambda v: tuple(1 for _ in v),
        }[change]
        given = {"stride": stride, "padding": padding, "dilation": dilation}
        given[change] = ignored(given[change])
        return true(size, out, kernel, given["stride"], given["padding"], given["dilation"])

    monkeypatch.setattr(products, "windows", wrong)
    assert list(differing())
