"""Find exact distances of a small network, and keep proofs in files.

    python exact_distance.py

A mixed-integer program gives the distance; branch and bound then proves, in a file that NumPy alone
can check, that there is no example at 99.9 % of it.
"""

from pathlib import Path

import torch
from torch import nn

import calipers
from calipers import Ball, Plan, Stage
from calipers.certificates import BranchAndBound
from calipers.record.checker import prove

torch.manual_seed(1)
net = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 3))
x = torch.rand(4, 2)

bracket = calipers.distance(net.eval(), x, None, Ball("linf", 0.5, box=None), exact=True)
for i, (low, high) in enumerate(zip(bracket.lower, bracket.upper, strict=True)):
    print(f"point {i}: {low:.7f} <= d <= {high:.7f}")

with calipers.Record() as record:
    plan = Plan("proofs", (Stage(BranchAndBound(proofs=True), "certifier"),))
    threat = Ball(
        "linf", torch.as_tensor(0.999 * bracket.lower), box=None
    )  # a radius for each point
    calipers.measure(net, x, None, threat, plan=plan, record=record)
    (question,) = record.questions()
    for fact in record.evidence(question.fingerprint):
        if fact.kind == "certificate":
            proof = bytes(record.witness(question.fingerprint, fact))
            Path(f"{fact.point}.npz").write_bytes(proof)
            print(f"{fact.point}.npz: {len(proof)} bytes, proved again: {prove(proof).proved}")
