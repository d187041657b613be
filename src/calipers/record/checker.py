"""Is a proof file true? Everything is proved again from its network and its point: `python checker.py proof.npz`. NumPy and the standard library only.

The file states a claim: no input of a threat set around `x` changes what a network of listed operations answers. Beside it the file holds choices: slopes of
lines, multipliers, weights, cuts, and which rows to sweep. Any choice is sound, since this program derives from it whatever has to be true: boxes by interval
arithmetic and backward sweeps, intercepts of lines from slopes, and that the cuts of all leaves leave no gap. It believes no bound of the file.

Bounds are computed in float64. A sum of n products errs by at most g(n) = nu / (1 - nu) times the sum of their sizes, u = 2^-53, in any order of summation
(Higham, Accuracy and Stability of Numerical Algorithms, ch. 3); coefficients that a sweep has computed count as chosen, so that the rounding of one operation
costs g(n) <|A|, |W||x| + |b|>. What is proved holds for the network in real arithmetic.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING or __package__:
    from calipers.record.checker_ops import TINY, Array, Leaf, Node, Rejected, Threat, covered, demand, g, gathered
else:  # run on its own
    from checker_ops import TINY, Array, Leaf, Node, Rejected, Threat, covered, demand, g, gathered

VERSION = 1
_PASSES = 8
_OWN = 64  # operations besides the long sums
_HELD = 2**21  # coefficients in flight


@dataclass(frozen=True)
class Verdict:
    """Was the claim proved? If not, `reason` says what failed. `claim` is the header; `rows` and `leaves` are what was swept."""

    proved: bool
    reason: str
    claim: dict[str, Any]
    rows: int = 0
    leaves: int = 0


# ---- the proof -------------------------------------------------------------------------------------------------------------------------------------


class Cuts(NamedTuple):
    """Where the leaves of a block are cut: row, number, element, ends and multiplier of each cut."""

    row: NDArray[Any]
    number: NDArray[Any]
    element: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]
    beta: NDArray[Any]

    def part(self, begin: int, end: int) -> Cuts:
        """Return the cuts of a run of rows."""
        mine = (self.row >= begin) & (self.row < end)
        return Cuts(self.row[mine] - begin, *(column[mine] for column in self[1:]))


class Proof:
    """A file, read and compared with its own header."""

    def __init__(self, data: bytes) -> None:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                files = {name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False) for name in archive.namelist()}
            self.header: dict[str, Any] = json.loads(bytes(files.pop("header")))
        except Exception as error:  # what a damaged archive raises has no common name
            raise Rejected(f"the file cannot be read ({type(error).__name__}: {error})") from error
        self.arrays, kind = files, tuple(self.header.get(name) for name in ("format", "version", "guarantee"))
        demand(kind == ("calipers-proof", VERSION, "float64-checked"), f"this checker proves calipers-proof, version {VERSION}, float64-checked, not {kind}")
        demand(self.header["arrays"] == {name: [v.dtype.str, list(v.shape)] for name, v in files.items()}, "the arrays are not those that the header lists")
        exact = [v.dtype.kind in "bf" or (v.dtype.kind in "iu" and (not v.size or int(abs(v).max()) <= 2**53)) for v in files.values()]
        demand(all(exact) and all(v.dtype.itemsize <= 8 for v in files.values()), "an array holds numbers that float64 would round")
        demand(all(b["pass"] in range(_PASSES) for b in self.header["blocks"]), f"a block stands in no pass from 0 to {_PASSES - 1}")
        demand(digest(self.header["network"], files) == self.header["model"], "the network is not the one that the header names: its hash differs")
        self._read_network()
        self._read_claim()

    def _read_network(self) -> None:
        shapes = [tuple(int(n) for n in self.header["network"]["input"])]
        self.nodes: list[Node] = []
        for k, facts in enumerate(self.header["network"]["nodes"], start=1):
            held = {name.removeprefix(f"net.{k}."): v for name, v in self.arrays.items() if name.startswith(f"net.{k}.")}
            self.nodes.append(Node(facts, held, shapes))
            shapes.append(self.nodes[-1].shape)
        self.sizes = [math.prod(shape) for shape in shapes]

    def _read_claim(self) -> None:
        x, k, goal = np.asarray(self.arrays["x"], np.float64).reshape(-1), self.sizes[-1], self.header["goal"]
        demand(x.size == self.sizes[0] and np.isfinite(x).all(), "the point is not an input of the network")
        self.threat = Threat(self.header["threat"], x, {n.removeprefix("threat."): v for n, v in self.arrays.items() if n.startswith("threat.")})
        if goal["kind"] == "linear":
            self.spec, self.offsets, self.cases = (np.asarray(self.arrays[name], t) for name, t in (("spec", float), ("offsets", float), ("cases", int)))
        else:
            chosen, eye = int(goal["class"]), np.eye(k)
            known = 0 <= chosen < k and k > 1 and goal["kind"] in ("untargeted", "targeted")
            demand(known, f"class {chosen} is none of the network's {k}, or the goal is unknown")
            away = goal["kind"] == "untargeted"
            self.spec, self.offsets = (eye[chosen] - np.delete(eye, chosen, 0)) * (1 if away else -1), np.zeros(k - 1)
            self.cases = np.arange(k - 1) * (1 if away else 0)
        count = len(self.spec)
        fits = count and self.spec.shape == (count, k) and self.offsets.shape == self.cases.shape == (count,)
        demand(fits, "the specification does not fit the network's outputs")
        whole = np.isfinite(self.spec).all() and np.isfinite(self.offsets).all() and set(self.cases.tolist()) == set(range(int(self.cases.max()) + 1))
        demand(whole, "the specification holds what is no number, or leaves a case out")


def digest(network: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str:
    """Return the name of a network: SHA-256 of its list of operations as JSON with sorted keys, then of each array's name, type, shape and bytes."""
    name = hashlib.sha256(json.dumps(network, sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(k for k in arrays if k.startswith("net.")):
        value = np.ascontiguousarray(arrays[key])
        name.update(f"{key}:{value.dtype.str}:{list(value.shape)}:".encode() + value.tobytes())
    return name.hexdigest()


class Prover:
    """The boxes proved so far, number by number, and the sweeps that narrow them."""

    def __init__(self, proof: Proof) -> None:
        self.proof, self.nodes, self.rows, self.leaves = proof, proof.nodes, 0, 0
        self.boxes: list[tuple[Array, Array]] = []
        self.lines: dict[int, tuple[Array, Array, Array, Array]] = {}
        self.reach: dict[int, Array] = {}

    def run(self) -> Verdict:
        """Go through the passes: every number's box, then the leaves; at last look for gaps between these."""
        blocks, leaves = self.proof.header["blocks"], {int(c): list[Leaf]() for c in self.proof.cases.tolist()}
        for turn in range(1 + max([int(b["pass"]) for b in blocks], default=0)):
            known, self.boxes, self.lines, self.reach = self.boxes, [], {}, {}
            mine = {j: b for j, b in enumerate(blocks) if b["pass"] == turn}
            for number in range(len(self.nodes) + 1):
                self._settle(number, turn, known[number] if known else None, [j for j, b in mine.items() if b["kind"] == "box" and b["number"] == number])
            for j in (j for j, b in mine.items() if b["kind"] == "leaf"):
                failed = self._leaves(j, leaves)
                if failed:
                    return self._verdict(failed)
        for case, held in leaves.items():
            if not covered(held):
                return self._verdict(f"case {case}: its {len(held)} leaves do not cover the whole threat set")
        return self._verdict("")

    def _verdict(self, failed: str) -> Verdict:
        return Verdict(not failed, failed, self.proof.header, self.rows, self.leaves)

    def _settle(self, number: int, turn: int, known: tuple[Array, Array] | None, blocks: list[int]) -> None:
        low, high = self._interval(number) if number else self.proof.threat.box()
        if known is not None:
            low, high = np.fmax(low, known[0]), np.fmin(high, known[1])
        self.boxes.append((np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)))
        for j in blocks:
            self._narrow(number, j)
        for k, node in enumerate(self.nodes, start=1):
            if node.inputs == [number] and node.kind in ("pieces", "curve"):
                low, high = self.boxes[number]
                slopes, place = np.full((2, low.size), np.nan), self._places(f"pass{turn}.{k}.place", node.size)
                for slope, name in zip(slopes, ("low", "high"), strict=True):
                    slope[place] = self.proof.arrays.get(f"pass{turn}.{k}.{name}", np.float64(np.nan))
                self.lines[k] = node.lines(low, high, *slopes)

    def _interval(self, number: int) -> tuple[Array, Array]:
        node = self.nodes[number - 1]
        boxes = [self.boxes[i] for i in node.inputs]
        if node.kind in ("pieces", "curve"):
            return node.range(*boxes[0])
        if node.kind == "largest":
            return self._members(node)[0].max(1), self._members(node)[1].max(1)
        middles = [(low + high) / 2 for low, high in boxes]
        radii = [np.maximum(high - c, c - low) for c, (low, high) in zip(middles, boxes, strict=True)]
        sizes = node.forward([self._size(i)[None] for i in node.inputs], True)[0] + np.abs(node.constant)
        self.reach[number] = sizes
        room = 4 * g(max(node.wide) + _OWN) * sizes + TINY
        middle, reach = node.forward([c[None] for c in middles], False)[0], node.forward([r[None] for r in radii], True)[0]
        return middle - reach - room, middle + reach + room

    def _members(self, node: Node) -> list[Array]:
        """Return both ends of each window's members; one past the end is minus infinity."""
        return [np.append(end, -np.inf)[node.held["windows"]] for end in self.boxes[node.inputs[0]]]

    def _size(self, number: int) -> Array:
        return np.maximum(np.abs(self.boxes[number][0]), np.abs(self.boxes[number][1]))

    def _places(self, name: str, size: int) -> NDArray[np.int64]:
        place = np.asarray(self.proof.arrays.get(name, np.zeros(0)), np.int64).reshape(-1)
        demand(((place >= 0) & (place < size)).all(), f"{name} points past the end of what it is about")
        return place

    def _narrow(self, number: int, j: int) -> None:
        """Sweep the rows of a block, each for one end of one element, and take what they prove."""
        low, high = (end.copy() for end in self.boxes[number])
        element, sign = self._places(f"b{j}.element", low.size), np.asarray(self.proof.arrays[f"b{j}.sign"], np.float64)
        demand(sign.shape == element.shape and (np.abs(sign) == 1).all(), f"block {j}: each row is about +1 or -1 times an element")
        for begin, end in self._shares(len(element)):
            a = np.zeros((end - begin, low.size))
            a[np.arange(end - begin), element[begin:end]] = sign[begin:end]
            bound = self._sweep(number, a, j, begin, _NO_CUTS)
            for ends, side, take in ((low, sign[begin:end] > 0, np.maximum), (high, sign[begin:end] < 0, np.minimum)):
                good = side & (bound > -np.inf)  # a NaN proves nothing
                take.at(ends, element[begin:end][good], (bound if take is np.maximum else -bound)[good])
        self.rows += len(element)
        self.boxes[number] = (low, high)

    def _shares(self, rows: int) -> list[tuple[int, int]]:
        step = max(1, _HELD // max(self.proof.sizes))
        return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]

    def _leaves(self, j: int, leaves: dict[int, list[Leaf]]) -> str:
        """Sweep a block of leaves; return what failed, and note which part of the threat set each proves for its case."""
        proof = self.proof
        case, weights, cuts = np.asarray(proof.arrays[f"b{j}.case"], int), np.asarray(proof.arrays[f"b{j}.weights"], np.float64), self._cuts(j)
        good = weights.shape == (len(case), len(proof.spec)) and (np.isfinite(weights) & (weights >= 0)).all() and set(case.tolist()) <= set(leaves)
        demand(good, f"block {j}: weights of directions are numbers of at least 0, one for each, and cases are those of the goal")
        demand(not (weights * (proof.cases != case[:, None])).any(), f"block {j}: a leaf weighs directions of another case")
        for begin, end in self._shares(len(case)):
            mine, w = cuts.part(begin, end), weights[begin:end]
            bound = self._sweep(len(self.nodes), w @ proof.spec, j, begin, mine) + w @ proof.offsets
            lost = (w @ np.abs(proof.spec)) @ self._size(len(self.nodes)) + w @ np.abs(proof.offsets) + np.abs(bound)
            good = bound - 2 * g(len(proof.spec) + 8) * lost > 0
            good[mine.row[self._empty(mine)]] = True  # nothing lies on both sides of a cut
            if not good.all():
                worst = begin + int(np.argmin(good))
                return f"leaf {worst} of block {j} (case {case[worst]}): its bound is {bound[worst - begin]:.6g}, not above 0"
        found = [Leaf() for _ in case]
        for row, number, element, low, high in zip(*(v.tolist() for v in (cuts.row, cuts.number, cuts.element, cuts.low, cuts.high)), strict=True):
            demand((number, element) not in found[row], f"block {j}: leaf {row} cuts one element twice")
            found[row][number, element] = (low, high)
        for c, leaf in zip(case.tolist(), found, strict=True):
            leaves[c].append(leaf)
        self.leaves += len(case)
        return ""

    def _cuts(self, j: int) -> Cuts:
        if f"b{j}.cut.row" not in self.proof.arrays:
            return _NO_CUTS
        types = {name: np.int64 if name in ("row", "number", "element") else np.float64 for name in Cuts._fields}
        cuts = Cuts(*(np.asarray(self.proof.arrays[f"b{j}.cut.{name}"], t) for name, t in types.items()))
        row, number, element, low, high, beta = cuts
        count = len(self.proof.arrays[f"b{j}.case"])
        fits = {v.shape for v in cuts} == {(len(row),)} and ((row >= 0) & (row < count) & (number >= 1) & (number <= len(self.nodes)) & (element >= 0)).all()
        demand(fits, f"block {j}: cuts that do not fit its leaves")
        real = (element < np.asarray(self.proof.sizes)[number]).all() and not np.isnan(low).any() and not np.isnan(high).any() and np.isfinite(beta).all()
        demand(real, f"block {j}: a cut of no element, or at no number")
        held = np.isfinite(np.where(beta > 0, low, np.where(beta < 0, high, 0.0))).all()
        demand(held, f"block {j}: a multiplier whose sign is that of no constraint of its leaf")
        return cuts

    def _empty(self, cuts: Cuts) -> NDArray[np.bool_]:
        low, high = (np.array([self.boxes[n][side][e] for n, e in zip(cuts.number, cuts.element, strict=True)]) for side in (0, 1))
        return np.asarray((cuts.low > cuts.high) | (cuts.low > high) | (cuts.high < low), bool)

    def _sweep(self, number: int, a: Array, j: int, begin: int, cuts: Cuts) -> Array:
        """Return lower bounds (R,) of <a, value of the number> over the threat set and the cuts; `begin` is the rows' place in their block."""
        pending, total, lost = {number: a}, np.zeros(len(a)), np.zeros(len(a))
        for k in range(number, 0, -1):
            if k not in pending:
                continue
            a, node = pending.pop(k), self.nodes[k - 1]
            held = cuts.number == k
            if held.any():  # beta (z - end) >= 0 in the branch
                row, beta = cuts.row[held], cuts.beta[held]
                ends = np.where(beta > 0, cuts.low[held], cuts.high[held])
                gain = np.where(beta == 0, 0.0, beta * np.where(beta == 0, 0.0, ends))
                a = a.copy()
                np.subtract.at(a, (row, cuts.element[held]), beta)
                np.add.at(total, row, gain)
                np.add.at(lost, row, g(len(self.nodes) + len(row) + 8) * np.abs(gain))
            lost += g(16) * (np.abs(a) @ self._size(k))
            allowed = g(node.size + max(node.wide) + 2 * len(self.nodes) + _OWN)
            if node.affine:
                gains, sizes, backs = a @ node.constant, np.abs(a) @ self.reach[k], node.back(a)
            elif node.kind == "largest":
                gains, sizes, backs = self._selected(node, a)
            else:
                gains, sizes, backs = self._bent(k, node, a, j, begin, cuts)
            total, lost = total + gains, lost + allowed * sizes
            for i, back in zip(node.inputs, backs, strict=True):
                pending[i] = pending[i] + back if i in pending else back
        threat = self.proof.threat
        if 0 not in pending:
            return np.asarray(total - (1 + 1e-6) * lost - TINY)
        a = pending[0]
        fall, middle, sizes = threat.fall(a), a @ threat.x, np.abs(a) @ np.abs(threat.x)
        lost += 2 * g(a.shape[1] + 2 * len(self.nodes) + _OWN) * (sizes + fall + np.abs(total))
        return np.asarray(total + middle - fall - (1 + 1e-6) * lost - TINY * (1 + sum(float(self._size(i).sum()) for i in range(number + 1))))

    def _bent(self, k: int, node: Node, a: Array, j: int, begin: int, cuts: Cuts) -> tuple[Array, Array, list[Array]]:
        """Go through a function of one number: lower lines where coefficients are positive, upper lines where they are negative."""
        low, low_at, high, high_at = (line[None] for line in self.lines[k])
        own = self._places(f"b{j}.{k}.place", node.size)
        if own.size:
            ends = [np.repeat(end[None], len(a), 0) for end in self.boxes[node.inputs[0]]]
            mine = cuts.number == node.inputs[0]
            for end, cut, take in zip(ends, (cuts.low, cuts.high), (np.maximum, np.minimum), strict=True):
                take.at(end, (cuts.row[mine], cuts.element[mine]), cut[mine])
            slopes = [self._rows(f"b{j}.{k}.{name}", begin, len(a), own.size) for name in ("low", "high")]
            lines = node.lines(ends[0][:, own], np.maximum(*ends)[:, own], *slopes)
            low, low_at, high, high_at = (np.repeat(line, len(a), 0) for line in (low, low_at, high, high_at))
            for whole, part in zip((low, low_at, high, high_at), lines, strict=True):
                whole[:, own] = part
        up, down = np.maximum(a, 0), np.minimum(a, 0)
        sizes = np.maximum(np.abs(low), np.abs(high)) * self._size(node.inputs[0]) + np.maximum(np.abs(low_at), np.abs(high_at))
        return (up * low_at + down * high_at).sum(1), (np.abs(a) * sizes).sum(1), [up * low + down * high]

    def _rows(self, name: str, begin: int, count: int, width: int) -> Array | None:
        values = self.proof.arrays.get(name)
        if values is None:
            return None
        demand(values.ndim == 2 and values.shape[1] == width and len(values) >= begin + count, f"{name} has not one slope for each row and element")
        return np.asarray(values[begin : begin + count], np.float64)

    def _selected(self, node: Node, a: Array) -> tuple[Array, Array, list[Array]]:
        """Go through the largest of each window: no less than its member of the largest lower end; no more than that one where it dominates, or a number."""
        windows, (lows, highs) = node.held["windows"], self._members(node)
        best = lows.argmax(1)[:, None]
        pick, ceiling = np.take_along_axis(windows, best, 1)[:, 0], highs.max(1)
        np.put_along_axis(highs, best, -np.inf, 1)
        open_above = np.minimum(a, 0) * ~(lows.max(1) >= highs.max(1))
        sizes = np.maximum(np.abs(ceiling), np.append(self._size(node.inputs[0]), 0.0)[pick])
        safe = np.where(open_above.any(0), ceiling, 0.0)
        return open_above @ safe, np.abs(a) @ sizes, [gathered(a - open_above, np.minimum(pick, node.wide[0] - 1), node.wide[0])]


_NOTHING = np.zeros(0, np.int64)
_NO_CUTS = Cuts(_NOTHING, _NOTHING, _NOTHING, np.zeros(0), np.zeros(0), np.zeros(0))


def prove(data: bytes) -> Verdict:
    """Return whether the claim of a proof file holds. Raises nothing: a file that makes no sense proves nothing."""
    try:
        with np.errstate(all="ignore"):
            return Prover(Proof(data)).run()
    except Rejected as error:
        return Verdict(False, str(error), {})
    except Exception as error:  # a header may lie about anything
        return Verdict(False, f"the file contradicts itself ({type(error).__name__}: {error})", {})


def statement(claim: dict[str, Any]) -> str:
    """Return the claim in words."""
    threat, goal = claim["threat"], claim["goal"]
    what = {"untargeted": "no class but {} wins", "targeted": "class {} does not win", "linear": "the linear specification holds"}[goal["kind"]]
    return f"{what.format(goal.get('class'))} within {threat['norm']} {threat['radius']:.9g} of the point, network {claim['model'][:12]}"


def main(paths: list[str]) -> int:
    """Print a line for each file; return 1 if any is not proved."""
    verdicts = [(path, prove(Path(path).read_bytes())) for path in paths]
    for path, verdict in verdicts:
        print(f"{path}: " + (f"proved: {statement(verdict.claim)} ({verdict.leaves} leaves)" if verdict.proved else f"NOT proved: {verdict.reason}"))
    return 0 if paths and all(verdict.proved for _, verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
