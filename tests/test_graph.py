"""Does the graph compute what the module computes, are its adjoints adjoint, and is what it cannot
hold refused in words that help?
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from calipers.errors import CaptureError, UnsupportedOp
from calipers.graph.affine import Conv
from calipers.graph.capture import capture, graph_of
from calipers.graph.kinds import Affine, Elementwise, Op, Windowed
from calipers.graph.logsumexp import LogSumExp
from calipers.graph.receptive_field import field_of_view
from calipers.models.classifier import Classifier

NAMES = sorted(nets.ZOO)


# ---- the graph equals the module
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_graph_equals_module_on_batches_of_any_size(name: str) -> None:
    classifier, graph = nets.classifier_of(name), nets.captured(name)
    for count in (1, 2, 7):
        x = 3 * torch.randn(
            count,
            *nets.ZOO[name][0],
            generator=torch.Generator().manual_seed(count),
            dtype=torch.float64,
        )
        expected, values = classifier.logits64(x), graph.values(x)
        torch.testing.assert_close(values[-1], expected, rtol=1e-12, atol=1e-12)
        assert [tuple(v.shape[1:]) for v in values] == [graph.shape(i) for i in range(len(values))]


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_is_of_one_kind_and_names_its_place(name: str) -> None:
    for node in nets.captured(name).nodes:
        assert isinstance(node.op, Op)
        assert node.op.affine == isinstance(node.op, Affine)
        assert node.op.elementwise == isinstance(node.op, Elementwise)
        assert node.where


@pytest.mark.parametrize("name", NAMES)
def test_graph_in_float32_computes_in_float32(name: str) -> None:
    graph, x = nets.captured(name).to(torch.float32), nets.points_of(name)
    values = graph.values(x)
    assert {v.dtype for v in values} == {torch.float32}
    torch.testing.assert_close(
        values[-1].double(), nets.classifier_of(name).logits64(x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_number_is_left_that_nobody_reads(name: str) -> None:
    graph = nets.captured(name)
    read = {i for node in graph.nodes for i in node.inputs} | {len(graph.nodes)}
    assert set(range(1, len(graph.nodes) + 1)) <= read


@pytest.mark.slow
def test_shares_of_a_row_are_read_as_their_sum_alone() -> None:
    """Lines of log sum exp hold together: whoever read one share of several would be told what is
    false of it.
    """
    seen = 0
    for name in NAMES:
        graph = nets.captured(name)
        for number in (
            k for k, node in enumerate(graph.nodes, start=1) if isinstance(node.op, LogSumExp)
        ):
            (reader,) = (node.op for node in graph.nodes if number in node.inputs)
            assert isinstance(reader, Affine)
            shares = torch.eye(math.prod(graph.shape(number)), dtype=torch.float64).view(
                -1, *graph.shape(number)
            )
            axis = graph.nodes[number - 1].op.axis
            alike = reader.value(shares).flatten(1).view(*graph.shape(number), -1)
            assert bool((alike == alike.narrow(axis - 1, 0, 1)).all())
            assert not any(way[0] == number for way in graph.ways.values())
            seen += 1
    assert seen >= 3


def test_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3)).train()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.rand(3, 4)
    random_state = torch.get_rng_state()
    capture(Classifier(module), x)
    assert (
        module.training
        and all(m.training for m in module.modules())
        and all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    )
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_classifier_is_captured_once() -> None:
    classifier = nets.classifier_of("dense")
    assert graph_of(classifier, nets.points_of("dense")) is graph_of(
        classifier, nets.points_of("dense", 2)
    )


def test_a_single_point_is_enough_to_capture() -> None:
    graph = capture(nets.classifier_of("dense"), nets.points_of("dense", 1))
    x = nets.points_of("dense").double()
    torch.testing.assert_close(graph.values(x)[-1], nets.captured("dense").values(x)[-1])


def test_a_single_logit_becomes_the_logits_of_two_classes() -> None:
    x = nets.points_of("single logit").double()
    logits = nets.captured("single logit").values(x)[-1]
    assert logits.shape == (len(x), 2) and not logits[:, 0].any()


def test_largest_and_bent_numbers() -> None:
    graph = nets.captured("residual")
    assert graph.largest == max(
        torch.Size(graph.shape(i)).numel() for i in range(len(graph.nodes) + 1)
    )
    assert {type(graph.nodes[k - 1].op).__name__ for k in graph.nonlinear} <= {
        "Conv",
        "Sum",
        "Generic",
    }


# ---- affine operations
# --------------------------------------------------------------------------------------------------


def affine_operations(
    name: str, dtype: torch.dtype = torch.float64
) -> list[tuple[Affine, list[Tensor], Tensor]]:
    """Return every affine operation of a captured module, with random inputs and a random direction
    of its result.
    """
    generator = torch.Generator().manual_seed(3)
    graph = nets.captured(name).to(dtype)
    return [
        (
            op,
            [torch.randn(4, *shape, generator=generator, dtype=dtype) for shape in shapes],
            torch.randn(4, *out, generator=generator, dtype=dtype),
        )
        for op, shapes, out in nets.affine_nodes(graph)
    ]


def linear_part(op: Affine, inputs: list[Tensor]) -> Tensor:
    """Return W x, the value without its constant."""
    return op.value(*inputs) - op.value(*(torch.zeros_like(x) for x in inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_adjoints_are_adjoint(name: str, dtype: torch.dtype) -> None:
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    for op, inputs, y in affine_operations(name, dtype):
        back = op.adjoint(y)
        assert [b.shape for b in back] == [x.shape for x in inputs]
        forward = (linear_part(op, inputs) * y).reshape(4, -1).sum(1)
        backward = sum((x * b).reshape(4, -1).sum(1) for x, b in zip(inputs, back, strict=True))
        torch.testing.assert_close(forward, backward, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_absolute_is_the_operation_with_absolute_weights(name: str) -> None:
    for op, inputs, _ in affine_operations(name):
        absolute = op.absolute(*(x[:1].abs() for x in inputs))
        torch.testing.assert_close(
            absolute,
            explicit_absolute(op, [x[:1].abs() for x in inputs], absolute.shape[1:]),
            rtol=1e-11,
            atol=1e-11,
        )


def explicit_absolute(op: Affine, radii: list[Tensor], out: torch.Size) -> Tensor:
    """Return |W| r from the whole matrix, one row for each element of the result."""
    rows = op.adjoint(torch.eye(out.numel(), dtype=torch.float64).view(-1, *out))
    return sum(
        (row.reshape(len(row), -1).abs() @ r.flatten() for row, r in zip(rows, radii, strict=True)),
        torch.zeros(()),
    ).view(1, *out)


@pytest.mark.parametrize("name", [name for name in NAMES if "conv" in name])
def test_window_of_a_convolution_is_its_adjoint_on_the_padded_image(name: str) -> None:
    for op, inputs, y in affine_operations(name):
        if not isinstance(op, Windowed) or y.dim() != 4:
            continue
        window = op.window_adjoint(y)
        assert window.shape[2:] == (op.window(y.shape[2], 0), op.window(y.shape[3], 1))
        size, padding = inputs[0].shape[2:], op.padding
        whole = functional.pad(
            window,
            [
                0,
                size[1] + 2 * padding[1] - window.shape[3],
                0,
                size[0] + 2 * padding[0] - window.shape[2],
            ],
        )
        inner = whole[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]
        torch.testing.assert_close(inner, op.adjoint(y)[0], rtol=1e-11, atol=1e-11)


def test_slopes_are_the_diagonal() -> None:
    seen = set()
    for op, _, y in (operation for name in NAMES for operation in affine_operations(name)):
        if (slopes := op.slopes()) is not None:
            seen.add(type(op).__name__)
            for slope, back in zip(slopes, op.adjoint(y), strict=True):
                torch.testing.assert_close(y * slope, back)
    assert {"Scale", "Sum"} <= seen


# ---- refusals
# --------------------------------------------------------------------------------------------------


class Middle(nn.Module):
    """A dense network with a function of the hidden values in a module called `odd`."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(4, 4), nets.Apply(function), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Three layers."""
        return self.last(self.odd(self.first(x)))


