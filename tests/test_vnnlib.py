"""Is a VNN-LIB file read as what it says, exactly, and anything else refused; and does its goal
decide as plain arithmetic does?
"""

from __future__ import annotations

import gzip
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from beside import DATA, needs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import calipers
from calipers.errors import BadInput
from calipers.interchange import load_vnnlib
from calipers.interchange.vnnlib import Property, parse_vnnlib
from calipers.problem.goals import Goal, endless
from calipers.problem.io_property import Inequality, Query, below, read
from calipers.problem.problem import Problem
from calipers.problem.specification import Specification

DECLARED = "".join(f"(declare-const {name} Real)\n" for name in ("X_0", "X_1", "Y_0", "Y_1"))
BOX = "(assert (>= X_0 -0.1)) (assert (<= X_0 0.3)) (assert (>= X_1 0)) (assert (<= X_1 1))\n"


def parsed(text: str) -> Property:
    return parse_vnnlib(DECLARED + text)


def inequality(constant: str, **terms: int) -> Inequality:
    return Inequality(
        tuple((int(name[1:]), Fraction(c)) for name, c in terms.items()), Fraction(constant)
    )


def test_bounds_are_exact_and_the_box_is_rounded_outward() -> None:
    (query,) = parsed(BOX + "(assert (<= Y_0 Y_1))").queries
    assert (query.low, query.high) == (
        (Fraction(-1, 10), Fraction(0)),
        (Fraction(3, 10), Fraction(1)),
    )
    assert query.cases == ((inequality("0", y0=1, y1=-1),),)
    for dtype in (torch.float32, torch.float64):
        low, high = query.box(dtype)
        for i in range(2):
            assert Fraction(low[i]) < query.low[i] and Fraction(high[i]) > query.high[i]
            assert low[i] < read(query.low[i], dtype) and high[i] > read(query.high[i], dtype)
            assert high[i] - float(query.high[i]) < 1e-7


READINGS: list[tuple[str, tuple[tuple[Inequality, ...], ...]]] = [
    ("(assert (>= Y_0 0.5))", ((inequality("0.5", y0=-1),),)),
    (
        "(assert (and (<= Y_0 1e-3) (<= Y_1 2.)))",
        ((inequality("-0.001", y0=1), inequality("-2", y1=1)),),
    ),
    (
        "(assert (or (<= Y_0 1) (and (<= Y_1 2) (>= Y_0 .5))))",
        ((inequality("-1", y0=1),), (inequality("-2", y1=1), inequality("0.5", y0=-1))),
    ),
    (
        "(assert (or (<= Y_0 0) (<= Y_1 0))) (assert (or (<= Y_0 1) (<= Y_1 1)))",
        tuple(
            (inequality("0", **{a: 1}), inequality("-1", **{b: 1}))
            for a, b in itertools.product(("y0", "y1"), repeat=2)
        ),
    ),
    ("(assert (<= (+ Y_0 (* 2 Y_1) 1 (- Y_1)) (- Y_0 3)))", ((inequality("4", y1=1),),)),
    ("(assert (<= (* (+ 1 1) (- Y_0 Y_1) 0.5) (/ 3 4)))", ((inequality("-0.75", y0=1, y1=-1),),)),
    ("(assert (= Y_0 1))", ((inequality("-1", y0=1), inequality("1", y0=-1)),)),
    ("(assert (or (and (<= Y_0 1) (<= 1 0)) (<= Y_1 1)))", ((inequality("-1", y1=1),),)),
    ("(assert (<= 0 1)) (assert (<= Y_0 0))", ((inequality("0", y0=1),),)),
]


@pytest.mark.parametrize(("text", "cases"), READINGS, ids=[r[0][:40] for r in READINGS])
def test_formulas_become_cases(text: str, cases: tuple[tuple[Inequality, ...], ...]) -> None:
    (query,) = parsed(BOX + text).queries
    assert query.cases == cases


def test_cases_of_one_box_are_one_query_and_boxes_are_told_apart() -> None:
    asked = parsed(
        BOX + "(assert (or (and (<= X_0 0) (<= Y_0 0)) (and (>= X_0 0.1) (<= Y_1 0)) (and (<= X_0 "
        "0.0) (<= Y_1 3))))"
    )
    assert [(q.low[0], q.high[0], len(q.cases)) for q in asked.queries] == [
        (Fraction(-1, 10), 0, 2),
        (Fraction(1, 10), Fraction(3, 10), 1),
    ]


