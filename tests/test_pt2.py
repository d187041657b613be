"""Is an exported program read as torch reads it, and does nothing that a stranger wrote into the
file run?
"""

from __future__ import annotations

import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import calipers
from calipers.errors import BadInput, BadModel, CalipersError
from calipers.graph.capture import capture
from calipers.interchange import archives, models, pt2, pt2_graph
from calipers.interchange.pt2 import load_exported
from calipers.models.classifier import Classifier

pytestmark = pytest.mark.one_in(1)


class Fn(nn.Module):
    """A model made of a function of its layers and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)
        self.loose = torch.tensor([0.5])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layers, x) * self.scale + self.loose


def _attention(m: Any, x: Tensor) -> Tensor:
    h = x.flatten(1).reshape(x.shape[0], 6, 8)
    hidden = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    return m[0](
        ((h @ h.transpose(1, 2)).masked_fill(hidden, -torch.inf).softmax(-1) @ h).flatten(1)
    )


def _regions(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        largest = x.abs().amax()
    first, second = functional.relu(x * 1, inplace=True).chunk(2, 3)
    best, _ = first.flatten(1).max(1, keepdim=True)
    return (
        m[0](torch.cat([first, second], 3).flatten(1))
        + best
        + largest * 0
        + torch.ones(x.shape[0] * 2 // 2, 1) * x.shape[0] ** 0.5
    )


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m[0](x.flatten(1))


MODELS: dict[str, tuple[Any, ...]] = {
    "convolution": (
        lambda m, x: m[2](functional.max_pool2d(m[1](m[0](x)), 2).flatten(1)),
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Linear(16, 3),
    ),
    "attention": (_attention, nn.Linear(48, 3)),
    "transformer": (
        lambda m, x: m[1](m[0](x.flatten(1).reshape(-1, 6, 8)).mean(1)),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        nn.Linear(8, 3),
    ),
    "recurrent": (
        lambda m, x: m[1](m[0](x.flatten(1).reshape(x.shape[0], 6, 8))[0][:, -1]),
        nn.LSTM(8, 5, batch_first=True),
        nn.Linear(5, 3),
    ),
    "regions": (_regions, nn.Linear(48, 3)),
    "autocast": (_autocast, nn.Linear(48, 3)),
    "resized": (
        lambda m, x: m[0](functional.interpolate(x, scale_factor=2, mode="bilinear").flatten(1)),
        nn.Linear(192, 3),
    ),
    "rounded": (
        lambda m, x: m[0](
            torch.where(x > 0.5, x.clamp(max=0.7), x.new_full((), 0.1)).double().flatten(1)
        ).float(),
        nn.Linear(48, 3).double(),
    ),
}


def exported(path: Path, module: nn.Module, free: bool = True) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=2)},) if free else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of recurrent layers' lists of weights
        program = torch.export.export(
            module.eval(), (torch.rand(3, 3, 4, 4),), dynamic_shapes=shapes
        )
    torch.export.save(program, path)
    return program


@pytest.mark.parametrize("name", MODELS)
def test_a_program_computes_what_torch_has_it_compute(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    function, *layers = MODELS[name]
    program = exported(tmp_path / "net.pt2", Fn(function, *layers))
    ours, x = load_exported(tmp_path / "net.pt2"), torch.rand(5, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(ours(x.clone()), program.module()(x.clone()))
    asked = x.clone().requires_grad_()
    ours(asked).sum().backward()
    assert asked.grad is not None
    assert bool(asked.grad.abs().sum() > 0)


def test_it_follows_the_module_to_float64_and_is_captured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    function, *layers = MODELS["recurrent"]
    exported(tmp_path / "net.pt2", Fn(function, *layers))
    ours, x = load_exported(tmp_path / "net.pt2"), torch.rand(4, 3, 4, 4)
    exact = deepcopy(ours).double()(x.double())
    assert exact.dtype == torch.float64
    assert torch.allclose(exact, ours(x).double(), atol=1e-5)
    graph = capture(Classifier(ours), x)
    assert torch.allclose(graph.values(x.double())[-1], exact, atol=1e-9)


def test_two_programs_with_the_same_weights_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, digests = nn.Linear(48, 3), set()
    for k, unstable in enumerate((torch.relu, torch.tanh)):
        exported(
            tmp_path / "net.pt2",
            Fn(lambda m, x, unstable=unstable: unstable(m[0](x.flatten(1))), layer),
        )
        digests.add(Classifier(load_exported(tmp_path / "net.pt2")).digest())
        assert len(digests) == k + 1


def test_another_shape_or_a_fixed_batch_is_refused_with_the_cure(tmp_path: Path) -> None:
    exported(
        tmp_path / "net.pt2", Fn(lambda m, x: m[0](x.flatten(1)), nn.Linear(48, 3)), free=False
    )
    net = load_exported(tmp_path / "net.pt2")
    with pytest.raises(
        BadModel,
        match=r"shape \(3, 3, 4, 4\), got \(2, 3, 4, 4\); export it with a free batch: "
        r"dynamic_shapes=",
    ):
        net(torch.rand(2, 3, 4, 4))
    with pytest.raises(BadModel, match="inputs of 4 axes"):
        net(torch.rand(3, 48))


def test_a_norm_of_weights_reads_nothing_past_its_end(tmp_path: Path) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(48, 3))
    program = exported(tmp_path / "net.pt2", Fn(lambda m, x: m[0](x.flatten(1)), layer))
    net, x = load_exported(tmp_path / "net.pt2"), torch.rand(2, 3, 4, 4)
    assert torch.equal(net(x), program.module()(x))
    for size in ((1, 1), (3,), (3, 2)):
        with pytest.raises(BadModel, match="weight norm"):
            pt2_graph._weight_norm(torch.rand(3, 48), torch.rand(size), 0)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(48), nn.Dropout(0.5)], ids=["batch norm", "dropout"]
)
def test_training_mode_is_refused(layer: nn.Module, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Flatten(), layer, nn.Linear(48, 3)).train()
    torch.export.save(torch.export.export(module, (torch.rand(3, 3, 4, 4),)), tmp_path / "net.pt2")
    with pytest.raises(BadInput, match=r"call model\.eval\(\) before torch\.export\.export"):
        load_exported(tmp_path / "net.pt2")


# ---- files from strangers
# --------------------------------------------------------------------------------------------------


class Marks:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def pickled(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def changed(path: Path, edit: Callable[[str, bytes], bytes | None]) -> Path:
    """Return a copy of the archive with its members edited."""
    target = path.with_name(f"{path.stem}_changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as out:
        for info in source.infolist():
            data = edit(info.filename.partition("/")[2], source.read(info))
            if data is not None:
                out.writestr(info.filename, data)
    return target


def edited(path: Path, change: Callable[[Any], None], member: str = "models/model.json") -> Path:
    """Return a copy whose JSON has been changed."""

    def edit(name: str, data: bytes) -> bytes:
        if name != member:
            return data
        told = json.loads(data)
        change(told)
        return json.dumps(told).encode()

    return changed(path, edit)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pt2") / "good.pt2"
    exported(path, Fn(_regions, nn.Linear(48, 3)))
    return path


CODE = "__import__('pathlib').Path({!r}).write_text('x')"


def evil(good: Path, kind: str, mark: Path) -> Path:
    """Return a file by which torch.export.load, or one that trusts its names, would make the
    mark.
    """
    code = CODE.format(str(mark))

    def symbols(told: Any) -> None:
        for size in told["graph_module"]["graph"]["tensor_values"].values():
            size["sizes"] = [
                {"as_expr": {"expr_str": code, "hint": {"as_int": 3}}} for _ in size["sizes"]
            ]
        told["range_constraints"] = {}

    def names(told: Any) -> None:
        text = json.dumps(told["graph_module"]).replace('"x"', json.dumps(f"x=({code})"))
        told["graph_module"] = json.loads(text)

    def target(told: Any) -> None:
        node = told["graph_module"]["graph"]["nodes"][0]
        node |= {"target": "torch.ops.aten.from_file.default"}
        node["inputs"] = [
            {"name": "filename", "arg": {"as_string": str(mark)}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
        ]
        node["inputs"].append({"name": "size", "arg": {"as_int": 4}, "kind": 1})

    def hub(told: Any) -> None:
        node = told["graph_module"]["graph"]["nodes"][0]
        node |= {
            "target": "torch.hub.load",
            "inputs": [{"name": "repo_or_dir", "arg": {"as_string": str(mark)}, "kind": 1}],
        }

    def guards(told: Any) -> None:
        told["guards_code"] = [code]

    files: dict[str, Callable[[], Path]] = {
        "sample inputs": lambda: changed(
            good,
            lambda n, d: (
                pickled(((Marks(mark),), {})) if n.startswith("data/sample_inputs/") else d
            ),
        ),
        "a pickled weight": lambda: edited(
            changed(
                good,
                lambda n, d: (
                    pickled({"t": torch.rand(2), "e": Marks(mark)})
                    if n == "data/weights/weight_0"
                    else d
                ),
            ),
            lambda told: next(iter(told["config"].values())).update(use_pickle=True),
            "data/weights/model_weights_config.json",
        ),
        "an opaque constant": lambda: edited(
            changed(
                good,
                lambda n, d: pickle.dumps(Marks(mark)) if n == "data/constants/tensor_0" else d,
            ),
            lambda told: next(iter(told["config"].values())).update(path_name="opaque_obj_0"),
            "data/constants/model_constants_config.json",
        ),
        "symbols": lambda: edited(good, symbols),
        "names": lambda: edited(good, names),
        "a file operation": lambda: edited(good, target),
        "a function of torch": lambda: edited(good, hub),
        "guards": lambda: edited(good, guards),
    }
    return files[kind]()


# which hold nothing that is looked at, or that is more than a name
READ = "sample inputs", "guards", "names"
EVIL = (
    *READ,
    "a pickled weight",
    "an opaque constant",
    "symbols",
    "a file operation",
    "a function of torch",
)


@pytest.mark.parametrize("kind", EVIL)
def test_nothing_in_a_file_runs(kind: str, good: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = evil(good, kind, mark)
    if kind in READ:
        load_exported(path)(torch.rand(3, 3, 4, 4))
    else:
        with pytest.raises(CalipersError, match=path.name):
            load_exported(path)(torch.rand(3, 3, 4, 4))
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["sample inputs", "a pickled weight", "symbols", "guards"])
def test_the_same_files_run_their_code_in_torch(kind: str, good: Path, tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    mark = tmp_path / "mark"
    path = evil(good, kind, mark)
    with suppress(Exception):  # after its code has run, the file is of no use
        torch.export.load(path).module()(torch.rand(3, 3, 4, 4))
    assert mark.exists()


def test_what_refuses_an_operation_is_what_keeps_files_from_being_written(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "mark"
    path = evil(good, "a file operation", mark)
    monkeypatch.setattr(pt2_graph, "_REFUSED", set())
    with suppress(RuntimeError):  # of the operation that gets the file's bytes in place of a size
        load_exported(path)(torch.rand(3, 3, 4, 4))
    assert mark.exists()


def _enlarge(nodes: list[Any]) -> None:
    ones = next(node for node in nodes if node["target"] == "torch.ops.aten.ones.default")
    ones["inputs"][0]["arg"]["as_sym_ints"][1] = {"as_int": 2**43}


REFUSALS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pickle": (
        lambda good: edited(
            good,
            lambda told: next(iter(told["config"].values())).update(use_pickle=True),
            "data/weights/model_weights_config.json",
        ),
        "unpickling a file runs its author's code",
    ),
    "an object": (
        lambda good: edited(
            good,
            lambda told: next(iter(told["config"].values())).update(path_name="custom_obj_0"),
            "data/constants/model_constants_config.json",
        ),
        "only tensors are read",
    ),
    "a path outside": (
        lambda good: edited(
            good,
            lambda told: next(iter(told["config"].values())).update(path_name="weight_/../../x"),
            "data/weights/model_weights_config.json",
        ),
        "only tensors are read",
    ),
    "weights pickled by an older torch": (
        lambda good: changed(
            good,
            lambda name, data: None if name == "data/weights/model_weights_config.json" else data,
        ),
        "keeps them as a pickle, as torch before 2.9 did",
    ),
    "another version": (
        lambda good: edited(good, lambda told: told["schema_version"].update(major=9)),
        "version 9 of torch's format, this reads version 8",
    ),
    "another layout": (
        lambda good: changed(good, lambda name, data: b"7" if name == "archive_version" else data),
        "no archive of an exported program",
    ),
    "big-endian": (
        lambda good: changed(good, lambda name, data: b"big" if name == "byteorder" else data),
        "big-endian machine",
    ),
    "an unknown operation": (
        lambda good: edited(
            good,
            lambda told: told["graph_module"]["graph"]["nodes"][0].update(
                target="torch.ops.evil.f.default"
            ),
        ),
        "not known",
    ),
    "an operation that reads past the end": (
        lambda good: edited(
            good,
            lambda told: told["graph_module"]["graph"]["nodes"][0].update(
                target="torch.ops.aten.embedding_bag.default"
            ),
        ),
        "is not read: it is none that a classifier computes with",
    ),
    "a size of terabytes": (
        lambda good: edited(good, lambda told: _enlarge(told["graph_module"]["graph"]["nodes"])),
        "makes 8,796,093,022,208 numbers for each point",
    ),
    "an input without a name": (
        lambda good: edited(
            good, lambda told: told["graph_module"]["graph"]["inputs"][0].update(as_tensor={})
        ),
        "cannot be read",
    ),
    "a value made nowhere": (
        lambda good: edited(
            good,
            lambda told: told["graph_module"]["graph"]["outputs"][0]["as_tensor"].update(
                name="nobody"
            ),
        ),
        "used before it is made",
    ),
    "a weight cut short": (
        lambda good: changed(
            good, lambda name, data: data[:-4] if name == "data/weights/weight_0" else data
        ),
        "needs more numbers",
    ),
    "a huge weight": (
        lambda good: edited(
            good,
            lambda told: next(iter(told["config"].values()))["tensor_meta"].update(
                sizes=[{"as_int": 2**30}, {"as_int": 2**9}], strides=[{"as_int": 0}] * 2
            ),
            "data/weights/model_weights_config.json",
        ),
        "needs more numbers",
    ),
    "brackets without end": (
        lambda good: changed(
            good, lambda name, data: b"[" * 10**6 if name == "models/model.json" else data
        ),
        "cannot be read",
    ),
    "no zip file": (lambda good: good, "no zip archive"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_cannot_be_read_is_refused_in_a_sentence(
    kind: str, good: Path, tmp_path: Path
) -> None:
    change, words = REFUSALS[kind]
    if kind == "no zip file":
        good = tmp_path / "net.pt2"
        good.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(BadInput, match=words):
        load_exported(change(good))


def test_the_older_format_is_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as out:
        for name in ("version", "serialized_exported_program.json", "serialized_state_dict.pt"):
            out.writestr(name, b"8.2")
    with pytest.raises(BadInput, match="torch's older format, whose weights are pickles"):
        models.load(str(tmp_path / "net.pt2"))


def test_an_archive_that_would_unpack_to_far_more_is_refused(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("bomb/archive_format", b"pt2")
        out.writestr("bomb/zeros", bytes(archives.FREE))
    with pytest.raises(BadInput, match="would unpack to"):
        load_exported(path)
    monkeypatch.setattr(archives, "RATIO", 10**6)
    with pytest.raises(BadInput, match="no archive of an exported program"):
        load_exported(path)


def test_torch_reads_no_exported_program_here() -> None:
    """Whoever needs one opens it with `load_exported`; weights are read as tensors only."""
    for path in Path(str(calipers.__file__)).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace(str(pt2.__doc__), "")
        assert "export.load(" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
