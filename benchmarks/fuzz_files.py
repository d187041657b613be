"""What do files do that nobody meant to be read? Generated and mutated ones at every door, counted
by what came of them.

PYTHONPATH=src python benchmarks/fuzz_files.py --kind npz --count 5000 [--seed 1] [--keep FOLDER]

Kinds: npz (and npy), vnnlib, pt2, proof, csv, record. A child reads one file after another in its
own memory limit (1 GiB above what torch takes) and time limit (10 CPU seconds a file); the parent
counts: read, refused (in one of the package's own errors), and what must never be: traceback,
memory, hang, crash, code (a file that ran what stood in it), altered (a proof of another claim than
was asked about). Files of those are kept in FOLDER.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import sys
import tempfile
import traceback
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import calipers
from calipers.api.verify import listed
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN
from calipers.certificates.proof_writer import differs
from calipers.errors import BadInput, CalipersError
from calipers.interchange import load, load_data, load_instances, load_vnnlib
from calipers.models.classifier import Classifier
from calipers.problem.problem import Problem
from calipers.problem.protocols import Claim
from calipers.record import checker
from calipers.record.proofs import contents, sealed
from calipers.record.record import Record, making_sense
from calipers.report.render import render_html
from calipers.report.text import render_text
from calipers.threats.ball import Ball

GOOD = ("read", "refused")
# bytes above the start; CPU seconds, and seconds on the wall, of one file
_MEMORY, _SECONDS, _PATIENCE = 2**30, 10, 120
_ODD = (
    0,
    1,
    -1,
    2,
    7,
    2**31 - 1,
    2**31,
    2**40,
    2**63 - 1,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e308,
    None,
    True,
    [],
    {},
    "",
    "x" * 3000,
    "\x00",
    "as_int",
)


# ---- mutations
# --------------------------------------------------------------------------------------------------


def mutated(draw: random.Random, data: bytes, most: int = 6) -> bytes:
    """Return the bytes with a few of them flipped, cut, doubled, moved or replaced."""
    out = bytearray(data)
    for _ in range(draw.randint(1, most)):
        i, j = sorted(draw.randint(0, len(out)) for _ in range(2))
        way = draw.randrange(7)
        if way == 0 and out:
            out[min(i, len(out) - 1)] ^= 1 << draw.randrange(8)
        elif way == 1:
            out[i:i] = draw.randbytes(draw.choice((1, 2, 4, 8, 40)))
        elif way == 2:
            del out[i : min(j, i + draw.choice((1, 4, 50, 10**6)))]
        elif way == 3:
            out[i:i] = out[i : min(j, i + 200)]
        elif way == 4:
            out[i : i + 4] = draw.choice(
                (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"9999")
            )
        elif way == 5 and out:
            out[min(i, len(out) - 1)] = draw.randrange(256)
        else:
            out[i:j] = out[i:j][::-1] if draw.random() < 0.2 else out[i:j]
    return bytes(out)


def packed_again(
    draw: random.Random, data: bytes, edit: Callable[[str, bytes], bytes], odd: float = 1.0
) -> bytes:
    """Return an archive with its members edited, now and then one left out, doubled, renamed or
    packed another way.
    """
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as source,
        zipfile.ZipFile(out, "w") as target,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for info in source.infolist():
            name, content = info.filename, edit(info.filename, source.read(info))
            way = draw.random() / max(odd, 1e-9)
            method = draw.choice((0, 0, 0, 8, 8, 12, 14)) if draw.random() < odd else 0
            if way < 0.03:
                continue
            if way < 0.06:
                name = draw.choice((name * 2, name[::-1], "../" + name, name[: len(name) // 2], ""))
            for _ in range(2 if 0.06 < way < 0.08 else 1):
                target.writestr(zipfile.ZipInfo(name), content, method)
    return out.getvalue()


def rewritten(draw: random.Random, told: Any, changes: int) -> Any:
    """Return parsed JSON with a few of its places changed."""
    places = list(_places(told))
    for _ in range(changes if places else 0):
        holder, key = draw.choice(places)
        with contextlib.suppress(LookupError):
            way = draw.randrange(5)
            if way == 0:
                del holder[key]
            elif way == 1:
                holder[key] = draw.choice(_ODD)
            elif way == 2:
                other, at = draw.choice(places)
                holder[key] = deepcopy(other[at])
            elif way == 3 and type(holder[key]) is int:
                holder[key] += draw.choice((-1, 1, 2, 100, 2**33))
            elif isinstance(holder[key], str):
                holder[key] = draw.choice(
                    (
                        holder[key] + "_",
                        holder[key][::-1],
                        "torch.ops.aten.relu.default",
                        "x",
                        "0.weight",
                    )
                )
    return told


def _places(told: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    keys = (
        told.keys()
        if isinstance(told, dict)
        else range(len(told))
        if isinstance(told, list)
        else ()
    )
    for key in list(keys):
        yield told, key
        yield from _places(told[key], depth + 1)


# ---- kinds
# --------------------------------------------------------------------------------------------------


class Any3(nn.Module):
    """Logits of three classes for points of any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        s = (x.to(self.scale.dtype) * self.scale).flatten(1).sum(1)
        return torch.stack([s, -s, 0 * s + 0.5], 1)


