"""Which threats are there? A ball of a norm, or substitutions of letters; and how a record brings
one back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calipers.problem.ball import Ball
from calipers.problem.substitutions import Substitutions

Threat = Ball | Substitutions
"""What every problem asks of its threat: `check`, `region`, `radii`, `at`, `take`, `widest`,
`below`, `least`, `next`, `identity`.
"""


def recorded_threat(facts: Mapping[str, Any], radii: Tensor) -> Threat:
    """Return the threat that a question's facts describe, with the radius of each point (N,). Masks
    and weights of a ball are not among the facts.
    """
    letters = facts.get("letters")
    if letters is None:
        box = facts["box"]
        return Ball(
            facts["norm"],
            radii,
            None if box is None else (float(box[0]), float(box[1])),
            constraints=facts.get("constraints"),
        )
    allowed = (
        None if letters["allowed"] is None else torch.tensor(letters["allowed"], dtype=torch.bool)
    )
    return Substitutions(letters["groups"], radii, allowed, _numeric(letters["numeric"]))


def _numeric(said: Mapping[str, Any] | None) -> Ball | None:
    if said is None:
        return None
    mask, weights = said["mask"], said["weights"]
    box = (
        None
        if said["box"] is None
        else tuple(torch.tensor(end, dtype=torch.float64) for end in said["box"])
    )
    return Ball(
        said["norm"],
        torch.tensor(said["radius"], dtype=torch.float64),
        box,  # type: ignore[arg-type]
        None if mask is None else torch.tensor(mask, dtype=torch.bool),
        None if weights is None else torch.tensor(weights, dtype=torch.float64),
        said.get("constraints"),
    )
