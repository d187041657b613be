"""What may the adversary do? Balls refuse nonsense in words, regions are exact to the last bit, and
distortion has the textbook's numbers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from calipers.errors import BadInput
from calipers.random_streams import Streams
from calipers.threats.ball import Ball
from calipers.threats.distortion import largest_mse, mse, psnr, psnr_of, radius_of_equal_energy

P = ["linf", "l2", "l1"]
DTYPES = [torch.float32, torch.float64]


def images(n: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return random images, some features on the faces of the box."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, 3, 4, generator=g)
    return torch.where(torch.rand(x.shape, generator=g) < 0.2, x.round(), x).to(dtype)


def names(n: int) -> list[str]:
    return [f"p{i}" for i in range(n)]


def streams(n: int, seed: int = 0) -> Streams:
    return Streams.of(seed, names(n), torch.device("cpu"))


# ---- refusals
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"radius": -0.1},
            r"radius must be a finite number >= 0 in the data's own units, got -0\.1",
        ),
        ({"radius": math.nan}, r"radius must be a finite number >= 0 .* got nan"),
        ({"radius": math.inf}, r"radius must be a finite number >= 0 .* got inf"),
        ({"radius": [0.1, -1.0, 0.3]}, r"got -1\.0 at point 1"),
        (
            {"radius": torch.zeros(2, 2)},
            r"one number or one for each point, got a tensor of shape \(2, 2\)",
        ),
        (
            {"box": (1.0, 0.0)},
            r"box must be \(low, high\) with low <= high in every feature, got \(1\.0, 0\.0\)",
        ),
        ({"box": (0.0, math.nan)}, "box must be"),
        (
            {"weights": torch.tensor([1.0, 0.0])},
            "weights must be positive and finite in every feature; to freeze a feature use mask",
        ),
        ({"weights": torch.tensor([1.0, math.inf])}, "weights must be positive and finite"),
        ({"mask": torch.tensor([1, 0])}, r"mask must be of dtype bool .* got torch\.int64"),
        ({"norm": "l7"}, r"unknown norm 'l7'; a Ball takes 'linf', 'l2' or 'l1'"),
        (
            {"norm": "l0", "box": None},
            r"'l0' counts changed features .* give a box=\(low, high\) of finite numbers",
        ),
    ],
)
def test_a_ball_refuses_nonsense_and_says_what_it_takes(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        Ball(**{"norm": "linf", "radius": 0.1, **settings})


def test_wrong_lengths_and_shapes_are_named() -> None:
    x = images(3)
    with pytest.raises(
        BadInput,
        match="radius has 2 entries, but there are 3 points: give one number, or one for each "
        "point",
    ):
        Ball("linf", [0.1, 0.2]).region(x)
    for name in ("weights", "mask"):
        wrong: dict[str, Any] = {
            name: torch.ones(5, dtype=torch.bool if name == "mask" else torch.float32)
        }
        with pytest.raises(
            BadInput,
            match=r"a box, mask or weight of shape \(5,\) does not fit inputs of shape \(2, 3, 4\)",
        ):
            Ball("l2", 0.1, **wrong).region(x)
    with pytest.raises(BadInput, match=r"of shape \(5,\) does not fit"):
        Ball("l2", 0.1, box=(torch.zeros(5), 1.0)).region(x)


def test_names_are_normalised_and_the_radius_is_no_part_of_the_identity() -> None:
    assert Ball("L∞", 0.1).norm == "linf"
    assert (
        Ball("l2", 0.1).identity()
        == Ball("2", 0.9).identity()
        == {"norm": "l2", "box": [0.0, 1.0], "mask": None, "weights": None}
    )
    mask, weights = torch.tensor([True, False]), torch.tensor([1.0, 2.0])
    others = [
        Ball("linf", 1),
        Ball("l2", 1, box=None),
        Ball("l2", 1, box=(0, 2)),
        Ball("l2", 1, mask=mask),
        Ball("l2", 1, weights=weights),
    ]
    assert len({str(b.identity()) for b in [Ball("l2", 1), *others]}) == 6


# ---- one radius for each point
# --------------------------------------------------------------------------------------------------


def test_a_radius_for_each_point() -> None:
    ball = Ball("linf", [0.1, 0.0, 0.3])
    assert ball.radii(3).tolist() == [0.1, 0.0, 0.3]
    # as float64 numbers: float32 would make the radius of 0.1 larger
    assert ball.take(torch.tensor([2, 0])).radii(2).tolist() == [0.3, 0.1]
    assert ball.at(0.5).radii(2).tolist() == [0.5, 0.5] and ball.radii(3).tolist() == [
        0.1,
        0.0,
        0.3,
    ]
    assert Ball("linf", 0.1).take(torch.tensor([1])).radii(4).tolist() == [0.1] * 4
    region = ball.region(torch.full((3, 2), 0.5))
    reach = (region.support(torch.ones(3, 2)).point - 0.5)[:, 0].tolist()
    assert reach == pytest.approx([0.1, 0.0, 0.3], abs=1e-6)
    assert region.take(torch.tensor([2, 2])).radius.tolist() == [0.3, 0.3]
    assert region.at(torch.tensor([1.0, 2.0, 3.0])).radius.tolist() == [1, 2, 3]


# ---- exactness
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", P)
def test_one_ulp_outside_is_outside(norm: str) -> None:
    x = torch.zeros(1, 3, dtype=torch.float64)
    ball = Ball(norm, 0.3, box=None).region(x)
    edge = torch.tensor([[0.3, 0.0, 0.0]], dtype=torch.float64)
    beyond = torch.nextafter(edge, torch.full_like(edge, torch.inf)) * (edge > 0)
    assert ball.contains(edge).tolist() == [True] and ball.contains(beyond).tolist() == [False]
    assert ball.contains(torch.full_like(x, torch.nan)).tolist() == [False]
    narrow = Ball(norm, 1.0, box=(-0.2, 0.2)).region(x)
    face = torch.tensor([[0.2, -0.2, 0.0]], dtype=torch.float64)
    assert narrow.contains(face).tolist() == [True]
    for direction in (torch.inf, -torch.inf):
        assert narrow.contains(
            torch.nextafter(face, torch.full_like(face, direction))
        ).tolist() == [False]


def test_a_float32_point_is_compared_with_the_float64_radius() -> None:
    """0.1 in float32 is a little more than 0.1."""
    region = Ball("linf", 0.1, box=None).region(torch.zeros(1, 1))
    assert region.contains(torch.tensor([[0.1]])).tolist() == [False]
    assert region.contains(region.snap(torch.tensor([[0.1]]))).tolist() == [True]


def test_a_masked_feature_may_not_move_at_all() -> None:
    x = torch.full((1, 3), 0.5)
    region = Ball("linf", 0.1, mask=torch.tensor([True, False, True])).region(x)
    assert region.contains(x + torch.tensor([0.05, 0.0, -0.05])).tolist() == [True]
    assert region.contains(x + torch.tensor([0.0, 1e-7, 0.0])).tolist() == [False]
    g = torch.tensor([[1.0, 1.0, -1.0]])
    for point in (
        region.support(g).point,
        region.project(x + g),
        region.sample(streams(1)),
        region.snap(x + torch.tensor([0.2, 0.0, 0.2])),
    ):
        assert point[0, 1] == 0.5 and point[0, 0] != 0.5


def test_a_feature_of_weight_two_may_move_half_as_far() -> None:
    x, w = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1.0, 2.0])
    for norm in P:
        region = Ball(norm, 0.4, box=None, weights=w).region(x)
        for i, reach in enumerate((0.4, 0.2)):
            e = torch.eye(2, dtype=torch.float64)[i : i + 1]
            assert float(region.support(e).value) == pytest.approx(reach, abs=1e-15)
            assert region.contains(e * reach).all() and not region.contains(e * reach * 1.001).any()
            assert float(region.distance(e)) == (1.0, 2.0)[i]
            assert torch.allclose(region.project(e), e * reach, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("norm", P)
def test_snap_lands_inside_exactly_and_hardly_moves(
    norm: str, weighted: bool, dtype: torch.dtype
) -> None:
    x = images(64, dtype)
    weights = (
        torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) + 0.5 if weighted else None
    )
    for radius in (0.1, 8 / 255, 0.7):
        region = Ball(norm, radius, weights=weights).region(x)
        g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        for points in (region.support(g).point, region.project(x + g), region.sample(streams(64))):
            snapped = region.snap(points)
            assert region.contains(snapped).all()
            assert float((snapped - points).abs().max()) < 1e-5
            assert torch.equal(region.snap(snapped), snapped)


def test_snap_takes_the_inner_float_of_a_box_that_ends_between_two() -> None:
    x = torch.full((1, 2), 0.15)
    # float32 numbers nearest to 0.1 and 0.3 lie above both
    region = Ball("linf", 1.0, box=(0.1, 0.3)).region(x)
    snapped = region.snap(torch.tensor([[0.1, 0.3]]))
    assert (
        region.contains(snapped).all()
        and float(snapped[0, 1]) < 0.3
        and float(snapped[0, 0]) >= 0.1
    )


def test_snap_to_a_radius_of_zero_is_the_point_itself() -> None:
    x = images(4)
    for norm in P:
        region = Ball(norm, [0.0, 0.1, 0.0, 0.1]).region(x)
        snapped = region.snap((x + 0.05).clamp(0, 1))
        assert torch.equal(snapped[0::2], x[0::2]) and region.contains(snapped).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", P)
def test_projection_and_step_stay_inside_after_snapping(norm: str, dtype: torch.dtype) -> None:
    x = images(32, dtype)
    region = Ball(norm, 0.25).region(x)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    moved = region.project(region.step(x, g, 0.7))
    assert region.contains(region.snap(moved)).all()
    assert (region.distance(moved) <= 0.25 * (1 + 1e-6)).all()
    assert ((g * (moved - x)).flatten(1).sum(1) > 0).all()


@pytest.mark.parametrize("norm", P)
def test_samples_are_inside_differ_and_can_be_repeated(norm: str) -> None:
    x = images(32, torch.float64)
    region = Ball(
        norm, 0.3, mask=torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(4)) < 0.8
    ).region(x)
    points = region.sample(streams(32))
    assert (
        region.contains(region.snap(points)).all()
        and float((region.distance(points) / 0.3).max()) <= 1 + 1e-12
    )
    assert torch.equal(points, region.sample(streams(32))) and not torch.equal(
        points, region.sample(streams(32, seed=1))
    )
    part = torch.tensor([7, 3])
    assert torch.equal(region.take(part).sample(streams(32).take(part)), points[part])


def test_outward_regions_hold_the_exact_set() -> None:
    x = torch.rand(50, 3, generator=torch.Generator().manual_seed(5))
    x = 0.15 + 0.7 * x
    region = Ball("linf", 9.0, box=(0.1, 0.9)).region(x, outward=True)
    floor, ceiling = x.double() + region.low.double(), x.double() + region.high.double()
    assert (floor <= 0.1).all() and (ceiling >= 0.9).all()


# ---- widest
# --------------------------------------------------------------------------------------------------


def test_widest_is_the_farthest_corner() -> None:
    x = torch.tensor([[0.2, 0.5], [0.0, 1.0]])
    assert Ball("linf", 0.1).widest(x).tolist() == pytest.approx([0.8, 1.0], abs=1e-7)
    assert Ball("l1", 0.1).widest(x).tolist() == pytest.approx([1.3, 2.0], abs=1e-7)
    assert Ball("l2", 0.1).widest(x).tolist() == pytest.approx(
        [math.sqrt(0.89), math.sqrt(2)], abs=1e-7
    )
    assert Ball("linf", 0.1, weights=torch.tensor([1.0, 3.0])).widest(x).tolist() == pytest.approx(
        [1.5, 3.0], abs=1e-7
    )
    assert Ball("linf", 0.1, mask=torch.tensor([False, True])).widest(x).tolist() == [0.5, 1.0]
    assert all(math.isinf(v) for v in Ball("l2", 0.1, box=None).widest(x).tolist())
    assert Ball("l2", 0.1, box=None, mask=torch.tensor([False, False])).widest(x).tolist() == [
        0.0,
        0.0,
    ]


@pytest.mark.parametrize("norm", P)
def test_beyond_the_widest_radius_nothing_changes(norm: str) -> None:
    x, g = (
        images(8, torch.float64),
        torch.randn(8, 2, 3, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64),
    )
    ball = Ball(norm, 1.0)
    wide = ball.widest(x)
    at, far, near = (
        ball.at(wide * factor).region(x).support(g).value for factor in (1.0, 10.0, 0.1)
    )
    assert torch.allclose(at, far, rtol=1e-9) and (near < at).all()


# ---- distortion
# --------------------------------------------------------------------------------------------------


def test_the_worked_numbers_of_the_textbook() -> None:
    """Grey images of 1024 pixels, standardised with sigma = 60: linf 0.1 against l2 3."""
    assert largest_mse("linf", 0.1, 1024, scale=60.0) == pytest.approx(36.0, abs=1e-12)
    assert largest_mse("l2", 3.0, 1024, scale=60.0) == 31.640625
    assert float(psnr_of(36.0, 255)) == pytest.approx(32.568, abs=5e-4)
    assert float(psnr_of(31.640625, 255)) == pytest.approx(33.128, abs=5e-4)
    matched = radius_of_equal_energy("linf", "l2", 0.1, 1024)
    assert matched == pytest.approx(3.2, abs=1e-12)
    assert float(psnr_of(largest_mse("l2", matched, 1024, scale=60.0), 255)) == pytest.approx(
        32.568, abs=5e-4
    )
    assert radius_of_equal_energy("l2", "linf", matched, 1024) == pytest.approx(0.1, abs=1e-15)
    assert radius_of_equal_energy("l1", "l2", 0.5, 1024) == 0.5
    assert float(psnr_of(0.0, 255)) == math.inf


def test_high_quality_ends_between_radius_0_1344_and_0_1345() -> None:
    """30 dB is an MSE of 65.025: a standardised linf radius of 0.13440, or 4.3007 in l2."""
    quality = [
        float(psnr_of(largest_mse("linf", r, 1024, scale=60.0), 255)) >= 30
        for r in (0.1343, 0.13439, 0.13440, 0.1345)
    ]
    assert quality == [True, True, False, False]
    assert float(psnr_of(65.025, 255)) == pytest.approx(30.0, abs=1e-9)
    assert [
        float(psnr_of(largest_mse("l2", r, 1024, scale=60.0), 255)) >= 30 for r in (4.3006, 4.3008)
    ] == [
        True,
        False,
    ]


def test_psnr_of_images_is_measured_on_what_was_stored() -> None:
    a = torch.zeros(3, 1, 4, 4)
    b = torch.stack([torch.zeros(1, 4, 4), torch.full((1, 4, 4), 0.1), torch.ones(1, 4, 4)])
    assert (
        mse(a, b).tolist() == pytest.approx([0, 0.01, 1], rel=1e-6)
        and mse(a, b).dtype == torch.float64
    )
    assert psnr(a, b, 1.0).tolist() == pytest.approx([math.inf, 20.0, 0.0], rel=1e-6, abs=1e-6)
    assert torch.allclose(psnr(a * 255, b * 255, 255)[1:], psnr(a, b, 1.0)[1:], atol=1e-6)


def test_distortion_refuses_what_has_no_meaning() -> None:
    for peak in (0.0, -1.0, math.nan):
        with pytest.raises(BadInput, match="peak must be the data's range"):
            psnr_of(1.0, peak)
    with pytest.raises(BadInput, match="'l0' is available as a distance only"):
        radius_of_equal_energy("linf", "l0", 0.1, 10)
    with pytest.raises(BadInput, match="unknown norm 'ssim'"):
        largest_mse("ssim", 0.1, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_snap_brings_points_inside_balls_hardly_wider_than_a_rounding(
    norm: str, dtype: torch.dtype
) -> None:
    """A rounding of a coordinate near 1 is thousands of roundings of such a radius: a point outside
    must be drawn in by what the dtype resolves there.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3000, 5, generator=generator, dtype=torch.float64).to(dtype)
    radius = torch.finfo(dtype).eps * 10 ** (
        1 + 5 * torch.rand(3000, generator=generator, dtype=torch.float64)
    )
    region = Ball(norm, radius, box=None).region(x)
    corners = region.support(
        torch.randn(3000, 5, generator=generator, dtype=torch.float64).to(dtype)
    ).point
    snapped = region.snap(corners)
    assert not bool(region.contains(corners).all()) and bool(region.contains(snapped).all())
    # and no farther than it takes
    assert float(((snapped - corners).abs().amax(1).double() / torch.finfo(dtype).eps).max()) <= 64