class Kind(ABC):
    """How files of a kind are made, and what reads them."""

    suffix = ""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, folder / "mark"

    @abstractmethod
    def make(self, draw: random.Random) -> bytes:
        """Return a file, whole or spoiled."""

    @abstractmethod
    def read(self, path: Path) -> str:
        """Read a file; return "read", or what must never be."""


class Arrays(Kind):
    """Points and labels."""

    suffix = ".npz"

    def make(self, draw: random.Random) -> bytes:
        names = draw.choice(
            (("x", "y"), ("x", "y"), ("images", "labels"), ("x",), ("a", "b", "x", "y"))
        )
        tame = draw.choice(((4,), (1, 3, 3), (3, 5, 5))) if draw.random() < 0.6 else None
        members = {
            name: self._member(
                draw, None if tame is None else (3, *tame) if name in ("x", "images") else (3,)
            )
            for name in names
        }
        if draw.random() < 0.3:
            return (
                mutated(draw, members.popitem()[1]) if draw.random() < 0.7 else members.popitem()[1]
            )
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as target:
            for name, data in members.items():
                target.writestr(f"{name}.npy", data, draw.choice((0, 8)))
        data = out.getvalue()
        way = draw.random()
        if way < 0.35:
            return mutated(draw, data)
        return (
            packed_again(
                draw,
                data,
                lambda _, content: mutated(draw, content, 3) if draw.random() < 0.5 else content,
            )
            if way < 0.7
            else data
        )

    def _member(self, draw: random.Random, tame: tuple[int, ...] | None) -> bytes:
        if tame is not None and draw.random() < 0.9:
            kinds = (
                ("i8", "u1", ">i4", "i2")
                if len(tame) == 1
                else ("f4", "f8", "u1", ">f4", ">f8", "f2", "i4", "?")
            )
            out = io.BytesIO()
            np.save(
                out,
                np.array([draw.randrange(3) for _ in range(math.prod(tame))])
                .reshape(tame)
                .astype(draw.choice(kinds)),
            )
            return out.getvalue()
        n, shape = (
            draw.choice((0, 1, 3, 3, 3, 40)),
            draw.choice(((), (4,), (1, 3, 3), (3, 3, 3), (0,), (2, 2, 2, 2, 2))),
        )
        kind = draw.choice(
            (
                "f4",
                "f8",
                "u1",
                "i8",
                ">f4",
                ">i2",
                "f2",
                "?",
                "c8",
                "g",
                "O",
                "U3",
                "S2",
                "M8[s]",
                "u8",
                "V4",
                "(2,)f4",
                "i4,f4",
            )
        )
        array = (
            np.zeros((n, *shape), np.dtype(kind))
            if draw.random() < 0.9
            else np.zeros((), np.dtype(kind))
        )
        with contextlib.suppress(Exception):
            array = (
                np.array([draw.randrange(3) for _ in range(array.size)])
                .reshape(array.shape)
                .astype(kind)
            )
        out = io.BytesIO()
        if draw.random() < 0.6:
            with contextlib.suppress(Exception):
                np.save(out, array, allow_pickle=True)
                return out.getvalue()
        odd = [
            draw.choice((0, 1, 3, 2**20, 2**31, 2**62, 10**25, -1, True, 2.5))
            for _ in range(draw.randint(0, 40 if draw.random() < 0.1 else 3))
        ]
        text = repr(
            {
                "descr": draw.choice((array.dtype.str, "<f8", "|O", [("a", "<f4")], "x", 3)),
                "fortran_order": draw.choice((True, False, 1)),
                "shape": tuple(odd),
            }
        )
        text = draw.choice(
            (text, text, "(" * 3000, "{" + text, "9" * 9000, text.replace("'", '"') + "#")
        )
        version = draw.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
        size = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
        return (
            b"\x93NUMPY" + version + size + text.encode() + draw.randbytes(draw.choice((0, 96, 24)))
        )

    def read(self, path: Path) -> str:
        np.save(self.folder / "labels.npy", np.zeros(3, int))
        draw = random.Random(path.stat().st_size)
        x, y = load_data(
            str(path),
            draw.choice((None, str(self.folder / "labels.npy"), str(path))),
            draw.choice((None, 2)),
        )
        Problem.pose(Classifier(Any3()), x, y, Ball("linf", 0.1, box=None))
        return "read"


