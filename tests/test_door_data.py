"""What people hand over as points and labels, and what is made of it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import calipers
from calipers import Ball, Classifier
from calipers.errors import BadInput
from calipers.threats.units import standardised_by

BALL = Ball("linf", 0.05)


def net(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    ).eval()


def images(n: int = 6, channels: int = 3) -> Tensor:
    luck = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, 8, 8), generator=luck).float() / 255


def labels(x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x.shape[1])(x).argmax(1)


def found(x: Any, y: Any, threat: Ball = BALL, model: Any = None) -> Any:
    return calipers.attack(model or net(), x, y, threat, "PGD(steps=3)")


class Pictures(Dataset[Any]):
    """Bytes with the channels last, one by one, as dicts."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict[str, Any]:
        x = images()
        picture = (x[i] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return {"image": picture, "label": int(labels(x)[i])}


class Stream(IterableDataset[Any]):
    """Pairs without a number."""

    def __iter__(self) -> Any:
        return iter(zip(images(), labels(images()), strict=True))


HANDED: dict[str, Any] = {
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "lists": lambda x, y: (x.tolist(), y.tolist()),
    "a list of tensors": lambda x, y: (list(x), list(y)),
    "bytes": lambda x, y: ((x * 255).round().to(torch.uint8), y),
    "bytes, channels last": lambda x, y: ((x * 255).round().byte().permute(0, 2, 3, 1).numpy(), y),
    "channels last": lambda x, y: (x.permute(0, 2, 3, 1), y),
    "a loader": lambda x, y: (DataLoader(TensorDataset(x, y), batch_size=4), None),
    "a loader, labels apart": lambda x, y: (DataLoader(TensorDataset(x), batch_size=4), y),
    "a data set": lambda x, y: (TensorDataset(x, y), None),
    "a data set of dicts": lambda x, y: (Pictures(), None),
    "a stream": lambda x, y: (Stream(), None),
}
TOLD = {
    "bytes": "divided by 255",
    "bytes, channels last": r"divided by 255.*\(N, H, W, C\) became",
    "channels last": r"\(N, H, W, C\) became \(N, C, H, W\)",
    "a data set of dicts": r"divided by 255.*\(N, H, W, C\) became",
}


@pytest.mark.parametrize("name", HANDED)
@pytest.mark.one_in(1)
def test_points_come_in_any_form(name: str) -> None:
    x = images()
    y, usual = labels(x), found(x, labels(x))
    got = found(*HANDED[name](x, y))
    assert torch.equal(got.candidates, usual.candidates)
    assert torch.equal(got.success, usual.success)
    notes = "; ".join(got.notes)
    assert re.search(TOLD[name], notes) if name in TOLD else not notes


def test_all_calls_go_through_the_same_door() -> None:
    x = images(3)
    loader = DataLoader(TensorDataset(x, labels(x)), batch_size=2)
    for call in (calipers.attack, calipers.certify, calipers.measure, calipers.distance):
        call(net(), loader, None, BALL)  # type: ignore[operator]
    calipers.curve(net(), loader, None, BALL, [0.01, 0.02], plan="quick")
    calipers.local_geometry(net(), loader, None, BALL, tools=["PGD(steps=3)"])


def test_a_loader_is_drained_as_far_as_it_must_be() -> None:
    x = images(6)
    loader = DataLoader(TensorDataset(x, labels(x)), batch_size=4)
    some, theirs = calipers.load_data(loader, points=5)
    assert torch.equal(some, x[:5]) and torch.equal(theirs, labels(x)[:5])
    assert len(calipers.load_data(Stream(), points=2)[0]) == 2
    assert len(calipers.load_data((x, labels(x)), points=2)[1]) == 2


def test_what_a_loader_may_not_hand_out() -> None:
    def handing(*items: Any) -> Any:
        return DataLoader(list(items), batch_size=None)  # type: ignore[arg-type]

    for source, said in (
        (handing(), "hands out nothing"),
        (handing((images(2),), (images(2), torch.zeros(2))), "labels for some points only"),
        (handing((images(2), torch.zeros(2), 3)), "3 things at once"),
        (handing({"picture": images(2)}), "hands out picture. Points are handed out as"),
        (handing(("text", 1)), "what the DataLoader hands out must be numbers"),
        (handing((images(2),), (images(2)[:, :, :4],)), "one shape"),
    ):
        with pytest.raises(BadInput, match=said):
            found(source, None)


def test_large_loaders_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from calipers.interchange import loaders

    monkeypatch.setattr(loaders, "_MOST", 1000)
    with pytest.raises(BadInput, match=r"load_data\(loader, points=1000\)"):
        found(TensorDataset(images()), None)
    assert len(calipers.load_data(TensorDataset(images(), labels(images())), points=6)[0]) == 6


def test_without_labels_the_models_own_answers_are_right() -> None:
    x = images()
    result = calipers.measure(net(), x, None, BALL, plan="quick")
    assert result.clean_accuracy.count == len(x)
    assert "the model's own answers are taken for right" in str(result)
    assert [row.label for row in result.points] == labels(x).tolist()


class Named(nn.Module):
    """A module that names its classes."""

    def __init__(self, classes: Any) -> None:
        super().__init__()
        self.inner, self.classes_ = net(), classes

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)
        return result


