"""Does the independent checker prove every certificate again, and nothing that is false?"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beside import DATA, needs
from broken_checker import only_proved_by
from torch import Tensor, nn
from typer.testing import CliRunner

import calipers
from calipers.certificates.alpha_crown import AlphaCROWN
from calipers.certificates.branch_and_bound import BranchAndBound
from calipers.certificates.crown import CROWN, IBP
from calipers.certificates.proof_writer import differs
from calipers.certificates.radius import CertifiedRadius
from calipers.cli import app
from calipers.errors import UnsupportedOp
from calipers.graph.capture import graph_of
from calipers.graph.serialise import described
from calipers.graph.smooth_table import TANH
from calipers.problem.goals import Targeted
from calipers.problem.problem import Problem
from calipers.problem.protocols import Certifier, Claim
from calipers.problem.specification import Specification
from calipers.record import checker
from calipers.record.checker import Proof, Threat, covered, prove
from calipers.record.proofs import about, contents, packed, sealed
from calipers.threats.ball import Ball

INF = float("inf")
RADII = {"linf": 0.08, "l2": 0.25, "l1": 0.5}
TOOLS: tuple[Certifier, ...] = (
    CROWN(proofs=True),
    AlphaCROWN(steps=8, intermediate=4, proofs=True),
    BranchAndBound(seconds=3, steps=6, intermediate=4, proofs=True),
)

# ---- small networks
# --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two branches that meet, an absolute value, a permutation that has no description of its
    own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        both = (h - self.second(h)).abs()
        return self.last(torch.relu(both.flip(1) - 0.1))


def network(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    match kind:
        case "dense":
            return nn.Sequential(
                nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 10), nn.LeakyReLU(0.1), nn.Linear(10, 4)
            ), (5,)
        case "conv":
            layers = [
                nn.Conv2d(2, 4, 3, stride=2, padding=1),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 4, 2, dilation=2, padding=1, groups=2),
                nn.ReLU(),
            ]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)), (2, 6, 6)
        case "pool":
            layers = [
                nn.Conv2d(1, 3, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(3, 2, 1),
                nn.Conv2d(3, 3, 2),
                nn.Hardtanh(),
                nn.AvgPool2d(2),
                nn.Flatten(),
            ]
            return nn.Sequential(*layers, nn.Linear(3, 3)), (1, 6, 6)
        case "smooth":
            return nn.Sequential(
                nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 3)
            ), (4,)
        case "one-dimensional":
            return nn.Sequential(
                nn.Conv1d(2, 3, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(9, 6),
                nn.ReLU(),
                nn.Linear(6, 3),
            ), (2, 6)
    return Residual(), (6,)


KINDS = ("dense", "conv", "pool", "smooth", "one-dimensional", "residual")


def posed(
    kind: str, seed: int, norm: str, share: float = 1.0, points: int = 3, **threat: Any
) -> Problem:
    """Return random points that a random network gets right, at a radius of `share` times the
    usual.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module, shape = network(kind)
        x = torch.rand(points, *shape)
        with torch.no_grad():
            for p in module.parameters():
                p *= 1.8
    module.eval()
    return Problem.pose(module, x, module(x).argmax(1), Ball(norm, RADII[norm] * share, **threat))


def claims(tool: Certifier, problem: Problem) -> Iterator[tuple[int, float, bytes]]:
    """Yield place, radius and proof of every claim."""
    for claim in tool(problem):
        if isinstance(claim, Claim):
            assert claim.proofs is not None and len(claim.proofs) == len(claim.index)
            for i, radius, data in zip(
                claim.index.tolist(), claim.radius.tolist(), claim.proofs, strict=True
            ):
                assert (data is not None) == (radius > 0)
                if data is not None:
                    yield i, radius, data


def reproved(problem: Problem) -> list[int]:
    """Prove every claim of every tool again; return the numbers of leaves."""
    leaves = []
    for tool in TOOLS:
        for i, radius, data in claims(tool, problem):
            verdict = prove(data)
            assert verdict.proved, f"point {i}, {tool}, radius {radius}: {verdict.reason}"
            assert (
                verdict.claim["tool"] == repr(tool)
                and verdict.claim["threat"]["radius"] == radius
                and not differs(problem, i, data)
            )
            leaves.append(verdict.leaves)
    return leaves


# ---- whatever the tools prove, the checker proves
# --------------------------------------------------------------------------------------------------


