"""Is every file from a stranger read in full, or refused in a sentence that names it, before it
fills the memory?
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import sqlite3
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from terminal import calipers
from torch import nn

from calipers.errors import BadInput
from calipers.interchange import (
    archives,
    arrays,
    files,
    load,
    load_data,
    load_instances,
    load_vnnlib,
    npy,
    vnnlib,
)
from calipers.interchange.vnnlib import parse_vnnlib

pytestmark = pytest.mark.one_in(1)

X, Y = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6), np.array([0, 1, 2, 0])


def npy_bytes(array: np.ndarray, **header: object) -> bytes:
    """Return an array as NumPy writes it, what its header says changed."""
    told = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **header}
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, told)
    return out.getvalue() + array.tobytes()


def archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in members.items():
            out.writestr(name, data)
    return path


def encrypted(path: Path) -> Path:
    """Mark every member of an archive as encrypted."""
    data = bytearray(archive(path, {"x.npy": npy_bytes(X), "y.npy": npy_bytes(Y)}).read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            data[at + place] |= 1
    path.write_bytes(bytes(data))
    return path


def flipped(path: Path) -> Path:
    data = bytearray(archive(path, {"x.npy": npy_bytes(X), "y.npy": npy_bytes(Y)}).read_bytes())
    data[data.find(X.tobytes()) + 5] ^= 1
    path.write_bytes(bytes(data))
    return path


# ---- arrays
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        X,
        X.astype(">f4"),
        X.astype(">f8"),
        X.astype("<f2"),
        np.asfortranarray(X),
        X > 0.5,
        (X * 9).astype(">i2"),
        (X * 9).astype("u4"),
    ],
)
def test_arrays_of_plain_numbers_are_read_in_any_byte_order(x: np.ndarray, tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=x, y=Y.astype(">i4"), more=np.array(["text"]))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", Y.astype("u1"))
    for found in (
        load_data(str(tmp_path / "d.npz")),
        load_data(str(tmp_path / "x.npy"), str(tmp_path / "y.npy")),
    ):
        assert np.array_equal(found[0].double().numpy(), x.astype(np.float64))
        assert found[1].tolist() == Y.tolist()
        assert found[1].dtype == torch.int64


def test_pixels_of_eight_bits_still_become_shares(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.full((2, 5, 5, 3), 51, np.uint8), y=[0, 1])
    x, _ = load_data(str(tmp_path / "d.npz"))
    assert x.shape == (2, 3, 5, 5)
    assert torch.allclose(x, torch.tensor(0.2))


HUGE = {"x.npy": npy_bytes(X, shape=(2**30, 2**9)), "y.npy": npy_bytes(Y)}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "an encrypted archive": (encrypted, "x.npy is encrypted"),
    "a flipped bit": (flipped, "x.npy cannot be unpacked.*CRC"),
    "an archive cut short": (
        lambda p: p.write_bytes(archive(p, HUGE).read_bytes()[:-30]),
        "damaged one",
    ),
    "no archive": (lambda p: p.write_bytes(b"\x00" * 100), "cannot be read as arrays"),
    "nothing": (lambda p: p.write_bytes(b""), "cannot be read as arrays"),
    "a huge shape": (
        lambda p: archive(p, HUGE),
        r"d\.npz: x says that it holds 2,199,023,255,552 bytes of numbers, but 96 are there",
    ),
    "a negative shape": (
        lambda p: archive(p, {**HUGE, "x.npy": npy_bytes(X, shape=(-4, -6))}),
        "which no array of points has",
    ),
    "a shape of huge numbers": (
        lambda p: archive(p, {**HUGE, "x.npy": npy_bytes(X, shape=(10**400,))}),
        "which no array of points has",
    ),
    "objects": (
        lambda p: np.savez(p, x=np.array([{}, 1], object), y=Y[:2]),
        "pickles and never read",
    ),
    "records": (
        lambda p: np.savez(p, x=np.zeros(4, [("a", "f4"), ("b", "i4")]), y=Y),
        "Save plain numbers",
    ),
    "text": (lambda p: np.savez(p, x=np.array(list("abcd")), y=Y), "Save plain numbers"),
    "dates": (lambda p: np.savez(p, x=np.zeros(4, "M8[s]"), y=Y), "Save plain numbers"),
    "complex numbers": (lambda p: np.savez(p, x=X + 1j, y=Y), "Save plain numbers"),
    "long doubles": (lambda p: np.savez(p, x=X.astype(np.longdouble), y=Y), "Save plain numbers"),
    "brackets without end": (
        lambda p: archive(p, {**HUGE, "x.npy": b"\x93NUMPY\x01\x00\x20\x03" + b"(" * 800}),
        "cannot be read as an array",
    ),
    "one number": (
        lambda p: np.savez(p, x=np.float32(3), y=Y),
        "one number where points are needed",
    ),
    "one label": (lambda p: np.savez(p, x=X, y=3), "one number where labels are needed"),
    "huge labels": (lambda p: np.savez(p, x=X, y=np.full(4, 2**63, np.uint64)), "labels of 2\\^63"),
    "a member twice": (lambda p: _twice(p), "a member twice"),
    "a method of packing of its own": (
        lambda p: archive(p, HUGE, zipfile.ZIP_LZMA),
        "packed by a method that is not read",
    ),
    "a bomb": (
        lambda p: archive(
            p,
            {"x.npy": npy_bytes(np.zeros((2**13, 2**11), np.float64)), "y.npy": npy_bytes(Y)},
            zipfile.ZIP_DEFLATED,
        ),
        "would unpack to",
    ),
    "other names": (lambda p: np.savez(p, a=X, b=Y), "holds the arrays a, b; x"),
}


def _twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("x.npy", npy_bytes(X))
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("x.npy", npy_bytes(X))


@pytest.mark.parametrize("kind", REFUSED)
def test_an_array_that_cannot_be_read_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    make, words = REFUSED[kind]
    make(tmp_path / "d.npz")
    with pytest.raises(BadInput, match=words) as refused:
        load_data(str(tmp_path / "d.npz"))
    assert "d.npz" in str(refused.value)


def test_each_limit_is_what_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    REFUSED["a bomb"][0](tmp_path / "d.npz")
    monkeypatch.setattr(archives, "RATIO", 10**6)
    with pytest.raises(BadInput, match="8192 points but 4 labels"):
        load_data(str(tmp_path / "d.npz"))
    REFUSED["long doubles"][0](tmp_path / "l.npz")
    monkeypatch.setattr(npy, "_DTYPES", {*npy._DTYPES, np.dtype(np.longdouble)})
    with pytest.raises(TypeError):
        load_data(str(tmp_path / "l.npz"))


@pytest.mark.parametrize("labels", ["npz", "objects", "text", "missing"])
def test_a_file_of_labels_is_read_with_the_same_care(labels: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "npz", other=Y)
    np.save(tmp_path / "objects.npy", np.array([{}] * 4, object))
    (tmp_path / "text.npy").write_text("0 1 2 0")
    name = tmp_path / ("npz.npz" if labels == "npz" else f"{labels}.npy")
    if labels == "npz":
        assert load_data(str(tmp_path / "x.npy"), str(name))[1].tolist() == Y.tolist()
    else:
        with pytest.raises(BadInput, match=name.name):
            load_data(str(tmp_path / "x.npy"), str(name))


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    for name in (str(tmp_path / "pipe.npz"), "/dev/zero"):
        for read in (load_data, load, load_vnnlib, load_instances):
            with pytest.raises(BadInput, match="no ordinary file"):
                read(name)


# ---- images
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["cut short", "no image", "palette", "a bomb", "a pipe", "two sizes"]
)
def test_images_that_cannot_be_read_are_refused_by_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    folder = tmp_path / "images" / "class0"
    folder.mkdir(parents=True)
    good, path = (
        image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)),
        folder / "bad.png",
    )
    good.save(folder / "a.png")
    good.save(path)
    if kind == "cut short":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "no image":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    elif kind == "palette":
        good.convert("RGB").quantize(8).save(path)
    elif kind == "a bomb":
        (folder / "a.png").unlink()
        image.new("L", (4000, 4000)).save(path)
        monkeypatch.setattr(arrays, "FREE", 2**20)
    elif kind == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        good.resize((20, 40)).save(path)
    words = {"a bomb": "would unpack to", "two sizes": "of one size, found 2"}.get(kind, "bad.png")
    with pytest.raises(BadInput, match=words):
        load_data(str(tmp_path / "images"))


# ---- lists, properties, weights
# --------------------------------------------------------------------------------------------------


LISTS = {
    "a name that no file system takes": ("x" * 5000 + ",spec.vnnlib", ""),
    "a name with a zero": ("a\0b,spec.vnnlib", ""),
    **{f"a time of {t}": (f"n.onnx,s.vnnlib,{t}", "at least 0") for t in ("nan", "inf", "-1")},
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_holds_names_and_times_or_is_refused(kind: str, tmp_path: Path) -> None:
    text, words = LISTS[kind]
    (tmp_path / "list.csv").write_text(text)
    if not words:
        shown = calipers(tmp_path, "verify", "--csv", "list.csv")
        assert shown.returncode == 2
        assert ",error," in shown.stdout
    else:
        with pytest.raises(BadInput, match=words):
            load_instances(tmp_path / "list.csv")


DECLARED = "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (>= X_0 0))(assert (<= X_0 1))"


def test_depth_costs_nothing_and_every_open_bracket_is_told() -> None:
    deep = "(+ " * 20_000 + "Y_0" + ")" * 20_000
    assert len(parse_vnnlib(f"{DECLARED}(assert (<= {deep} 1))").queries) == 1
    with pytest.raises(BadInput, match="ends inside the bracket"):
        parse_vnnlib(DECLARED + "(" * 100_000)


def test_numbers_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    primes = [p for p in range(2, 9000) if all(p % k for k in range(2, int(p**0.5) + 1))]
    text = f"{DECLARED}(assert (<= Y_0 (+ {' '.join(f'(/ 1 {p})' for p in primes)})))"
    with pytest.raises(BadInput, match="more than 1000 digits"):
        parse_vnnlib(text)
    monkeypatch.setattr(vnnlib, "_MOST_BITS", 10**6)
    assert len(parse_vnnlib(text).queries) == 1


def test_coefficients_beyond_all_floats_are_refused_when_the_question_is_posed() -> None:
    terms = f"(* {'9' * 500} Y_0) (* 0.{'3' * 40} Y_1)"
    (query,) = parse_vnnlib(
        f"{DECLARED}(declare-const Y_1 Real)(assert (<= (+ {terms}) 1))"
    ).queries
    with pytest.raises(BadInput, match="too many digits"):
        query.goal()


def test_disjunctions_do_not_multiply_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = "(and " + "(<= Y_0 1)" * 300 + ")"
    text = f"{DECLARED}(assert {'(and ' + f'(or {wide}{wide})' * 4 + ')'})"
    assert len(parse_vnnlib(text).queries) == 1
    monkeypatch.setattr(vnnlib, "_MOST_ATOMS", 10_000)
    with pytest.raises(BadInput, match="multiply to more than 10000 comparisons"):
        parse_vnnlib(text)


def test_what_all_cases_share_is_sorted_once() -> None:
    """Cases with and without bounds of their own, empty and impossible ones, come out as they would
    one by one.
    """
    cases = [
        "(<= Y_0 1)",
        "(and (<= X_0 0.5) (<= Y_0 2))",
        "(<= Y_0 3)",
        "(and (>= X_0 0.7) (<= Y_0 4))",
        "(and (>= X_0 2) (<= Y_0 5))",
        "(and (<= 1 0) (<= Y_0 6))",
    ]
    found = parse_vnnlib(f"{DECLARED}(assert (or {' '.join(cases)}))(assert (>= Y_0 -9))")
    shown = [
        (
            float(q.low[0]),
            float(q.high[0]),
            [[float(-r.constant) for r in case] for case in q.cases],
        )
        for q in found.queries
    ]
    assert shown == [(0, 1, [[9, 1], [9, 3]]), (0, 0.5, [[9, 2]]), (0.7, 1, [[9, 4]])]
    assert [note[:6] for note in found.notes] == ["case 4", "case 5"]
    assert (
        len(parse_vnnlib(f"{DECLARED}(assert (or {' '.join(cases)}))(assert (<= 1 0))").queries)
        == 0
    )


def test_a_packed_property_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "FREE", 2**16)
    (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(bytes(2**24)))
    with pytest.raises(BadInput, match="would unpack to"):
        load_vnnlib(tmp_path / "p.vnnlib.gz")
    monkeypatch.setattr(archives, "RATIO", 10**6)
    assert len(files.content(tmp_path / "p.vnnlib.gz")) == 2**24


@pytest.mark.parametrize("kind", ["pickle", "bomb", "safetensors", "a list", "an empty name"])
def test_weights_that_cannot_be_read_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Linear(2, 3)\n"
    )
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "pickle":
        torch.save(nn.Linear(2, 3), path)
    elif kind == "bomb":
        archive(path, {"w/data.pkl": bytes(2**27)}, zipfile.ZIP_DEFLATED)
    elif kind == "safetensors":
        path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    else:
        torch.save([1, 2] if kind == "a list" else {"": 3}, path)
    with pytest.raises(BadInput, match=path.name):
        load(str(path), builder=f"{tmp_path}/net.py:build")


# ---- the command line
# --------------------------------------------------------------------------------------------------


WRONG = {
    "a negative timeout": (
        ("verify", "n.onnx", "s.vnnlib", "--seconds", "-1"),
        "the timeout is a number of seconds, at least 0",
    ),
    "a timeout that is no number": (
        ("verify", "n.onnx", "s.vnnlib", "--seconds", "nan"),
        "the timeout is a number of seconds, at least 0",
    ),
    "a confidence above 1": (
        ("report", "--confidence", "2"),
        "the confidence is a share between 0 and 1",
    ),
    "a folder that is not there": (
        ("report", "-o", "no/such/page.html"),
        "there is no folder no/such",
    ),
    "a record in a folder that is not there": (
        ("measure", "--record", "no/such/run.calipers"),
        "there is no folder no/such",
    ),
    "a page that is a folder": (("report", "r.calipers", "-o", "."), "the system refuses"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_every_option_is_looked_at_before_work_begins(kind: str, tmp_path: Path) -> None:
    words, message = WRONG[kind]
    if "r.calipers" in words:
        calipers(
            tmp_path,
            "measure",
            "-m",
            "mnist-plain",
            "-n",
            "2",
            "--plan",
            "quick",
            "--record",
            "r.calipers",
            "--report",
            "none",
            "-q",
        )
    shown = calipers(tmp_path, *words)
    assert shown.returncode == 2
    assert message in shown.stderr


def test_an_altered_record_that_makes_no_sense_is_told_and_a_bug_keeps_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "-m",
        "mnist-plain",
        "-n",
        "2",
        "--plan",
        "quick",
        "--record",
        "r.calipers",
        "--report",
        "none",
        "-q",
    )
    assert calipers(tmp_path, "measure", *words).returncode == 0
    with monkeypatch.context() as patch:
        patch.setattr("calipers.report.text.render_text", lambda *_: {}["no such thing"])
        with pytest.raises(KeyError):
            calipers(tmp_path, "report", "r.calipers", "-o", "none")
    for change in (
        "update question set facts = '[]'",
        "update point set array = x'00'",
        "update evidence set radius = 'far'",
    ):
        with contextlib.closing(sqlite3.connect(tmp_path / "r.calipers")) as db, db:
            db.execute(change)
        shown = calipers(tmp_path, "report", "r.calipers", "-o", "page.html")
        assert shown.returncode == 2, change
        assert "altered" in shown.stderr


def test_names_in_a_file_move_no_cursor(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **{"a\x1b[2J": X, "b\u202e": Y})
    shown = calipers(tmp_path, "attack", "-m", "mnist-plain", "-d", "d.npz", "-q")
    assert shown.returncode == 2
    assert "holds the arrays a�[2J, b�; x" in shown.stderr
    (tmp_path / "list.csv").write_text("n\x07.onnx,s.vnnlib")
    assert calipers(tmp_path, "verify", "--csv", "list.csv").stdout.startswith(
        "n�.onnx,s.vnnlib,error"
    )


def test_what_is_refused_at_the_door_leaves_no_record(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    shown = calipers(tmp_path, "measure", "-m", "mnist-plain", "-d", "d.npz", "-q")
    assert shown.returncode == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz"]


def test_a_header_that_claims_gigabytes_makes_nobody_set_them_aside(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + b"{'descr': '<f4'}")
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="cannot be read as an array"):
            load_data(str(path), labels=str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
