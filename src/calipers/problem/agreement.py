"""Comparison of imported networks with the file that they come from.

Made on points of the problem itself, when it is posed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from calipers.errors import BadModel
from calipers.models.classifier import Classifier
from calipers.random_streams import Streams
from calipers.threats.threat import Threat

# points, and for each how many inside its ball (and as many on its boundary)
_CENTERS, _AROUND = 2, 2
# numbers in the largest value at all points together: where it is large there are fewer points,
# but always one
_NUMBERS = 2**22


@runtime_checkable
class Sworn(Protocol):
    """A module that can be compared with another program."""

    @property
    def largest(self) -> int:
        """How many numbers the largest value has that it computes for a point."""

    def confirm(self, x: Tensor, run: Tensor, exact: Tensor) -> None:
        """Raise `BadModel` where its outputs differ from the other program's.

        At points x, in its own precision (`run`) and in float64 (`exact`).
        """


def confirm(classifier: Classifier, x: Tensor, threat: Threat, seed: int = 0) -> None:
    """Compare every part of the model that can be with its reference.

    On the first finite points of x (N, *D) and on points of their balls. Raises `BadModel` with the
    size of the difference, and where there is no memory for the comparison. Costs nothing for a
    model without such parts.
    """
    try:
        _confirm(classifier, x, threat, seed)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):  # torch's own words
            raise BadModel(
                "there is too little memory to compare the network with the file that it was read "
                "from: nothing is claimed about it"
            ) from error
        raise


def _confirm(classifier: Classifier, x: Tensor, threat: Threat, seed: int) -> None:
    """Compare every part, as `confirm` says."""
    sizes = [m.largest for m in classifier.module.modules() if isinstance(m, Sworn)]
    finite = torch.nonzero(x.flatten(1).isfinite().all(1)).flatten() if sizes else x.new_empty(0)
    if not len(finite):
        return
    room = max(1, _NUMBERS // max(*sizes, x[0].numel()))
    finite = finite[: min(_CENTERS, max(1, room // 2))]
    points = _points(x[finite], threat.take(finite), room, seed)  # a radius may be each point's own
    classifier.logits64(points[:1])  # makes and tests the copy before the hooks are set
    for (module, given, run), (_, _, exact) in zip(
        _heard(classifier.logits, points), _heard(classifier.logits64, points), strict=True
    ):
        module.confirm(given, run, exact)


def _points(centers: Tensor, threat: Threat, room: int, seed: int) -> Tensor:
    """Return random points of the balls, and the centers.

    Some are random points, some maximise a random linear function; the first `room` of all are
    kept.
    """
    region, found = threat.region(centers), list[Tensor]()
    for k in range(min(_AROUND, room)):
        streams = Streams.of(
            seed, [f"agreement {k} {i}" for i in range(len(centers))], centers.device
        )
        found.append(region.sample(streams))
        if room > 1:
            found.append(
                region.support(
                    streams.normal(centers[0].numel(), centers.dtype).view_as(centers)
                ).point
            )
    return torch.cat([p.to(centers) for p in (*found, centers)])[:room]


Call = tuple[Sworn, Tensor, Tensor]


def _heard(ask: Callable[[Tensor], Tensor], points: Tensor) -> list[Call]:
    """Run the model, and return what its comparable parts got and returned.

    Where it takes the points in several calls, one point at a time.
    """
    found = _listened(ask, points)
    if all(len(given) == len(points) for _, given, _ in found):
        return found
    each = zip(*(_listened(ask, point) for point in points.split(1)), strict=True)
    return [
        (calls[0][0], torch.cat([c[1] for c in calls]), torch.cat([c[2] for c in calls]))
        for calls in each
    ]


def _listened(ask: Callable[[Tensor], Tensor], points: Tensor) -> list[Call]:
    """Run the model once, and return the calls of its comparable parts."""
    found: list[Call] = []

    def listen(module: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        if isinstance(module, Sworn):
            found.append((module, given[0], answer))

    hook = nn.modules.module.register_module_forward_hook(listen)
    try:
        ask(points)
    finally:
        hook.remove()
    return found
