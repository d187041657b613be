"""Does a model answer a point in the same way in whatever company? And is its single answer a
probability? Asked of the model itself, at the question's points.

No list of layers tells: a mean over the batch, a scale of quantisation taken from all points, a
cache may stand in any line of `forward`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

Answer = Callable[[Tensor], Tensor]

_ASKED = 6  # points asked alone and together
# of the largest logit: products of other shapes add up in other orders, and float32 shows it by
# less
_SUSPICIOUS = 1e-4
_BEYOND_DOUBT = 1e-7  # of the largest logit, in float64: many more than its roundings
_PROBABILITY_TOLERANCE, _HALF_TOLERANCE = 1e-5, 2e-3
_ENOUGH = 8  # rows that do not all sum to about 1 by chance
_PROBES = 32  # points besides the question's own at which a single output is looked at


def in_company(x: Tensor, answer: Answer, precise: Answer | None) -> tuple[int, float] | None:
    """Return a point whose logits hang on the other points of its batch, and by how much; None
    where none is found.

    A few points spread over x (N, *D) are asked alone, together, and together in reverse. What
    differs by more than rounding is asked again of a float64 copy, where there is one: a threshold
    inside the model may turn a rounding into a jump, but in float64 hardly ever the same.
    """
    places = sorted({round(i * (len(x) - 1) / (_ASKED - 1)) for i in range(_ASKED)})
    found = _apart(x[places], answer, _SUSPICIOUS)
    if found is not None and precise is not None:
        found = _apart(x[places].double(), precise, _BEYOND_DOUBT)
    return None if found is None else (places[found[0]], found[1])


def _apart(points: Tensor, answer: Answer, tolerance: float) -> tuple[int, float] | None:
    alone = torch.cat([answer(point) for point in points.split(1)]).nan_to_num()
    scale = alone.abs().amax()
    for together in (answer(points), answer(points.flip(0)).flip(0)):
        gap = (together.nan_to_num() - alone).abs().amax(1)
        if bool((gap > tolerance * scale).any()):
            return int(gap.argmax()), float(gap.max())
    return None


def is_probability(x: Tensor, values: Tensor, answer: Answer) -> bool:
    """Does the single output never leave [0, 1], at the points x (N, *D) where it has these values,
    and at others far away?

    However few the points: the others are theirs moved and stretched, and a logit leaves [0, 1]
    somewhere. Those that the model cannot be asked at say nothing.
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
    """Do all rows look like a softmax's output? A row of exactly equal logits (1/K each) alone is
    no sign of it; many rows may be rounded to half precision.
    """
    tolerance = _PROBABILITY_TOLERANCE if len(z) < _ENOUGH else _HALF_TOLERANCE
    inside = bool((z.min() >= -_PROBABILITY_TOLERANCE) and (z.max() <= 1 + _PROBABILITY_TOLERANCE))
    return (
        inside
        and bool(((z.sum(1) - 1).abs() < tolerance).all())
        and bool((z.max() - z.min()) > _PROBABILITY_TOLERANCE)
    )
