"""Do the losses point the right way, whatever the scale of the logits and however few the
classes?
"""

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calipers.api.ask import attack
from calipers.attacks.apgd import APGD
from calipers.attacks.engine.losses import OBJECTIVES, LossName, check_loss, cross_entropy, dlr
from calipers.attacks.pgd import PGD
from calipers.data import build, images
from calipers.errors import BadInput
from calipers.problem.goals import Goal, Targeted, Untargeted
from calipers.threats.ball import Ball

SCALE_FREE = ["dlr", "scaled"]
GOALS = [Untargeted(), Targeted(0)]
F64 = torch.float64


def asked(
    classes: int, goal: Goal, n: int = 60, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return random logits (n, K) and labels that differ from the target 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=dtype)
    return logits, torch.randint(1, classes, (n,), generator=generator)


def slope(name: str, logits: Tensor, y: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
    """Return a loss (n,) and its gradient by the logits (n, K)."""
    logits = logits.clone().requires_grad_()
    loss = OBJECTIVES[name](goal.margins(logits, y), goal)
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


def test_the_names_are_those_that_can_be_asked_for() -> None:
    assert set(get_args(LossName)) == {"alternate", *OBJECTIVES}
    with pytest.raises(BadInput, match="'dlr'"):
        check_loss("dlrr")


@pytest.mark.parametrize("goal", GOALS, ids=repr)
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_scaled_logits_change_nothing(name: str, classes: int, goal: Goal) -> None:
    logits, y = asked(classes, goal)
    _, here = slope(name, logits, y, goal)
    # powers of two round nothing: the signs must agree in every place
    for factor in (
        2.0**40,
        2.0**-40,
    ):
        _, there = slope(name, logits * factor, y, goal)
        assert torch.equal(here.sign(), there.sign())


@pytest.mark.parametrize(
    ("name", "goal"),
    [("dlr", Untargeted()), ("scaled", Untargeted()), ("scaled", Targeted(0))],
    ids=repr,
)
@pytest.mark.parametrize("classes", [3, 10])
def test_the_value_has_no_unit(name: str, classes: int, goal: Goal) -> None:
    logits, y = asked(classes, goal, dtype=F64)
    assert torch.allclose(
        slope(name, logits, y, goal)[0], slope(name, logits * 1e4, y, goal)[0], rtol=1e-9
    )


def test_cross_entropy_alone_would_not_pass() -> None:
    """The mutant: without the scale the weights of the other classes, and with them the direction,
    change.
    """
    logits, y = asked(10, Untargeted())
    _, here = slope("cross_entropy", logits, y, Untargeted())
    _, there = slope("cross_entropy", logits * 2.0**-20, y, Untargeted())
    assert float(torch.nn.functional.cosine_similarity(here, there).min()) < 0.9


@pytest.mark.parametrize("goal", GOALS, ids=repr)
@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_small_step_along_the_gradient_weakens_the_margin(
    name: str, classes: int, goal: Goal
) -> None:
    """While the point resists; the step is short beside the margins, and the one that decides must
    fall.
    """
    logits, y = asked(classes, goal, n=200, dtype=F64)
    worst = goal.worst(goal.margins(logits, y))
    standing = worst > 0.1
    _, g = slope(name, logits, y, goal)
    moved = logits + 1e-4 * g / g.abs().amax(1, keepdim=True)
    fell = goal.worst(goal.margins(moved, y)) < worst
    assert standing.any() and bool(fell[standing].all())


def test_dlr_is_the_papers_formula() -> None:
    logits, y = asked(10, Untargeted(), dtype=F64)
    z = logits.sort(1, descending=True).values
    target = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    own = logits.gather(1, y[:, None])[:, 0]
    assert torch.allclose(
        dlr(Untargeted().margins(logits, y), Untargeted()), -(own - target) / (z[:, 0] - z[:, 2])
    )


def test_dlr_climbs_the_margin_at_a_target() -> None:
    """The paper's ratio, with the target in its own gap, does not always rise with the target's
    logit.
    """
    logits, y = asked(5, Targeted(0), dtype=F64)
    assert torch.equal(
        slope("dlr", logits, y, Targeted(0))[1], slope("margin", logits, y, Targeted(0))[1]
    )


def test_dlr_of_two_classes_is_no_constant() -> None:
    logits, y = asked(2, Untargeted())
    loss, g = slope("dlr", logits, y, Untargeted())
    assert bool((g != 0).all()) and len(loss.unique()) == len(loss)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from([0.0, 1.0, -1.0, 1e-15, 1e15, -1e15, 3.0, 1.0 + 2**-23]),
        min_size=2,
        max_size=6,
    ),
    st.sampled_from(list(OBJECTIVES)),
    st.sampled_from(GOALS),
)
def test_values_and_gradients_are_finite_everywhere(
    values: list[float], name: str, goal: Goal
) -> None:
    """Ties of two, three and all logits included: there the gap that DLR divides by is zero."""
    loss, g = slope(name, torch.tensor([values]), torch.tensor([1]), goal)
    assert bool(loss.isfinite().all()) and bool(g.isfinite().all())


def test_scaled_is_cross_entropy_of_rescaled_margins() -> None:
    m = torch.tensor([[1.0, 3.0, 4.0]], dtype=F64)
    assert torch.allclose(OBJECTIVES["scaled"](m, Untargeted()), cross_entropy(m * 3, Untargeted()))


class Times(nn.Module):
    """A network whose logits are multiplied by a number."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


@pytest.mark.parametrize("tool", [PGD, APGD])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_a_net_with_scaled_logits_is_broken_as_often(name: Any, tool: Any) -> None:
    x, y = (part[:120] for part in images())
    found = [
        int(
            attack(
                Times(build("mnist-robust"), factor),
                x,
                y,
                Ball("linf", 0.13),
                tool(steps=15, loss=name),
            ).success.sum()
        )
        for factor in (1.0, 1e4, 1e-4)
    ]
    # 1e4 is no power of two: a rounding may tip one point
    assert found[0] >= 8 and max(found) - min(found) <= 1, found


def test_the_plain_cross_entropy_is_fooled_by_small_logits() -> None:
    """What the scale is for: the same search with plain cross-entropy loses many of its
    examples.
    """
    x, y = (part[:120] for part in images())
    small = Times(build("mnist-robust"), 1e-4)
    plain, scale_free = (
        int(attack(small, x, y, Ball("linf", 0.13), PGD(steps=15, loss=name)).success.sum())
        for name in ("cross_entropy", "scaled")
    )
    assert scale_free >= plain + 3, (scale_free, plain)
