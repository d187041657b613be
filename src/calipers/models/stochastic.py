"""Models that draw random numbers, judged by the median of many draws.

A single pass through such a model decides nothing: an adversary who repeats it finds a draw that is
fooled. So a random model is declared (`Classifier(model, samples=100)`), and a point counts as
adversarial where the median over that many fresh draws of its worst margin is not positive: where
at least half of the draws are fooled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from calipers.random_streams import key_of

_ROUNDINGS = 64  # of the largest output: summation in another order changes no more


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the shared generators, and restore their state at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.random.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        if device.type == "cuda":
            torch.cuda.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
        yield


def drawn(model: nn.Module, x: Tensor, draws: int, seed: int) -> Iterator[Tensor]:
    """Yield the model's answers to x under independent random draws.

    `draws` of them; the state of the shared generators is restored each time. One call a draw, so a
    layer that draws once for a whole batch is drawn anew, too.
    """
    for i in range(draws):
        with seeded(key_of(seed, i), x.device):
            z = model(x)
        yield z


def differ(first: Tensor, second: Tensor) -> bool:
    """Return whether two answers to the same input differ beyond rounding.

    NaN and infinity agree with themselves.
    """
    one, other = first.nan_to_num(), second.nan_to_num()
    return one.shape != other.shape or bool(
        ((one - other).abs() > _ROUNDINGS * torch.finfo(one.dtype).eps * one.abs().amax()).any()
    )


def ballot(model: nn.Module, points: Tensor, draws: int) -> Tensor:
    """Return the answers (draws, N, K) of fresh draws, each point alone.

    The seed is the point's own content: the same point gets the same answers whatever the other
    points of the batch are, and from draws that no attack has seen. Cost: draws x N passes.
    """
    with torch.no_grad():
        return torch.stack(
            [
                torch.cat(list(drawn(model, point, draws, _seed_of(point))))
                for point in points.split(1)
            ],
            1,
        )


def _seed_of(point: Tensor) -> int:
    """Return a seed that is a digest of the point."""
    return key_of("ballot", point.detach().cpu().numpy().tobytes().hex())
