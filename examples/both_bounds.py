"""Measure an embedded network from both sides, and check the evidence again.

    python both_bounds.py

Needs no data of your own: the network and the digits ship with calipers.
"""

import calipers

x, y = calipers.load_data(None, points=20)
model = calipers.load("mnist-robust")
threat = calipers.Ball("linf", 0.1)  # at most 0.1 from each pixel, inside the box (0, 1)

with calipers.Record("digits.calipers") as record:
    result = calipers.measure(model, x, y, threat, plan="quick", record=record)
    print(result)

    robust = result.robust_accuracy
    print(f"certified {robust.certified}, not broken {robust.attacked}")
    for row in result.points[:3]:
        print(
            f"point {row.index}: {row.verdict} by {row.tool}, {row.lower:.3f} <= d <= {row.upper}"
        )

    # Everything above can be replayed, on another machine too: calipers check digits.calipers
    for checked in calipers.check(record, model):
        print(f"checked {checked.witnesses} examples, {checked.certificates} certificates")
        print(f"sound: {checked.sound}")
