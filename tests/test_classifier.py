"""Is the model measured as it is, and left as it was? Refusals at the door, frozen state, counters,
digests.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calipers.errors import BadModel
from calipers.models.classifier import Classifier


class Fn(nn.Module):
    """A model made of a function."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def net(seed: int = 0, classes: int = 3, inputs: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 6), nn.ReLU(), nn.Linear(6, classes)).eval()


def points(n: int = 5, *shape: int) -> Tensor:
    return torch.rand(n, *(shape or (4,)), generator=torch.Generator().manual_seed(1))


# ---- refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "where"),
    [
        (nn.Dropout(0.5), "1"),
        (nn.BatchNorm1d(6), "1"),
        (nn.Sequential(nn.Identity(), nn.AlphaDropout()), r"1\.1"),
    ],
    ids=["dropout", "batch norm", "nested"],
)
def test_training_mode_is_refused_by_the_name_of_the_layer(layer: nn.Module, where: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3)).train()
    with pytest.raises(
        BadModel,
        match=rf"training mode with active dropout or batch norm \({where}\).*Call "
        r"model\.eval\(\) first",
    ):
        Classifier(model).check(points())
    assert Classifier(model.eval()).check(points()).shape == (5, 3)


def test_training_mode_without_such_layers_is_harmless() -> None:
    assert Classifier(net().train()).check(points()).shape == (5, 3)


def test_only_some_of_many_active_layers_are_listed() -> None:
    with pytest.raises(BadModel, match=r"\(0, 1, 2, …\)"):
        Classifier(nn.Sequential(*[nn.Dropout() for _ in range(5)]).train()).check(points())


@pytest.mark.parametrize("steepness", [1.0, 50.0])
def test_a_last_softmax_is_left_out_and_said(steepness: float) -> None:
    classifier = Classifier(Fn(lambda x: (steepness * x[:, :3]).softmax(1)))
    assert torch.equal(classifier.check(points()), steepness * points()[:, :3])
    assert "the softmax at its end is left out" in repr(classifier)


def test_logits_that_look_a_little_like_probabilities_are_not_refused() -> None:
    for function in (
        lambda x: torch.full((len(x), 4), 0.25),
        lambda x: x[:, :3],
        lambda x: x[:, :3] - x[:, :3].mean(1, keepdim=True) + 1 / 3,
    ):
        Classifier(Fn(function)).check(points())
    assert (
        Classifier(Fn(lambda x: x.log_softmax(1))).check(points()) < 0
    ).all()  # log-probabilities are logits


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: x.view(len(x), 2, 2), r"for 2 inputs it returned \(2, 2, 2\)"),
        (lambda x: x[:1], r"for 2 inputs it returned \(1, 4\)"),
        (lambda x: x.sum(), r"for 2 inputs it returned \(\)"),
        (lambda x: {"logits": x[:1]}, r"for 2 inputs it returned \(1, 4\)"),
        (lambda x: (), "it returned a tuple without tensors"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(
    function: Callable[[Tensor], object], got: str
) -> None:
    with pytest.raises(BadModel, match=rf"the model must return logits of shape \(N, K\); {got}"):
        Classifier(Fn(function)).check(points())


def test_a_single_squeezed_logit_is_refused_with_its_shape() -> None:
    with pytest.raises(BadModel, match=r"for 1 inputs it returned \(\)"):
        Classifier(Fn(lambda x: x[:, :1].squeeze())).check(points(1))


def test_a_model_that_raises_is_named_with_what_it_was_given() -> None:
    with pytest.raises(
        BadModel,
        match=r"could not be called on inputs of shape \(7,\) and dtype torch\.float32: .*shapes "
        r"cannot be "
        r"multiplied",
    ) as caught:
        Classifier(net()).check(points(3, 7))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(BadModel, match=r"wraps a torch\.nn\.Module, got function.*calipers\.load"):
        Classifier(points)  # type: ignore[arg-type]


def test_mean_and_std_come_in_pairs_and_std_is_positive() -> None:
    with pytest.raises(BadModel, match="give both mean and std"):
        Classifier(net(), mean=0.5)
    with pytest.raises(
        BadModel, match=r"std must be positive in every channel, got \[1\.0, 0\.0\]"
    ):
        Classifier(net(), mean=[0.0, 0.0], std=[1.0, 0.0])


# ---- frozen
# --------------------------------------------------------------------------------------------------


def mixed() -> nn.Sequential:
    """Return a model whose parts are in different modes and whose parameters have different flags,
    as a fine-tuning user has them.
    """
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
    ).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    return model


def state(model: nn.Module) -> tuple[list[bool], list[bool], list[Tensor]]:
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [t.clone() for t in model.state_dict().values()],
    )


class Interrupted(BaseException):
    """Like KeyboardInterrupt: no `except Exception` sees it."""


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, Interrupted])
def test_frozen_puts_everything_back_also_after_an_exception(
    error: type[BaseException] | None,
) -> None:
    model = mixed()
    classifier = Classifier(model)
    torch.manual_seed(3)
    modes, flags, values = state(model)
    generator = torch.get_rng_state()
    with classifier.frozen():
        assert not any(m.training for m in model.modules()) and not any(
            p.requires_grad for p in model.parameters()
        )
    if error is not None:
        with pytest.raises(error):
            draw_and_fail(classifier, error)
    classifier.logits(points())
    classifier.logits64(points())
    classifier.step(torch.bfloat16)(points())
    after = state(model)
    assert (modes, flags) == after[:2] and all(
        torch.equal(a, b) for a, b in zip(values, after[2], strict=True)
    )
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