class Properties(Kind):
    """VNN-LIB, sometimes packed."""

    suffix = ".vnnlib"

    def make(self, draw: random.Random) -> bytes:
        self.wild = draw.choice((0.0, 0.0, 0.01, 0.1))
        n, k = draw.choice((1, 2, 5, 200)), draw.choice((1, 2, 5))
        lines = [f"(declare-const X_{i} Real)" for i in range(n)] + [
            f"(declare-const Y_{i} Real)" for i in range(k)
        ]
        lines += [
            f"(assert (>= X_{i} {self._number(draw, -1)}))\n(assert (<= X_{i} "
            f"{self._number(draw, 1)}))"
            for i in range(n)
        ]
        lines += [
            f"(assert {self._formula(draw, n, k, draw.choice((1, 2, 3, 4, 6)))})"
            for _ in range(draw.randint(1, 3))
        ]
        text = "\n".join(draw.sample(lines, len(lines)) if draw.random() < 0.05 else lines)
        if draw.random() < 0.1:
            text = text.replace(
                draw.choice("()-.0YX"), draw.choice(("(", ")", "((", "", "|", '"', ";", "9" * 2000))
            )
        if draw.random() < 0.07:
            text += draw.choice(
                (
                    "(assert ",
                    "(" * 10**5,
                    "(or " * 10**4 + "(<= Y_0 0)",
                    "(assert (<= (+ " + "(/ 1 97)" * 2000 + ") Y_0))",
                )
            )
        data = text.encode()
        data = mutated(draw, data) if draw.random() < 0.3 else data
        return gzip.compress(data) if draw.random() < 0.05 else data

    def _number(self, draw: random.Random, around: int = 0) -> str:
        if draw.random() >= self.wild:
            return f"{around + draw.random() * 0.5:.6f}"
        return draw.choice(
            (
                "1",
                "-1",
                "1e999",
                "1e-999",
                "nan",
                "9" * 900,
                f"0.{'3' * 900}",
                "(/ 1 3)",
                "1e99999",
                "0x10",
                "+.5",
                "-5.e-3",
            )
        )

    def _formula(self, draw: random.Random, n: int, k: int, depth: int) -> str:
        odd = draw.random() < self.wild
        if depth <= 0 or draw.random() < 0.2:
            return (
                f"({draw.choice(('=', '<', 'distinct') if odd else ('<=', '>='))} "
                f"{self._term(draw, n, k, 2)} {self._term(draw, n, k, 2)})"
            )
        parts = " ".join(
            self._formula(draw, n, k, depth - 1) for _ in range(draw.choice((1, 2, 3, 6)))
        )
        return f"({'not' if odd else draw.choice(('and', 'or'))} {parts})"

    def _term(self, draw: random.Random, n: int, k: int, depth: int) -> str:
        odd = draw.random() < self.wild
        if depth <= 0 or draw.random() < 0.5:
            return (
                draw.choice((f"X_{draw.randrange(n)}", f"Y_{k}"))
                if odd
                else draw.choice((f"Y_{draw.randrange(k)}", self._number(draw)))
            )
        if draw.random() < 0.3:
            return f"(* {self._number(draw)} {self._term(draw, n, k, depth - 1)})"
        parts = " ".join(self._term(draw, n, k, depth - 1) for _ in range(draw.choice((1, 2, 3))))
        return f"({draw.choice(('*', '/') if odd else ('+', '-'))} {parts})"

    def read(self, path: Path) -> str:
        if path.read_bytes()[:2] == b"\x1f\x8b":
            path = Path(shutil.copy(path, path.with_name("case.vnnlib.gz")))
        for query in load_vnnlib(path).queries[:5]:
            query.box(torch.float32)
            query.goal()
        return "read"