def test_a_contradictory_case_is_dropped_with_a_note() -> None:
    asked = parsed(BOX + "(assert (>= X_0 0.30000000000000000001)) (assert (<= Y_0 0))")
    assert asked.queries == () and "X_0" in asked.notes[0]
    assert parsed(BOX + "(assert (and (<= 1 0) (<= Y_0 0)))").notes == (
        "case 0 asks for the impossible",
    )


def test_a_case_about_inputs_alone_is_unsafe_everywhere() -> None:
    (query,) = parsed(BOX + "(assert (or (<= X_0 0) (and (<= X_0 0) (<= Y_0 0))))").queries
    assert query.unsafe(torch.tensor([5.0, 5.0])) and not query.unsafe(
        torch.tensor([math.nan, 5.0])
    )
    assert (
        float(
            query.goal().worst(
                query.goal().margins(torch.tensor([[5.0, 5.0]]), torch.zeros(1, dtype=torch.long))
            )
        )
        <= 0
    )


def test_depth_and_length_cost_nothing() -> None:
    deep = "(and " * 20_000 + "(<= Y_0 0)" + ")" * 20_000
    sums = "(+ 0 " * 20_000 + "Y_0" + ")" * 20_000
    assert len(parsed(BOX + f"(assert {deep}) (assert (<= {sums} 1))").queries[0].cases[0]) == 2