def draw_and_fail(classifier: Classifier, error: type[BaseException]) -> None:
    with classifier.frozen():
        torch.rand(10)
        raise error


def test_frozen_can_be_nested() -> None:
    model = mixed()
    before = state(model)[:2]
    with Classifier(model).frozen(), Classifier(model).frozen():
        pass
    assert state(model)[:2] == before


# ---- the map
# --------------------------------------------------------------------------------------------------


def test_a_standardised_model_equals_the_wrapped_one() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 2 * 3, 5)).eval()
    mean, std, x = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], points(6, 3, 4, 5)
    by_hand = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    assert torch.allclose(
        Classifier(inner, mean, std).logits(x), inner(by_hand).detach(), atol=1e-6
    )
    assert torch.allclose(
        Classifier(inner, 0.5, 0.25).logits(x), inner((x - 0.5) / 0.25).detach(), atol=1e-6
    )
    flat = Classifier(net(), [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0])
    assert torch.allclose(
        flat.logits(points()),
        net()(
            (points() - torch.tensor([0.1, 0.2, 0.3, 0.4])) / torch.tensor([1.0, 2.0, 3.0, 4.0])
        ).detach(),
        atol=1e-6,
    )


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_a_single_logit_becomes_two_classes(shape: tuple[int, ...]) -> None:
    classifier, x = Classifier(Fn(lambda x: (x.sum(1) - 2).reshape(shape))), points(50)
    logits = classifier.check(x)
    assert logits.shape == (50, 2) and torch.allclose(
        logits[:, 1] - logits[:, 0], x.sum(1) - 2, atol=1e-6
    )
    assert torch.equal(logits.argmax(1) == 1, x.sum(1) > 2)
    assert classifier.check(x).shape == (50, 2)  # asking twice does not stack a second pair on it


def test_logits64_is_a_copy_that_leaves_the_model_in_float32() -> None:
    model = net()
    classifier, x = Classifier(model, mean=0.1, std=0.3), points()
    precise = classifier.logits64(x)
    assert precise.dtype == torch.float64 and next(model.parameters()).dtype == torch.float32
    assert torch.allclose(precise, classifier.logits(x).double(), atol=1e-5) and not torch.equal(
        precise, classifier.logits(x).double()
    )
    double = Classifier(net().double())
    assert double.dtype == torch.float64 and torch.equal(
        double.logits64(x.double()), double.logits(x.double())
    )


def test_a_step_in_half_precision_is_a_copy_too() -> None:
    model = net()
    classifier, x = Classifier(model), points().requires_grad_()
    rough = classifier.step(torch.bfloat16)(x)
    assert rough.dtype == torch.float32 and next(model.parameters()).dtype == torch.float32
    assert torch.allclose(rough, classifier.logits(x), atol=0.1) and not torch.equal(
        rough, classifier.logits(x)
    )
    (gradient,) = torch.autograd.grad(rough.sum(), x)
    assert gradient.abs().sum() > 0


def test_every_point_is_counted() -> None:
    classifier = Classifier(net())
    with classifier.passes.counting() as whole:
        with classifier.passes.counting() as spent:
            classifier.logits(points(7))
            classifier.logits64(points(3))
        assert (spent.forwards, spent.backwards) == (10, 0)
        classifier.check(points(5))
    classifier.logits(points(4))
    # A first call with two points, others for chance and gradients; five points alone, together and
    # in reverse; then all.
    assert (whole.forwards, whole.backwards) == (10 + 2 + 2 + 2 + 3 * 5 + 5, 2)


def test_logits_carry_no_gradients() -> None:
    assert not Classifier(net()).logits(points().requires_grad_()).requires_grad


# ---- identity
# --------------------------------------------------------------------------------------------------


def test_the_digest_is_the_weights_and_the_structure() -> None:
    base = Classifier(net())
    assert (
        base.digest() == Classifier(net()).digest() == Classifier(net().train()).digest()
        and len(base.digest()) == 16
    )
    touched = net()
    with torch.no_grad():
        touched[0].weight[0, 0] += 1e-6
    normed = nn.Sequential(net(), nn.BatchNorm1d(3)).eval()
    shifted = nn.Sequential(net(), nn.BatchNorm1d(3)).eval()
    shifted[1].running_mean += 1
    others = [
        Classifier(touched),
        Classifier(net(seed=1)),
        Classifier(net().double()),
        Classifier(net(), 0.5, 0.5),
        Classifier(net(), 0.5, 0.25),
    ]
    others += [
        Classifier(normed),
        Classifier(shifted),
        Classifier(nn.Sequential(*net()[:1], nn.Tanh(), net()[2]).eval()),
    ]
    assert len({c.digest() for c in [base, *others]}) == 1 + len(others)


def test_device_and_dtype_are_those_of_the_parameters() -> None:
    assert Classifier(net().double()).dtype == torch.float64
    assert (
        Classifier(nn.Flatten()).dtype == torch.float32
        and Classifier(nn.Flatten()).device.type == "cpu"
    )
