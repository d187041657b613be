"""Gradient maps: the features that a point's decision is sensitive to.

The gradient is drawn as a picture beside the point, with one colour for each sign.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.report.tiles import as_image, png

Floats = NDArray[np.float64]
_LARGEST_SIDE = 112
_STRIP = 48
# the colours of differences, as in tiles.py
_LESS, _SAME, _MORE = np.array([[9, 104, 118], [240, 237, 230], [186, 66, 20]], dtype=np.float64)


@dataclass(frozen=True)
class Map:
    """Three pictures of one point as markup.

    They show the point itself, the gradient of its worst margin, and what an adversarial example
    changed. `share` is the part of the gradient's l1 norm that the largest tenth of its entries
    holds.
    """

    index: int
    point: str
    gradient: str
    change: str
    share: float
    words: str


def gradient_map(
    index: int,
    point: NDArray[Any],
    gradient: NDArray[Any],
    change: NDArray[Any] | None,
    span: tuple[float, float],
    words: str,
) -> Map:
    """Return the pictures of a point.

    `span` is the range of the data; gradient and change are each scaled to the 99 % quantile of
    their absolute values.
    """
    low, high = span
    plain = np.clip((np.asarray(point, dtype=np.float64) - low) / ((high - low) or 1.0), 0, 1)
    ranked = np.sort(np.abs(np.asarray(gradient, dtype=np.float64)).ravel())[::-1]
    whole = float(ranked.sum())
    share = float(ranked[: max(1, len(ranked) // 10)].sum()) / whole if whole > 0 else 0.0
    shown = (
        _plain(plain, f"point {index}"),
        _signed(gradient, f"gradient of the worst margin at point {index}"),
    )
    changed = (
        ""
        if change is None
        else _signed(change, f"what the adversarial example of point {index} changes")
    )
    return Map(index, *shown, changed, share, words)


def _plain(values: Floats, alt: str) -> str:
    image = as_image(values)
    return _bars(values.ravel()[:_STRIP], alt, 0.0) if image is None else _tile(image * 255, alt)


def _signed(values: NDArray[Any], alt: str) -> str:
    """Return positive entries in one colour, negative in the other.

    Zero has neither.
    """
    values = np.nan_to_num(np.asarray(values, dtype=np.float64))
    size = float(np.quantile(np.abs(values), 0.99)) or float(np.abs(values).max()) or 1.0
    scaled = np.clip(values / size, -1, 1)
    if scaled.ndim == 3 and scaled.shape[0] == 3:
        scaled = scaled.mean(axis=0)
    image = as_image(scaled)
    if image is None:
        return _bars(0.5 + scaled.ravel()[:_STRIP] / 2, alt, 0.5)
    share = image[..., None]
    return _tile(
        np.where(share < 0, _SAME - share * (_LESS - _SAME), _SAME + share * (_MORE - _SAME)), alt
    )


def _tile(image: Floats, alt: str) -> str:
    step = math.ceil(max(image.shape[:2]) / _LARGEST_SIDE)
    pixels = np.round(np.clip(image[::step, ::step], 0, 255)).astype(np.uint8)
    data = base64.b64encode(png(np.ascontiguousarray(pixels))).decode("ascii")
    return (
        f'<img src="data:image/png;base64,{data}" width="{pixels.shape[1]}" '
        f'height="{pixels.shape[0]}" '
        f'alt="{alt}">'
    )


def _bars(values: Floats, alt: str, base: float) -> str:
    path = "".join(
        f"M{i + 0.5:g} {100 * (1 - base):.1f}V{100 * (1 - v):.1f}" for i, v in enumerate(values)
    )
    return (
        f'<svg class="strip" role="img" aria-label="{alt}" viewBox="0 0 {len(values)} 100" '
        f'preserveAspectRatio="none"><title>{alt}</title>'
        f'<path class="ground" d="M0 {100 * (1 - base):g}H{len(values)}"/><path class="bars" '
        f'd="{path}"/></svg>'
    )
