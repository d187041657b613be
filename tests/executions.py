"""In which orders can float32 add up a network? Executions of dense ReLU networks that all are what
somebody's library may do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float32]
Order = Callable[[Floats], Floats]
"""Adds up terms (..., n) one way or another, every partial sum rounded to float32."""


def sequential(terms: Floats) -> Floats:
    """From the first to the last."""
    return np.cumsum(terms, axis=-1, dtype=np.float32)[..., -1]


def backward(terms: Floats) -> Floats:
    """From the last to the first."""
    return sequential(terms[..., ::-1])


def positive_first(terms: Floats) -> Floats:
    """From the largest down: what cancels comes last."""
    return sequential(-np.sort(-terms, axis=-1))


def large_first(terms: Floats) -> Floats:
    """By falling size: small terms are lost."""
    return sequential(
        np.take_along_axis(terms, np.argsort(-np.abs(terms), axis=-1, kind="stable"), -1)
    )


def small_first(terms: Floats) -> Floats:
    """By rising size."""
    return sequential(
        np.take_along_axis(terms, np.argsort(np.abs(terms), axis=-1, kind="stable"), -1)
    )


def chunks(terms: Floats) -> Floats:
    """Blocks of seven, then the blocks."""
    ends = range(0, terms.shape[-1], 7)
    return sequential(np.stack([sequential(terms[..., i : i + 7]) for i in ends], -1))


def shuffled(terms: Floats) -> Floats:
    """Some permutation."""
    return sequential(
        terms[..., np.random.default_rng(terms.shape[-1]).permutation(terms.shape[-1])]
    )


ORDERS: tuple[Order, ...] = (
    sequential,
    backward,
    positive_first,
    large_first,
    small_first,
    chunks,
    shuffled,
)


class Run(NamedTuple):
    """One way of running a network: a name, and every layer's result, (M, n) each."""

    name: str
    values: list[Tensor]


def executions(network: nn.Sequential, x: Tensor) -> Iterator[Run]:
    """Yield all runs on x (M, d), float32: numpy in many orders, the bias first and last; torch
    with one thread and two, batch 1 and all; fused (products are exact, as float64 holds them, and
    only sums are rounded).
    """
    for order in ORDERS:
        yield Run(order.__name__, _by_hand(network, x, order, bias_first=False))
        yield Run(f"{order.__name__}, bias first", _by_hand(network, x, order, bias_first=True))
    yield Run("fused", _by_hand(network, x, sequential, bias_first=True, fused=True))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            yield Run(f"torch, {threads} threads", _by_torch(network, x))
            alone = [_by_torch(network, point) for point in x[:64].split(1)]
            yield Run(
                f"torch, {threads} threads, one by one",
                [torch.cat(layer) for layer in zip(*alone, strict=True)],
            )
    finally:
        torch.set_num_threads(before)


def _by_torch(network: nn.Sequential, x: Tensor) -> list[Tensor]:
    values = [x]
    with torch.no_grad():
        for module in network:
            values.append(module(values[-1]))
    return values


def _by_hand(
    network: nn.Sequential, x: Tensor, order: Order, *, bias_first: bool, fused: bool = False
) -> list[Tensor]:
    values = [x]
    for module in network:
        given = values[-1]
        if not isinstance(module, nn.Linear):
            values.append(module(given))
            continue
        weight, bias = (t.detach().numpy() for t in (module.weight, module.bias))
        made = (
            _fused(given.numpy(), weight, bias)
            if fused
            else _layer(given.numpy(), weight, bias, order, bias_first)
        )
        values.append(torch.from_numpy(made))
    return values


def _layer(x: Floats, weight: Floats, bias: Floats, order: Order, bias_first: bool) -> Floats:
    products = x[:, None, :] * weight
    start = np.broadcast_to(bias[None, :, None], (*products.shape[:2], 1))
    return order(np.concatenate([start, products], -1)) if bias_first else order(products) + bias


def _fused(x: Floats, weight: Floats, bias: Floats) -> Floats:
    total = np.broadcast_to(bias, (len(x), len(bias))).astype(np.float32)
    for k in range(x.shape[1]):
        total = (
            total.astype(np.float64)
            + x[:, k : k + 1].astype(np.float64) * weight[:, k].astype(np.float64)
        ).astype(np.float32)
    return total
