"""Conversion of images to the axes that a model takes.

For images with their channels last, or without an axis for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calipers.models.classifier import Classifier

_CHANNELS = (1, 3, 4)  # of images


def laid_out(classifier: Classifier, x: Tensor) -> tuple[Tensor, list[str]]:
    """Return images x (N, *D) as the model takes them, with a note.

    Channels that come last are moved to the front, and a missing axis of channels is inserted, but
    only where the model fails on the points as they are and not on the converted ones. The notes
    say in words what was done.
    """
    other: Tensor | None = None
    if x.dim() == 4 and x.shape[3] in _CHANNELS and x.shape[1] not in _CHANNELS:
        other, words = x.permute(0, 3, 1, 2).contiguous(), "(N, H, W, C) became (N, C, H, W)"
    elif x.dim() == 3:
        other, words = x[:, None], "(N, H, W) became (N, 1, H, W)"
    if other is None or _takes(classifier, x[:2]) or not _takes(classifier, other[:2]):
        return x, []
    return other, [f"the points {words}, as the model takes them"]


def _takes(classifier: Classifier, x: Tensor) -> bool:
    """Return whether the model can be called on these points."""
    classifier.passes.add(forwards=len(x))
    try:
        with classifier.frozen(), torch.no_grad():
            answer: Any = classifier.network(x.nan_to_num())
    except Exception:
        return False
    return not isinstance(answer, Tensor) or (answer.dim() <= 2 and len(answer) == len(x))