def test_labels_by_name_and_labels_that_are_none() -> None:
    x = images()
    y = labels(x)
    for names in (["cat", "dog", "eel"], [-1, 0, 1], [1, 2, 3]):
        told = np.array(names)[y.numpy()]
        for given in (told, told.tolist()):
            assert torch.equal(found(x, given, model=Named(names)).success, found(x, y).success)
    for given, said in (
        (np.array(["cat"] * 6), r"got strings.*model\.classes_"),
        (y.double(), r"write y\.long\(\)"),
        (nn.functional.one_hot(y, 3), r"write y\.argmax\(1\)"),
        (torch.tensor([-1, 1] * 3), r"got -1\.\.1.*\(y > 0\)\.long\(\)"),
        (torch.tensor([1, 2, 3] * 2), r"got 1\.\.3. Labels that begin at 1: write y - 1"),
    ):
        with pytest.raises(BadInput, match=said):
            found(x, given)
    with pytest.raises(BadInput, match="among the model's own classes"):
        found(x, ["cow"] * 6, model=Named(["cat", "dog", "eel"]))


def test_bytes_keep_their_values_in_a_box_of_bytes() -> None:
    x = images()
    got = found((x * 255).round().byte(), labels(x * 255), Ball("linf", 8, box=(0, 255)))
    assert got.candidates.max() > 1 and not got.notes


STATISTICS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "MNIST": ((0.1307,), (0.3081,)),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.one_in(1)
def test_standardised_data_are_recognised(name: str) -> None:
    mean, std = STATISTICS[name]
    x = images(6, len(mean))
    m, s = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    standardised = (x - m) / s
    assert (standardised_by(standardised.double()) or [""])[0] == name
    with pytest.raises(BadInput) as caught:
        found(standardised, labels(x), model=net(len(mean)))
    assert f"statistics of {name}" in str(caught.value) and f"mean={mean}" in str(caught.value)
    assert "255" not in str(caught.value).split("Classifier")[0].split("[0, 1]")[-1]
    cured = found(x, None, model=Classifier(net(len(mean)), mean=mean, std=std))
    assert cured.candidates.shape == x.shape


def test_other_data_outside_their_box_have_a_cure_that_helps() -> None:
    luck = torch.Generator().manual_seed(0)
    odd = torch.randn(6, 3, 8, 8, generator=luck)
    table = torch.randn(6, 5, generator=luck) * 30
    rows = nn.Linear(5, 2)
    exact = torch.rand(6, 5, generator=luck, dtype=torch.float64)
    box = (exact.amin(0), exact.amax(0))
    for x, threat, model, said in (
        (odd, BALL, net(), "look standardised: hand over"),
        (images() * 255, BALL, net(), "look like 0..255: divide by 255"),
        (table, BALL, rows, r"box='data'.*scaler\.mean_"),
        (exact, Ball("linf", 0.01, box), rows, r"by a rounding.*box='data', or model\.double\(\)"),
    ):
        with pytest.raises(BadInput, match=said):
            found(x, None, threat, model)
    assert standardised_by(odd.double()) is None
    for x, model in ((odd, net()), (table, rows), (exact, rows)):
        got = found(x, None, Ball("linf", 0.01, box="data"), model)
        assert "the box is the range of these points" in got.notes


def test_a_box_of_the_data_is_theirs_by_column_or_channel() -> None:
    x = images()
    x[0, 0, 0, 0] = torch.nan
    ball = Ball("linf", 0.5, box="data").fitted(x)
    assert ball.ends is not None
    low, high = (torch.as_tensor(end) for end in ball.ends)
    assert low.shape == (3, 1, 1) and torch.equal(high[1].reshape(()), x[:, 1].max())
    table = torch.rand(5, 4)
    ends = Ball("l2", 0.5, box="data").fitted(table).ends
    assert ends is not None and torch.equal(torch.as_tensor(ends[0]), table.amin(0))
    given = found(images(), None, Ball("linf", 0.5, box="data")).candidates
    assert (given.amax((0, 2, 3)) <= images().amax((0, 2, 3))).all()
    for nonsense in ("date", "", b"data"):
        with pytest.raises(BadInput, match=r"box must be \(low, high\), two numbers or arrays, 'd"):
            Ball("linf", 0.5, box=nonsense)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"ball\.fitted\(x\) first"):
        Ball("linf", 0.5, box="data").region(x)


