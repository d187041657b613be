"""Selection of the choice on which to branch next.

It is the choice whose linear programs rise most: found by strong branching the first time, and from
then on predicted by pseudo-costs, the average rise so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from calipers.certificates.exact.lp import Answer
from calipers.certificates.exact.model import Floats, MIPModel

_LEAST = 1e-6  # the smallest rise that any branch counts for, as a share of what is lacking
_LOST = 1e-12  # a smaller relaxation gap counts as this


@dataclass
class PseudoCosts:
    """Average rise of the bound for each option of each choice.

    A rise is divided by what the relaxation had lost at the choice before (Benichou et al. 1971).
    """

    held: dict[int, dict[int, tuple[float, int]]] = field(default_factory=dict)

    def knows(self, choice: int) -> bool:
        """Return whether the choice has been looked at."""
        return choice in self.held

    def note(self, choice: int, option: int, before: float, after: float, gap: float) -> None:
        """Record how much a program's optimum rose with an option of a choice.

        It rose from `before` to `after`, which may be NaN, where the relaxation had lost `gap`.
        """
        if np.isnan(after) or not np.isfinite(before):
            return
        total, count = self.held.setdefault(choice, {}).get(option, (0.0, 0))
        self.held[choice][option] = total + _risen(before, after) / max(gap, _LOST), count + 1

    def worth(self, choice: int, value: float, gap: float) -> float:
        """Return the score to expect of branching on a choice.

        The optimum before is `value`, and the relaxation loses `gap` at the choice.
        """
        return worth_of(
            value,
            [value + gap * total / count for total, count in self.held.get(choice, {}).values()],
        )


def likely_choices(
    model: MIPModel, answer: Answer | None, made: dict[int, int], most: int
) -> list[int]:
    """Return some open choices, the most promising ones first.

    Those are where the relaxation seems to lose most: the distance of a result from its function's
    value, times the multipliers of the rows between them. Without an answer only the first open
    choice is returned; none where all are made.
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


def gaps_of(model: MIPModel, columns: Floats) -> Floats:
    """Return each choice's relaxation gap at a program's solution, (choices,).

    The gap is how far the choice's result is from its function's value.
    """
    gaps: Floats = np.abs(model.values_of(columns) - columns[model.results()])
    return gaps


def worth_of(value: float, reached: list[float]) -> float:
    """Return the score of a choice from the optima of its branches.

    It is the product of the two smallest rises above `value`. Of a choice without branches nothing
    is known, and the score is 0.
    """
    rises = sorted(_risen(value, after) + _LEAST * abs(value) for after in reached)
    return 0.0 if not rises else rises[0] * rises[min(1, len(rises) - 1)]


def _risen(before: float, after: float) -> float:
    """Return by how much an optimum rose, capped where the branch is closed."""
    return max(min(after, 0.0) - before, 0.0)