def _exported(folder: Path) -> list[bytes]:
    """Return a few small programs as torch writes them."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.table = (
                nn.Conv2d(1, 2, 3),
                nn.Linear(8, 3),
                [torch.eye(3)],
            )

        def forward(self, x: Tensor) -> Tensor:
            h, n = torch.relu(self.first(x)), x.shape[0]
            with torch.no_grad():
                top = h.abs().amax()
            return self.second(h.reshape(n, 8)) @ self.table[0] + top + torch.zeros(n, 1)

    found = []
    for module, shape in (
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (3, 4)),
        (Mixed(), (3, 1, 4, 4)),
    ):
        program = torch.export.export(
            module.eval(),
            (torch.rand(shape),),
            dynamic_shapes=({0: torch.export.Dim("batch", min=2)},),
        )
        torch.export.save(program, folder / "base.pt2")
        found.append((folder / "base.pt2").read_bytes())
    return found


class Marks:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Programs(Kind):
    """Exported programs, many of them with code in them."""

    suffix = ".pt2"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.base = _exported(folder)
        out = io.BytesIO()
        torch.save(((Marks(self.mark),), {}), out)
        self.pickle = out.getvalue()
        self.code = f"__import__('os').mkdir({str(self.mark)!r})"

    def make(self, draw: random.Random) -> bytes:
        data = draw.choice(self.base)
        if draw.random() < 0.15:
            return mutated(draw, data)
        evil, way = draw.random() < 0.5, draw.randrange(6)

        def edit(name: str, content: bytes) -> bytes:
            if name.endswith(".json"):
                told = rewritten(
                    draw,
                    json.loads(content),
                    draw.choice((0, 0, 0, 1, 2, 5))
                    if name.endswith("model.json") or not evil
                    else 0,
                )
                text = json.dumps(told)
                if evil and way in (0, 1):
                    text = text.replace('"use_pickle": false', '"use_pickle": true')
                if evil and way in (2, 3):
                    old = draw.choice(
                        (
                            "Symbol('s77', positive=True, integer=True)",
                            '"x"',
                            "s77",
                            '"relu"',
                            '"linear"',
                            '"p_1_weight"',
                        )
                    )
                    text = text.replace(
                        old, json.dumps(self.code) if old.startswith('"') else self.code
                    )
                if evil and way == 4:
                    text = text.replace(
                        '"guards_code": []', json.dumps({"guards_code": [self.code]})[1:-1]
                    )
                if evil and way == 5:
                    text = text.replace('"weight_0"', '"custom_obj_0"').replace(
                        '"tensor_0"', '"opaque_obj_0"'
                    )
                return text.encode() if draw.random() < 0.97 else mutated(draw, text.encode())
            if evil and ("sample_inputs" in name or (way in (1, 5) and name.endswith("_0"))):
                return self.pickle
            return mutated(draw, content, 2) if draw.random() < 0.02 else content

        return packed_again(draw, data, edit, draw.choice((0.0, 0.0, 0.1)))

    def read(self, path: Path) -> str:
        net = load(str(path))
        shape = getattr(net.module.program, "shape", ())  # type: ignore[union-attr]
        sizes = [n if isinstance(n, int) and n < 100 else 3 for n in shape]
        net.check(torch.rand(sizes or [3, 4]))
        return "read"


class Lists(Kind):
    """Lists of instances."""

    suffix = ".csv"

    def make(self, draw: random.Random) -> bytes:
        def cell() -> str:
            odd = (
                "net.onnx",
                "a.vnnlib",
                "",
                "5",
                "nan",
                "1e400",
                "-3",
                "x" * 300,
                "x" * 70_000,
                '"',
                "network",
                "property",
                "timeout",
                "\0",
                "../..",
                "/",
                "é\ud800"[:1],
            )
            return draw.choice(odd)

        rows = [
            ",".join(cell() for _ in range(draw.choice((0, 1, 2, 3, 3, 4))))
            for _ in range(draw.randint(0, 6))
        ]
        data = draw.choice(("\n", "\r\n", "\r")).join(rows).encode()
        return mutated(draw, data) if draw.random() < 0.5 else data

    def read(self, path: Path) -> str:
        load_instances(path)
        for _ in listed(path, timeout=1.0):
            pass
        return "read"


class Proofs(Kind):
    """Proof files: as bytes, as archives, and as claims whose lists, hashes and seal fit again."""

    suffix = ".npz"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(0)
        model = (
            nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
            .double()
            .eval()
        )
        x = torch.rand(12, 5, dtype=torch.float64)
        self.problem = Problem.pose(Classifier(model), x, model(x).argmax(1), Ball("linf", 0.05))
        tools: tuple[Any, ...] = (
            CROWN(proofs=True),
            BranchAndBound(seconds=2, steps=3, intermediate=2, proofs=True),
        )
        claims = [
            claim for tool in tools for claim in tool(self.problem) if isinstance(claim, Claim)
        ]
        self.base = [
            (i, data)
            for c in claims
            for i, data in zip(c.index.tolist(), c.proofs or (), strict=False)
            if data is not None
        ]
        self.asked: tuple[int, str] = (0, "")

    def make(self, draw: random.Random) -> bytes:
        i, data = draw.choice(self.base)
        header, arrays = contents(data)
        self.asked = i, header["claim"]
        way = draw.random()
        if way < 0.3:
            return mutated(draw, data)
        if way < 0.4:
            return packed_again(
                draw,
                data,
                lambda _, content: mutated(draw, content, 1) if draw.random() < 0.1 else content,
                0.3,
            )
        if draw.random() < 0.5:
            header = rewritten(draw, header, draw.choice((1, 1, 2, 4)))
        for name in draw.sample(sorted(arrays), min(len(arrays), draw.choice((0, 1, 1, 2)))):
            arrays[name] = self._changed(draw, arrays[name])
        with contextlib.suppress(Exception):
            header["arrays"] = {name: [v.dtype.str, list(v.shape)] for name, v in arrays.items()}
            header["model"] = checker.digest(header["network"], arrays)
            header["claim"] = checker.claimed(header, arrays)
        return sealed(header, arrays)

    def _changed(self, draw: random.Random, array: Any) -> Any:
        way, flat = draw.randrange(6), array.reshape(-1).copy()
        if way == 0 and len(flat):
            k = draw.randrange(len(flat))
            steps = (1, 3) if flat.dtype.kind in "iu" else (1e-3, -0.1, 1e6, math.nan, -math.inf)
            flat[k] = not flat[k] if flat.dtype == bool else flat[k] + draw.choice(steps)
            return flat.reshape(array.shape)
        if way == 1:
            return flat[: len(flat) // 2]
        if way == 2:
            return np.concatenate([array, array[:1]]) if array.ndim else array
        if way == 3:
            with np.errstate(all="ignore"):
                return array.astype(draw.choice(("f8", "i8", "u1", ">f4")))
        return array * 0 if way == 4 and flat.dtype != bool else flat[::-1].reshape(array.shape)

    def read(self, path: Path) -> str:
        data, (i, claim) = path.read_bytes(), self.asked
        if checker.main([str(path)]) not in (0, 1):
            return "traceback"
        verdict = checker.prove(data)
        if not verdict.proved:
            raise BadInput(verdict.reason)
        # The same numbers in another type have another hash; what the question is compared with are
        # the numbers.
        return (
            "altered"
            if checker.prove(data, claim).proved and differs(self.problem, i, data)
            else "read"
        )


class Records(Kind):
    """SQLite files, and what a report of them reads."""

    suffix = ".calipers"
    tables = tuple("question point run evidence chain meta model checked passed name".split())

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        torch.manual_seed(0)
        model = nn.Linear(4, 3).eval()
        x = torch.rand(6, 4)
        calipers.measure(
            model,
            x,
            model(x).argmax(1),
            Ball("linf", 0.1),
            plan="quick",
            record=folder / "base.calipers",
        ).ledger.close()
        with sqlite3.connect(folder / "base.calipers") as db:
            db.execute("pragma journal_mode = delete")
        db.close()
        self.base = (folder / "base.calipers").read_bytes()

    def make(self, draw: random.Random) -> bytes:
        if draw.random() < 0.4:
            return mutated(draw, self.base)
        path = self.folder / "edited.calipers"
        path.write_bytes(self.base)
        db = sqlite3.connect(path)
        with contextlib.suppress(sqlite3.DatabaseError), db:
            for _ in range(draw.randint(1, 3)):
                table = draw.choice(self.tables)
                columns = [row[1] for row in db.execute(f"pragma table_info({table})")]
                column = draw.choice(columns)
                old = db.execute(f"select {column} from {table} limit 1").fetchone()
                new: Any = draw.choice(
                    (None, 0, -1, 2**62, 1e400, "text", b"\x93NUMPY", "", "{}", "[]", "NaN", b"")
                )
                if old and isinstance(old[0], bytes):
                    new = draw.choice((new, mutated(draw, old[0]), old[0][:20]))
                if old and isinstance(old[0], str) and old[0].startswith("{"):
                    new = draw.choice((new, json.dumps(rewritten(draw, json.loads(old[0]), 2))))
                db.execute(
                    f"update {table} set {column} = ? where rowid in (select rowid from {table} "
                    f"limit {draw.choice((1, 100))})",
                    (new,),
                )
            if draw.random() < 0.1:
                db.execute(f"drop table {draw.choice(('question', 'point', 'evidence'))}")
        db.close()
        return path.read_bytes()

    def read(self, path: Path) -> str:
        with Record(path, read_only=True) as ledger, making_sense(ledger):
            render_text(ledger)
            render_html(ledger, self.folder / "page.html")
        return "read"


KINDS: dict[str, type[Kind]] = {
    "npz": Arrays,
    "vnnlib": Properties,
    "pt2": Programs,
    "proof": Proofs,
    "csv": Lists,
    "record": Records,
}


# ---- runs
# --------------------------------------------------------------------------------------------------


class _Hang(BaseException):
    """The CPU seconds of one file are over."""


def _hang(*_: object) -> None:
    raise _Hang


def outcome(kind: Kind, path: Path) -> tuple[str, str]:
    """Return what came of reading a file, and the words of what must not be."""
    signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    words = ""
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            found = kind.read(path)
    except CalipersError as error:
        found = "memory" if "alloc" in str(error) or "MemoryError" in str(error) else "refused"
        words = str(error)
    except MemoryError:
        found, words = "memory", traceback.format_exc()
    except _Hang:
        found, words = "hang", traceback.format_exc()
    except BaseException as error:
        found, words = (
            ("memory" if "can't allocate memory" in str(error) else "traceback"),
            traceback.format_exc(),
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if kind.mark.exists():
        kind.mark.rmdir()
        found, words = "code", words
    return found, words


def _child(kind: Kind, seed: int, begin: int, count: int, pipe: Any) -> None:
    """Read files from `begin` on, and tell of each."""
    with open("/proc/self/statm", encoding="ascii") as held:
        now = int(held.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, resource.RLIM_INFINITY))
    path = kind.folder / f"case{kind.suffix}"
    for i in range(begin, count):
        draw = random.Random(f"{seed} {i}")
        path.write_bytes(kind.make(draw))
        pipe.send(("ended", i, outcome(kind, path)))
    pipe.send(("done", count, ""))


def run(
    name: str, count: int, seed: int = 1, keep: Path | None = None
) -> tuple[Counter[str], list[str]]:
    """Return how often what came of the files of a kind, and the last line of each that must not
    be.
    """
    torch.set_num_threads(1)
    counts, told, begin = Counter[str](), list[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder))
        while begin < count:
            here, there = multiprocessing.Pipe(duplex=False)
            child = multiprocessing.get_context("fork").Process(
                target=_child, args=(kind, seed, begin, count, there)
            )
            child.start()
            there.close()
            word, died = "", ("hang", "no answer")
            with contextlib.suppress(EOFError):
                while word != "done" and here.poll(_PATIENCE):
                    died = ("crash", "the process died")
                    word, at, found = here.recv()
                    if word == "ended":
                        _count(found, at, kind, counts, told, keep)
                        begin = at + 1
                    died = ("hang", "no answer")
            if word != "done":
                _count(died, begin, kind, counts, told, keep)
                begin += 1
            begin = count if word == "done" else begin
            child.kill()
            child.join()
    return counts, told


def _count(
    found: tuple[str, str],
    at: int,
    kind: Kind,
    counts: Counter[str],
    told: list[str],
    keep: Path | None,
) -> None:
    what, words = found
    counts[what] += 1
    if what in GOOD:
        return
    told.append(f"{what} {at}: {words.strip().splitlines()[-1][:300] if words.strip() else ''}")
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{what}-{at}{kind.suffix}").write_bytes(
            (kind.folder / f"case{kind.suffix}").read_bytes()
        )
        (keep / f"{what}-{at}.txt").write_text(words)


def main() -> None:
    """Print the counts; exit with 1 where any file did what none may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    counts, told = run(options.kind, options.count, options.seed, options.keep)
    for line in told[:40]:
        print(line)
    print(
        f"{options.kind}, {options.count} files, seed {options.seed}: "
        + ", ".join(f"{n} {what}" for what, n in counts.most_common())
    )
    sys.exit(any(what not in GOOD for what in counts))


if __name__ == "__main__":
    main()