def test_a_threat_of_another_kind_is_named() -> None:
    for threat in (8 / 255, "linf", None):
        with pytest.raises(
            BadInput, match=r"what the adversary may do, got \w+\. Give calipers\.B"
        ):
            found(images(), None, threat)  # type: ignore[arg-type]


def test_masks_weights_and_boxes_of_arrays_and_lists() -> None:
    x = images()
    mask = np.zeros((1, 8, 8), bool)
    mask[:, :4] = True
    threat = Ball("linf", 0.3, (np.zeros((3, 1, 1)), [[[1.0]]] * 3), mask)
    got = found(x, None, threat)
    assert torch.equal(got.candidates[:, :, 4:], x[:, :, 4:])
    assert not torch.equal(got.candidates[:, :, :4], x[:, :, :4])
    assert torch.equal(
        got.candidates, found(x, None, Ball("linf", 0.3, mask=mask.tolist())).candidates
    )


def test_masks_for_each_point_are_refused_with_the_way_to_do_it() -> None:
    x = images()
    mask = torch.ones(len(x), 3, 8, 8, dtype=torch.bool)
    with pytest.raises(BadInput, match=r"\(6, 3, 8, 8\).*one mask for all points.*each mask apart"):
        found(x, None, Ball("linf", 0.1, mask=mask))


sklearn = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")


def table(n: int = 60) -> tuple[Any, Any]:
    """Rows of four columns, and strings as labels."""
    luck = np.random.default_rng(0)
    x = luck.random((n, 4))
    return x, np.array(["no", "yes"])[(x[:, 0] + 0.2 * x[:, 1] > 0.6).astype(int)]


def test_an_estimator_is_handed_over_as_it_is() -> None:
    x, y = table()
    model = sklearn.LogisticRegression(C=100).fit(x, y)
    threat = Ball("linf", 0.2)
    got = calipers.attack(model, x, y, threat, "Square(queries=50)")
    again = calipers.attack(calipers.load(model), x, y.tolist(), threat, "Square(queries=50)")
    assert got.success.sum() > 10 and torch.equal(got.success, again.success)
    result = calipers.measure(model, x, y, threat, plan="quick")
    assert result.clean_accuracy.count >= 55


def test_frames_reach_estimators_with_their_names_and_networks_as_numbers() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    compose = pytest.importorskip("sklearn.compose")
    pipeline = pytest.importorskip("sklearn.pipeline")
    scale = pytest.importorskip("sklearn.preprocessing")
    x, y = table()
    frame = pandas.DataFrame(x, columns=["a", "b", "c", "d"])
    by_name = compose.ColumnTransformer([("scale", scale.StandardScaler(), ["a", "b"])])
    model = pipeline.make_pipeline(by_name, sklearn.LogisticRegression(C=100)).fit(frame, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = calipers.attack(model, frame, y, Ball("linf", 0.2), "Square(queries=50)")
    assert got.success.any() and not got.success.all()
    net_of_rows = nn.Linear(4, 2)
    numbers = found(frame, None, model=net_of_rows)
    assert torch.equal(numbers.candidates, found(x, None, model=net_of_rows).candidates)
    frame["city"] = "Berlin"
    with pytest.raises(BadInput, match=r"columns that are no numbers: city\. Encode them"):
        found(frame, None, model=nn.Linear(5, 2))


def test_files_of_tensors_are_data_too(tmp_path: Path) -> None:
    x = images()
    for k, held in enumerate(((x, labels(x)), {"images": (x * 255).byte(), "labels": labels(x)})):
        torch.save(held, tmp_path / f"{k}.pt")
        got = calipers.load_data(str(tmp_path / f"{k}.pt"), points=4)
        assert torch.equal(got[0], x[:4]) and torch.equal(got[1], labels(x)[:4])
    for held, said in ((x, "holds a Tensor where points and labels"), (net(), "runs code")):
        torch.save(held, tmp_path / "x.pt")
        with pytest.raises(BadInput, match=said):
            calipers.load_data(str(tmp_path / "x.pt"))


def test_the_command_line_chooses_outputs_boxes_and_grids(tmp_path: Path) -> None:
    from terminal import calipers as run

    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Both(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return {'scores': super().forward(x.flatten(1)), 'hidden': x}\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return Both(16, 3)\n"
    )
    x = images(6, 1)[:, :, :4, :4]
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=np.zeros(6, np.int64))
    base = ("attack", "-m", "net.py:build", "-d", "data.npz", "-e", "8/255", "-t", "PGD(steps=2)")
    refused = run(tmp_path, *base)
    assert refused.returncode == 2 and "say which are the logits" in refused.stderr
    done = run(tmp_path, *base, "--output", "scores", "--box", "data", "--grid", "1/255")
    assert done.returncode == 0, done.stderr
    assert "the box is the range of these points" in done.stdout
