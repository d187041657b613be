"""What every call of the package is given, as one checked problem."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import calipers.arguments as arguments
from calipers.errors import BadInput
from calipers.interchange.loaders import drained, hands_out
from calipers.interchange.models import load
from calipers.models.classifier import Classifier
from calipers.models.layout import laid_out
from calipers.problem.goals import Goal
from calipers.problem.problem import Problem
from calipers.threats.threat import Threat


def pose(
    model: Any, x: Any, y: Any, threat: Threat, goal: Goal | None = None, *, places: bool = False
) -> Problem:
    """Return the checked problem that `measure` and all other calls are given.

    Args:
        model: A module, a Classifier, or whatever `load` reads: a fitted estimator, an onnxruntime
            session, a function that builds a module, the name of a file.
        x: Points (N, *D), a tensor, array, list or frame; or a DataLoader or Dataset, which brings
            its labels along.
        y: Labels (N,); None stands for those of the loader, or for the model's own predictions.
        threat: What the adversary may do.
        goal: What the adversary wants.
        places: Whether labels are indices of outputs even if the model names its classes.

    Raises:
        BadInput: For data or a threat that do not fit; the message says what was got, what was
            expected, and what to do.
        BadModel: For a model that cannot be measured, likewise.
    """
    if not isinstance(model, nn.Module | Classifier) and isinstance(x, nn.Module | Classifier):
        raise BadInput(
            f"the model comes first, got {type(model).__name__} there and a model second; the "
            "order is (model, x, y, threat), and a tool comes after the threat: "
            "calipers.attack(model, x, y, threat, tool)"
        )
    classifier = model if isinstance(model, Classifier) else load(model)
    if hands_out(x):
        x, own = drained(x)
        y = own if y is None else y
    return Problem.pose(classifier, x, y, threat, goal, places=places)


def read_points(classifier: Classifier, x: Any) -> Tensor:
    """Return points alone, (N, *D), as `pose` hands them to the model."""
    given, _ = arguments.points(drained(x)[0] if hands_out(x) else x)
    return laid_out(classifier, given.to(device=classifier.device, dtype=classifier.dtype))[0]