def refusal(function: Callable[[Tensor], Tensor], kind: type[Exception], width: int = 4) -> str:
    """Return the message with which a network with this function in the middle is refused."""
    with pytest.raises(kind) as refused:
        capture(Classifier(Middle(function, width)), torch.rand(3, 4))
    return str(refused.value)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (torch.tan, "aten.tan.default"),
        (lambda x: x.sign(), "aten.sign.default"),
        (lambda x: x.sort(1).values, "aten.sort.default"),
        (
            lambda x: functional.scaled_dot_product_attention(
                x[:, None], x[:, None], x[:, None], is_causal=True
            )[:, 0],
            "aten.scaled_dot_product_attention.default",
        ),
    ],
)
def test_unsupported_operation_is_named_with_its_module_and_source_line(
    function: Callable[[Tensor], Tensor], op: str
) -> None:
    message = refusal(function, UnsupportedOp)
    assert f"no bounds for {op} at odd (" in message and "attacks work" in message
    assert re.search(r"nets\.py:\d+\)", message), message


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0),
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x - x[:1],
        lambda x: x.flip(0),
        lambda x: torch.cat([x[1:], x[:1]]),
        lambda x: x / x.shape[0],
        lambda x: x.softmax(0),
        lambda x: x.cumsum(0),
        lambda x: x - x.amax(0),
        lambda x: functional.layer_norm(x.T, (len(x),)).T,
    ],
    ids=[
        "minus the mean",
        "minus the mean, kept",
        "minus the first",
        "flipped",
        "rolled",
        "divided by the batch size",
        "softmax over points",
        "sums over points",
        "largest of points",
        "norm over points",
    ],
)
def test_models_that_mix_points_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    message = refusal(function, CaptureError)
    assert "batch" in message or "points" in message


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.zeros(x.shape[0], 4, dtype=x.dtype),
        lambda x: x.reshape(-1, 2).relu().reshape(-1, 4),
        lambda x: x.T.relu().T,
        lambda x: torch.stack([x, x.relu()])[1],
    ],
    ids=["a constant for each point", "halved", "turned around", "stacked before the points"],
)
def test_models_that_move_the_axis_of_points_and_keep_them_apart_are_captured(
    function: Callable[[Tensor], Tensor],
) -> None:
    module = Middle(function)
    graph, x = capture(Classifier(module), torch.rand(3, 4)), torch.rand(6, 4, dtype=torch.float64)
    torch.testing.assert_close(graph.values(x)[-1], module.double()(x))


