"""Gradients, local Lipschitz constants and linear regions of networks."""

from calipers.geometry.gradients import linear_score_change, sensitivity
from calipers.geometry.lipschitz import local_slopes
from calipers.geometry.plane_sections import plane_slices
from calipers.geometry.polynomials import Polynomial, largest_gradient, largest_value
from calipers.geometry.regions import Regions, activation_pattern, regions_of
from calipers.geometry.segments import exit_distance, path, steps_to_leave

__all__ = [
    "Polynomial", "Regions", "activation_pattern", "exit_distance", "largest_gradient",
    "largest_value", "linear_score_change", "local_slopes", "path", "plane_slices", "regions_of",
    "sensitivity", "steps_to_leave",
]  # fmt: skip
