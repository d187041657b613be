"""Files that strangers wrote: is each read as ONNX's reference runs it, or refused in a sentence that says why?"""

from __future__ import annotations

import gzip
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from beside import CASES, needs
from terminal import calipers as terminal

import calipers
from calipers.errors import BadInput, CalipersError
from calipers.interchange import load_onnx, load_vnnlib
from calipers.measurement.verify import Verdict

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

pytestmark = [needs(CASES / "onnx"), pytest.mark.one_in(1)]

READ = (
    "avgpool_ceil clip_min_above_max const_onehot const_reducemax const_size const_trilu_mask "
    "dead_node_other_domain if_constant_condition lindex lstm_default_activations_written_out "
    "maxpool_same_upper mod_fmod_constant output_of_rank_3 second_output_label sigmoid_end "
    "skl_mlp skl_mlp_scores softmax_end sparse_initializer torch_rnn_dyn"
).split()
REFUSED = {
    "all_axes_free": "only the first axis, the batch, may be free. Export it with fixed sizes",
    "conv_transpose_output_shape": "the output_shape [10, 8] is not read",
    "dropout_training_mode": "drops at random",
    "float16_inside": "casts what depends on the point to type 10",
    "opset6_add_axis": "written in operator set 6",
}
SCORES = {"skl_mlp": 1}
"""Of the files of several outputs: the place of the one that holds the scores, if not 0."""


def file_of(name: str) -> Path:
    """Return the file, packed or not."""
    plain = CASES / "onnx" / f"{name}.onnx"
    return plain if plain.exists() else plain.with_name(f"{name}.onnx.gz")


def reference(path: Path) -> tuple[ReferenceEvaluator, str, tuple[int, ...]]:
    """Return who runs the file, the name of its input, and its shape with 1 for what is free."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    model = onnx.load_model_from_string(data)
    given = model.graph.input[0]
    return (
        ReferenceEvaluator(model),
        given.name,
        tuple(d.dim_value or 1 for d in given.type.tensor_type.shape.dim),
    )


def outputs(path: Path, points: np.ndarray) -> np.ndarray:
    """Return what the reference makes of points (M, d), one at a time."""
    if path.name.startswith("sparse"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes())
        rows = [session.run(None, {"x": p[None].astype(np.float32)})[0] for p in points]
        return np.concatenate(rows).astype(np.float64)
    evaluator, name, shape = reference(path)
    place = SCORES.get(path.name.split(".")[0], 0)
    with np.errstate(all="ignore"):
        return np.stack(
            [
                np.asarray(
                    evaluator.run(None, {name: p.reshape(shape).astype(np.float32)})[place],
                    dtype=np.float64,
                ).reshape(-1)
                for p in points
            ]
        )


def test_no_case_is_left_out() -> None:
    found = {
        p.name.removesuffix(".gz").removesuffix(".onnx") for p in (CASES / "onnx").glob("*.onnx*")
    }
    assert found == {*READ, *REFUSED}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_what_the_reference_runs(name: str) -> None:
    if name == "sparse_initializer":
        pytest.importorskip("onnxruntime", reason="the reference does not run sparse tensors")
    net = load_onnx(file_of(name), paired=True)
    x = (
        np.random.default_rng(0)
        .uniform(-3, 3, (20, math.prod(net.program.point_shape)))
        .astype(np.float32)
    )
    got = (
        net(torch.tensor(x).reshape(-1, *net.program.point_shape))
        .detach()[:, -net.outputs :]
        .numpy()
    )
    np.testing.assert_allclose(got, outputs(file_of(name), x), rtol=1e-4, atol=1e-5)


def test_sizes_that_a_file_leaves_free_can_be_given() -> None:
    net = load_onnx(file_of("all_axes_free"), shape=(1, 5, 6))
    x = np.random.default_rng(0).uniform(-3, 3, (4, 1, 5, 6)).astype(np.float32)
    evaluator, name, _ = reference(file_of("all_axes_free"))
    expected = evaluator.run(None, {name: x})[0]
    np.testing.assert_allclose(net(torch.tensor(x)).numpy(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match=re.escape("(2, 5, 6) does not fit the input x")):
        load_onnx(file_of("all_axes_free"), shape=(2, 5, 6))


def test_one_of_several_outputs_is_chosen_by_name_or_number() -> None:
    path = file_of("skl_mlp")
    x = torch.rand(3, 4)
    chosen = [load_onnx(path, output=output)(x) for output in (None, "probabilities", 1, "1")]
    assert all(torch.equal(z, chosen[0]) for z in chosen)
    with pytest.raises(BadInput, match=re.escape("choose one of label, probabilities")):
        load_onnx(path, output="scores")
    with pytest.raises(CalipersError, match=r"ai\.onnx\.ml"):
        load_onnx(path, output="label")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    with pytest.raises(CalipersError, match=re.escape(REFUSED[name])):
        load_onnx(file_of(name), paired=True)


def unsafe_among(specification: Path, network: Path, count: int = 200) -> bool:
    """Is an output of the reference unsafe at one of many points of the property's boxes, their corners among them?"""
    rng, (query,) = np.random.default_rng(0), load_vnnlib(specification).queries
    low, high = (
        np.array([float(v) for v in end], dtype=np.float32) for end in (query.low, query.high)
    )
    share = rng.random((count, len(low))).astype(np.float32)
    share[: count // 4] = np.round(share[: count // 4])
    share[0], share[1] = 0, 1
    points = np.clip(low + share * (high - low), low, high)
    return any(query.unsafe(torch.tensor(z)) for z in outputs(network, points))


def answered(network: Path, specification: Path) -> Verdict | str:
    """Return the verdict, or what the refusal says."""
    try:
        return calipers.verify(network, specification, timeout=20)
    except CalipersError as error:
        return str(error)


PROPERTIES = {
    "clip_min_above_max": "sat",
    "mod_fmod_constant": "sat",
    "conv_transpose_output_shape": "sat",
    "dropout_training_mode": "drops at random",
    "sigmoid_end": "sat",
    "softmax_end": "sat",
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_no_property_is_called_safe_where_samples_are_unsafe(name: str) -> None:
    """The false `unsat` of each was printed once, and its proof confirmed."""
    network, specification, expected = (
        file_of(name),
        CASES / "onnx" / f"{name}.vnnlib",
        PROPERTIES[name],
    )
    assert unsafe_among(specification, network)
    found = answered(network, specification)
    if isinstance(found, str):
        assert expected in found
        return
    assert found.answer == "sat" and found.witness is not None and expected == "sat"
    point = np.array([float(text) for text in found.witness.inputs], dtype=np.float32)
    assert (
        load_vnnlib(specification).queries[0].unsafe(torch.tensor(outputs(network, point[None])[0]))
    )


def test_a_property_of_thousands_of_boxes_is_decided() -> None:
    found = calipers.verify(file_of("lindex"), CASES / "onnx" / "lindex_7000.vnnlib.gz")
    assert found.answer == "unsat"


WITHOUT_A_NETWORK = ["inout", "not", "strict"]


def test_no_property_is_left_out() -> None:
    found = {p.name.split(".")[0] for p in (CASES / "onnx").glob("*.vnnlib*")}
    assert found == {*PROPERTIES, *WITHOUT_A_NETWORK, "lindex_7000"}


@pytest.mark.parametrize("name", WITHOUT_A_NETWORK)
def test_properties_without_a_network_are_answered_rightly(name: str, tmp_path: Path) -> None:
    """Of 5 inputs and 3 outputs: a network of that size is made for them, and the truth counted by hand."""
    w = np.random.default_rng(3).standard_normal((5, 3)).astype(np.float32)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 5))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "net", [given], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
                              [numpy_helper.from_array(w, "w")])  # fmt: skip
    (tmp_path / "net.onnx").write_bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
    )
    points = np.random.default_rng(0).uniform(0.1, 0.2, (4000, 5))
    y = points @ w
    unsafe = {
        "inout": y[:, 0] <= points[:, 0] + 1,
        "not": y[:, 0] > y[:, 1],
        "strict": y[:, 0] < y[:, 1],
    }[name]
    found = answered(tmp_path / "net.onnx", CASES / "onnx" / f"{name}.vnnlib")
    assert not isinstance(found, str) and found.answer == ("sat" if unsafe.any() else "unsat")


