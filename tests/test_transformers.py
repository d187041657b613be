"""Transformers as the package of that name builds them, and their parts: are both jaws there?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import calipers
from calipers import Ball, Classifier


class Attending(nn.Module):
    """A class token, a mask for each point, attention, and positions that are made in forward."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.masked = nn.Parameter(torch.randn(1, 1, 8)), masked
        self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        n = x.shape[0]
        x = torch.cat([self.token.expand(n, -1, -1), x], 1)
        allowed = torch.arange(x.shape[1])[None, None, None] >= int(self.masked)
        mask = allowed.expand(n, 1, x.shape[1], x.shape[1])
        q = self.inner(x)[:, None]
        z = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return {"logits": self.last(z[:, 0, 0]), "hidden": z}


def both(model: nn.Module, x: Tensor, radius: float) -> None:
    """Certify and attack at a radius that is proved at every point; then attack at a wide one."""
    with torch.no_grad():
        y = Classifier(model).check(x).argmax(1)
    small = Ball("l2", radius, box=None)
    assert calipers.certify(model, x, y, small, "CROWN").certified.all()
    assert not calipers.attack(model, x, y, small, "PGD(steps=5)").success.any()
    wide = calipers.attack(model, x, y, Ball("l2", 50.0, box=None), "PGD(steps=20)")
    assert wide.backwards.sum() > 0 and wide.success.any()


def test_a_mask_that_hides_nothing_is_no_mask() -> None:
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    model = Attending(False).eval()
    both(model, x, 1e-3)
    found = calipers.certify(model, x, None, Ball("linf", 0.05, box=None), "CROWN").margin
    for _ in range(50):
        z = model(x + 0.05 * (2 * torch.rand_like(x) - 1))["logits"]
        top = model(x)["logits"].argmax(1, keepdim=True)
        rest = z.scatter(1, top, -torch.inf).amax(1)
        assert (z.gather(1, top)[:, 0] - rest >= found - 1e-6).all()


def test_what_is_missing_is_blamed_and_no_line_before_it() -> None:
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    model = Attending(True).eval()
    with pytest.raises(calipers.UnsupportedOp, match="scaled_dot_product_attention"):
        calipers.certify(model, x, None, Ball("linf", 0.01, box=None), "CROWN")
    assert calipers.attack(model, x, None, Ball("linf", 3.0, box=None)).success.any()


class Embedded(nn.Module):
    """A text model on embedded words."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(inputs_embeds=x)


def built(kind: str, how: str) -> tuple[nn.Module, Tensor]:
    """A small classifier of random weights, and points."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "attn_implementation": how,
    }
    if kind == "vision":
        config = transformers.ViTConfig(**size, image_size=32, patch_size=8, num_labels=10)
        return transformers.ViTForImageClassification(config).eval(), torch.rand(2, 3, 32, 32)
    config = transformers.BertConfig(
        **size, vocab_size=40, max_position_embeddings=32, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config).eval()
    return Embedded(model).eval(), torch.randn(2, 8, 32)


@pytest.mark.one_in(1)
@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["vision", "text"])
def test_vision_and_text_transformers_have_both_jaws(kind: str, how: str) -> None:
    model, x = built(kind, how)
    both(model, x, 1e-4)


def test_token_ids_of_a_text_model_are_told_what_to_do() -> None:
    model, _ = built("text", "sdpa")
    ids = torch.randint(0, 40, (2, 8))
    with pytest.raises(calipers.BadInput, match=r"token ids.*embeddings"):
        calipers.attack(model.model, ids, None, Ball("linf", 0.1))