@pytest.mark.one_in(2)
@pytest.mark.parametrize("norm", tuple(RADII))
@pytest.mark.parametrize("kind", KINDS)
def test_every_certificate_is_proved_again(kind: str, norm: str) -> None:
    assert (
        sum(len(reproved(posed(kind, seed, norm, share))) for seed, share in ((1, 0.5), (2, 1.5)))
        > 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("norm", tuple(RADII))
@pytest.mark.parametrize("kind", KINDS)
def test_every_certificate_of_many_networks_is_proved_again(
    kind: str, norm: str, seed: int
) -> None:
    reproved(posed(kind, 100 + seed, norm, (0.3, 1.0, 2.5)[seed % 3], points=4))


def witnessed(problem: Problem, i: int) -> float:
    """Return the distance of the nearest of some random inputs that are of another class; infinity
    where all are of one.
    """
    other = torch.rand(3000, *problem.x.shape[1:], generator=torch.Generator().manual_seed(i))
    wrong = other[problem.classifier.logits(other).argmax(1) != problem.y[i]]
    return float(problem.region.take([i] * len(wrong)).distance(wrong).min()) if len(wrong) else INF


@pytest.mark.one_in(3)
@pytest.mark.parametrize("norm", tuple(RADII))
@pytest.mark.parametrize("kind", KINDS)
def test_certificates_of_intervals_and_of_searches_are_proved_again(kind: str, norm: str) -> None:
    seen = set()
    for tool, share in (
        (IBP(proofs=True), 0.02),
        (CertifiedRadius(CROWN(), proofs=True), 1.0),
        (CertifiedRadius(IBP(), proofs=True), 0.1),
    ):
        problem = posed(kind, 1, norm, share)
        for i, radius, data in claims(tool, problem):
            asked = problem.take([i]).at(torch.tensor([radius], dtype=torch.float64))
            verdict, far = prove(data), witnessed(problem, i)
            larger = rewritten(data, lambda header, _, far=far: header["threat"].update(radius=far))
            assert verdict.proved, f"point {i}, {tool}, radius {radius}: {verdict.reason}"
            assert verdict.claim["threat"]["radius"] == radius < far and not differs(asked, 0, data)
            assert "threat" in differs(asked, 0, larger) and not prove(larger).proved
            seen.add(str(tool))
    assert len(seen) == 3


@pytest.mark.parametrize("norm", tuple(RADII))
def test_masks_weights_and_missing_boxes_are_kept(norm: str) -> None:
    mask, weights = (
        torch.tensor([True, False, True, True, True]),
        torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0]),
    )
    assert reproved(
        posed(
            "dense",
            3,
            norm,
            mask=mask,
            weights=weights,
            box=(torch.zeros(5), torch.full((5,), 1.5)),
        )
    )
    assert reproved(posed("dense", 4, norm, 0.2, box=None))


def test_other_goals_are_proved_again() -> None:
    problem = posed("dense", 5, "linf")
    targeted = Problem.pose(
        problem.classifier, problem.x, problem.y, problem.threat, Targeted((problem.y + 1) % 4)
    )
    assert reproved(targeted)
    logits = problem.classifier.logits(problem.x)
    wide = Specification(
        torch.eye(4)[:3], (1 - logits.amin()).expand(3).clone(), torch.tensor([0, 0, 1])
    )
    assert reproved(Problem.pose(problem.classifier, problem.x, problem.y, problem.threat, wide))


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_of_the_file_is_the_model(kind: str) -> None:
    problem = posed(kind, 6, "linf", 0.01)
    _, _, data = next(claims(TOOLS[0], problem))
    proof = Proof(data)
    for x, logits in zip(problem.x.double(), problem.classifier.logits64(problem.x), strict=True):
        values = [x.numpy().reshape(1, -1)]
        for node in proof.nodes:
            inputs = [values[i] for i in node.inputs]
            if node.kind == "largest":
                values.append(np.append(inputs[0][0], -np.inf)[node.held["windows"]].max(1)[None])
            else:
                made = (
                    (
                        forward(v, np.asarray)
                        for (forward, _), v in zip(node.maps, inputs, strict=True)
                    )
                    if node.affine
                    else None
                )
                values.append(
                    node.function.value(inputs[0]) if made is None else sum(made) + node.constant
                )
        np.testing.assert_allclose(values[-1][0], logits.numpy(), rtol=1e-9, atol=1e-9)
    assert graph_of(problem.classifier, problem.x).nodes[0].shape == proof.nodes[0].shape