REFUSED = [
    ("", "nothing about the outputs"),
    (BOX, "nothing about the outputs"),
    (BOX + "(assert (<= Y_0 0)", "ends inside the bracket that was opened in line 6"),
    (BOX + "(assert (<= Y_0 0)))", "never opened"),
    (BOX + "(assert (<= Y_7 0))", "'Y_7' is not declared"),
    (BOX + "(assert (<= y 0))", "'y' is neither"),
    (BOX + "(assert (not (<= Y_0 0) (<= Y_1 0)))", "takes one formula"),
    (BOX + "(assert (=> (<= Y_0 0) (<= Y_1 0)))", "'=>' is not read"),
    (BOX + "(assert (<= (* Y_0 Y_1) 0))", "not linear"),
    (BOX + "(assert (<= (/ Y_0 0) 0))", "by zero"),
    (BOX + "(assert (<= Y_0 nan))", "'nan'"),
    (BOX + "(assert (<= Y_0 1e9999))", "'1e9999'"),
    (BOX + "(assert (<= Y_0))", "compares two terms"),
    (BOX + "(assert (or))", "holds nothing"),
    (BOX + "(assert Y_0)", "a formula is expected"),
    (BOX + "(assert (<= (<= Y_0 0) 0))", "a term is expected"),
    (
        "(assert (<= X_0 0)) (assert (>= X_0 0)) (assert (<= X_1 0)) (assert (<= Y_0 0))",
        "X_1 no lower bound",
    ),
    ("(declare-const X_0 Real)", "declared twice"),
    ("(declare-const X_7 Real)" + BOX + "(assert (<= Y_0 0))", "without gaps"),
    ("(declare-const Z_0 Real)", "neither an input"),
    ("(declare-const X_2 Int)", "reads"),
    ("(vnnlib-version <2.0>)", "VNN-LIB 2"),
    ("(push 1)", "'push'"),
    ("assert", "outside of all brackets"),
    (BOX + "(assert " + "(and " + "(or (<= Y_0 0) (<= Y_1 0)) " * 20 + "))", "cases"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_is_not_read_in_full_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parsed(text)


WHOLE = (
    DECLARED
    + BOX
    + "(assert (or (and (<= X_0 0) (<= Y_0 (- Y_1 0.5))) (and (>= Y_0 1.25e-1) (<= (+ Y_1 Y_0) "
    "2))))"
)


def test_every_truncation_is_refused() -> None:
    for end in range(len(WHOLE)):
        with pytest.raises(BadInput):
            parse_vnnlib(WHOLE[:end])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_text_is_refused_or_read_never_an_accident(data: st.DataObject) -> None:
    """Tokens dropped, doubled, swapped or replaced; whatever is still read asks about both inputs
    and both outputs.
    """
    tokens = WHOLE.replace("(", " ( ").replace(")", " ) ").split()
    for _ in range(data.draw(st.integers(1, 4))):
        i, j = (data.draw(st.integers(0, len(tokens) - 1)) for _ in range(2))
        what = data.draw(st.sampled_from(["drop", "double", "swap", "replace"]))
        if what == "drop":
            del tokens[i]
        elif what == "double":
            tokens.insert(i, tokens[j])
        elif what == "swap":
            tokens[i], tokens[j] = tokens[j], tokens[i]
        else:
            tokens[i] = data.draw(
                st.sampled_from(
                    [
                        "(",
                        ")",
                        "and",
                        "or",
                        "<=",
                        "*",
                        "/",
                        "0",
                        "1e400",
                        "Y_0",
                        "X_0",
                        "é",
                        '"',
                        "|",
                        ";",
                        "-",
                    ]
                )
            )
    try:
        asked = parse_vnnlib(" ".join(tokens))
    except BadInput:
        return
    assert (
        asked.inputs
        and asked.outputs
        and all(len(q.low) == asked.inputs and q.cases for q in asked.queries)
    )


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_garbage_is_bad_input(text: str) -> None:
    with pytest.raises(BadInput):
        parse_vnnlib(text)


def test_files_packed_or_not_are_the_same_and_damaged_ones_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.vnnlib").write_text(WHOLE)
    (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(WHOLE.encode()))
    assert load_vnnlib(tmp_path / "p.vnnlib") == load_vnnlib(tmp_path / "p.vnnlib.gz")
    (tmp_path / "bad.vnnlib.gz").write_bytes(gzip.compress(WHOLE.encode())[:-20])
    (tmp_path / "bad.vnnlib").write_bytes(b"\xff\xfe(")
    for name in ("bad.vnnlib.gz", "bad.vnnlib", "missing.vnnlib"):
        with pytest.raises(BadInput, match=name.split(".")[0]):
            load_vnnlib(tmp_path / name)


@needs(DATA / "vnncomp")
def test_the_competition_s_properties_are_read() -> None:
    found = {
        path.name.split(".vnnlib")[0]: load_vnnlib(path)
        for path in [
            *(DATA / "vnncomp").glob("*/vnnlib/*"),
            *(DATA / "vnncomp").glob("test/*.vnnlib"),
        ]
    }
    shapes = {
        name: (p.inputs, p.outputs, [[len(c) for c in q.cases] for q in p.queries])
        for name, p in found.items()
    }
    assert (
        shapes["prop_2"] == (5, 5, [[4]])
        and shapes["vdp_0"] == (3, 3, [[5]])
        and shapes["test_small"] == (1, 1, [[1]])
    )
    assert shapes["prop_0_0.03"] == (784, 10, [[1] * 9]) and shapes["prop_0_0.004"] == (
        784,
        10,
        [[1] * 9],
    )
    assert not any(p.notes for p in found.values())


# ---- numbers
# --------------------------------------------------------------------------------------------------


@given(st.fractions())
def test_below_is_the_largest_float_that_is_not_above(q: Fraction) -> None:
    assert Fraction(below(q)) <= q < Fraction(math.nextafter(below(q), math.inf))


def test_coefficients_are_held_exactly_or_refused() -> None:
    terms, constant = Inequality(
        ((0, Fraction(1, 10)), (1, Fraction(-3, 10))), Fraction(1, 3)
    ).floats()
    assert terms == {0: 1.0, 1: -3.0} and Fraction(constant) <= Fraction(10, 3) < Fraction(
        math.nextafter(constant, 9)
    )
    with pytest.raises(BadInput, match="digits"):
        Inequality(((0, Fraction(1, 3)), (1, Fraction(10**20 + 1))), Fraction(0)).floats()


@settings(deadline=None)
# sides of a few subnormal floats
@example([(Decimal("0E-7"), Decimal("0E-9")), (Decimal("1E-7"), Decimal("0E-9"))], 0, True)
@given(
    st.lists(
        st.tuples(st.decimals(-10, 10, places=7), st.decimals(0, 1, places=9)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_every_float_of_the_region_is_written_inside_the_exact_box(
    sides: list[tuple[object, object]], seed: int, single: bool
) -> None:
    """The box of the problem, sampled and at its corners, in both precisions: what is written reads
    back as the same float, and lies in the exact box.
    """
    dtype = torch.float32 if single else torch.float64
    low = tuple(Fraction(str(a)) for a, _ in sides)
    high = tuple(a + Fraction(str(width)) for a, (_, width) in zip(low, sides, strict=True))
    query = Query(low, high, 2, ((Inequality(((0, Fraction(1)),), Fraction(0)),),))
    problem = query.posed(calipers.Classifier(nn.Linear(len(low), 2).to(dtype)), (len(low),))
    region, outward = problem.region, problem.threat.region(problem.x.double(), outward=True)
    # the certificate's box holds the exact one and what its ends are read as
    for q, i in (
        (low, 0),
        (high, 1),
    ):
        end = (outward.center.flatten(1) + (outward.low, outward.high)[i])[0].tolist()
        side = (
            torch.minimum(-outward.low, torch.full_like(outward.low, math.inf))
            if i == 0
            else outward.high
        )
        reach = outward.radius[:, None] / (1 if outward.weight is None else outward.weight)
        assert bool((reach >= side * (1 - 1e-12)).all()), "the ball cuts the box"
        for exact, found in zip(q, end, strict=True):
            assert (
                (Fraction(found) <= exact and found <= read(exact, dtype))
                if i == 0
                else (Fraction(found) >= exact and found >= read(exact, dtype))
            )
    points = [
        problem.x,
        *(region.snap(region.sample(problem.streams(seed).fork(k))) for k in range(4)),
    ]
    points += [
        region.snap(torch.tensor([[read(q, dtype) for q in ends]], dtype=dtype))
        for ends in (low, high)
    ]
    for point in points:
        assert bool(region.contains(point).all())
        texts = query.written(point[0])
        if single:
            assert texts is not None
        if texts is not None:
            assert all(a <= Fraction(t) <= b for a, t, b in zip(low, texts, high, strict=True))
            assert [read(t, dtype) for t in texts] == point[0].double().tolist()


# ---- the goal
# --------------------------------------------------------------------------------------------------


def plain_worst(
    rows: list[list[float]], shifts: list[float], belongs: list[int], z: list[float]
) -> float:
    margins = [
        sum(r * v for r, v in zip(row, z, strict=True)) + shift
        for row, shift in zip(rows, shifts, strict=True)
    ]
    return min(
        max(m for m, b in zip(margins, belongs, strict=True) if b == case) for case in set(belongs)
    )


numbers = st.integers(-8, 8).map(float)


@settings(deadline=None)
@given(st.data())
def test_worst_agrees_with_plain_arithmetic(data: st.DataObject) -> None:
    k, sizes = (
        data.draw(st.integers(1, 4)),
        data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)),
    )
    belongs = data.draw(st.permutations([case for case, n in enumerate(sizes) for _ in range(n)]))
    rows = [data.draw(st.lists(numbers, min_size=k, max_size=k)) for _ in belongs]
    shifts = data.draw(st.lists(numbers, min_size=len(belongs), max_size=len(belongs)))
    goal = Specification(torch.tensor(rows), torch.tensor(shifts), torch.tensor(belongs))
    z = data.draw(st.lists(numbers, min_size=k, max_size=k))
    y = torch.zeros(1, dtype=torch.long)
    margins = goal.margins(torch.tensor([z]), y)
    assert float(goal.worst(margins)) == plain_worst(rows, shifts, belongs, z)
    assert torch.equal(
        margins, (goal.rows(y, k) @ torch.tensor([z])[:, :, None])[:, :, 0] + goal.offsets(y, k)
    )
    assert (
        abs(float(goal.smooth(margins)) - float(goal.worst(margins)))
        <= math.log(len(belongs)) + 1e-5
    )
    assert (float(endless(goal).worst(margins)) > 0) and torch.equal(
        goal.cases(k), torch.tensor(belongs)
    )
    poisoned = margins.clone()
    poisoned[0, 0] = math.nan
    assert bool(goal.worst(poisoned).isnan()), "a NaN stays a NaN"


@pytest.mark.parametrize(
    "goal", [calipers.Untargeted(), calipers.Targeted(2)], ids=["untargeted", "targeted"]
)
def test_the_usual_goals_are_specifications_too(goal: Goal) -> None:
    y, z = torch.tensor([1]), torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    same = Specification(goal.rows(y, 4)[0], goal.offsets(y, 4)[0], goal.cases(4))
    assert torch.allclose(same.margins(z, y), goal.margins(z, y))
    assert torch.allclose(same.worst(same.margins(z, y)), goal.worst(goal.margins(z, y)))
    assert torch.allclose(same.smooth(same.margins(z, y)), goal.smooth(goal.margins(z, y)))


ONE = Specification(
    torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]),
    torch.tensor([-0.5, 0.25, 0.125]),
    torch.tensor([0, 0, 1]),
)


def test_two_specifications_are_two_questions() -> None:
    linear, x, y = nn.Linear(3, 2), torch.full((1, 3), 0.5), torch.zeros(1, dtype=torch.long)
    others = [
        ONE,
        replace(ONE, offset=ONE.offset + 1),
        replace(ONE, case_of=torch.tensor([0, 1, 1])),
        calipers.Untargeted(),
    ]
    prints = {
        Problem.pose(linear, x, y, calipers.Ball("linf", 0.1), goal).fingerprint()
        for goal in others
    }
    assert len(prints) == 4
    with pytest.raises(BadInput, match="about 2 outputs"):
        Problem.pose(nn.Linear(3, 4), x, y, calipers.Ball("linf", 0.1), ONE)


BAD: list[Callable[[], Specification]] = [
    lambda: Specification(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.long)),
    lambda: Specification(torch.eye(2), torch.zeros(3), torch.tensor([0, 1])),
    lambda: Specification(torch.eye(2), torch.tensor([0.0, math.nan]), torch.tensor([0, 1])),
    lambda: Specification(torch.eye(2), torch.zeros(2), torch.tensor([0, 2])),
]


