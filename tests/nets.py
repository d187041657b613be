"""Small networks for the tests: random graphs from a seed, a zoo of real modules, and points inside
a ball that attack them.

Nothing here asks `calipers` what the adversary may do: the points come from norms written out once
more, so that a mistake in the package cannot hide itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calipers.graph.activations import ACTIVATIONS
from calipers.graph.affine import Conv, Generic, Linear, Scale, Sum
from calipers.graph.capture import capture
from calipers.graph.ir import Graph, Node
from calipers.graph.kinds import Affine, Op
from calipers.graph.products import SELECTIONS
from calipers.graph.smooth_relaxation import Smooth
from calipers.graph.smooth_table import SIGMOID, SQUARE
from calipers.models.classifier import Classifier
from calipers.problem.goals import Goal, Targeted, Untargeted
from calipers.threats.ball import Ball

ORDERS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}

# Arguments with which each activation is tried; an entry that is not listed is tried with its
# defaults.
ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {
    "aten.leaky_relu.default": [(None,), (None, 0.3), (None, 1.7), (None, -0.4), (None, 25.0)],
    "aten.hardtanh.default": [(None,), (None, -0.3, 0.8), (None, 0.25, 0.75)],
    "aten.clamp.default": [
        (None, 0.0),
        (None, -0.5, 0.5),
        (None, None, 0.3),
        (None, -0.2, None),
        (None, 0.4, 0.4),
        (None, 0.7, 0.2),
    ],
    "aten.clamp_min.default": [(None, 0.0), (None, -0.4)],
    "aten.clamp_max.default": [(None, 0.7), (None, -0.2)],
    "aten.gelu.default": [(None,), (None, "tanh")],
    "aten.softplus.default": [(None,), (None, 2.5), (None, 0.5, 3.0)],
    "aten.elu.default": [(None,), (None, 0.4), (None, 30.0)],
    "aten.celu.default": [(None,), (None, 0.3)],
    "aten.pow.Tensor_Scalar": [
        (None, 2),
        (None, 3),
        (None, 4),
        (None, 0.5),
        (None, 1.5),
        (None, -0.5),
        (None, -1),
        (None, -2),
        (None, -3),
        (None, 0.1),
        (None, 5),
    ],
}


def activations() -> list[tuple[str, tuple[Any, ...]]]:
    """Return every entry of the table, with every list of arguments it is tried with."""
    return [(name, args) for name in ACTIVATIONS for args in ARGUMENTS.get(name, [(None,)])]


# ---- random graphs
# --------------------------------------------------------------------------------------------------


class Recipe:
    """Builds a graph operation by operation, in float64; shapes come from running the operation
    once.
    """

    def __init__(self, input_shape: tuple[int, ...], seed: int) -> None:
        self.shapes = [input_shape]
        self.nodes: list[Node] = []
        self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def last(self) -> int:
        """The number of the newest result."""
        return len(self.nodes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the newest result."""
        return self.shapes[-1]

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Draw float64 weights."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale

    def add(self, op: Op, *inputs: int) -> int:
        """Append an operation, on the newest result by default."""
        inputs = inputs or (self.last,)
        value = op.value(*(torch.zeros(1, *self.shapes[i], dtype=torch.float64) for i in inputs))
        self.shapes.append(tuple(value.shape[1:]))
        self.nodes.append(Node(op, inputs, self.shape, "recipe"))
        return self.last

    def linear(self, out: int) -> int:
        """A dense layer on the last axis."""
        fan_in = self.shape[-1]
        return self.add(
            Linear(
                self.normal(out, fan_in, scale=1.5 / math.sqrt(fan_in)),
                self.normal(out, scale=0.5) if self.draw.random() < 0.8 else None,
            )
        )

    def conv(self, out: int, *, same: bool = False) -> int:
        """A convolution, one that keeps the size where `same`."""
        channels, *size = self.shape
        kernel = 3 if same else self.draw.choice([k for k in (1, 2, 3) if k <= min(size)])
        dilation = 2 if kernel == 2 and min(size) > 3 and self.draw.random() < 0.3 else 1
        groups = 2 if channels % 2 == 0 and out % 2 == 0 and self.draw.random() < 0.3 else 1
        rank = len(size)
        weight = self.normal(
            out,
            channels // groups,
            *[kernel] * rank,
            scale=1.5 / math.sqrt(channels // groups * kernel**rank),
        )
        stride, padding = (
            ([1] * rank, [1] * rank)
            if same
            else (
                [self.draw.choice([1, 2]) for _ in size],
                [self.draw.choice([0, 1]) for _ in size],
            )
        )
        bias = self.normal(out, scale=0.5) if self.draw.random() < 0.8 else None
        return self.add(
            Conv(
                weight, bias, tuple(stride), tuple(padding), (dilation,) * rank, groups, tuple(size)
            )
        )

    def norm(self) -> int:
        """Batch norm in evaluation: a scale and a shift for each channel, of either sign."""
        shape = (1, self.shape[0], *[1] * (len(self.shape) - 1))
        return self.add(Scale(self.normal(*shape) + 0.3, self.normal(*shape, scale=0.5)))

    def activation(self, only: str | None = None) -> int:
        """Any entry of the activation table, or one of them."""
        name, args = self.draw.choice(
            [entry for entry in activations() if only is None or entry[0] == only]
        )
        op = ACTIVATIONS[name](args)
        assert op is not None
        if isinstance(op, Smooth) and not bool(op.defined(torch.tensor(-1.0), torch.tensor(0.0))):
            self.add(SQUARE)  # the function asks for positive arguments
            self.add(
                Scale(
                    torch.full((), 0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
                )
            )
        if isinstance(op, Smooth) and op.name.startswith(("exp", "power", "square")):
            self.add(SIGMOID)  # exponentials of exponentials leave every floating point
        return self.add(op)

    def max_pool(self) -> int:
        """Max pooling, with padding, overlap and ceil mode now and then."""
        rank = len(self.shape) - 1
        kernel = self.draw.choice([2, 3]) if min(self.shape[1:]) > 2 else 2
        arguments = (
            None,
            [kernel] * rank,
            [self.draw.choice([1, 2])] * rank,
            [self.draw.choice([0, 1])] * rank,
            [1] * rank,
            self.draw.random() < 0.4,
        )
        pool = {1: functional.max_pool1d, 2: functional.max_pool2d}[rank]
        shape = tuple(pool(torch.zeros(1, *self.shape), *arguments[1:]).shape[1:])
        op = SELECTIONS[f"aten.max_pool{rank}d.default"](arguments, self.shape, shape)
        assert op is not None
        return self.add(op)

    def flatten(self) -> int:
        """One axis."""
        if len(self.shape) == 1:
            return self.last
        shape = self.shape
        return self.add(
            Generic(lambda x: x.reshape(len(x), -1), "reshape", (shape,), diagonal=True)
        )

    def graph(self) -> Graph:
        """The graph so far."""
        return Graph(self.shapes[0], tuple(self.nodes))


def dense_net(seed: int, activation: str | None = None) -> Graph:
    """One to three hidden layers, a residual connection now and then."""
    recipe = Recipe((random.Random(seed).choice([2, 3, 6]),), seed)
    width = recipe.draw.choice([3, 5, 8])
    for depth in range(recipe.draw.choice([1, 2, 2, 3])):
        before = recipe.last
        recipe.linear(width)
        if recipe.draw.random() < 0.2:
            recipe.norm()
        recipe.activation(activation)
        if depth and recipe.draw.random() < 0.4:
            recipe.add(Sum((1.0, recipe.draw.choice([1.0, -1.0]))), recipe.last, before)
    recipe.linear(recipe.draw.choice([2, 3, 4]))
    return recipe.graph()


def conv_net(seed: int, activation: str | None = None) -> Graph:
    """Convolutions in one or two dimensions, some straight behind each other, with batch norm,
    residual connections and max pooling.
    """
    draw = random.Random(seed)
    recipe = Recipe(
        (draw.choice([1, 2]), *([draw.choice([5, 6])] * (1 if draw.random() < 0.2 else 2))), seed
    )
    for _ in range(draw.choice([1, 2])):
        recipe.conv(draw.choice([2, 4]))
        if draw.random() < 0.3:
            recipe.norm()
        if draw.random() < 0.8:
            recipe.activation(activation)
        if draw.random() < 0.5:
            before = recipe.last
            recipe.conv(recipe.shape[0], same=True)
            recipe.activation(activation)
            recipe.add(Sum((1.0, draw.choice([1.0, -1.0]))), recipe.last, before)
    if draw.random() < 0.4 and min(recipe.shape[1:]) >= 2:
        recipe.max_pool()
    recipe.flatten()
    recipe.linear(draw.choice([2, 3, 4]))
    return recipe.graph()


# ---- questions
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A graph, points with labels, a threat and a goal."""

    graph: Graph
    x: Tensor
    y: Tensor
    ball: Ball
    goal: Goal

    @property
    def classes(self) -> int:
        """The number of logits."""
        return self.graph.nodes[-1].shape[0]

    def worst(self, logits: Tensor, repeats: int = 1) -> Tensor:
        """Return the deciding margin of logits (N * repeats, K), the points repeated as a whole."""
        goal = (
            self.goal
            if not isinstance(self.goal, Targeted)
            else Targeted(torch.as_tensor(self.goal.target).expand(len(self.x)).repeat(repeats))
        )
        return goal.worst(goal.margins(logits, self.y.repeat(repeats)))

    def take(self, index: Tensor) -> Case:
        """Return the case for the chosen points."""
        return replace(
            self,
            x=self.x[index],
            y=self.y[index],
            ball=self.ball.take(index),
            goal=self.goal.take(index),
        )

    def at(self, radius: float | Tensor) -> Case:
        """Return the case at another radius."""
        return replace(self, ball=self.ball.at(radius))


def random_ball(
    draw: random.Random, generator: torch.Generator, points: int, shape: tuple[int, ...]
) -> Ball:
    """Any norm; with and without a box, a mask, weights, and a radius for each point."""
    norm = draw.choice(sorted(ORDERS))
    size = 10 ** draw.uniform(-1.3, 0.3) * {"linf": 1.0, "l2": 2.0, "l1": 4.0}[norm]
    radius = (
        size
        if draw.random() < 0.5
        else torch.rand(points, generator=generator, dtype=torch.float64) * size
    )
    low = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.2
    box = draw.choice([None, (0.0, 1.0), (low - 0.2, low + 0.8)])
    mask = torch.rand(shape, generator=generator) < 0.7 if draw.random() < 0.3 else None
    weights = (
        0.3 + 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
        if draw.random() < 0.3
        else None
    )
    return Ball(norm, radius, box, mask, weights)


def case_of(graph: Graph, seed: int, points: int = 3, ball: Ball | None = None) -> Case:
    """Ask a random question about a graph; the label is the predicted class, so that there is
    something to prove.
    """
    draw, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    ball = ball or random_ball(draw, generator, points, graph.input_shape)
    x = torch.rand(points, *graph.input_shape, generator=generator, dtype=torch.float64)
    if ball.box is not None:
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in ball.box)
        x = torch.minimum(torch.maximum(low + x * (high - low), low), high)
    classes = graph.nodes[-1].shape[0]
    y = graph.values(x)[-1].argmax(1)
    goal = (
        Untargeted()
        if draw.random() < 0.7
        else Targeted((y + draw.randrange(1, classes)) % classes)
    )
    return Case(graph, x, y, ball, goal)


def random_case(seed: int, activation: str | None = None, ball: Ball | None = None) -> Case:
    """Return a random question about a random network."""
    graph = (dense_net if seed % 2 else conv_net)(seed, activation)
    return case_of(graph, seed, ball=ball)


# ---- attacks
# --------------------------------------------------------------------------------------------------


def inside(case: Case, points: Tensor) -> Tensor:
    """Is each point (R, N, *D) admissible, (R, N) bool? Compared in extended precision as far as
    numpy has it, without tolerance otherwise.
    """
    ball = case.ball
    delta = (points - case.x).flatten(2)
    weights = None if ball.weights is None else ball.weights.flatten()
    size = torch.linalg.vector_norm(
        delta if weights is None else delta * weights, ORDERS[ball.norm], dim=-1
    )
    fits = size <= ball.radii(len(case.x))
    if ball.box is not None:
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in ball.box)
        fits &= ((points >= low) & (points <= high)).flatten(2).all(-1)
    if ball.mask is not None:
        fits &= (delta == 0)[..., ~ball.mask.flatten()].all(-1)
    return fits


def admissible(case: Case, delta: Tensor) -> Tensor:
    """Return points (R, N, *D) near x + delta (R, N, d) that lie inside: scaled into the ball, cut
    to the box and the mask.

    What rounding throws out all the same goes back to x.
    """
    ball = case.ball
    weights = (
        torch.ones(delta.shape[-1], dtype=delta.dtype)
        if ball.weights is None
        else ball.weights.flatten()
    )
    keep = (
        torch.ones(delta.shape[-1], dtype=torch.bool) if ball.mask is None else ball.mask.flatten()
    )
    delta = delta * keep
    size = torch.linalg.vector_norm(delta * weights, ORDERS[ball.norm], dim=-1)
    radius = ball.radii(len(case.x)) * (1 - 1e-14)
    shrink = (radius / size.clamp_min(1e-300)).clamp(max=1)
    points = case.x + (delta * shrink[..., None]).view(*delta.shape[:2], *case.x.shape[1:])
    if ball.box is not None:
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in ball.box)
        points = torch.minimum(torch.maximum(points, low), high)
    fits = inside(case, points).view(*delta.shape[:2], *[1] * (case.x.dim() - 1))
    return torch.where(fits, points, case.x)


def steepest(case: Case, g: Tensor) -> Tensor:
    """Return the offset (R, N, d) of the ball alone that raises <g, .> most."""
    weights = (
        torch.ones(g.shape[-1], dtype=g.dtype)
        if case.ball.weights is None
        else case.ball.weights.flatten()
    )
    g = g if case.ball.mask is None else g * case.ball.mask.flatten()
    g, radius = g / weights, case.ball.radii(len(case.x))[:, None]
    if case.ball.norm == "linf":
        step = g.sign() * radius
    elif case.ball.norm == "l2":
        step = g / g.norm(dim=-1, keepdim=True).clamp_min(1e-300) * radius
    else:
        step = (
            torch.zeros_like(g).scatter(-1, g.abs().argmax(-1, keepdim=True), 1.0)
            * g.sign()
            * radius
        )
    return step / weights


def attacked(case: Case, seed: int, steps: int = 2) -> Tensor:
    """Return admissible points (R, N, *D).

    The centre, random ones, corners, those that drive one element of every number far, and those
    that lower the margin step by step.
    """
    generator = torch.Generator().manual_seed(seed)
    n, d = len(case.x), case.x[0].numel()
    random_directions = torch.randn(5, n, d, generator=generator, dtype=torch.float64)
    spikes = (
        torch.zeros(3, n, d, dtype=torch.float64).scatter(
            -1, torch.randint(d, (3, n, 1), generator=generator), 1.0
        )
        * random_directions[:3].sign()
    )
    lengths = torch.tensor([1.0, 1.0, 0.7, 0.3, 1e-3], dtype=torch.float64).view(-1, 1, 1)
    reach = case.ball.radii(n)[:, None]
    still, far = (
        torch.zeros(1, n, d, dtype=torch.float64),
        steepest(case, random_directions) * lengths,
    )
    starts = torch.cat([still, far, reach * random_directions.sign(), reach * spikes * 1e3])
    found = [admissible(case, starts)]
    gradients = torch.cat([_numbers_gradient(case, generator), _margin_gradient(case, found[0])])
    found.append(admissible(case, steepest(case, gradients)))
    for _ in range(steps):
        here = found[-1]
        best = steepest(case, _margin_gradient(case, here))
        found.append(
            admissible(case, torch.cat([best, ((here - case.x).flatten(2) + best) / 2])[:24])
        )
    return torch.cat(found)


def _margin_gradient(case: Case, points: Tensor) -> Tensor:
    """Return minus the gradient of the deciding margin at points (R, N, *D), (R, N, d)."""
    flat = points.flatten(0, 1).clone().requires_grad_(True)
    worst = case.worst(case.graph.values(flat)[-1], len(points))
    return -torch.autograd.grad(worst.sum(), flat)[0].reshape(*points.shape[:2], -1)


def _numbers_gradient(case: Case, generator: torch.Generator) -> Tensor:
    """Return the gradient of a random element of every number the bounds depend on, with a random
    sign, at the centre: (numbers, N, d).
    """
    x = case.x.clone().requires_grad_(True)
    values = case.graph.values(x)
    gradients = []
    for number in [i for i in case.graph.nonlinear if i] or [len(values) - 1]:
        flat = values[number].flatten(1)
        pick = torch.randint(flat.shape[1], (len(flat), 1), generator=generator)
        sign = torch.randint(2, pick.shape, generator=generator) * 2 - 1
        gradients.append(
            torch.autograd.grad((flat.gather(1, pick) * sign).sum(), x, retain_graph=True)[
                0
            ].flatten(1)
        )
    return torch.stack(gradients)


class Carrier(nn.Module):
    """A random network as a module that knows its own graph."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """(N, *D) -> (N, K)."""
        return self.case.graph.values(x)[-1] * self.scale

    def graph(self) -> Graph:
        """Carry the graph itself."""
        return self.case.graph


# ---- real modules
# --------------------------------------------------------------------------------------------------


class Apply(nn.Module):
    """Any function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """The function."""
        return self.function(x)


class Residual(nn.Module):
    """x + body(x), or x - body(x)."""

    def __init__(self, *body: nn.Module, sign: float = 1.0) -> None:
        super().__init__()
        self.body, self.sign = nn.Sequential(*body), sign

    def forward(self, x: Tensor) -> Tensor:
        """The branch joins its input."""
        return x + self.body(x) if self.sign > 0 else x - self.body(x)


class TwoBranches(nn.Module):
    """cat of two branches along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Both see the same input."""
        return torch.cat([self.left(x).relu(), self.right(x)], 1)


class Attention(nn.Module):
    """Attention written by hand, with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.mixed, self.out = (
            heads,
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        n, t, d = x.shape
        q, k, v = (
            self.mixed(x)
            .view(n, t, self.heads, 3, d // self.heads)
            .permute(0, 2, 3, 1, 4)
            .unbind(2)
        )
        weights = (q @ k.transpose(-1, -2) * (d // self.heads) ** -0.5).softmax(-1)
        joined = (weights @ v).transpose(1, 2).reshape(n, t, d)
        return x + self.out(joined)


class SmallTransformer(nn.Module):
    """A vision transformer: patches, a class token, positions, layers, the token's answer."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.patches, self.token, self.place = (
            nn.Conv2d(2, 4, 3, stride=3),
            nn.Parameter(torch.randn(1, 1, 4)),
            nn.Parameter(torch.randn(1, 5, 4)),
        )
        self.layers, self.last = nn.Sequential(*layers), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2, 6, 6) -> (N, 3)."""
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.place
        return self.last(self.layers(h)[:, 0])


class Mixer(nn.Module):
    """An MLP-Mixer's block: over places, then over channels."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.along, self.across = (
            nn.Sequential(nn.Linear(places, 5), nn.GELU(), nn.Linear(5, places)),
            nn.Sequential(nn.Linear(width, 5), nn.GELU(), nn.Linear(5, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        x = x + self.along(self.one(x).transpose(1, 2)).transpose(1, 2)
        return x + self.across(self.two(x))


class Recurrent(nn.Module):
    """The last state of a recurrent layer decides."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, 3)."""
        return self.last(self.layer(x)[0][:, -1])


class Shaped(nn.Module):
    """Down, up again by a transposed convolution, and joined with what was there: a small U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.join = (
            nn.Conv2d(2, 3, 2, stride=2),
            nn.ConvTranspose2d(3, 2, 2, stride=2),
            nn.Conv2d(4, 2, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2, 6, 6) -> (N, 2, 6, 6)."""
        return self.join(torch.cat([x, self.up(self.down(x).relu())], 1))


class Dense(nn.Module):
    """A DenseNet's block: each layer sees all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2, 6, 6) -> (N, 6, 6, 6)."""
        one = torch.cat([x, self.one(x.relu())], 1)
        return torch.cat([one, self.two(one.relu())], 1)


def _stirred(norm: nn.Module) -> nn.Module:
    """Give a batch norm statistics that are far from 0 and 1."""
    with torch.no_grad():
        for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.randn_like(tensor).abs() + 0.2
                    if name == "running_var"
                    else torch.randn_like(tensor)
                )
    return norm


def _ending(layers: Callable[[], list[nn.Module]], features: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers(), nn.Flatten(), nn.Linear(features, 3))


def _dense(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), Apply(function), nn.Linear(6, 3))


