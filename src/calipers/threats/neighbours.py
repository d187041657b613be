"""Counting and enumeration of at most k substitutions of symbols."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BATCH = 4096


def neighbourhood_size(alternatives: Sequence[int], k: int) -> int:
    """Return how many points have at most k substitutions.

    Group g has `alternatives[g]` other symbols. The number is sum_{i<=k} of the elementary
    symmetric polynomials e_i(alternatives), which is sum_i C(n, i) (K - 1)^i for n groups of K
    symbols. Exact whole numbers.

    >>> neighbourhood_size([3] * 60, 2)
    16111
    """
    ways = [1] + [0] * k  # ways[i]: with i substitutions in the groups seen so far
    for count in alternatives:
        for i in range(k, 0, -1):
            ways[i] += ways[i - 1] * count
    return sum(ways)


def enumerate_substitutions(counts: Tensor, k: int, batch: int = BATCH) -> Iterator[Tensor]:
    """Yield all ways of substituting at most k symbols, as (T, i, 2).

    The groups have `counts (G,)` alternatives; entries are (group, number of the alternative).
    Ordered by the number of substitutions, then lexicographically, whatever the batch; at most
    about `batch` ways are held at a time.
    """
    group = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    after = counts.cumsum(0)[group]  # the first move of the next group
    nth = torch.arange(len(group), device=counts.device) - (after - counts[group])
    for i in range(k + 1):
        for moves in _rebatched(_increasing(i, after, batch), batch):
            yield torch.stack([group[moves], nth[moves]], 2)


def _increasing(i: int, after: Tensor, batch: int) -> Iterator[Tensor]:
    """Yield the i-tuples of moves of ascending groups, (T, i)."""
    if i == 0:
        yield torch.zeros(1, 0, dtype=torch.long, device=after.device)
        return
    for shorter in _increasing(i - 1, after, batch):
        for part in shorter.split(max(1, batch // max(1, len(after)))):
            start = after[part[:, -1]] if i > 1 else after.new_zeros(len(part))
            count = len(after) - start
            row = torch.repeat_interleave(torch.arange(len(part), device=after.device), count)
            last = (
                torch.arange(len(row), device=after.device)
                - (count.cumsum(0) - count)[row]
                + start[row]
            )
            yield torch.cat([part[row], last[:, None]], 1)


def _rebatched(parts: Iterator[Tensor], batch: int) -> Iterator[Tensor]:
    """Yield the same rows in pieces of exactly `batch`, the last one shorter."""
    held: list[Tensor] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= batch:
            *full, left = torch.cat(held).split(batch)
            yield from full
            held = [left]
    if held and len(left := torch.cat(held)):
        yield left