@pytest.mark.parametrize("make", BAD, ids=["empty", "lengths", "nan", "gap"])
def test_a_specification_that_makes_no_sense_is_refused(make: Callable[[], Specification]) -> None:
    with pytest.raises(BadInput):
        make()


def test_both_jaws_close_on_a_linear_model() -> None:
    """z = Wx; unsafe iff (z0 <= a and z1 <= b) or z0 - z1 + c <= 0: certified and attacked verdicts
    on 60 shifts agree with a linear programme's.
    """
    from scipy.optimize import linprog

    rng = random.Random(0)
    net = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [0.5, 1.5, -1.0]]))
    counts, model = {"safe": 0, "unsafe": 0}, calipers.Classifier(net)
    for _ in range(60):
        goal = replace(
            ONE,
            offset=torch.tensor(
                [rng.uniform(-1, 3), rng.uniform(-1, 3), rng.uniform(-1, 6)], dtype=torch.float64
            ),
            matrix=ONE.matrix.double(),
        )
        unsafe = False
        for case in (0, 1):
            rows = goal.matrix[goal.case_of == case].numpy() @ net.weight.detach().numpy()
            unsafe |= (
                linprog(
                    np.zeros(3),
                    A_ub=rows,
                    b_ub=-goal.offset[goal.case_of == case].numpy(),
                    bounds=[(0, 1)] * 3,
                ).status
                == 0
            )
        threat, x, y = (
            calipers.Ball("linf", 0.5),
            torch.full((1, 3), 0.5).double(),
            torch.zeros(1, dtype=torch.long),
        )
        claim = next(calipers.certificates.CROWN()(Problem.pose(model, x, y, threat, goal)))
        attacked = next(
            calipers.attacks.PGD(steps=60, restarts=8)(Problem.pose(model, x, y, threat, goal))
        ).candidate
        broken = bool(goal.worst(goal.margins(net(attacked), y)) <= 0)
        assert not (unsafe and bool(claim.radius > 0)), "a proof of what is false"
        assert not (broken and not unsafe)
        counts["unsafe"] += broken
        counts["safe"] += bool(claim.radius > 0)
    assert counts["unsafe"] >= 40 and counts["safe"] >= 10, counts