def test_batch_statistics_are_refused() -> None:
    # Without running statistics a batch norm looks at the whole batch, also in evaluation mode.
    module = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    ).eval()
    with pytest.raises((CaptureError, UnsupportedOp)):
        capture(Classifier(module), torch.rand(3, 4))


@pytest.mark.parametrize(
    "function",
    [lambda x: x if float(x.sum()) > 0 else -x, lambda x: x.relu() if x.shape[0] > 2 else -x],
    ids=["data", "batch size"],
)
def test_python_decisions_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    message = refusal(function, CaptureError)
    assert (
        "cannot be exported" in message
        and "torch.where" in message
        and "attacks work without a graph" in message
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 0.1 * torch.rand(4, dtype=x.dtype),
        lambda x: x * (1 + 1e-6 * torch.randn((), dtype=x.dtype)),
    ],
    ids=["noise", "small noise"],
)
def test_random_models_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    message = refusal(function, CaptureError)
    assert "disagree" in message and "randomness" in message


def test_random_models_are_refused_by_the_operation_where_it_depends_on_the_point() -> None:
    assert "aten.randn_like.default" in refusal(lambda x: x + torch.randn_like(x), UnsupportedOp)


class Stateful(nn.Module):
    """Adds how often it has been called."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Remembers."""
        self.calls += 1
        return self.last(x) + self.calls


def test_stateful_models_are_refused() -> None:
    with pytest.raises(CaptureError):
        capture(Classifier(Stateful()), torch.rand(3, 4))