IMAGE, FLAT, SERIES = (2, 6, 6), (4,), (2, 9)

ZOO: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "dense": (
        FLAT,
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)
        ),
    ),
    "linear": (FLAT, lambda: nn.Linear(4, 3)),
    "dense on images": (
        IMAGE,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 3)),
    ),
    "linear on an inner axis": (SERIES, _ending(lambda: [nn.Linear(9, 4), nn.ReLU()], 8)),
    "conv": (IMAGE, _ending(lambda: [nn.Conv2d(2, 4, 3), nn.ReLU()], 64)),
    "conv, stride and padding": (
        IMAGE,
        _ending(
            lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 2)], 8
        ),
    ),
    "conv, uneven": (
        IMAGE,
        _ending(
            lambda: [nn.Conv2d(2, 5, (3, 2), stride=(2, 3), padding=(0, 1), bias=False), nn.ReLU()],
            30,
        ),
    ),
    "conv, dilation": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 4, 2, dilation=2, padding=1), nn.ReLU()], 144),
    ),
    "conv, groups": (
        IMAGE,
        _ending(
            lambda: [nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=4)], 36
        ),
    ),
    "conv, many channels": (
        IMAGE,
        _ending(
            lambda: [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2)], 24
        ),
    ),
    "conv behind conv": (
        IMAGE,
        _ending(
            lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()], 108
        ),
    ),
    "conv1d": (SERIES, _ending(lambda: [nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.ReLU()], 20)),
    "conv3d": ((1, 3, 4, 4), _ending(lambda: [nn.Conv3d(1, 2, 2), nn.ReLU()], 36)),
    "residual": (
        IMAGE,
        _ending(
            lambda: [
                nn.Conv2d(2, 4, 3),
                Residual(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
                nn.ReLU(),
            ],
            64,
        ),
    ),
    "residual, subtracted": (
        FLAT,
        lambda: nn.Sequential(
            nn.Linear(4, 5),
            Residual(nn.ReLU(), nn.Linear(5, 5), sign=-1.0),
            nn.ReLU(),
            nn.Linear(5, 3),
        ),
    ),
    "added to itself": (FLAT, _dense(lambda x: x.relu() + x)),
    "batch norm": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 3, 3), _stirred(nn.BatchNorm2d(3)), nn.ReLU()], 48),
    ),
    "batch norm, dense": (
        FLAT,
        lambda: nn.Sequential(
            nn.Linear(4, 6),
            _stirred(nn.BatchNorm1d(6)),
            nn.ReLU(),
            nn.Linear(6, 3),
            _stirred(nn.BatchNorm1d(3, affine=False)),
        ),
    ),
    "batch norm, series": (
        SERIES,
        lambda: nn.Sequential(
            _stirred(nn.BatchNorm1d(2)), nn.Flatten(), nn.Linear(18, 4), nn.ReLU(), nn.Linear(4, 3)
        ),
    ),
    "average pool": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)], 27),
    ),
    "average pool, padded": (
        IMAGE,
        lambda: nn.Sequential(
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.Flatten(),
            nn.Linear(18, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        ),
    ),
    "adaptive pool": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((2, 3))], 18),
    ),
    "global pool": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)], 3),
    ),
    "max pool": (IMAGE, _ending(lambda: [nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.ReLU()], 12)),
    "max pool, padded": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(3, 2, 1)], 27),
    ),
    "max pool, ceil": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)], 27),
    ),
    "max pool, dilation": (IMAGE, _ending(lambda: [nn.MaxPool2d(2, 1, dilation=2)], 32)),
    "max pool 1d": (SERIES, _ending(lambda: [nn.Conv1d(2, 3, 2), nn.MaxPool1d(2)], 12)),
    "pad": (
        IMAGE,
        _ending(lambda: [nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 2, 3), nn.ReLU()], 70),
    ),
    "pad, reflected": (
        IMAGE,
        _ending(lambda: [nn.ReflectionPad2d(1), nn.Conv2d(2, 2, 3), nn.ReLU()], 72),
    ),
    "pad, replicated": (
        IMAGE,
        _ending(lambda: [nn.ReplicationPad2d(1), nn.Conv2d(2, 2, 3), nn.ReLU()], 72),
    ),
    "cat": (IMAGE, _ending(lambda: [TwoBranches(), nn.ReLU()], 180)),
    "cat with zeros": (
        FLAT,
        lambda: nn.Sequential(
            nn.Linear(4, 3),
            Apply(lambda x: torch.cat([x, torch.zeros_like(x)], 1)),
            nn.ReLU(),
            nn.Linear(6, 3),
        ),
    ),
    "permute": (
        IMAGE,
        _ending(lambda: [Apply(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(2, 3), nn.ReLU()], 108),
    ),
    "slice": (
        IMAGE,
        lambda: nn.Sequential(
            Apply(lambda x: x[:, :, 1:5:2, :-1]),
            nn.Flatten(),
            nn.Linear(20, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        ),
    ),
    "select and stack": (
        IMAGE,
        _ending(lambda: [Apply(lambda x: torch.stack([x[:, 0], x[:, 1, :, :].flip(2)], 1))], 72),
    ),
    "mean": (
        IMAGE,
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.ReLU(), Apply(lambda x: x.mean((2, 3))), nn.Linear(3, 3)
        ),
    ),
    "sum and scale": (
        IMAGE,
        _ending(
            lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), Apply(lambda x: -(x.sum(-1) * 0.5 - 1.0) / 4)],
            12,
        ),
    ),
    "expand": (FLAT, _ending(lambda: [Apply(lambda x: x.unsqueeze(1).expand(-1, 2, 4))], 8)),
    "constant minus x": (FLAT, _dense(lambda x: torch.ones(6, dtype=x.dtype) * 0.5 - x.relu())),
    "upsample": (
        IMAGE,
        _ending(lambda: [nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3, stride=3), nn.ReLU()], 32),
    ),
    "pixel shuffle": (
        (4, 3, 3),
        _ending(lambda: [nn.PixelShuffle(2), nn.Conv2d(1, 2, 2), nn.ReLU()], 50),
    ),
    "dropout in evaluation": (
        FLAT,
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 3)),
    ),
    "relu in place": (
        FLAT,
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    ),
    "leaky relu": (
        FLAT,
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 3), nn.LeakyReLU()),
    ),
    "hardtanh": (FLAT, _dense(lambda x: functional.hardtanh(x, -0.5, 0.25))),
    "relu6": (FLAT, _dense(lambda x: functional.relu6(4 * x))),
    "clamp from below": (FLAT, _dense(lambda x: x.clamp(min=-0.2))),
    "clamp at zero": (FLAT, _dense(lambda x: x.clamp(min=0))),
    "clamp from above": (FLAT, _dense(lambda x: x.clamp(max=0.3))),
    "clamp both": (FLAT, _dense(lambda x: x.clamp(-0.3, 0.4))),
    "sigmoid": (FLAT, _dense(torch.sigmoid)),
    "tanh": (FLAT, _dense(torch.tanh)),
    "abs": (FLAT, _dense(torch.abs)),
    "residual, batch norm": (
        IMAGE,
        _ending(
            lambda: [
                nn.Conv2d(2, 3, 3),
                Residual(
                    nn.Conv2d(3, 3, 3, padding=1),
                    _stirred(nn.BatchNorm2d(3)),
                    nn.ReLU(),
                    nn.Conv2d(3, 3, 1),
                ),
            ],
            48,
        ),
    ),
    "densely connected": (IMAGE, _ending(lambda: [Dense(), nn.AvgPool2d(2)], 54)),
    "vision transformer": (
        IMAGE,
        lambda: SmallTransformer(
            nn.LayerNorm(4),
            Attention(4, 2),
            nn.LayerNorm(4),
            Residual(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)),
        ),
    ),
    "transformer layer": (
        IMAGE,
        lambda: SmallTransformer(
            nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True)
        ),
    ),
    "transformer layer, norm first": (
        IMAGE,
        lambda: SmallTransformer(
            nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
        ),
    ),
    "mixer": ((4, 3), _ending(lambda: [Mixer(4, 3)], 12)),
    "gru": ((3, 2), lambda: Recurrent(nn.GRU(2, 3, batch_first=True), 3)),
    "lstm": ((3, 2), lambda: Recurrent(nn.LSTM(2, 3, batch_first=True), 3)),
    "group norm": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.SiLU()], 16),
    ),
    "instance norm": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 2, 3), nn.InstanceNorm2d(2, affine=True), nn.ReLU()], 32),
    ),
    "prelu, mish and silu": (
        FLAT,
        lambda: nn.Sequential(
            nn.Linear(4, 6),
            nn.PReLU(6),
            nn.Linear(6, 5),
            nn.Mish(),
            nn.Linear(5, 4),
            nn.SiLU(),
            nn.Linear(4, 3),
        ),
    ),
    "prelu on images": (IMAGE, _ending(lambda: [nn.Conv2d(2, 3, 3), nn.PReLU(3)], 48)),
    "up and down": (IMAGE, _ending(lambda: [Shaped(), nn.ReLU()], 72)),
    "transposed, uneven": (
        IMAGE,
        _ending(lambda: [nn.Conv2d(2, 2, 3), nn.ReLU(), nn.ConvTranspose2d(2, 2, 3, 2, 1, 1)], 128),
    ),
    "bilinear upsampling": (
        IMAGE,
        _ending(
            lambda: [
                nn.Upsample(scale_factor=2, mode="bilinear"),
                nn.Conv2d(2, 2, 3, stride=3),
                nn.ReLU(),
            ],
            32,
        ),
    ),
    "softmax": (FLAT, _dense(lambda x: x.softmax(1))),
    "attention of torch": (
        SERIES,
        _ending(
            lambda: [
                nn.Linear(9, 3),
                Apply(lambda x: functional.scaled_dot_product_attention(x, 2 * x, x)),
            ],
            6,
        ),
    ),
    "product": (FLAT, _dense(lambda x: x * x.flip(1))),
    "product, broadcast": (FLAT, _dense(lambda x: x * x[:, :1])),
    "square": (FLAT, _dense(lambda x: x * x)),
    "softsign": (FLAT, _dense(functional.softsign)),
    "quotient": (FLAT, _dense(lambda x: x / (1 + x.flip(1).square()))),
    "largest of two": (
        FLAT,
        _dense(
            lambda x: (
                torch.maximum(x, x.flip(1))
                - torch.minimum(x.relu(), torch.tensor(0.3, dtype=x.dtype))
            )
        ),
    ),
    "matrix product": (
        SERIES,
        _ending(lambda: [nn.Linear(9, 3), Apply(lambda x: x.transpose(1, 2) @ x)], 9),
    ),
    "constant times matrix": (
        SERIES,
        _ending(
            lambda: [
                Apply(lambda x: torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=x.dtype) @ x),
                nn.ReLU(),
            ],
            18,
        ),
    ),
    "sum over indices": (
        SERIES,
        _ending(
            lambda: [
                Apply(
                    lambda x: torch.einsum(
                        "nct,cd->ndt", x, torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=x.dtype)
                    )
                ),
                nn.ReLU(),
            ],
            18,
        ),
    ),
    "padded with a value": (
        FLAT,
        _ending(
            lambda: [
                Apply(lambda x: functional.pad(x, (1, 1), value=-1.5)),
                nn.Linear(6, 4),
                nn.ReLU(),
            ],
            4,
        ),
    ),
    "rolled and picked": (
        IMAGE,
        _ending(
            lambda: [Apply(lambda x: x.roll(2, 3).index_select(2, torch.tensor([0, 3, 3])))], 36
        ),
    ),
    "masked": (
        FLAT,
        _dense(
            lambda x: torch.where(torch.arange(6) > 2, x, x.flip(1)).masked_fill(
                torch.arange(6) == 1, 0.7
            )
        ),
    ),
    "three chunks": (
        FLAT,
        _dense(lambda x: torch.cat([c.relu() * k for k, c in enumerate(x.chunk(3, 1), 1)], 1)),
    ),
    "weighted sum": (FLAT, _dense(lambda x: torch.add(x.relu(), x, alpha=-2.5))),
    "constant that enlarges": (
        FLAT,
        _ending(
            lambda: [
                nn.Linear(4, 1),
                Apply(lambda x: x * torch.arange(5.0, dtype=x.dtype) + 1),
                nn.ReLU(),
            ],
            5,
        ),
    ),
    "max pool 3d": ((1, 4, 4, 4), _ending(lambda: [nn.MaxPool3d(2)], 8)),
    "hard gates": (
        FLAT,
        _dense(lambda x: functional.hardsigmoid(4 * x) + functional.hardswish(4 * x)),
    ),
    "variance": (FLAT, _dense(lambda x: x / (x.var(1, keepdim=True) + 0.1).sqrt())),
    "single logit": (FLAT, lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))),
    "single logit, flat": (
        FLAT,
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1), nn.Flatten(0)),
    ),
    "single logit, selected": (
        FLAT,
        lambda: nn.Sequential(
            nn.Linear(4, 6),
            nn.Tanh(),
            Apply(lambda x: x[:, 2]),
            nn.ReLU(),
            Apply(lambda x: 2 * x - 1),
        ),
    ),
    "standardised": (IMAGE, _ending(lambda: [nn.Conv2d(2, 3, 3), nn.ReLU()], 48)),
}