def test_a_bound_that_forgets_the_offsets_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Specification, y: Tensor, classes: int) -> Tensor:
        return torch.zeros(len(y), len(self.offset))

    monkeypatch.setattr(Specification, "offsets", forgetful)
    with pytest.raises(AssertionError):
        test_both_jaws_close_on_a_linear_model()


def test_a_box_that_is_not_rounded_outward_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Query,
        "box",
        lambda self, dtype: ([float(q) for q in self.low], [float(q) for q in self.high]),
    )
    with pytest.raises(AssertionError):
        test_bounds_are_exact_and_the_box_is_rounded_outward()


@pytest.mark.slow
def test_a_disjunction_read_as_a_conjunction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake by which verifiers in the competition called unsafe networks safe."""
    monkeypatch.setattr(Specification, "worst", lambda self, margins: margins.amax(1))
    with pytest.raises(AssertionError):
        test_worst_agrees_with_plain_arithmetic()


# ---- strict comparisons, negations, and inputs that are tied
# --------------------------------------------------------------------------------------------------


def strict(constant: str, **terms: int) -> Inequality:
    return replace(inequality(constant, **terms), strict=True)


MORE: list[tuple[str, tuple[tuple[Inequality, ...], ...]]] = [
    ("(assert (< Y_0 0.5))", ((strict("-0.5", y0=1),),)),
    ("(assert (> Y_0 Y_1))", ((strict("0", y0=-1, y1=1),),)),
    ("(assert (not (<= Y_0 1)))", ((strict("1", y0=-1),),)),
    ("(assert (not (< Y_0 1)))", ((inequality("1", y0=-1),),)),
    ("(assert (not (not (<= Y_0 1))))", ((inequality("-1", y0=1),),)),
    (
        "(assert (not (and (<= Y_0 1) (<= Y_1 1))))",
        ((strict("1", y0=-1),), (strict("1", y1=-1),)),
    ),
    (
        "(assert (not (or (<= Y_0 1) (>= Y_1 1))))",
        ((strict("1", y0=-1), strict("-1", y1=1)),),
    ),
    ("(assert (not (= Y_0 1)))", ((strict("1", y0=-1),), (strict("-1", y0=1),))),
    ("(assert (or (< 0 0) (<= Y_0 1)))", ((inequality("-1", y0=1),),)),
    ("(assert (<= 0 0)) (assert (<= Y_0 1))", ((inequality("-1", y0=1),),)),
]


@pytest.mark.parametrize(("text", "cases"), MORE, ids=[r[0][:40] for r in MORE])
def test_strict_comparisons_and_negations_become_cases(
    text: str, cases: tuple[tuple[Inequality, ...], ...]
) -> None:
    (query,) = parsed(BOX + text).queries
    assert query.cases == cases


def truth(text: str, values: dict[str, Fraction]) -> bool:
    """Work a formula out by Python's own rules."""
    tokens = iter(text.replace("(", " ( ").replace(")", " ) ").split())

    def expression() -> object:
        token = next(tokens)
        if token != "(":
            return values[token] if token in values else Fraction(token)
        head, parts = next(tokens), []
        while (part := expression_or_end()) is not None:
            parts.append(part)
        signs: dict[str, Callable[..., object]] = {
            "<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "<": lambda a, b: a < b, ">": lambda a, b: a > b, "=": lambda a, b: a == b,
            "and": lambda *a: all(a), "or": lambda *a: any(a), "not": lambda a: not a, "+": lambda *a: sum(a), "-": lambda a, b: a - b,
        }  # fmt: skip
        return signs[head](*parts)

    def expression_or_end() -> object:
        nonlocal tokens
        token = next(tokens)
        if token == ")":
            return None
        tokens = itertools.chain([token], tokens)
        return expression()

    return bool(expression())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_point_is_unsafe_exactly_where_the_formula_is_true(data: st.DataObject) -> None:
    """Random formulas of outputs and inputs, at points of a grid, where ties are frequent."""
    names = ["X_0", "X_1", "Y_0", "Y_1"]

    def formula(depth: int) -> str:
        kind = data.draw(st.sampled_from(["and", "or", "not"] if depth else ["compare"]))
        if kind == "compare":
            sign = data.draw(st.sampled_from(["<=", ">=", "<", ">", "="]))
            left, right = (data.draw(st.sampled_from([*names, "0", "1", "0.5"])) for _ in "ab")
            if data.draw(st.booleans()):
                left = f"(+ {left} {data.draw(st.sampled_from(names))})"
            return f"({sign} {left} {right})"
        return f"({kind} {' '.join(formula(depth - 1) for _ in range(1 + (kind != 'not')))})"

    text = formula(data.draw(st.integers(0, 3)))
    box = "".join(f"(assert (>= X_{i} 0)) (assert (<= X_{i} 1))" for i in (0, 1))
    try:
        asked = parsed(
            f"{box} (assert (<= (- Y_0 Y_0) 0)) (assert (or (<= Y_1 9) (<= Y_1 8))) (assert {text})"
        )
    except BadInput:  # too many cases
        return
    steps = [Fraction(0), Fraction(1, 2), Fraction(1)]
    for values in itertools.product(steps, repeat=4):
        said = [str(float(v)) for v in values[:2]]
        outputs = torch.tensor(
            [float(v) for v in (*values[2:], *(values[i] for i in asked.echoed))]
        )
        point = torch.tensor([float(v) for v in values[:2]])
        found = any(
            all(a <= v <= b for a, v, b in zip(q.low, values, q.high, strict=False))
            and q.written(point) is not None and q.unsafe(outputs, said)
            for q in asked.queries
        )  # fmt: skip
        assert found == truth(text, dict(zip(names, values, strict=True))), (text, values)