def test_outputs_of_three_axes_are_refused_as_those_of_a_module_are() -> None:
    with np.load(CASES / "onnx" / "tab.npz") as data:
        x, y = torch.tensor(data["x"]), torch.tensor(data["y"])
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Unflatten(1, (2, 3)))
    for model in (load_onnx(file_of("output_of_rank_3")), module):
        for ask in (
            calipers.measure,
            lambda *given: calipers.attack(*given, calipers.attacks.PGD()),
            lambda *given: calipers.certify(*given, calipers.certificates.CROWN()),
        ):
            with pytest.raises(
                BadInput,
                match=re.escape(
                    "must return logits of shape (N, K); for 2 inputs it returned (2, 2, 3)"
                ),
            ):
                ask(model, x, y, calipers.Ball("linf", 0.1, box=None))


@pytest.mark.parametrize(
    "name", sorted(p.stem.removesuffix("-n") for p in (CASES / "onnx_fuzz").glob("*.onnx"))
)
def test_spoiled_files_end_in_one_sentence(name: str) -> None:
    shown = terminal(
        CASES / "onnx_fuzz", "verify", f"{name}-n.onnx", f"{name}-s.vnnlib", "--seconds", "20"
    )
    assert shown.returncode == 2 and not shown.stdout
    assert (
        shown.stderr.startswith(f"calipers: {name}-n.onnx")
        and len(shown.stderr.strip().splitlines()) == 1
    )


def test_a_list_goes_on_behind_a_spoiled_file() -> None:
    shown = terminal(CASES / "verify_list", "verify", "--csv", "list.csv")
    answers = [line.split(",")[2] for line in shown.stdout.splitlines()]
    assert (
        answers == ["sat", "error", "sat"]
        and shown.returncode == 2
        and "bad_attribute.onnx" in shown.stderr
    )
    shown = terminal(CASES / "verify_list", "verify", "view.onnx", "view.vnnlib")
    assert shown.returncode == 2 and len(shown.stderr.strip().splitlines()) == 1
