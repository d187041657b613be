"""Measure a scikit-learn model on a table of categories and numbers.

    python table.py

The adversary may change one category and move the numbers within their ranges.
"""

import sys

try:
    import pandas
    from sklearn.linear_model import LogisticRegression
except ImportError as error:
    sys.exit(f"skipped: {error}; pip install scikit-learn pandas")
import numpy as np

import calipers

draw = np.random.default_rng(0)
age, work = draw.uniform(18, 70, 200), draw.choice(["none", "part", "full"], 200)
frame = pandas.get_dummies(pandas.DataFrame({"age": age, "work": work}), dtype=float)
paid = np.where((work == "full") | (age > 55), "paid", "refused")
model = LogisticRegression(max_iter=1000).fit(frame, paid)

columns = list(frame.columns)  # age, work_full, work_none, work_part
threat = calipers.Substitutions(
    groups=[[columns.index(name) for name in columns if name.startswith("work_")]],
    k=1,
    continuous=calipers.Ball("linf", 2.0, box=(18, 70)),  # years
)
result = calipers.measure(model, frame[:40], paid[:40], threat)
print(result)
broken = [row for row in result.points if row.verdict == "broken" and row.upper > 0]
print(f"{len(broken)} of 40 applications change their answer by one category and two years")
