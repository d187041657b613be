"""Is the answer kept, joined and counted right? Join laws, statistics against published tables, and
a file that survives being killed.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from calipers.errors import Contradiction, RecordError
from calipers.record.bracket import Bracket
from calipers.record.estimates import clopper_pearson, dkw_half_width, two_sided, wilson
from calipers.record.evidence import Evidence, Point, Question
from calipers.record.record import SCHEMA_VERSION, Record

SRC = Path(__file__).resolve().parent.parent / "src"
INF = math.inf
N = 4


# ---- the bracket
# --------------------------------------------------------------------------------------------------


def bracket(
    *ends: tuple[float, float], lower_tool: str = "CROWN()", upper_tool: str = "PGD()"
) -> Bracket:
    low, up = (np.array(e, dtype=float) for e in zip(*ends, strict=True))
    return Bracket(
        low,
        up,
        tuple(lower_tool if v else "" for v in low),
        tuple(upper_tool if v < INF else "" for v in up),
    )


def same(a: Bracket, b: Bracket) -> bool:
    return (
        a.lower.tolist() == b.lower.tolist()
        and a.upper.tolist() == b.upper.tolist()
        and (a.lower_tool, a.upper_tool) == (b.lower_tool, b.upper_tool)
    )


lowers, uppers, tools = (
    st.sampled_from([0.0, 0.1, 0.2, 0.25]),
    st.sampled_from([0.5, 0.6, 1.0, INF]),
    st.sampled_from(["a", "b", "c"]),
)


@st.composite
def brackets(draw: st.DrawFn) -> Bracket:
    """Sound brackets: points 0 is misclassified in some; ends come from few values, so that ties
    are common.
    """
    zero = draw(st.booleans())
    low = [0.0, *(draw(lowers) for _ in range(N - 1))]
    up = [0.0 if zero else INF, *(draw(uppers) for _ in range(N - 1))]
    return Bracket(
        np.array(low),
        np.array(up),
        tuple(draw(tools) if v else "" for v in low),
        tuple(draw(tools) if v < INF else "" for v in up),
    )


@settings(deadline=None, max_examples=200)
@given(brackets(), brackets(), brackets())
def test_joining_is_commutative_associative_and_idempotent(
    a: Bracket, b: Bracket, c: Bracket
) -> None:
    assert same(a.join(b), b.join(a))
    assert same(a.join(b).join(c), a.join(b.join(c)))
    assert same(a.join(a), a) and same(a.join(b).join(b), a.join(b))
    assert same(a.join(Bracket.open(N)), a)
    assert (a.join(b).lower >= a.lower).all() and (a.join(b).upper <= a.upper).all()


def facts(seed: int, count: int = 40) -> list[Evidence]:
    """Return random facts that do not contradict each other: certificates below 0.3, witnesses
    above.
    """
    g = np.random.default_rng(seed)
    kinds = {
        "certificate": (0.0, 0.3),
        "witness": (0.31, 0.9),
        "attempt": (0.0, 1.0),
        "clean": (0.0, 1.0),
    }
    names = list(kinds)
    drawn = [(names[g.integers(4)], int(g.integers(N)), int(g.integers(3))) for _ in range(count)]
    return [
        Evidence(f"p{i}", kind, f"tool{t}()", round(float(g.uniform(*kinds[kind])), 2))
        for kind, i, t in drawn
    ]  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, 40), st.randoms(use_true_random=False))
def test_the_bracket_of_all_facts_is_the_join_of_the_brackets_of_some(
    seed: int, cut: int, chance: object
) -> None:
    names, every = [f"p{i}" for i in range(N)], facts(seed)
    whole = Bracket.of(names, every)
    chance.shuffle(every)  # type: ignore[attr-defined]
    assert same(Bracket.of(names, every), whole)
    assert same(Bracket.of(names, every[:cut]).join(Bracket.of(names, every[cut:])), whole)
    assert same(Bracket.of(names, every + every), whole)


def test_only_certificates_and_witnesses_move_the_ends() -> None:
    names = ["a", "b"]
    some = [
        Evidence("a", "certificate", "CROWN()", 0.1),
        Evidence("a", "witness", "PGD()", 0.4),
        Evidence("a", "attempt", "PGD()", 0.05),
        Evidence("b", "witness", "clean", 0.0),
        Evidence("b", "invalid", "model", math.nan, note="NaN logits"),
        Evidence("stranger", "witness", "PGD()", 0.01),
    ]
    found = Bracket.of(names, some)
    assert same(
        found,
        Bracket(np.array([0.1, 0.0]), np.array([0.4, 0.0]), ("CROWN()", ""), ("PGD()", "clean")),
    )
    assert same(Bracket.open(2), Bracket(np.zeros(2), np.full(2, INF), ("", ""), ("", "")))


@pytest.mark.parametrize(
    "ends", [(0.3, 0.2), (0.2, 0.2), (math.nan, 0.5), (0.1, math.nan), (0.1, 0.0)]
)
def test_ends_that_cross_are_a_contradiction(ends: tuple[float, float]) -> None:
    """A certificate covers the closed ball, so a witness at the certified distance contradicts it
    as well.
    """
    with pytest.raises(Contradiction):
        bracket((0.1, 0.4), ends)


def test_a_contradiction_names_point_tools_distances_and_what_to_do() -> None:
    with pytest.raises(Contradiction) as caught:
        bracket((0.1, 0.4), (0.3, INF)).join(
            bracket((0.0, INF), (0.0, 0.25), upper_tool="Square()")
        )
    assert str(caught.value) == (
        "point 1: CROWN() certifies 0.3, but the witness of Square() stands at 0.25 (1 of 2 points "
        "contradict). One of the two tools is wrong: replay both "
        "with `calipers check RECORD`, and please report it with the record."
    )


def test_a_claim_that_is_no_number_names_its_tool() -> None:
    with pytest.raises(Contradiction, match="Broken\\(\\) claims a distance that is not a number"):
        Bracket.of(["a"], [Evidence("a", "certificate", "Broken()", math.nan)])


def test_verdicts_are_a_reading_without_tolerance() -> None:
    b = bracket((0.0, 0.0), (0.1, 0.3), (0.2, INF), (0.0, INF))
    assert b.verdicts(0.2) == ["broken", "unknown", "robust", "unknown"]
    assert b.verdicts(0.3) == ["broken", "broken", "unknown", "unknown"]
    assert b.verdicts(np.nextafter(0.2, 1)) == ["broken", "unknown", "unknown", "unknown"]
    assert b.verdicts(np.nextafter(0.3, 0))[1] == "unknown"
    assert b.verdicts(np.array([0.0, 0.1, 0.1, 0.0])) == ["broken", "robust", "robust", "robust"]


# ---- estimates
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "score", "exact"),
    [
        (0, 10, (0.0000, 0.2775), (0.0000, 0.3085)),
        (10, 10, (0.7225, 1.0), (0.6915, 1.0)),
        (7, 50, (0.0695, 0.2619), (0.0582, 0.2674)),
        (0, 100, (0.0000, 0.0370), (0.0000, 0.0362)),
        (50, 100, (0.4038, 0.5962), (0.3983, 0.6017)),
        (95, 100, (0.8882, 0.9785), (0.8872, 0.9836)),
        (470, 1000, (0.4392, 0.5010), (0.4387, 0.5015)),
        (4404, 10000, (0.4307, 0.4502), (0.4306, 0.4502)),
        (4921, 10000, (0.4823, 0.5019), (0.4823, 0.5019)),
    ],
)
def test_intervals_of_the_published_table(
    k: int, n: int, score: tuple[float, float], exact: tuple[float, float]
) -> None:
    for interval, ends in ((wilson(k, n), score), (clopper_pearson(k, n), exact)):
        assert (interval.low, interval.high) == pytest.approx(ends, abs=5.1e-5)
        assert (
            interval.rate == k / n
            and interval.confidence == 0.95
            and interval.low <= interval.rate <= interval.high
        )


def test_wilson_by_its_formula() -> None:
    z = 1.959963984540054
    for k, n in ((0, 7), (3, 7), (7, 7), (123, 456)):
        p = k / n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        ends = ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
        assert (wilson(k, n).low, wilson(k, n).high) == pytest.approx(ends, abs=1e-12)


def test_the_points_that_a_half_width_costs() -> None:
    for n, half in ((385, 0.05), (1068, 0.03), (2401, 0.02), (9604, 0.01)):
        interval = wilson(n // 2, n)
        assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.01)


def test_the_rule_of_three() -> None:
    """No failure in 1000: one-sided upper end 0.29912 %, which the rule rounds to 3 / n."""
    assert clopper_pearson(0, 1000, confidence=0.9).high == pytest.approx(0.0029912, abs=5e-8)


def test_the_statement_from_both_jaws() -> None:
    assert two_sided(300, 470, 1000) == pytest.approx((0.2724, 0.5010), abs=5e-5)
    assert two_sided(470, 470, 1000) == pytest.approx(
        (wilson(470, 1000).low, wilson(470, 1000).high), abs=1e-12
    )
    assert two_sided(0, 10, 10) == pytest.approx((0.0, 1.0), abs=1e-12)
    with pytest.raises(
        ValueError,
        match="5 points certified but only 4 survive the attacks: the two counts contradict",
    ):
        two_sided(5, 4, 10)


def test_the_band_around_a_curve() -> None:
    assert [dkw_half_width(n) for n in (100, 1000, 10000)] == pytest.approx(
        [0.136, 0.0429, 0.0136], abs=5e-4
    )
    assert dkw_half_width(1000) == pytest.approx(math.sqrt(math.log(2 / 0.05) / 2000), abs=1e-15)


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=rf"a rate needs 0 <= k <= n and n > 0, got k={k}, n={n}"):
        wilson(k, n)
    with pytest.raises(ValueError, match="at least one point"):
        dkw_half_width(0)
    with pytest.raises(ValueError, match="confidence must lie strictly between 0 and 1"):
        clopper_pearson(1, 2, confidence=95)


@pytest.mark.parametrize(
    ("n", "usual", "everywhere"),
    [(50, 0.9309, 0.8394), (100, 0.9276, 0.8607), (200, 0.9342, 0.9102), (1000, 0.9444, 0.9198)],
)
def test_the_exact_coverage_of_our_own_intervals(n: int, usual: float, everywhere: float) -> None:
    """Sum the binomial probabilities of all counts whose interval holds p: Wilson dips below 95 %
    as published, Clopper-Pearson never does.
    """
    z = 1.959963984540054
    k = np.arange(n + 1)
    middle, half = (
        k / n + z * z / (2 * n),
        z * np.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n)),
    )
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    for i in (0, n // 3, n):  # the vectorised formula is the function under test
        assert (low[i], high[i]) == pytest.approx((wilson(i, n).low, wilson(i, n).high), abs=1e-12)

    def coverage(p: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        holds = (low[:, None] <= p) & (p <= high[:, None])
        total: np.ndarray = (binom.pmf(k[:, None], n, p) * holds).sum(0)
        return total

    fine = np.linspace(0.05, 0.95, 1997)
    assert coverage(fine, low, high).min() == pytest.approx(usual, abs=3e-4)
    assert 0.95 < coverage(fine, low, high).mean() < 0.952
    assert coverage(np.linspace(0.001, 0.999, 1997), low, high).min() == pytest.approx(
        everywhere, abs=3e-4
    )
    if n <= 100:
        exact = [clopper_pearson(int(i), n) for i in k]
        assert (
            coverage(
                np.linspace(0.001, 0.999, 999),
                np.array([e.low for e in exact]),
                np.array([e.high for e in exact]),
            ).min()
            >= 0.95
        )


# ---- the ledger
# --------------------------------------------------------------------------------------------------

QUESTION = Question("f" * 16, "a question", {"threat": {"norm": "linf", "radius": 0.1}, "seed": 0})


def points(n: int = N, start: int = 0) -> list[Point]:
    return [
        Point(f"p{i}", i - start, i % 3, 0.1, np.full((1, 2, 2), i, dtype=np.float32))
        for i in range(start, start + n)
    ]


def filled(path: Path | None, evidence: list[Evidence], some: list[Point] | None = None) -> Record:
    ledger = Record(path)
    ledger.ask(QUESTION, points() if some is None else some)
    ledger.append(QUESTION.fingerprint, evidence)
    return ledger


def held(ledger: Record) -> set[str]:
    """Return everything the ledger says about the question, in words that can be compared whatever
    the order.
    """
    return {repr(e) for e in ledger.evidence(QUESTION.fingerprint)}


def test_appending_twice_changes_nothing() -> None:
    ledger = filled(None, facts(1))
    before = ledger.evidence(QUESTION.fingerprint)
    ledger.append(QUESTION.fingerprint, facts(1))
    ledger.ask(QUESTION, points())
    assert [repr(e) for e in ledger.evidence(QUESTION.fingerprint)] == [repr(e) for e in before]
    assert len({e.key for e in before}) == len(before) > 10
    assert [p.name for p in ledger.points(QUESTION.fingerprint)] == ["p0", "p1", "p2", "p3"]


def test_a_file_that_is_reopened_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.calipers"
    with filled(path, facts(2)) as ledger:
        before = held(ledger)
    with Record(path) as again, Record(path, read_only=True) as reader:
        assert held(again) == held(reader) == before
        assert again.questions() == [QUESTION] and again.questions()[0].facts == QUESTION.facts
        assert all(
            np.array_equal(a.array, b.array) and a == b
            for a, b in zip(again.points(QUESTION.fingerprint), points(), strict=True)
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64, np.bool_])
def test_arrays_come_back_bit_for_bit(tmp_path: Path, dtype: type) -> None:
    # not contiguous
    array = (np.random.default_rng(0).random((3, 4, 5)) * 200).astype(dtype)[:, ::2]
    fact = Evidence("p0", "witness", "PGD()", 0.1, -0.5, array=array)
    with filled(tmp_path / "r", [fact, Evidence("p1", "certificate", "CROWN()", 0.2)]):
        pass
    with Record(tmp_path / "r") as ledger:
        back = ledger.witness(QUESTION.fingerprint, ledger.evidence(QUESTION.fingerprint)[0])
        assert back is not None and back.dtype == array.dtype and np.array_equal(back, array)
        assert (
            ledger.witness(QUESTION.fingerprint, Evidence("p1", "certificate", "CROWN()", 0.2))
            is None
        )
        assert ledger.witness(QUESTION.fingerprint, Evidence("p9", "witness", "PGD()", 0.1)) is None


def test_nan_and_infinity_come_back() -> None:
    some = [
        Evidence("p0", "invalid", "model", note="NaN logits"),
        Evidence("p1", "certificate", "CROWN()", INF, -INF),
        Evidence("p2", "clean", "model", 0.0, INF),
    ]
    ledger = filled(None, some + some)
    assert [repr(e) for e in ledger.evidence(QUESTION.fingerprint)] == [repr(e) for e in some]
    assert math.isnan(ledger.evidence(QUESTION.fingerprint)[0].radius) and math.isnan(
        ledger.evidence(QUESTION.fingerprint)[0].margin
    )


def test_a_fact_that_cannot_be_stored_is_an_error_and_not_lost_in_silence() -> None:
    ledger = filled(None, [])
    with pytest.raises((sqlite3.IntegrityError, RecordError)):
        ledger.append(
            QUESTION.fingerprint,
            [
                Evidence("p0", "witness", "PGD()", 0.1),
                Evidence("p1", "witness", "PGD()", 0.1, seconds=math.nan),
            ],
        )
    assert ledger.evidence(QUESTION.fingerprint) == []  # an append is all or nothing


def test_two_halves_in_any_order_are_the_whole(tmp_path: Path) -> None:
    every = [
        Evidence(
            **{**{n: getattr(e, n) for n in Evidence.__dataclass_fields__}, "array": np.full(3, i)}
        )
        for i, e in enumerate(facts(3))
    ]
    whole = filled(None, every)
    for order in itertools.permutations(range(3)):
        parts = [filled(tmp_path / f"{order}{i}", every[i::3], points()[i::3]) for i in range(3)]
        merged = Record(tmp_path / f"{order}")
        for i in order:
            merged.merge(parts[i])
            merged.merge(parts[i])  # twice is once
        assert held(merged) == held(whole) and {
            p.name for p in merged.points(QUESTION.fingerprint)
        } == {p.name for p in points()}
        assert sorted(p.position for p in merged.points(QUESTION.fingerprint)) == list(range(N))
        names = [p.name for p in points()]
        assert same(
            Bracket.of(names, merged.evidence(QUESTION.fingerprint)),
            Bracket.of(names, whole.evidence(QUESTION.fingerprint)),
        )
        assert all(
            merged.witness(QUESTION.fingerprint, e) is not None
            for e in merged.evidence(QUESTION.fingerprint)
        )
        for ledger in (merged, *parts):
            ledger.close()


def test_questions_do_not_mix() -> None:
    ledger = filled(None, facts(4))
    other = Question("0" * 16, "another")
    ledger.ask(other, points(2))
    ledger.append(other.fingerprint, [Evidence("p0", "witness", "PGD()", 0.5)])
    assert (
        len(ledger.evidence(other.fingerprint)) == 1
        and len(ledger.points(QUESTION.fingerprint)) == N
    )
    assert [q.fingerprint for q in ledger.questions()] == [QUESTION.fingerprint, other.fingerprint]


def test_asking_again_at_another_radius_keeps_positions_and_evidence() -> None:
    ledger = filled(None, facts(5))
    before = held(ledger)
    ledger.ask(
        Question(QUESTION.fingerprint, "now wider", {}),
        [Point(p.name, 99, p.label, 0.3, p.array) for p in points()],
    )
    assert [(p.position, p.radius) for p in ledger.points(QUESTION.fingerprint)] == [
        (i, 0.3) for i in range(N)
    ]
    assert held(ledger) == before and ledger.questions()[0].title == "now wider"


# ---- files that are not what they should be
# --------------------------------------------------------------------------------------------------


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "places.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("create table bookmarks (url text)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(
        RecordError,
        match=r"places\.sqlite is a database of another program, not a calipers record\. Give "
        r"another file "
        r"name",
    ):
        Record(path)
    assert path.read_bytes() == before


def test_a_record_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.calipers"
    filled(path, []).close()
    with sqlite3.connect(path) as db:
        db.execute(f"pragma user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(
        RecordError,
        match=rf"written by a newer calipers \(record version {SCHEMA_VERSION + 1}, this one reads "
        rf"{SCHEMA_VERSION}\)\. Update calipers",
    ):
        Record(path)


@pytest.mark.parametrize(
    "content",
    [
        b"no database at all, but long enough to look like a file" * 40,
        b"SQLite format 3\x00" + bytes(range(256)) * 20,
    ],
)
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(
        RecordError,
        match=r"notes\.txt cannot be used as a record \(.*\)\. Give another file name, or remove "
        r"it",
    ):
        Record(path)
    assert path.read_bytes() == content


def test_a_truncated_record_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "run.calipers"
    filled(
        path,
        [
            Evidence(f"p{i % N}", "witness", f"PGD({i})", 0.4, array=np.zeros(400))
            for i in range(200)
        ],
    ).close()
    whole = path.read_bytes()
    for share in (0.05, 0.5, 0.95):
        path.write_bytes(whole[: int(len(whole) * share)])
        with (
            pytest.raises(RecordError, match=r"run\.calipers cannot be used as a record"),
            Record(path) as ledger,
        ):
            ledger.evidence(QUESTION.fingerprint)


def test_a_record_with_a_damaged_page_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "run.calipers"
    every = [Evidence(f"p{i % N}", "witness", f"PGD({i})", 0.4) for i in range(400)]
    filled(path, every).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xff" * 4096 * 8 + whole[8192 + 4096 * 8 :])
    with pytest.raises(
        RecordError,
        match=r"run\.calipers is damaged \(.*malformed.*\)\. Take a copy of the file, or measure "
        r"again into "
        r"a new one",
    ):
        read_all(path)


def read_all(path: Path) -> set[str]:
    with Record(path) as ledger:
        return held(ledger)


def test_reading_what_is_not_there_says_how_to_measure(tmp_path: Path) -> None:
    path = tmp_path / "none.calipers"
    with pytest.raises(
        RecordError,
        match=r"no record at .*none\.calipers: nothing to read\. Measure first: calipers measure "
        r"--record",
    ):
        Record(path, read_only=True)
    assert not path.exists()
    with pytest.raises(RecordError, match="no record at"):
        Record(None, read_only=True)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="there is no folder"):
        Record(tmp_path / "missing" / "run.calipers")


# ---- durability
# --------------------------------------------------------------------------------------------------


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SRC)}


def test_a_record_opens_without_torch() -> None:
    code = """
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "torch":
                    raise ImportError("torch is not here")

        sys.meta_path.insert(0, Blocked())
        import numpy as np
        from calipers.record import bracket, estimates, evidence, record
        book = record.Record()
        book.ask(evidence.Question("q", "q"), [evidence.Point("p", 0, 1, 0.1, np.zeros(2))])
        book.append("q", [evidence.Evidence("p", "witness", "PGD()", 0.2), evidence.Evidence("p", "certificate", "CROWN()", 0.1)])
        print(bracket.Bracket.of(["p"], book.evidence("q")).verdicts(0.2), estimates.wilson(1, 2).rate, "torch" in sys.modules)
    """
    done = subprocess.run(
        python(code), env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['broken'] 0.5 False"


@pytest.mark.parametrize("after", [1, 17, 60])
def test_a_kill_in_the_middle_of_appending_loses_nothing_admitted(
    tmp_path: Path, after: int
) -> None:
    """The child tells of each append that has returned; it is killed without warning while it goes
    on appending.
    """
    code = """
        import itertools, sys
        import numpy as np
        from calipers.record.evidence import Evidence, Point, Question
        from calipers.record.record import Record
        ledger = Record(sys.argv[1])
        ledger.ask(Question("q", "q"), [Point("p", 0, 1, 0.1, np.zeros(2))])
        for i in itertools.count():
            ledger.append("q", [Evidence("p", "witness", f"a{i}", 0.2, array=np.full(300, i)), Evidence("p", "certificate", f"b{i}", 0.1)])
            print(i, flush=True)
    """
    path = tmp_path / "run.calipers"
    child = subprocess.Popen(
        python(code, str(path)), env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    told = [int(child.stdout.readline()) for _ in range(after)]
    os.kill(child.pid, signal.SIGKILL)
    told += [int(line) for line in re.findall(r"^\d+(?=\n)", child.stdout.read(), re.MULTILINE)]
    child.stdout.close()
    assert child.wait(timeout=30) == -signal.SIGKILL
    with Record(path) as ledger:
        names = {e.tool for e in ledger.evidence("q")}
        assert names >= {f"{kind}{i}" for i in told for kind in "ab"} and len(told) >= after
        # no half of an append
        assert {name[1:] for name in names if name[0] == "a"} == {
            name[1:] for name in names if name[0] == "b"
        }
        for e in ledger.evidence("q"):
            array = ledger.witness("q", e)
            assert (array is None) == (e.kind == "certificate") and (
                array is None or (array == int(e.tool[1:])).all()
            )
        ledger.append("q", [Evidence("p", "witness", "after", 0.2)])
        assert len(ledger.evidence("q")) == len(names) + 1


def test_a_decision_is_made_once_for_whoever_resumes(tmp_path: Path) -> None:
    with Record(tmp_path / "a.calipers") as first:
        assert first.decide("q", "run", "order", lambda: ["FAB", "PGD"]) == ["FAB", "PGD"]
    with Record(tmp_path / "a.calipers") as second:
        assert second.decide("q", "run", "order", lambda: ["PGD", "FAB"]) == ["FAB", "PGD"]
        assert second.decide("q", "other run", "order", lambda: ["PGD", "FAB"]) == ["PGD", "FAB"]
