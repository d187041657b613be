"""Tests whether answers depend on the batch, or are probabilities.

The model itself is tested, at the points of the problem. A list of layers would not tell: a mean
over the batch, a scale of quantisation taken from all points or a cache may be in any line of
`forward`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

Answer = Callable[[Tensor], Tensor]

_ASKED = 6  # points evaluated alone and together
# of the largest logit: products of other shapes are summed in other orders, but float32 differs by
# less than this
_SUSPICIOUS = 1e-4
_BEYOND_DOUBT = 1e-7  # of the largest logit, in float64: far more than its rounding
_PROBABILITY_TOLERANCE, _HALF_TOLERANCE = 1e-5, 2e-3
_ENOUGH = 8  # so many rows do not all sum to about 1 by chance
_PROBES = 32  # points besides the problem's own at which a single output is evaluated


def in_company(x: Tensor, answer: Answer, precise: Answer | None) -> tuple[int, float] | None:
    """Return a point whose logits depend on the other points of its batch.

    And by how much; None where none is found. A few points spread over x (N, *D) are evaluated
    alone, together, and together in reverse order. A difference beyond rounding is evaluated again
    in a float64 copy, where there is one: a threshold inside the model may turn a rounding into a
    jump, but in float64 hardly ever the same one.
    """
    places = sorted({round(i * (len(x) - 1) / (_ASKED - 1)) for i in range(_ASKED)})
    found = _apart(x[places], answer, _SUSPICIOUS)
    if found is not None and precise is not None:
        found = _apart(x[places].double(), precise, _BEYOND_DOUBT)
    return None if found is None else (places[found[0]], found[1])


def _apart(points: Tensor, answer: Answer, tolerance: float) -> tuple[int, float] | None:
    """Return the first point that differs beyond a tolerance, and by how much."""
    alone = torch.cat([answer(point) for point in points.split(1)]).nan_to_num()
    scale = alone.abs().amax()
    for together in (answer(points), answer(points.flip(0)).flip(0)):
        gap = (together.nan_to_num() - alone).abs().amax(1)
        if bool((gap > tolerance * scale).any()):
            return int(gap.argmax()), float(gap.max())
    return None


def is_probability(x: Tensor, values: Tensor, answer: Answer) -> bool:
    """Return whether the single output never leaves [0, 1].

    At the points x (N, *D), where it has these values, and at others far away: few points are
    enough, since the others are theirs moved and stretched, and a logit leaves [0, 1] somewhere.
    Points at which the model fails are ignored.
    """
    seen = [values]
    generator = torch.Generator().manual_seed(0)
    spread = (x.amax() - x.amin()).clamp_min(1.0)
    for reach in (1.0, 10.0, 100.0):
        noise = torch.randn(
            _PROBES // 3 + 1, *x.shape[1:], generator=generator, dtype=torch.float64
        ).to(x)
        with contextlib.suppress(Exception):
            seen.append(answer(x[:1] + reach * spread * noise).reshape(-1))
    every = torch.cat([v.reshape(-1) for v in seen])
    every = every[every.isfinite()]
    return (
        len(seen) > 1
        and bool(((every >= 0) & (every <= 1)).all())
        and bool(every.max() > every.min())
    )


def are_probabilities(z: Tensor) -> bool:
    """Return whether all rows look like the output of a softmax.

    A row of exactly equal logits (1/K each) alone is no sign of it; where there are many rows they
    may be rounded to half precision.
    """
    tolerance = _PROBABILITY_TOLERANCE if len(z) < _ENOUGH else _HALF_TOLERANCE
    inside = bool((z.min() >= -_PROBABILITY_TOLERANCE) and (z.max() <= 1 + _PROBABILITY_TOLERANCE))
    return (
        inside
        and bool(((z.sum(1) - 1).abs() < tolerance).all())
        and bool((z.max() - z.min()) > _PROBABILITY_TOLERANCE)
    )