def test_a_cast_to_float32_in_a_model_of_float32_changes_nothing() -> None:
    x, casting = torch.rand(3, 4), Middle(lambda x: x.float().to(x.dtype))
    plain = Middle(lambda x: x)
    plain.load_state_dict(casting.state_dict())
    found, expected = (
        capture(Classifier(model), x).values(x.double())[-1] for model in (casting, plain)
    )
    assert torch.equal(found, expected)


class Deaf(nn.Module):
    """Answers the same for every point."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3), without a look at the values."""
        return self.answer.expand(x.shape[0], 3)


def test_an_output_that_does_not_depend_on_the_input_is_refused() -> None:
    with pytest.raises(CaptureError):
        capture(Classifier(Deaf()), torch.rand(3, 4))


def test_the_input_itself_as_output_is_refused() -> None:
    with pytest.raises(CaptureError, match="does not depend"):
        capture(Classifier(nn.Identity()), torch.rand(3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "settings",
    [
        (1, 3, 3, 1, 1),
        (3, 4, 5, 2, 2),
        (6, 5, 3, 1, 1),
        (6, 5, 3, 1, 0),
        (6, 4, (3, 2), 1, (2, 1)),
        (6, 4, 1, 1, 1),
        (9, 4, 3, 2, 1),
        (9, 6, 3, 1, 1, 2),
        (6, 6, 3, 1, 1, 1, 3),
    ],
    ids=str,
)
def test_the_adjoint_of_a_convolution_is_its_gradient_whichever_way_it_is_computed(
    settings: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(*settings).to(dtype).requires_grad_(False)
    x = torch.randn(3, settings[0], 9, 8, dtype=dtype, requires_grad=True)
    z = layer(x)
    a = torch.randn_like(z)
    op = Conv(
        layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups, (9, 8)
    )  # type: ignore[arg-type]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        op.adjoint(a)[0], torch.autograd.grad((z * a).sum(), x)[0], rtol=tolerance, atol=tolerance
    )


def test_the_field_of_view_grows_with_the_windows_and_ends_where_they_do() -> None:
    strided = nn.Sequential(
        nn.Conv2d(1, 2, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2, 2, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 2),
    )
    graph = capture(Classifier(strided.eval()), torch.randn(3, 1, 28, 28))
    assert field_of_view(graph, 1) == pytest.approx(16 / 28**2)
    assert field_of_view(graph, 3) == pytest.approx(max(64 / 28**2, 9 / 14**2))
    assert field_of_view(graph, len(graph.nodes)) == float("inf")
    pooled = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.AvgPool2d(2), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2)
    )
    graph = capture(Classifier(pooled.eval()), torch.randn(3, 1, 10, 10))
    assert field_of_view(graph, 3) == float("inf")


# ---- scalings become part of the layer before
# --------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A layer read by its batch norm and by something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return self.last(functional.relu(z + self.norm(z)))


@pytest.mark.parametrize(
    ("module", "shape", "kinds"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)),
            (1, 4, 4),
            "Conv Generic Linear",
        ),
        (
            nn.Sequential(
                nn.Conv1d(1, 3, 3, bias=False),
                nn.BatchNorm1d(3),
                nn.BatchNorm1d(3),
                nn.Flatten(),
                nn.Linear(6, 2),
            ),
            (1, 4),
            "Conv Generic Linear",
        ),
        (
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)),
            (4,),
            "Linear TwoPieces Linear",
        ),
        # by rows, not outputs
        (
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(15, 2)),
            (5, 4),
            "Linear Scale Generic Linear",
        ),
        (Shared(), (4,), "Linear Scale Sum TwoPieces Linear"),
    ],
    ids=["conv", "twice", "linear", "other axis", "shared"],
)
def test_a_scaling_is_merged_into_the_layer_that_feeds_it_alone(
    module: nn.Module, shape: tuple[int, ...], kinds: str
) -> None:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor in (part.running_mean, part.running_var, part.weight, part.bias):
                tensor.data.uniform_(0.2, 2.0)
    classifier = Classifier(module.eval())
    x = torch.randn(6, *shape)
    graph = capture(classifier, x)
    assert " ".join(type(node.op).__name__ for node in graph.nodes) == kinds
    torch.testing.assert_close(
        graph.values(x.double())[-1], classifier.logits64(x), rtol=1e-12, atol=1e-12
    )