def tied(folder: Path, text: str, weight: list[list[float]]) -> calipers.Verdict:
    """Verify a property of y = x W over two inputs in [0, 1]."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    given = onnx.helper.make_tensor_value_info("x", 1, (1, 2))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "net", [given],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(np.array(weight, np.float32), "w")],
    )  # fmt: skip
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    (folder / "net.onnx").write_bytes(made.SerializeToString())
    names = ["X_0", "X_1", *(f"Y_{j}" for j in range(len(weight[0])))]
    box = "".join(f"(assert (>= X_{i} 0)) (assert (<= X_{i} 1))" for i in (0, 1))
    declared = "".join(f"(declare-const {name} Real)" for name in names)
    (folder / "p.vnnlib").write_text(f"{declared}{box}{text}")
    return calipers.verify(folder / "net.onnx", folder / "p.vnnlib", timeout=30)


SUM = [[1.0, 1.0], [1.0, -1.0]]  # the sum of both inputs, and their difference
TIED: list[tuple[str, list[list[float]], str]] = [
    ("(assert (<= (+ X_0 X_1) 0.5)) (assert (>= Y_0 0.6))", SUM, "unsat"),
    ("(assert (<= (+ X_0 X_1) 0.5)) (assert (>= Y_0 0.4))", SUM, "sat"),
    ("(assert (>= Y_0 (+ X_0 1.01)))", SUM, "unsat"),
    ("(assert (>= Y_0 (+ X_0 0.9)))", SUM, "sat"),
    ("(assert (>= Y_0 (+ X_0 0.9)))", [[1.0], [1.0]], "sat"),
    ("(assert (>= Y_0 (+ X_0 1.01)))", [[1.0], [1.0]], "unsat"),
    ("(assert (<= X_0 X_1)) (assert (> Y_1 0.01))", SUM, "unsat"),
    ("(assert (< X_0 0.5)) (assert (>= Y_0 1.4))", SUM, "sat"),
    ("(assert (not (>= X_0 0.5))) (assert (>= Y_0 1.6))", SUM, "unsat"),
]


@pytest.mark.one_in(1)
@pytest.mark.parametrize(("text", "weight", "answer"), TIED, ids=[t[0][:60] for t in TIED])
def test_inputs_tied_to_each_other_or_to_outputs(
    text: str, weight: list[list[float]], answer: str, tmp_path: Path
) -> None:
    found = tied(tmp_path, text, weight)
    assert found.answer == answer
    if found.witness is not None:
        x = [Fraction(t) for t in found.witness.inputs]
        assert len(found.witness.outputs) == len(weight[0])
        y = [
            sum(a * Fraction(row[j]) for a, row in zip(x, weight, strict=True))
            for j in range(len(weight[0]))
        ]
        values = {f"X_{i}": v for i, v in enumerate(x)} | {
            f"Y_{j}": v + Fraction(0) for j, v in enumerate(y)
        }
        asserted = [part.strip() for part in text.split("(assert") if part.strip()]
        assert all(truth(part.removesuffix(")"), values) for part in asserted)


def test_a_strict_end_that_counts_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "(assert (< X_0 0.5)) (assert (>= X_0 0.5)) (assert (>= Y_0 0))"
    assert tied(tmp_path, text, SUM).answer == "unsat"
    text = "(assert (> X_0 0.999999999999)) (assert (not (< X_0 1))) (assert (> (+ X_1 Y_0) 2.99))"
    assert tied(tmp_path, text, SUM).answer == "sat"
    text = "(assert (> (+ X_0 X_1) 2)) (assert (>= Y_0 0))"
    assert tied(tmp_path, text, SUM).answer != "sat"
    monkeypatch.setattr(
        Inequality,
        "holds",
        lambda self, z: sum((c * z[j] for j, c in self.terms), self.constant) <= 0,
    )
    assert tied(tmp_path, text, SUM).answer == "sat"
