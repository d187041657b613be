"""Are budgets shared out as the plain formula says, however few features were looked at?"""

from __future__ import annotations

import pytest
import torch

from calipers.threats.water_filling import largest, spend_in_order


def test_few_features_answer_as_all_of_them_do() -> None:
    """Budgets that few features spend, and budgets that need a full sort, side by side: each row
    gets what the formula says for all features sorted.
    """
    generator = torch.Generator().manual_seed(3)
    rank = torch.rand(6, 300, generator=generator, dtype=torch.float64)
    price, cap = torch.rand(2, 6, 300, generator=generator, dtype=torch.float64).unbind(0)
    price[:, 7], cap[0, 11] = 0.0, torch.inf
    budget = torch.tensor([0.0, 0.5, 3.0, 20.0, 60.0, 1e6], dtype=torch.float64)
    lengths = spend_in_order(rank, price, cap, budget)
    for row in range(6):
        left = float(budget[row])
        for i in rank[row].argsort(descending=True).tolist():
            expected = (
                min(left / float(price[row, i]), float(cap[row, i])) if price[row, i] > 0 else 0.0
            )
            assert abs(float(lengths[row, i]) - expected) < 1e-9
            left = max(0.0, left - expected * float(price[row, i]))


@pytest.mark.parametrize("levels", [3, 10**9])
def test_largest_keeps_the_first_of_equal_ranks(levels: int) -> None:
    """With three levels most ranks are equal; counts from none to all, beyond the few that are
    looked for at first.
    """
    generator = torch.Generator().manual_seed(5)
    rank = torch.randint(0, levels, (8, 200), generator=generator).float()
    values = torch.rand(8, 200, generator=generator) + 0.5
    count = torch.tensor([0.0, 0.9, 1.0, 20.7, 64.0, 65.0, 199.0, 500.0])
    kept = largest(rank, values, count)
    for row in range(8):
        first = sorted(range(200), key=lambda i: (-float(rank[row, i]), i))[: int(count[row])]
        assert torch.nonzero(kept[row]).flatten().tolist() == sorted(first)
        assert torch.equal(kept[row, first], values[row, first])
