"""Units of points outside their box: grey levels, standardised values."""

from __future__ import annotations

import torch
from torch import Tensor

_STATISTICS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-10, as often copied": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "CIFAR-100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "CLIP": ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    "MNIST": ((0.1307,), (0.3081,)),
    "Fashion-MNIST": ((0.2860,), (0.3530,)),
    "[-1, 1] scaling": ((0.5,), (0.5,)),
}
"""Means and standard deviations that training scripts standardise images by."""

_SLACK = 0.02  # of [0, 1]: published statistics are rounded to four digits
_ON_GRID = 0.1  # mean distance from the nearest whole grey level; by chance it is a quarter


def cure_for(x: Tensor, floor: Tensor, ceiling: Tensor) -> str:
    """Return a remedy for points x (N, *D), float64, outside the box."""
    low, high = float(x.min()), float(x.max())
    unit = float(floor.min()) == 0 and float(ceiling.max()) == 1
    images = x.dim() == 4
    if unit and images and low < 0 and (known := standardised_by(x)):
        name, mean, std = known
        return (
            f"The data look standardised with the statistics of {name}: hand over x * std + mean, "
            f"in [0, 1], and calipers.Classifier(model, mean={mean}, std={std}); radii then count "
            "in units of [0, 1]."
        )
    if unit and images and low < 0:
        return (
            "The data look standardised: hand over x * std + mean, in [0, 1], and "
            "calipers.Classifier(model, mean=..., std=...) with what the model was trained with; "
            "or give box='data', and the radius in these units."
        )
    if unit and high > 2 and low >= 0 and (images or high > 100):
        return (
            "The data look like 0..255: divide by 255, or give box=(0, 255) and the radius in grey "
            "levels."
        )
    if float(_excess(x, floor, ceiling)) < 1e-6 * max(1.0, abs(low), abs(high)):
        return (
            "They lie outside by a rounding of the model's own precision alone: give box='data', "
            "or model.double()."
        )
    return (
        "Give the data's own box=(low, high), box='data' for the range of these points, or "
        "box=None if any value is allowed. Of a scaler fitted on a table: "
        "calipers.Classifier(model, mean=scaler.mean_, std=scaler.scale_) measures in its columns' "
        "own units."
    )


def standardised_by(x: Tensor) -> tuple[str, tuple[float, ...], tuple[float, ...]] | None:
    """Return the published statistics that images were standardised with.

    Those that take images (N, C, H, W) back to grey levels in [0, 1]: name, mean and standard
    deviation; None where none fit.
    """
    for name, (mean, std) in _STATISTICS.items():
        if len(mean) not in (1, x.shape[1]):
            continue
        m, s = (
            torch.tensor(v, dtype=x.dtype, device=x.device).view(1, -1, 1, 1) for v in (mean, std)
        )
        plain = x * s + m
        inside = bool((plain.min() > -_SLACK) and (plain.max() < 1 + _SLACK))
        levels = plain * 255
        if inside and float((levels - levels.round()).abs().mean()) < _ON_GRID:
            return name, mean, std
    return None


def _excess(x: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
    """Return how far the points reach beyond the box, at most."""
    return torch.maximum(floor - x, x - ceiling).amax()