def test_intervals_that_prove_more_than_adaptive_slopes_are_proved_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # max(h, 0) + 0.05 for h from -0.4 to 1: not negative for an interval, while the line h below it
    # falls to -0.35.
    module = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        for p, values in zip(
            module.parameters(), ([[1.4]], [-0.4], [[1.0], [0.0]], [0.05, 0.0]), strict=True
        ):
            p.copy_(torch.tensor(values))
    problem = Problem.pose(module, torch.tensor([[0.5]]), torch.tensor([0]), Ball("linf", 0.5))
    assert not list(claims(CROWN(proofs=True), problem))
    ((_, _, data),) = claims(IBP(proofs=True), problem)
    assert prove(data).proved
    monkeypatch.setattr("calipers.certificates.crown.level", lambda state: state)
    ((_, _, data),) = claims(IBP(proofs=True), problem)
    assert not prove(data).proved


def test_what_cannot_be_written_is_refused() -> None:
    problem = posed("smooth", 1, "linf")
    graph = graph_of(problem.classifier, problem.x)
    strange = dataclasses.replace(TANH, name="a curve of one's own")
    nodes = tuple(dataclasses.replace(n, op=strange) if n.op is TANH else n for n in graph.nodes)
    with pytest.raises(UnsupportedOp, match="proof file"):
        described(dataclasses.replace(graph, nodes=nodes))


def test_the_same_proof_has_the_same_bytes() -> None:
    first, second = (next(claims(TOOLS[1], posed("dense", 1, "linf", 0.5)))[2] for _ in range(2))
    assert first == second


# ---- and nothing that is false
# --------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any], dict[str, Any]], None]


def rewritten(data: bytes, change: Change, *, listed: bool = True, hashed: bool = True) -> bytes:
    """Return the file with its header and arrays changed, its own lists of them brought up to date
    unless told not to.
    """
    header, arrays = contents(data)
    arrays = {name: value.copy() for name, value in arrays.items()}
    change(header, arrays)
    if listed:
        header["arrays"] = {
            name: [value.dtype.str, list(value.shape)] for name, value in arrays.items()
        }
    if hashed:
        header["model"] = checker.digest(header["network"], arrays)
        header["claim"] = checker.claimed(header, arrays)
    return sealed(header, arrays)


def branched() -> tuple[Problem, int, bytes]:
    """Return a problem, a point and its proof of several leaves."""
    for seed in range(40):
        problem = posed("dense", seed, "linf", 2.0, points=4)
        for i, _, data in claims(
            BranchAndBound(seconds=3, steps=3, intermediate=0, proofs=True), problem
        ):
            if ".cut" in " ".join(contents(data)[1]) and prove(data).leaves > 6:
                return problem, i, data
    raise AssertionError("no point needs branches")


@pytest.fixture(scope="module")
def tree() -> tuple[Problem, int, bytes]:
    return branched()


def cuts(arrays: dict[str, Any], column: str) -> list[str]:
    """Return the arrays of cuts that hold this column."""
    return [name for name in arrays if ".cut" in name and name.endswith(f".{column}")]


def beyond(problem: Problem, i: int) -> float:
    """Return the distance of an input of another class: no radius from there on can be
    certified.
    """
    generator = torch.Generator().manual_seed(0)
    other = torch.rand(4000, *problem.x.shape[1:], generator=generator)
    near = torch.cat([problem.x[i] + t * (other - problem.x[i]) for t in (0.2, 0.4, 0.6, 0.8, 1.0)])
    near = near[problem.classifier.logits(near).argmax(1) != problem.y[i]]
    return float(problem.region.take([i] * len(near)).distance(near).min())


