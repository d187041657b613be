"""Does a choice's worth follow from what its branches rose? By hand."""

from __future__ import annotations

import numpy as np
import pytest

from calipers.certificates.exact.pseudocosts import PseudoCosts, worth_of


def test_worth_is_what_branches_rose_on_the_average_for_what_was_lost() -> None:
    costs = PseudoCosts()
    assert not costs.knows(3) and costs.worth(3, -1.0, 0.5) == 0.0
    costs.note(3, 0, -1.0, -0.8, gap=0.2)  # one for one
    costs.note(3, 0, -1.0, -0.4, gap=0.2)  # three for one: two on the average
    costs.note(3, 1, -1.0, -0.9, gap=0.2)  # a half for one
    assert costs.knows(3)
    assert costs.worth(3, -1.0, 0.1) == pytest.approx(0.2 * 0.05, rel=1e-3)


def test_no_more_than_what_closes_a_branch_counts_and_nothing_unknown() -> None:
    assert worth_of(-1.0, [5.0, -0.5]) == pytest.approx(1.0 * 0.5, rel=1e-3) and worth_of(
        -1.0, [-0.5]
    ) == pytest.approx(0.25, rel=1e-3)
    costs = PseudoCosts()
    costs.note(0, 0, -1.0, np.nan, gap=0.2)
    costs.note(0, 1, -np.inf, -1.0, gap=0.2)
    assert not costs.knows(0)
