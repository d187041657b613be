"""Visibility of perturbations: MSE, PSNR, and radii of equal energy."""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.threats.norms import norm_named


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference of two batches.

    Args:
        a: a batch (N, *D).
        b: another of the same shape.

    Returns:
        (N,) float64, in squared native units.

    Raises:
        RuntimeError: the shapes do not broadcast.

    Example:
        >>> mse(torch.zeros(1, 4), torch.full((1, 4), 0.5)).tolist()
        [0.25]
    """
    return (a.double() - b.double()).flatten(1).square().mean(1)


def psnr(a: Tensor, b: Tensor, peak: float) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, 10 log10(peak^2 / MSE).

    Args:
        a: a batch of images (N, *D).
        b: another of the same shape.
        peak: the data's range, 1 or 255.

    Returns:
        (N,) float64; infinite for equal images.

    Raises:
        BadInput: if the peak is not positive.

    Example:
        >>> psnr(torch.zeros(1, 4), torch.full((1, 4), 0.1, dtype=torch.float64), 1.0).tolist()
        [20.0]
    """
    return psnr_of(mse(a, b), peak)


def psnr_of(error: Tensor | float, peak: float) -> Tensor:
    """Return the PSNR in dB of a mean squared error."""
    if not peak > 0:
        raise BadInput(f"peak must be the data's range, a positive number (1 or 255), got {peak}")
    return 10 * (peak**2 / torch.as_tensor(error, dtype=torch.float64)).log10()


def largest_mse(norm: str, radius: float, features: int, scale: float = 1.0) -> float:
    """Return the largest mean squared error within a radius of a norm.

    `scale` converts standardised to native units (it is the standard deviation). linf: every
    feature moves by the radius. l2: the radius is the square root of the energy. l1: the whole
    budget goes to one feature. A box can only lower it.

    >>> largest_mse("linf", 0.1, 1024, scale=60.0), largest_mse("l2", 3.0, 1024, scale=60.0)
    (36.0, 31.640625)
    """
    return (scale * radius * norm_named(norm).longest_unit(features)) ** 2 / features


def radius_of_equal_energy(norm: str, other: str, radius: float, features: int) -> float:
    """Return the radius in another norm that allows the same energy.

    The energy is the squared Euclidean length of the longest perturbation that the ball contains,
    without a box.

    Args:
        norm: the norm of the given radius, "linf", "l2" or "l1".
        other: the norm of the radius sought.
        radius: in the data's units.
        features: the number of features of an input.

    Returns:
        The radius in `other`, in the data's units.

    Raises:
        BadInput: for an unknown norm, and for "l0" and "pixels": a count says nothing about energy.

    Example:
        >>> radius_of_equal_energy("linf", "l2", 0.1, 1024)
        3.2
    """
    return (
        radius * norm_named(norm).longest_unit(features) / norm_named(other).longest_unit(features)
    )