def module_of(name: str) -> nn.Module:
    """Return a module of the zoo in evaluation mode, the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(list(ZOO).index(name))
        return ZOO[name][1]().eval()


def points_of(name: str, count: int = 5) -> Tensor:
    """Return points of the module's input shape in [0, 1], float32."""
    return torch.rand(count, *ZOO[name][0], generator=torch.Generator().manual_seed(7))


def classifier_of(name: str) -> Classifier:
    """Return the module as a checked classifier (a single logit has become two), with statistics
    for the standardised one.
    """
    classifier = (
        Classifier(module_of(name), mean=[0.4, 0.6], std=[0.2, 0.3])
        if name == "standardised"
        else Classifier(module_of(name))
    )
    classifier.check(points_of(name))
    return classifier


@cache
def captured(name: str) -> Graph:
    """Return the graph of a module of the zoo; exporting costs a fraction of a second, so it is
    kept.
    """
    return capture(classifier_of(name), points_of(name))


def affine_nodes(graph: Graph) -> list[tuple[Affine, list[tuple[int, ...]], tuple[int, ...]]]:
    """Return every affine operation with its input shapes and its shape."""
    return [
        (node.op, [graph.shape(i) for i in node.inputs], node.shape)
        for node in graph.nodes
        if isinstance(node.op, Affine)
    ]
