"""Does every builder of an activation ask for all that an exported call says? What it does not ask
for would be taken to be as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from calipers.graph.activations import ACTIVATIONS, TwoPieces


class Asked(tuple[Any, ...]):
    """Arguments that remember which of them were asked for."""

    seen: set[int]

    def __getitem__(self, place: Any) -> Any:
        self.seen.update(
            range(len(self))[place] if isinstance(place, slice) else [range(len(self))[place]]
        )
        return super().__getitem__(place)

    def __iter__(self) -> Any:
        self.seen.update(range(len(self)))
        return super().__iter__()


def overlooked(name: str, builder: Callable[[Any], object]) -> list[str]:
    """Return the arguments of the exported operation, but its tensor, that the builder never asks
    for.
    """
    _, operation, overload = name.split(".")
    known = getattr(getattr(torch.ops.aten, operation), overload)._schema.arguments
    given = Asked(
        [torch.ones(2), *(2.0 if a.default_value is None else a.default_value for a in known[1:])]
    )
    given.seen = set()
    builder(given)
    return [a.name for place, a in enumerate(known) if place and place not in given.seen]


@pytest.mark.one_in(1)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_builder_asks_for_every_argument(name: str) -> None:
    assert not overlooked(name, ACTIVATIONS[name])


def test_a_builder_that_overlooks_a_slope_is_caught() -> None:
    assert overlooked("aten.leaky_relu.default", lambda args: TwoPieces(0.01, 1.0)) == [
        "negative_slope"
    ]
    assert overlooked(
        "aten.softplus.default", lambda args: ACTIVATIONS["aten.softplus.default"](args[:2])
    ) == ["threshold"]
