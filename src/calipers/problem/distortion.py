"""How visible is a perturbation? Mean squared error, PSNR, and radii of equal energy."""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.problem.norms import norm_named


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference (N,) in float64, in squared native units."""
    return (a.double() - b.double()).flatten(1).square().mean(1)


def psnr(a: Tensor, b: Tensor, peak: float) -> Tensor:
    """Return the peak signal-to-noise ratio (N,) in dB, 10 log10(peak^2 / MSE); infinite for equal
    images. `peak` is the data's range, 255 or 1.
    """
    return psnr_of(mse(a, b), peak)


def psnr_of(error: Tensor | float, peak: float) -> Tensor:
    """Return the PSNR of a mean squared error, in dB."""
    if not peak > 0:
        raise BadInput(f"peak must be the data's range, a positive number (1 or 255), got {peak}")
    return 10 * (peak**2 / torch.as_tensor(error, dtype=torch.float64)).log10()


def largest_mse(norm: str, radius: float, features: int, scale: float = 1.0) -> float:
    """Return the largest mean squared error a perturbation of that norm can have; `scale` converts
    standardised to native units (its sigma).

    linf: every feature moves by the radius. l2: the radius is the energy. l1: the whole budget on
    one feature. A box can only lower it.

    >>> largest_mse("linf", 0.1, 1024, scale=60.0), largest_mse("l2", 3.0, 1024, scale=60.0)
    (36.0, 31.640625)
    """
    return (scale * radius * norm_named(norm).longest_unit(features)) ** 2 / features


def radius_of_equal_energy(norm: str, other: str, radius: float, features: int) -> float:
    """Return the radius in norm `other` whose largest perturbation has the energy of the largest
    one in `norm`.

    >>> radius_of_equal_energy("linf", "l2", 0.1, 1024)
    3.2
    """
    return (
        radius * norm_named(norm).longest_unit(features) / norm_named(other).longest_unit(features)
    )
