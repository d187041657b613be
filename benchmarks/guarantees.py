"""What does it cost to account for the rounding of the network as executed? Points that CROWN
certifies under either guarantee, and seconds.

PYTHONPATH=src python benchmarks/guarantees.py [--points 100]
"""

from __future__ import annotations

import argparse

import common
import torch

from calipers.certificates.crown import CROWN
from calipers.problem.problem import Problem
from calipers.threats.ball import Ball

QUESTIONS = (("mnist_wk17a", 0.1), ("mnist_madry_tiny", 0.1), ("mnist_6x100_nat", 0.026))


def main() -> None:
    """Print a line for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=100)
    options = parser.parse_args()
    common.start("CROWN under both guarantees, linf")
    for name, radius in QUESTIONS:
        model = common.network(name)
        if model is None:
            continue
        x, y = common.right(model, *common.digits(options.points))
        line = f"{name:18} {radius:5.3g}  {len(x)} right of {options.points}"
        for tool in (CROWN(), CROWN(guarantee="float32-executed")):
            found: list[int] = []
            problem = Problem.pose(model, x, y, Ball("linf", radius))
            seconds = common.clock(
                lambda: found.append(int(torch.cat([c.margin > 0 for c in tool(problem)]).sum()))
            )
            line += f"   {tool.guarantee} {found[0]} in {seconds:.1f} s"
        print(line, flush=True)


if __name__ == "__main__":
    main()
