"""Does a receptive field bound an element as the whole network does? Every unstable element of
small convolutional networks, by value and by gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import nets
import pytest
import torch
from nets import Case, Residual
from torch import nn

from calipers.bounds import intermediate
from calipers.bounds.backward import relax
from calipers.bounds.dual_bound import Root
from calipers.bounds.float64_check import confirmed
from calipers.bounds.intermediate import sharpening
from calipers.bounds.optimise import Ascent
from calipers.bounds.receptive_field import receptive_field_of
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.rounding import CHECKED, plain_sums
from calipers.bounds.unstable import unstable_elements
from calipers.graph import receptive_field
from calipers.graph.capture import capture
from calipers.graph.receptive_field import Inside
from calipers.models.classifier import Classifier
from calipers.threats.ball import Ball

IMAGE = (2, 9, 11)
LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "two": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.ReLU()],
    "strides": lambda: [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2, stride=(1, 2), padding=1), nn.ReLU()],
    "uneven, dilated": lambda: [nn.Conv2d(2, 3, (3, 2), padding=(0, 1)), nn.ReLU(), nn.Conv2d(3, 2, 2, dilation=(2, 1), padding=(2, 0)), nn.ReLU()],
    "groups": lambda: [nn.Conv2d(2, 4, 3, groups=2, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=4, padding=1), nn.ReLU()],
    "one after another": lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2, padding=1), nn.ReLU()],
    "smooth": lambda: [nn.Conv2d(2, 2, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(2, 2, 2, padding=1), nn.Tanh()],
    "norm first": lambda: [nets._stirred(nn.BatchNorm2d(2)), nn.Conv2d(2, 3, 2, padding=1), nn.ReLU(), nets._stirred(nn.BatchNorm2d(3)),
                           nn.Conv2d(3, 2, 2, padding=1), nn.ReLU()],
    "residual": lambda: [nn.Conv2d(2, 3, 2), nn.ReLU(), Residual(nn.Conv2d(3, 3, 3, padding=1)), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU()],
    "residual, linear": lambda: [Residual(nn.Conv2d(2, 2, 3, padding=1), sign=-1.0), nn.Conv2d(2, 3, 2, padding=1), nn.ReLU(),
                                 Residual(nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1)), nn.Tanh()],
}  # fmt: skip
BALLS = {
    "linf": Ball("linf", 0.1),
    "l2": Ball("l2", 0.5),
    "l1": Ball("l1", 1.0, box=None),
    "masked": Ball(
        "linf",
        torch.tensor([0.1, 0.0, 0.3]),
        mask=torch.rand(IMAGE, generator=torch.Generator().manual_seed(2)) < 0.7,
    ),
}


def case(name: str, ball: Ball) -> Case:
    """Return three points of a network of that name."""
    torch.manual_seed(list(LAYERS).index(name))
    features = nn.Sequential(*LAYERS[name](), nn.Flatten())
    model = nn.Sequential(*features, nn.Linear(features(torch.zeros(1, *IMAGE)).shape[1], 3)).eval()
    classifier, x = Classifier(model), torch.rand(3, *IMAGE)
    classifier.check(x)
    return nets.case_of(capture(classifier, x), 5, ball=ball)


def differences(case: Case) -> list[str]:
    """Compare every unstable element's bound, minimiser's gradient and confirmed bound with the
    whole network's; name what differs.
    """
    with torch.no_grad(), plain_sums():
        region = case.ball.region(case.x, outward=True)
        state = relax(case.graph, region, CHECKED)
        root, found, seen = Root.of(state, torch.float64, region), [], 0
        for number in case.graph.nonlinear:
            field = receptive_field_of(case.graph, number, region)
            if field is None or number == 0:
                continue
            rows, places = unstable_elements(case.graph, number, state.boxes[number]).nonzero(
                as_tuple=True
            )
            seen += len(rows)
            if not len(rows):
                continue
            sign = torch.where(places % 2 == 0, 1.0, -1.0).double()
            bounds = []
            for dual, spec in (
                intermediate._whole(root, number, rows, places, sign, case.graph.shape(number)),
                intermediate._restricted(root, field, rows, places, sign, case.graph.shape(number)),
            ):
                free = dual.guess()
                sight = dual.see(free)
                pulls = dual.gradient(free, sight).alpha.items()
                own = [g * dual.weigh[dual.graph.nodes[k - 1].inputs[0]] for k, g in pulls]
                pull = sum((g.square().sum(1) for g in own), torch.zeros_like(sight.bound))
                better = Ascent(3, 0.2, enough=torch.inf)(dual, free)[0]
                bounds.append((sight.bound, pull, better, confirmed(dual, free, spec)))
            for what, one, other in zip(
                ("bound", "gradient", "ascent", "confirmed"), *bounds, strict=True
            ):
                if not torch.allclose(one, other, rtol=1e-6, atol=1e-8):
                    found.append(f"number {number}, {what}: {float((one - other).abs().max()):.3g}")
    assert seen > 50, "nothing was restricted"
    return found


@pytest.mark.parametrize("ball", sorted(BALLS))
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_receptive_field_bounds_as_the_whole_network_does(name: str, ball: str) -> None:
    assert not differences(case(name, BALLS[ball]))


def sharp(case: Case, *, restrict: bool) -> Relaxed:
    region = case.ball.region(case.x, outward=True)
    with torch.no_grad(), plain_sums():
        return relax(
            case.graph,
            region,
            CHECKED,
            tighten=sharpening(
                Ascent(4, 0.25), case.ball.region(case.x.float()), restrict=restrict
            ),
        )


@pytest.mark.parametrize("name", ["strides", "residual, linear", "smooth"])
def test_sharpened_boxes_are_the_same_and_hold(name: str) -> None:
    question = case(name, BALLS["linf"])
    restricted, without = sharp(question, restrict=True), sharp(question, restrict=False)
    points = nets.attacked(question, 3)
    values = question.graph.values(points.flatten(0, 1))
    for k, box in restricted.boxes.items():
        torch.testing.assert_close(box.lower, without.boxes[k].lower, rtol=1e-4, atol=1e-5)
        v = values[k].view(len(points), len(question.x), *values[k].shape[1:])
        assert bool(((v >= box.lower - 1e-9) & (v <= box.upper + 1e-9)).all())


def test_weights_and_wide_views_are_bounded_whole() -> None:
    question = case("two", BALLS["linf"])
    weighted = Ball("linf", 0.1, weights=torch.rand(IMAGE) + 0.5)
    assert receptive_field_of(question.graph, 3, weighted.region(question.x)) is None
    assert (
        receptive_field_of(
            question.graph, len(question.graph.nodes), question.ball.region(question.x)
        )
        is None
    )


def test_mutant_that_leaves_values_outside_the_image_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # no operation is taken for affine, so that none is followed by zeros
    monkeypatch.setattr(receptive_field, "Affine", Inside)
    assert differences(case("one after another", BALLS["linf"]))


def test_mutant_windows_beside_the_element_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = receptive_field.Window.through

    def beside(
        self: receptive_field.Window,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        size: tuple[int, int],
        image: tuple[int, int],
    ) -> receptive_field.Window:
        return real(self, stride, (padding[0], 0), size, image)

    monkeypatch.setattr(receptive_field.Window, "through", beside)
    assert differences(case("two", BALLS["linf"]))


def test_mutant_cuts_from_the_corner_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = receptive_field.Cut
    monkeypatch.setattr(
        receptive_field, "Cut", lambda top, left, size, whole: real(0, 0, size, whole)
    )
    assert differences(case("residual", BALLS["linf"]))


def test_mutant_filling_from_outside_the_image_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Root,
        "of",
        classmethod(lambda cls, state, dtype, region, inside=None: real(state, dtype, region)),
    )
    assert differences(case("one after another", BALLS["linf"]))


real = Root.of
