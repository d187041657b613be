"""Which choice to make next? The one whose programs rise most: looked ahead at once, and from then
on told by what it rose on the average.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from calipers.certificates.exact.model import Floats, Model
from calipers.certificates.exact.solving import Answer

_LEAST = 1e-6  # share of what is lacking that any branch counts as rising
_LOST = 1e-12  # the least that a choice's relaxation counts as having lost


@dataclass
class PseudoCosts:
    """What the options of each choice rose on the average, for what the relaxation had lost at the
    choice before (Benichou et al. 1971).
    """

    held: dict[int, dict[int, tuple[float, int]]] = field(default_factory=dict)

    def knows(self, choice: int) -> bool:
        """Has the choice been looked at?"""
        return choice in self.held

    def note(self, choice: int, option: int, before: float, after: float, gap: float) -> None:
        """Learn that a program's smallest goal rose from `before` to `after`, which may be NaN,
        where the relaxation lost `gap`.
        """
        if np.isnan(after) or not np.isfinite(before):
            return
        total, count = self.held.setdefault(choice, {}).get(option, (0.0, 0))
        self.held[choice][option] = total + _risen(before, after) / max(gap, _LOST), count + 1

    def worth(self, choice: int, value: float, gap: float) -> float:
        """Return what is to be expected of a choice where the smallest goal is `value` and the
        relaxation loses `gap`.
        """
        return worth_of(
            value,
            [value + gap * total / count for total, count in self.held.get(choice, {}).values()],
        )


def likely_choices(
    model: Model, answer: Answer | None, made: dict[int, int], most: int
) -> list[int]:
    """Return some open choices, those first where the relaxation seems to lose most: the distance
    of a result from its function, times the multipliers of the rows between. Without an answer only
    the first; none where all are made.
    """
    left = np.array([i for i in range(len(model.choices)) if i not in made], dtype=np.int64)
    if not len(left) or answer is None or answer.columns is None:
        return [int(i) for i in left[:1]]
    gap = gaps_of(model, answer.columns)[left]
    weight = np.array(
        [
            np.abs(answer.multipliers[model.choices[i].first : model.choices[i].last]).sum()
            for i in left
        ]
    )
    return [int(i) for i in left[np.lexsort((-gap, -gap * weight))[:most]]]


def gaps_of(model: Model, columns: Floats) -> Floats:
    """Return how far each choice's result is from its function at a program's columns,
    (choices,).
    """
    gaps: Floats = np.abs(model.values_of(columns) - columns[model.results()])
    return gaps


def worth_of(value: float, reached: list[float]) -> float:
    """Return the product of what the two least of a choice's branches rise above `value`; nothing
    is known of a choice without branches.
    """
    rises = sorted(_risen(value, after) + _LEAST * abs(value) for after in reached)
    return 0.0 if not rises else rises[0] * rises[min(1, len(rises) - 1)]


def _risen(before: float, after: float) -> float:
    """Return by how much a smallest goal rose; no more than what closes the branch counts."""
    return max(min(after, 0.0) - before, 0.0)
