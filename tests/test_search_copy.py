"""Does a rearranged network compute the same, and its gradient too?"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from calipers.models.fast_gradient import BlockedConvolution, search_copy

F64 = torch.float64
SHAPES = [  # in, out, kernel, stride, padding, height, width
    (1, 8, 4, 2, 1, 28, 28),
    (1, 4, 5, 1, 2, 9, 12),
    (2, 3, (3, 5), (2, 1), (0, 2), 11, 10),
    (3, 5, (4, 2), (1, 3), (3, 0), 8, 13),
    (3, 6, 7, 2, 3, 17, 16),
    (3, 4, 5, 4, 0, 18, 15),
    (4, 2, 1, 1, 0, 5, 6),
    (1, 2, 1, 3, 0, 8, 8),
    (1, 3, 2, 5, 0, 13, 12),
    (8, 4, 3, 2, 1, 7, 9),
]


def gradient(network: nn.Module, x: Tensor, direction: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad((network(x) * direction).sum(), x)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_blocked_gradient_is_the_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    *settings, height, width = shape
    convolution = nn.Conv2d(*settings).to(F64)
    blocked, x = (
        BlockedConvolution(convolution),
        torch.randn(3, settings[0], height, width, dtype=F64),
    )
    z = convolution(x)
    assert torch.equal(blocked(x), z)
    direction = torch.randn_like(z)
    expected = gradient(convolution, x, direction)
    assert expected.shape == gradient(blocked, x, direction).shape and torch.allclose(
        gradient(blocked, x, direction), expected, atol=1e-12
    )


def test_only_convolutions_of_few_channels_are_replaced_and_the_original_stays() -> None:
    torch.manual_seed(0)
    hooked = nn.Conv2d(1, 2, 3)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3))
    body = nn.Sequential(
        nn.Conv2d(2, 16, 3),
        nn.Conv2d(16, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
    )
    network = nn.Sequential(
        hooked, weighted, body, nn.Conv2d(4, 1, 3, padding=1, padding_mode="reflect")
    ).eval()
    copied = search_copy(network, torch.float32)
    assert [
        name for name, part in copied.named_modules() if isinstance(part, BlockedConvolution)
    ] == ["2.0"]
    assert not any(isinstance(part, BlockedConvolution) for part in network.modules())
    x = torch.rand(2, 1, 20, 20)
    assert torch.equal(copied(x), network(x))
    direction = torch.randn_like(network(x))
    assert torch.allclose(
        gradient(copied, x, direction), gradient(network, x, direction), atol=1e-6
    )
    assert all(not p.requires_grad for p in copied.parameters()) and all(
        p.requires_grad for p in network.parameters()
    )


def test_a_single_layer_is_replaced_whole_and_what_gains_nothing_is_not_copied() -> None:
    assert isinstance(search_copy(nn.Conv2d(1, 4, 3), torch.float32), BlockedConvolution)
    plain = nn.Linear(3, 2)
    assert (
        search_copy(plain, torch.float32) is plain
        and search_copy(plain, torch.bfloat16) is not plain
    )
    half = search_copy(nn.Conv2d(1, 4, 3), torch.bfloat16)
    assert isinstance(half, BlockedConvolution) and half.adjoint.kernel.dtype == torch.bfloat16


def test_a_module_that_cannot_be_copied_is_asked_as_it_is() -> None:
    class Locked(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(1, 4, 3))
            self.lock = threading.Lock()

    network = Locked()
    assert search_copy(network, torch.float32) is network
    with pytest.raises(TypeError, match="lock"):
        search_copy(network, torch.bfloat16)
