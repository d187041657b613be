"""How long does an image take until its robustness is decided and its distance exact? Asked as the
nightly runs of MIPVerify ask it.

They search mnist_wk17a for the nearest linf example within 0.1 of MNIST test images 1-500, 120 s an
image, and publish (2026-07-17, another machine, HiGHS): 476 certified, 9 optimal, 7 out of time, 8
misclassified; 2170 s, median 1.23 s. Here: one image after the other, certified at 0.1 by the plan
complete, and what is not certified is measured exactly. "exact": both ends of the distance within
1e-5 of each other, relatively; "open": neither that nor certified; how many of those are within
1e-4, where HiGHS stops unless told otherwise, is said beside it. Verdicts are held against the ends
that they publish for the first 250 images. Counts compare; seconds of two machines do not.

    PYTHONPATH=src python benchmarks/mipverify.py [--points 500] [--seconds 60]
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections import Counter
from statistics import mean, median
from typing import NamedTuple

import common
import torch
from distances import EXACT
from exact import ROOM, ends, reach

import calipers
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.measurement.plan import Plan
from calipers.presets import plan_for
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

RADIUS, NEARLY, USUAL = 0.1, 1e-5, 1e-4


class Image(NamedTuple):
    """What is known of one image: certified, exact, open or misclassified, both ends (upper
    infinite: no example known) and seconds.
    """

    verdict: str
    lower: float
    upper: float
    seconds: float


def plan_of(seconds: float) -> Plan:
    """Return the plan complete with that much branch and bound a point."""
    plan = plan_for(Ball("linf", RADIUS), "complete")
    stages = [
        dataclasses.replace(s, tool=dataclasses.replace(s.tool, seconds=seconds))
        if isinstance(s.tool, BranchAndBound)
        else s
        for s in plan.stages
    ]
    return dataclasses.replace(plan, stages=tuple(stages))


def decided(problem: Problem, plan: Plan) -> tuple[str, float, float]:
    """Return the verdict on one image within the radius, and what is known of its distance."""
    row = calipers.measure(
        problem.classifier, problem.x, problem.y, Ball("linf", RADIUS), plan=plan
    ).points[0]
    if row.verdict == "robust":
        return "certified", RADIUS, torch.inf
    return ("misclassified", 0.0, 0.0) if row.upper == 0 else ("open", 0.0, torch.inf)


def exact(problem: Problem, seconds: float) -> tuple[str, float, float]:
    """Return the same by mixed-integer programs, within the nearest example that an attack finds or
    the radius.
    """
    near = float(reach(problem)[0])
    low, high, _ = ends(problem.at(torch.tensor([min(near, RADIUS * ROOM)])), seconds)
    if near > RADIUS * ROOM and high >= RADIUS:
        # where no attack found any, that is the end of the region and not an example
        high = torch.inf
    return (
        "certified" if low >= RADIUS else "exact" if 1 - low / high <= NEARLY else "open",
        low,
        high,
    )


def asked(problem: Problem, plan: Plan, seconds: float) -> Image:
    """Return what is known of one image in the end, timed as a whole."""
    told: list[tuple[str, float, float]] = []

    def run() -> None:
        told.append(decided(problem, plan))
        if told[-1][0] == "open":
            told.append(exact(problem, seconds))

    spent = common.clock(run)
    return Image(*told[-1], spent)


def against_published(images: list[Image]) -> None:
    """Print how many images contradict what is published of them."""
    path = common.DATA / "truth" / EXACT[2][3]
    if not path.exists():
        return
    with path.open() as lines:
        rows = [
            row
            for row in csv.DictReader(lines)
            if int(row["mnist_test_index"]) < len(images) and row["status"] != "misclassified"
        ]
    wrong, closer = [], 0
    for row in rows:
        own, low = images[int(row["mnist_test_index"])], float(row["lower"])
        high = float(row["upper"] or "inf")
        if own.lower > high * (1 + NEARLY) or own.upper < low * (1 - NEARLY):
            wrong.append(row["mnist_test_index"])
        closer += row["status"] == "bracket" and own.verdict in ("exact", "certified")
    print(
        f"published: {len(rows)} images compared, {len(wrong)} contradicted {' '.join(wrong)}; "
        f"{closer} published as open are decided here"
    )


def summed(images: list[Image]) -> None:
    """Print the counts and the seconds."""
    count, took = Counter(image.verdict for image in images), [image.seconds for image in images]
    usual = sum(
        image.verdict == "open" and image.upper <= RADIUS and 1 - image.lower / image.upper <= USUAL
        for image in images
    )
    counted = ", ".join(
        f"{count[verdict]} {verdict}" for verdict in ("certified", "exact", "open", "misclassified")
    )
    print(f"{len(images)} images: {counted} (of the open, {usual} within {USUAL:g})")
    print(
        f"{sum(took):.1f} s, mean {mean(took):.2f} s, median {median(took):.2f} s, longest "
        f"{max(took):.1f} s"
    )


def main() -> None:
    """Print the images that are not certified, the counts and the seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="for an image: of branch and bound, and of programs",
    )
    options = parser.parse_args()
    common.start("Images until certified or exact, one after the other")
    torch.set_num_threads(1)
    model = common.network("mnist_wk17a")
    if model is None:
        return
    x, y = common.digits(options.points)
    problem = Problem.pose(model, x, y, Ball("linf", RADIUS))
    plan, images = plan_of(options.seconds), list[Image]()
    for i in range(len(problem)):
        images.append(asked(problem.take([i]), plan, options.seconds))
        if images[-1].verdict in ("exact", "open"):
            _, low, high, took = images[-1]
            print(
                f"  image {i}: {images[-1].verdict}, {low:.9g} to {high:.9g}, gap "
                f"{1 - low / high:.1e}, {took:.1f} s",
                flush=True,
            )
    summed(images)
    against_published(images)


if __name__ == "__main__":
    main()
