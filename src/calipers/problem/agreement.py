"""Does a network that was read from a file compute what the file says? Asked at the door, on points of the very question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from calipers.problem.classifier import Classifier
from calipers.problem.streams import Streams
from calipers.problem.threat import Threat

_CENTERS, _AROUND = 2, 2  # points, and for each of them how many inside its ball, and as many at its ends
_NUMBERS = 2**22  # of all points together: of large inputs there are fewer, but a point and one beside it always


@runtime_checkable
class Sworn(Protocol):
    """A module that can be compared with another program."""

    def confirm(self, x: Tensor, run: Tensor, exact: Tensor) -> None:
        """Raise `BadModel` where its outputs at points x, in its own precision and in float64, are not those of the other program."""


def confirm(classifier: Classifier, x: Tensor, threat: Threat, seed: int = 0) -> None:
    """Compare every part of the model that can be, on the first points of x (N, *D) that are finite and on points of their balls.

    Raises `BadModel` with the size of the difference. Costs nothing for a model without such parts.
    """
    finite = torch.nonzero(x.flatten(1).isfinite().all(1)).flatten()[:_CENTERS]
    if not len(finite) or not any(isinstance(m, Sworn) for m in classifier.module.modules()):
        return
    points = _points(x[finite], threat.take(finite), seed)  # a radius may be each point's own
    classifier.logits64(points[:1])  # the copy is made, and tried, before anybody listens
    for (module, given, run), (_, _, exact) in zip(_heard(classifier.logits, points), _heard(classifier.logits64, points), strict=True):
        module.confirm(given, run, exact)


def _points(centers: Tensor, threat: Threat, seed: int) -> Tensor:
    """Return the centers, random points of their balls, and some that a random direction leads to."""
    room = max(2, _NUMBERS // centers[0].numel())
    centers = centers[: max(1, room // 2)]
    region, found = threat.region(centers), [centers]
    for k in range(min(_AROUND, room - 1)):
        streams = Streams.of(seed, [f"agreement {k} {i}" for i in range(len(centers))], centers.device)
        found += [region.sample(streams), region.support(streams.normal(centers[0].numel(), centers.dtype).view_as(centers)).point]
    return torch.cat([p.to(centers) for p in found])[:room]


def _heard(ask: Callable[[Tensor], Tensor], points: Tensor) -> list[tuple[Sworn, Tensor, Tensor]]:
    """Run the model, and return what its parts that can be compared were given and answered."""
    found: list[tuple[Sworn, Tensor, Tensor]] = []

    def listen(module: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        if isinstance(module, Sworn):
            found.append((module, given[0], answer))

    hook = nn.modules.module.register_module_forward_hook(listen)
    try:
        ask(points)
    finally:
        hook.remove()
    return found