def falsehoods(problem: Problem, i: int) -> dict[str, Change]:
    """Return changes after which the claim is false, or does not follow."""
    far, wrong = beyond(problem, i), (int(problem.y[i]) + 1) % 4
    x = problem.x[i].numpy()

    def radius(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        header["threat"]["radius"] = far

    def both(other: Change) -> Change:
        def change(header: dict[str, Any], arrays: dict[str, Any]) -> None:
            other(header, arrays)
            radius(header, arrays)

        return change

    def bias(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        last = f"net.{len(header['network']['nodes'])}.bias"
        arrays[last][wrong] += 100

    def point(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(1)
        other = torch.rand(4000, 5, generator=generator)
        arrays["x"] = (
            other[problem.classifier.logits(other).argmax(1) != problem.y[i]][0]
            .numpy()
            .astype(x.dtype)
        )

    def label(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        header["goal"]["class"] = wrong

    def target(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        header["goal"] = {"kind": "targeted", "class": int(problem.y[i])}

    def norm(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        header["threat"] = {"norm": "l0", "radius": 5.0}

    def guarantee(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        header["guarantee"] = "float32-executed"

    def slopes(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        for name in arrays:
            if name.endswith((".low", ".high")) and "cut" not in name and "threat" not in name:
                arrays[name] = np.full(arrays[name].shape, 7.0)

    def rows(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        for name in arrays:
            if name.endswith(".element") and "cut" not in name:
                arrays[name] = arrays[name][::-1]

    def weights(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        for name in (n for n in arrays if n.startswith("b") and n.endswith(".weights")):
            arrays[name] = -np.asarray(arrays[name], float)

    plain = {
        "weight": bias,
        "point": point,
        "label": label,
        "target": target,
        "norm": norm,
        "guarantee": guarantee,
        "radius": radius,
        "weights": weights,
    }
    return plain | {"slopes": both(slopes), "rows": both(rows)}


def test_a_false_claim_is_never_proved(tree: tuple[Problem, int, bytes]) -> None:
    problem, i, data = tree
    assert prove(data).proved
    for name, change in falsehoods(problem, i).items():
        assert not prove(rewritten(data, change)).proved, name
        assert differs(problem, i, rewritten(data, change)) or name in ("guarantee", "weights"), (
            name
        )


def test_bad_choices_change_no_truth(tree: tuple[Problem, int, bytes]) -> None:
    # Slopes that no tool would choose are as sound as any.
    data = tree[2]

    def wild(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        name = next(
            n for n in arrays if n.endswith(".low") and n.startswith("b") and "cut" not in n
        )
        arrays[name] = arrays[name].astype(float) + 1e-7

    assert prove(rewritten(data, wild)).proved


def test_a_changed_network_is_not_the_one_that_was_named(tree: tuple[Problem, int, bytes]) -> None:
    def weight(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays["net.1.weight"][0, 0] += np.float32(1e-6)

    assert "hash" in prove(rewritten(tree[2], weight, hashed=False)).reason


def test_every_leaf_is_needed(tree: tuple[Problem, int, bytes]) -> None:
    _, arrays = contents(tree[2])
    for block in {name.split(".")[0] for name in cuts(arrays, "low")}:
        for leaf in range(len(arrays[f"{block}.case"])):

            def remove(
                header: dict[str, Any], held: dict[str, Any], block: str = block, leaf: int = leaf
            ) -> None:
                for name in [
                    n for n in held if n.startswith(f"{block}.") and not n.endswith(".place")
                ]:
                    held[name] = np.delete(held[name], leaf, 0)

            assert "cover" in prove(rewritten(tree[2], remove)).reason


def test_a_moved_cut_leaves_a_gap(tree: tuple[Problem, int, bytes]) -> None:
    def move(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        for name in cuts(arrays, "low"):
            ends = arrays[name].astype(float)
            ends.reshape(-1)[np.flatnonzero(np.isfinite(ends))[:1]] += 1e-3
            arrays[name], high = ends, name.replace("low", "high")
            arrays[high] = np.maximum(arrays[high].astype(float), ends)

    assert not prove(rewritten(tree[2], move)).proved


def test_a_multiplier_of_the_wrong_sign_is_rejected(tree: tuple[Problem, int, bytes]) -> None:
    def flip(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        for name in cuts(arrays, "beta"):
            arrays[name] = -arrays[name].astype(float) + np.where(
                np.isfinite(arrays[name.replace("beta", "low")].astype(float)), -1, 1
            )

    assert "multiplier" in prove(rewritten(tree[2], flip)).reason


def test_a_cut_named_twice_is_rejected(tree: tuple[Problem, int, bytes]) -> None:
    def twice(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        for name in [
            n for column in ("place", "low", "high", "beta") for n in cuts(arrays, column)
        ]:
            arrays[name] = np.concatenate([arrays[name], arrays[name]], -1)

    assert "twice" in prove(rewritten(tree[2], twice)).reason


def test_a_header_that_does_not_match_is_rejected(tree: tuple[Problem, int, bytes]) -> None:
    def drop(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        del arrays[cuts(arrays, "beta")[0]]

    def reshape(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays["x"] = arrays["x"][:-1]

    assert "header" in prove(rewritten(tree[2], drop, listed=False)).reason
    assert not prove(rewritten(tree[2], drop)).proved
    assert not prove(rewritten(tree[2], reshape)).proved


def test_numbers_that_would_be_rounded_are_rejected(tree: tuple[Problem, int, bytes]) -> None:
    def longer(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays["x"] = arrays["x"].astype(np.longdouble)

    assert "round" in prove(rewritten(tree[2], longer)).reason


def test_damaged_files_prove_nothing(tree: tuple[Problem, int, bytes]) -> None:
    data, draw = tree[2], np.random.Generator(np.random.PCG64(0))
    for end in [0, 1, 100, *draw.integers(0, len(data), 20).tolist()]:
        assert not prove(data[:end]).proved
    assert not any(
        prove(flipped(data, place, 1 << int(draw.integers(8)))).proved for place in range(len(data))
    )


def flipped(data: bytes, place: int, bits: int) -> bytes:
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def test_without_its_seal_a_file_can_be_changed_unnoticed(tree: tuple[Problem, int, bytes]) -> None:
    """In places of an archive that nobody reads: the seal is what notices."""
    unsealed = {"demand(data[-SEAL:] == seal(data),": "demand(True,"}
    place = tree[2].find(b"PK\x03\x04") + 10  # the time of its first member
    assert only_proved_by(unsealed, flipped(tree[2], place, 1))


def altered(data: bytes) -> dict[str, bytes]:
    """Return files of other claims than the one that was made, every list and hash in them brought
    up to date: nothing of them is false.
    """

    def point(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays["x"] = np.nextafter(arrays["x"], np.float32(1))

    def radius(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        header["threat"]["radius"] *= 0.5

    def norm(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        header["threat"] |= {"norm": "l1", "radius": header["threat"]["radius"] * 0.5}

    def box(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays |= {
            "threat.low": arrays["x"].astype(np.float64) - 1e-3,
            "threat.high": arrays["x"].astype(np.float64) + 1e-3,
        }

    def mask(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays["threat.mask"] = np.zeros(arrays["x"].shape, bool)

    def goal(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        k, chosen = header["network"]["nodes"][-1]["shape"][-1], header["goal"]["class"]
        header["goal"] = {"kind": "targeted", "class": (chosen + 1) % k}

    return {
        change.__name__: rewritten(data, change)
        for change in (point, radius, norm, box, mask, goal)
    }


def test_another_claim_is_not_the_one_that_was_asked_for(tree: tuple[Problem, int, bytes]) -> None:
    """Though it may be proved: it has another hash, and differs from the problem at hand."""
    problem, i, data = tree
    asked = prove(data).claim["claim"]
    assert (
        prove(data, asked).proved
        and prove(data, asked[:16]).proved
        and prove(data, model=prove(data).claim["model"]).proved
    )
    assert not prove(data, model="0" * 64).proved
    others = altered(data)
    for name, other in others.items():
        verdict = prove(other, asked)
        assert not verdict.proved and differs(problem, i, other), name
        assert "another claim" in verdict.reason or not prove(other).proved, name
    # of which the hash alone tells
    assert sum(prove(other).proved for other in others.values()) >= 4


def test_what_a_claim_is_made_of_has_all_of_it_in_its_hash(
    tree: tuple[Problem, int, bytes],
) -> None:
    header, arrays = contents(tree[2])
    first = checker.claimed(header, arrays)
    for name in header["network"], header["threat"], header["goal"]:
        name["more"] = 1
        assert checker.claimed(header, arrays) != first
        del name["more"]
    for name in [name for name in arrays if name.startswith(("net.", "threat.")) or name == "x"]:
        changed = {
            **arrays,
            name: np.roll(arrays[name].reshape(-1), 1).reshape(arrays[name].shape)
            + (arrays[name].size == 1),
        }
        assert checker.claimed(header, changed) != first or (changed[name] == arrays[name]).all(), (
            name
        )


def test_a_file_of_an_older_format_is_asked_for_again(tree: tuple[Problem, int, bytes]) -> None:
    def older(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        header["version"] = 2

    assert "write it again" in prove(rewritten(tree[2], older)).reason
    assert "write it again" in prove(tree[2][: -checker.SEAL] + bytes(checker.SEAL)).reason


def test_a_proof_says_what_it_is_about_but_that_proves_nothing(
    tree: tuple[Problem, int, bytes],
) -> None:
    named = about(tree[2], network="net.onnx", property="spec\x1b[2J.vnnlib")
    verdict = prove(named)
    assert verdict.proved and verdict.claim["claim"] == prove(tree[2]).claim["claim"]
    assert r"network net.onnx, property spec\x1b[2J.vnnlib" in checker.said(verdict)


@pytest.mark.parametrize("norm", tuple(RADII))
@pytest.mark.parametrize("kind", KINDS)
def test_no_radius_above_a_witness_is_proved(kind: str, norm: str) -> None:
    problem = posed(kind, 7, norm, 0.1, points=2)
    for i, _, data in claims(TOOLS[1], problem):
        far = witnessed(problem, i)
        if far == INF:
            continue

        def enlarge(header: dict[str, Any], arrays: dict[str, Any], far: float = far) -> None:
            header["threat"]["radius"] = far

        assert not prove(rewritten(data, enlarge)).proved


# ---- the checker's own rules
# --------------------------------------------------------------------------------------------------


def by_hand(margin: list[dict[str, Any]], arrays: dict[str, Any], leaves: dict[str, Any]) -> bytes:
    """Return a file about x in [-1, 1] and the margin that these operations end in, with one block
    of leaves.
    """
    claim = {
        "network": {"input": [1], "nodes": margin},
        "threat": {"norm": "linf", "radius": 1.0},
        "goal": {"kind": "linear"},
        "tool": "by hand",
    }
    held = {
        "x": np.zeros(1),
        "spec": np.ones((1, 1)),
        "offsets": np.zeros(1),
        "cases": np.zeros(1, int),
    }
    return packed(
        {**claim, "blocks": [{"pass": 0, "kind": "leaf"}]},
        {**held, **arrays, **{f"b0.{name}": value for name, value in leaves.items()}},
    )


def _linear(inputs: int) -> dict[str, Any]:
    return {"op": "linear", "inputs": [inputs], "shape": [1]}


def _cut(low: list[float], high: list[float], beta: list[float]) -> dict[str, Any]:
    """Return cuts of the one element of number 1."""
    columns = {"low": low, "high": high, "beta": beta}
    return {
        "cut1.place": np.zeros(1, int),
        **{f"cut1.{name}": np.array(values, float)[:, None] for name, values in columns.items()},
    }


def _leaves(count: int) -> dict[str, Any]:
    return {"case": np.zeros(count, int), "weights": np.ones((count, 1))}


SLANTED = {
    "net.1.weight": np.ones((1, 1)),
    "net.2.weight": np.ones((1, 1)),
    "net.2.bias": np.array([0.5]),
}
"""x + 0.5, which is negative at -1: no claim about it is true."""
BETA = by_hand(
    [_linear(0), _linear(1)], SLANTED, {**_leaves(2), **_cut([0, -INF], [INF, 0], [1, -1])}
)
HALF = by_hand([_linear(0), _linear(1)], SLANTED, {**_leaves(1), **_cut([0], [INF], [1])})
WRONG_SIDE = by_hand(
    [_linear(0), _linear(1)], SLANTED, {**_leaves(2), **_cut([0, -INF], [INF, 0], [1, 1])}
)


def _curve(name: str, *parameters: float) -> dict[str, Any]:
    return {
        "op": "function",
        "function": name,
        "parameters": list(parameters),
        "inputs": [1],
        "shape": [1],
    }


def _after(node: dict[str, Any], weight: float, bias: float, scale: float = 1.0) -> bytes:
    """Return a file about weight * f(scale * x) + bias."""
    held = {
        "net.1.weight": np.full((1, 1), scale),
        "net.3.weight": np.full((1, 1), weight),
        "net.3.bias": np.array([bias]),
    }
    return by_hand([_linear(0), node, _linear(2)], held, _leaves(1))


TENT = _after(_curve("two pieces", 0.0, 1.0), -1.0, 0.6)
"""0.6 - max(x, 0), negative at 1."""
VALLEY = _after(_curve("gelu"), 1.0, 0.165)
"""gelu(x) + 0.165, negative at the bottom of the valley at -0.75, not at the ends."""
MUTANTS: dict[str, tuple[dict[str, str], bytes]] = {
    "beta without its sign": ({"a[:, place] -= beta": "a[:, place] -= np.abs(beta)"}, BETA),
    "beta of either sign": (
        {
            "demand(np.isfinite(np.where(beta > 0, low": "demand(True or "
            "np.isfinite(np.where(beta > 0, low",
            "gain, a = beta * np.where(beta > 0, low": "gain, a = beta * "
            "np.where(np.isfinite(low), low",
        },
        WRONG_SIDE,
    ),
    "no intercepts": (
        {"return dot(up, low_at) + dot(down, high_at)": "return 0 * dot(up, low_at)"},
        TENT,
    ),
    "no upper lines": ({"u * low[n] + d * high[n]": "u * low[n]"}, TENT),
    "no look for gaps": ({"if covered(low, high,": "if True or covered(low, high,"}, HALF),
    "no threat set": ({"total + a @ x - fall": "total + a @ x"}, TENT),
    "constants counted twice": (
        {
            "gains, sizes, backs = (a @ node.constant": "gains, sizes, backs = (2 * a @ node.constant"
        },
        TENT,
    ),
    "intercept of the kink": ({"for t in corners], 0)": "for t in corners[2:]], 0)"}, TENT),
    "one side is enough": (
        {"((low <= begin) & (high >= end)).all(1)": "((low <= begin) | (high >= end)).all(1)"},
        HALF,
    ),
    "curvature forgotten": (
        {"(b - a) ** 2 / 8": "(b - a) ** 2 * 0", "np.arange(32) / 32": "np.arange(32) * 0"},
        VALLEY,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_checker_proves_what_is_false(name: str) -> None:
    assert only_proved_by(*MUTANTS[name])


def random_tree(draw: np.random.Generator, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends (P, 4) of the leaves of random splits of a box from -1 to 1, of which two
    sides have no end.
    """
    leaves = [(np.array([-1.0, -1.0, -INF, -INF]), np.array([1.0, 1.0, INF, INF]))]
    for _ in range(depth):
        low, high = leaves.pop(int(draw.integers(len(leaves))))
        key = int(draw.integers(4))
        value = float(draw.uniform(max(low[key], -1), min(high[key], 1)))
        below, above = high.copy(), low.copy()
        below[key] = above[key] = value
        leaves += [(low, below), (above, high)]
    order = draw.permutation(len(leaves))
    return tuple(np.array([leaf[side] for leaf in leaves])[order] for side in (0, 1))  # type: ignore[return-value]


def test_leaves_of_any_tree_cover_and_fewer_do_not() -> None:
    draw, box = (
        np.random.Generator(np.random.PCG64(1)),
        (np.array([-1.0, -1.0, -INF, -INF]), np.array([1.0, 1.0, INF, INF])),
    )
    for depth in range(1, 40):
        low, high = random_tree(draw, depth)
        assert covered(low, high, *box)
        assert covered(np.repeat(low, 2, 0), np.repeat(high, 2, 0), *box)
        for k in range(len(low)):
            assert not covered(np.delete(low, k, 0), np.delete(high, k, 0), *box)
            moved = high.copy()
            moved[k] -= np.where(np.isfinite(moved[k]), 1e-9, 0)
            assert covered(low, moved, *box) == (not np.isfinite(high[k]).any())
    assert not covered(low[:0], high[:0], *box)


@pytest.mark.parametrize("norm", tuple(RADII))
def test_linear_functions_fall_as_far_as_the_threat_allows(norm: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, a = (
        torch.rand(1, 7, generator=generator).double(),
        torch.randn(50, 7, generator=generator).double(),
    )
    mask, weights = (
        torch.tensor([True] * 6 + [False]),
        torch.rand(7, generator=generator).double() + 0.5,
    )
    for radius in (0.0, 0.05, 0.4, 3.0):
        ball = Ball(norm, radius, mask=mask, weights=weights)
        arrays = {
            "low": np.zeros(7),
            "high": np.ones(7),
            "mask": mask.numpy(),
            "weights": weights.numpy(),
        }
        threat = Threat({"norm": norm, "radius": radius}, x[0].numpy(), arrays)
        fall = threat.fall(
            a.numpy(), threat.box[0] - x.numpy(), threat.box[1] - x.numpy(), whole=True
        )
        best = ball.region(x.expand(50, -1)).support(-a)
        exact = (best.value + (a * x).sum(1)).numpy()
        attained = ((x - best.point) * a).sum(1).numpy()
        assert (fall >= attained - 1e-12).all()
        np.testing.assert_allclose(fall, exact, rtol=1e-9, atol=1e-9)


# ---- as a program, and in a record
# --------------------------------------------------------------------------------------------------


def test_the_checker_runs_on_its_own(tree: tuple[Problem, int, bytes], tmp_path: Path) -> None:
    (tmp_path / "checker.py").write_bytes(Path(str(checker.__file__)).read_bytes())
    (tmp_path / "good.npz").write_bytes(tree[2])
    (tmp_path / "bad.npz").write_bytes(tree[2][:-100])
    code = (
        "import sys; sys.modules['torch'] = sys.modules['calipers'] = None; sys.path.insert(0, "
        "'.'); import checker; sys.exit(checker.main(sys.argv[1:]))"
    )
    for names, status in ((["good.npz"], 0), (["good.npz", "bad.npz"], 1)):
        done = subprocess.run(
            [sys.executable, "-c", code, *names],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status and "good.npz: proved" in done.stdout, done.stderr
    assert "NOT proved" in done.stdout

    def alone(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "checker.py", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    claim = prove(tree[2]).claim["claim"]
    (tmp_path / "folder").mkdir()
    for words, status, said in (
        (("good.npz",), 0, f"claim {claim}"),
        (("good.npz", "--claim", claim), 0, "proved: no class but"),
        (("good.npz", "--claim", "0" * 16), 1, "NOT proved: it is another claim than 000000000000"),
        (("good.npz", "--claim", "0"), 2, "at least 16 digits"),
        (("--help",), 0, "usage"),
        ((), 2, "usage"),
        (("nothing.npz", "folder"), 1, "folder: NOT proved: the file cannot be read"),
    ):
        shown = alone(*words)
        assert shown.returncode == status and said in shown.stdout + shown.stderr, shown
        assert "Traceback" not in shown.stderr


def test_a_record_keeps_proofs_and_check_proves_them(tmp_path: Path) -> None:
    problem = posed("dense", 1, "linf", 0.5)
    threat, record = problem.threat, tmp_path / "run.calipers"
    calipers.measure(
        problem.classifier,
        problem.x,
        problem.y,
        threat,
        plan=calipers.Plan("quick", proofs=True),
        record=record,
    )
    (found,) = calipers.check(record, problem.classifier)
    assert found.sound and len(found.proofs) > 0 and "holds" in found.proofs[0]
    with sqlite3.connect(record) as database:
        (blob,) = database.execute(
            "select array from evidence where kind = 'certificate' and array is not null"
        ).fetchone()
        data = np.load(io.BytesIO(blob)).tobytes()

        def smaller(header: dict[str, Any], arrays: dict[str, Any]) -> None:
            header["threat"]["radius"] /= 2

        buffer = io.BytesIO()
        np.save(buffer, np.frombuffer(rewritten(data, smaller), np.uint8))
        database.execute("update evidence set array = ? where array = ?", (buffer.getvalue(), blob))
    (found,) = calipers.check(record, problem.classifier)
    assert [line for line in found.failures if "another threat" in line]


def test_the_command_line_keeps_and_checks_proofs(tmp_path: Path) -> None:
    record = str(tmp_path / "run.calipers")
    measured = CliRunner().invoke(
        app,
        [
            "measure",
            "-m",
            "mnist-robust",
            "-n",
            "2",
            "-p",
            "quick",
            "-o",
            "none",
            "-q",
            "--record",
            record,
            "--proofs",
        ],
    )
    assert measured.exit_code == 0, measured.output
    checked = CliRunner().invoke(app, ["check", record, "-m", "mnist-robust"])
    assert checked.exit_code == 0 and " holds (" in checked.output


# ---- networks of real size
# --------------------------------------------------------------------------------------------------


@needs(DATA / "nets")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "radius", "points"),
    [("mnist_wk17a", 0.1, 60), ("mnist_madry_tiny", 0.3, 6), ("cifar_cnn_a_adv4", 2 / 255, 3)],
)
def test_certificates_of_real_networks_are_proved_again(
    name: str, radius: float, points: int
) -> None:
    problem = real(name, radius, points)
    proved = 0
    for tool in (CROWN(proofs=True), AlphaCROWN(proofs=True)):
        for i, _, data in claims(tool, problem):
            verdict = prove(data)
            assert verdict.proved, f"{tool}, point {i}: {verdict.reason}"
            proved += 1
    assert proved > 0


def real(name: str, radius: float, points: int) -> Problem:
    """Return the first points of a reference network's data that it gets right."""
    spec = importlib.util.spec_from_file_location("load", DATA / "load.py")
    assert spec is not None and spec.loader is not None
    load = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load)
    module = load.load_net(str(DATA / "nets" / f"{name}.npz"))
    held = np.load(
        DATA / "data" / ("mnist_test_2k.npz" if "mnist" in name else "cifar10_test_first100.npz")
    )
    x, y = torch.tensor(held["x"][:points]).float() / 255, torch.tensor(held["y"][:points]).long()
    x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
    right = module(x).argmax(1) == y
    return Problem.pose(module, x[right], y[right], Ball("linf", radius))
