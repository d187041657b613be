"""Pictures of inputs: PNG data URIs for images, bar strips for vectors.

Needs zlib and struct, nothing else.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.report.gallery import Exhibit

Floats = NDArray[np.float64]
_LARGEST_SIDE = 112  # pixels; larger images are thinned, to keep a page of twelve small
_STRIP = 48  # features a bar strip can hold
# colours of a difference in grey: darker, unchanged, brighter
_LESS, _SAME, _MORE = (
    np.array([[9, 104, 118], [240, 237, 230], [186, 66, 20]], dtype=np.float64) / 255
)


@dataclass(frozen=True)
class Tiles:
    """Three pictures of one witness as markup.

    They show the clean input, the adversarial one, and their difference times `gain`, around
    mid-grey. `note` says what was left out.
    """

    clean: str
    adversarial: str
    difference: str
    gain: float
    note: str


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return an (H, W) grey or (H, W, 3) RGB image as a PNG file."""
    height, width = pixels.shape[:2]
    # each row begins with the number of its filter: 0, none
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiles(exhibit: Exhibit) -> Tiles:
    """Return the three pictures of a witness.

    They are images where its shape is one of an image, bar strips otherwise.
    """
    low, high = exhibit.span
    width = high - low or 1.0
    clean, adversarial = (exhibit.clean - low) / width, (exhibit.adversarial - low) / width
    delta = np.asarray(adversarial - clean, dtype=np.float64)
    gain = _gain(float(np.max(np.abs(delta))))
    shown = [np.nan_to_num(np.clip(v, 0, 1)) for v in (clean, adversarial, 0.5 + gain * delta)]
    about = [
        f"point {exhibit.index}",
        f"its adversarial example, taken for class {exhibit.fooled}",
        f"their difference, times {gain:g}",
    ]
    keep = np.sort(np.argsort(-np.abs(delta.ravel()), kind="stable")[:_STRIP])
    note = (
        f"the {_STRIP} most changed of {delta.size} features"
        if as_image(clean) is None and delta.size > _STRIP
        else ""
    )
    before, after, change = (
        _picture(v, alt, keep, is_difference=i == 2)
        for i, (v, alt) in enumerate(zip(shown, about, strict=True))
    )
    return Tiles(before, after, change, gain, note)


def as_image(values: NDArray[Any]) -> Floats | None:
    """Return the values as an image, (H, W) or (H, W, 3), or None.

    Shapes that are an image are (H, W), (1, H, W) and (3, H, W), of at least 4 by 4.
    """
    if values.ndim == 3 and values.shape[0] in (1, 3):
        values = values[0] if values.shape[0] == 1 else np.moveaxis(values, 0, -1)
    elif values.ndim != 2:
        return None
    return np.asarray(values, dtype=np.float64) if min(values.shape[:2]) >= 4 else None


def _gain(largest: float) -> float:
    """Return the factor by which a difference is amplified.

    It is the roundest factor (.. 0.5, 1, 2, 5, 10 ..) at which the largest change still fits on
    either side of mid-grey.
    """
    if not 0 < largest <= 1:
        return 1.0
    # half a grey level too much, so that rounding in float32 (0.05) does not halve the factor
    room = 0.502 / largest
    unit = 10.0 ** math.floor(math.log10(room))
    return max(step * unit for step in (1.0, 2.0, 5.0) if step * unit <= room or step == 1)


def _picture(values: Floats, alt: str, keep: NDArray[np.intp], *, is_difference: bool) -> str:
    image = as_image(values)
    if image is None:
        return _strip(values.ravel()[keep], alt, centred=is_difference)
    if is_difference and image.ndim == 2:
        image = _diverging(image)
    step = math.ceil(max(image.shape[:2]) / _LARGEST_SIDE)
    pixels = np.round(image[::step, ::step] * 255).astype(np.uint8)
    data = base64.b64encode(png(np.ascontiguousarray(pixels))).decode("ascii")
    return (
        f'<img src="data:image/png;base64,{data}" width="{pixels.shape[1]}" '
        f'height="{pixels.shape[0]}" '
        f'alt="{alt}">'
    )


def _diverging(grey: Floats) -> Floats:
    """Return (H, W, 3): darker pixels in one colour, brighter in the other.

    Unchanged pixels have neither.
    """
    change = 2 * grey[..., None] - 1
    return np.asarray(
        np.where(change < 0, _SAME - change * (_LESS - _SAME), _SAME + change * (_MORE - _SAME)),
        dtype=np.float64,
    )


def _strip(values: Floats, alt: str, *, centred: bool) -> str:
    """Return bars from the bottom, or from the middle for differences.

    Differences are values around 0.5.
    """
    base = 0.5 if centred else 0.0
    path = "".join(
        f"M{i + 0.5:g} {100 * (1 - base):.1f}V{100 * (1 - v):.1f}" for i, v in enumerate(values)
    )
    ground = f'<path class="ground" d="M0 {100 * (1 - base):g}H{len(values)}"/>'
    return (
        f'<svg class="strip" role="img" aria-label="{alt}" viewBox="0 0 {len(values)} 100" '
        f'preserveAspectRatio="none"><title>{alt}</title>'
        f'{ground}<path class="bars" d="{path}"/></svg>'
    )
