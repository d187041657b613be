"""How closely does the plan `distance` close the brackets of affine models, and what does it cost
against the same plan without linear regions?

Multinomial logistic regression on scikit-learn's digits, 100 images it was not fitted to, in three
norms with and without box and mask. Processor seconds, both plans by turns; with --kinks, how many
points of a published ReLU network linear regions bracket, and how closely.

    PYTHONPATH=src python benchmarks/affine.py [--dtype float32] [--no-search] [--kinks]
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import common
import numpy as np
import torch
from torch import Tensor, nn

import calipers
from calipers.measurement.plan import Plan
from calipers.presets import plan_for


def digits(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the model and the first 100 images, in [0, 1]."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    images, labels = load_digits(return_X_y=True)
    images = images / 16
    fitted = LogisticRegression(max_iter=2000, C=1.0).fit(images[100:], labels[100:])
    model = nn.Linear(64, 10)
    model.load_state_dict(
        {"weight": torch.tensor(fitted.coef_), "bias": torch.tensor(fitted.intercept_)}
    )
    return (
        model.to(dtype).requires_grad_(False).eval(),
        torch.tensor(images[:100]).to(dtype),
        torch.tensor(labels[:100]),
    )


ALL, SEARCHES, REGIONS = slice(None), slice(2, None), slice(2)


def stages(ball: calipers.Ball, which: slice) -> Plan:
    """Return these stages of the plan for distances: linear regions come first."""
    plan = plan_for(ball, "distance")
    return dataclasses.replace(plan, stages=plan.stages[which])


def measured(
    model: nn.Module, x: Tensor, y: Tensor, ball: calipers.Ball, which: slice
) -> tuple[str, float]:
    """Return how wide the brackets of some stages are, and their processor seconds."""
    begun = time.process_time()
    found = calipers.measure(model, x, y, ball, plan=stages(ball, which)).bracket
    spent = time.process_time() - begun
    right = (found.upper > 0) & np.isfinite(found.upper)
    gap = 1 - found.lower[right] / found.upper[right]
    return (
        f"{int((gap <= 1e-5).sum()):4d} of {int((found.upper > 0).sum())} within 1e-5, widest "
        f"{gap.max(initial=0.0):.1e}, {spent:6.2f} s",
        spent,
    )


def main() -> None:
    """Print a line for each question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument(
        "--no-search", action="store_true", help="leave out the plan without linear regions"
    )
    parser.add_argument(
        "--kinks", action="store_true", help="linear regions alone on mnist_wk17a, 2,000 images"
    )
    options = parser.parse_args()
    common.start(str(__doc__).splitlines()[0])
    torch.set_num_threads(1)
    model, x, y = digits(getattr(torch, options.dtype))
    # the graph is captured
    calipers.measure(model, x[:2], y[:2], calipers.Ball("linf", 0.1), plan="quick")
    for norm in ("linf", "l2", "l1"):
        for box in (None, (0.0, 1.0)):
            for mask in (None, torch.arange(64) % 3 != 0):
                ball = calipers.Ball(norm, 0.1, box, mask)
                told, spent = measured(model, x, y, ball, ALL)
                line = (
                    f"{norm:4s} {'box' if box else '   '} "
                    f"{'mask' if mask is not None else '    '}  {told}"
                )
                if not options.no_search:
                    other, long = measured(model, x, y, ball, SEARCHES)
                    line += f" | searching: {other} ({long / spent:.0f} x)"
                print(line, flush=True)
    network = common.network("mnist_wk17a") if options.breakpoints else None
    if network is not None:
        with np.load(common.DATA / "data" / "mnist_test_2k.npz") as arrays:
            x, y = (
                torch.tensor(arrays["x"]).float()[:, None] / 255,
                torch.tensor(arrays["y"]).long(),
            )
        for norm in ("linf", "l2", "l1"):
            begun = time.process_time()
            ball = calipers.Ball(norm, 0.1)
            plan = dataclasses.replace(stages(ball, REGIONS), lower_share=None)
            found = calipers.measure(network, x, y, ball, plan=plan).bracket
            near = np.flatnonzero((found.upper > 0) & np.isfinite(found.upper))
            told = ", ".join(
                f"{i}: {found.upper[i]:.6g} ({1 - found.lower[i] / found.upper[i]:.1e} apart)"
                for i in near
            )
            print(
                f"mnist_wk17a {norm}: {len(near)} examples in the point's own region, "
                f"{time.process_time() - begun:.1f} s; {told}",
                flush=True,
            )


if __name__ == "__main__":
    main()
