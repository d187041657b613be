"""The dual: a lower bound as a function of slopes and multipliers.

The bound of one direction over one region is a function of the free slopes alpha in [0, 1] of every
unstable element (Xu et al. 2021, alpha-CROWN) and of a multiplier beta for every constraint of a
branch (Wang et al. 2021, beta-CROWN); any values give a sound bound. Its supergradient needs no
automatic differentiation: a backward pass leaves the coefficient A of every unstable element, its
minimiser x* is propagated forward through the same lines, and

    d bound / d alpha = A+ d(lower line)(z) / d alpha + A- d(upper line)(z) / d alpha,
    d bound / d beta = -(constraint at z),

with z the pre-activation on that way (Danskin's theorem). These values also show where the relaxed
network is weakest: which element to split, and where to look for an adversarial example. None of
this needs trust: `confirm` proves what was found.

All tensors hold one row a problem, (P, ...); only unstable elements are free, and they stand in
columns (P, U).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from calipers.bounds.interval import Box
from calipers.bounds.parametrised import AlphaLines
from calipers.bounds.relaxation import Relaxed
from calipers.bounds.unstable_columns import Columns
from calipers.graph.ir import Graph, Node
from calipers.graph.kinds import Affine, is_affine, is_elementwise
from calipers.graph.relaxations import Lines, Parametrised
from calipers.threats.ball import Region


@dataclass(eq=False)
class Root:
    """A proved relaxed network, and what all branches of it share.

    `columns` by number are the unstable elements; `base` by node, slope and intercept (N, n) of the
    stable elements, in the dtype of the search; `constants` by node, the constants of affine
    operations. `inside` by number, of a receptive field: which elements (N, n) are inside the
    image.
    """

    state: Relaxed
    graph: Graph
    region: Region
    columns: dict[int, Columns] = field(default_factory=dict)
    base: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    constants: dict[int, Tensor | None] = field(default_factory=dict)
    inside: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        state: Relaxed,
        dtype: torch.dtype,
        region: Region,
        inside: dict[int, Tensor] | None = None,
    ) -> Root:
        """Return the root of a proved state.

        `region` are the same regions in the search's dtype. Numbers settled later are added by
        `grow`.
        """
        root = cls(state, state.graph.to(dtype), region, inside=inside or {})
        root.grow()
        return root

    def grow(self) -> None:
        """Add the numbers that have been settled since."""
        for k, node in enumerate(self.graph.nodes, start=1):
            if is_affine(node.op) and k not in self.constants:
                self.constants[k] = _constant(
                    node.op, [self.graph.shape(i) for i in node.inputs], self.region.center
                )
            if not is_elementwise(node.op) or k in self.base or k not in self.state.relaxations:
                continue
            i = node.inputs[0]
            box, lines = self.state.boxes[i], self.state.lines(k)
            if i not in self.columns:
                users = [n.op for n in self.graph.nodes if n.inputs[0] == i and n.op.elementwise]
                self.columns[i] = Columns.of(
                    torch.stack([op.unstable(box.lower, box.upper) for op in users])
                    .any(0)
                    .flatten(1),
                    among=self.inside.get(i),
                )
            slope, at = (
                t.flatten(1).to(self.region.center.dtype)
                for t in (lines.lower_slope, lines.lower_intercept)
            )
            # A row without unstable elements keeps its own constants: its one column is padding.
            at = self.columns[i].put(
                at,
                torch.where(
                    self.columns[i].real.any(1, keepdim=True),
                    torch.zeros_like(at[:, :1]),
                    self.columns[i].get(at),
                ),
            )
            self.base[k] = slope, (at if bool(at.any()) else None)

    def ends(self, number: int, dtype: torch.dtype) -> Box:
        """Return the ends of a number's columns, (N, U) each."""
        box, columns = self.state.boxes[number], self.columns[number]
        return Box(columns.get(box.lower).to(dtype), columns.get(box.upper).to(dtype))


def _constant(op: Affine, shapes: list[tuple[int, ...]], like: Tensor) -> Tensor | None:
    constant = op.value(
        *(torch.zeros(1, *shape, dtype=like.dtype, device=like.device) for shape in shapes)
    )
    return constant if bool(constant.any()) else None


@dataclass(eq=False)
class Free:
    """What may be chosen: slopes, multipliers, and weights of directions.

    `alpha` by node and `beta` by number, (P, U) each; `mix (P, S)`, the logarithms of the weights
    of a problem's directions. beta > 0 weighs the constraint z >= low of a branch, beta < 0 z <=
    high.
    """

    alpha: dict[int, Tensor]
    beta: dict[int, Tensor]
    mix: Tensor

    def each(self, change: Callable[[str, int, Tensor], Tensor]) -> Free:
        """Return the choices with all values replaced by a function's results.

        `change(kind, key, values)` is called for each tensor.
        """
        alpha, beta = (
            {k: change(kind, k, t) for k, t in held.items()}
            for kind, held in (("alpha", self.alpha), ("beta", self.beta))
        )
        return Free(alpha, beta, change("mix", 0, self.mix))

    def of(self, kind: str, key: int) -> Tensor:
        """Return the values of that kind and key."""
        return self.mix if kind == "mix" else self.alpha[key] if kind == "alpha" else self.beta[key]

    def take(self, rows: Tensor) -> Free:
        """Return the choices of the chosen rows."""
        return self.each(lambda kind, k, t: t[rows])

    def replaced(self, better: Tensor, other: Free) -> Free:
        """Return the other's choices where `better (P,)`."""
        return self.each(lambda kind, k, t: torch.where(better[:, None], other.of(kind, k), t))

    def written(self, rows: Tensor, other: Free) -> Free:
        """Return the choices with the other's in the chosen rows."""
        return self.each(lambda kind, k, t: t.index_copy(0, rows, other.of(kind, k)))

    @property
    def weights(self) -> Tensor:
        """The weights of the directions (P, S).

        Not negative, of sum 1 but for rounding.
        """
        return self.mix.softmax(1)


class Sight(NamedTuple):
    """What one evaluation of the dual found.

    The bounds (P,), the minimisers (P, *D), for each node the coefficients and lines of its
    columns, and by number the values z on the minimisers' way.
    """

    bound: Tensor
    point: Tensor
    coefficients: dict[int, Tensor]
    lines: dict[int, Lines]
    values: dict[int, Tensor]

    def take(self, rows: Tensor) -> Sight:
        """Return what was found for the chosen rows."""
        lines = {k: Lines(*(t[rows] for t in v)) for k, v in self.lines.items()}
        held = ({k: t[rows] for k, t in one.items()} for one in (self.coefficients, self.values))
        coefficients, values = held
        return Sight(self.bound[rows], self.point[rows], coefficients, lines, values)


class Dual:
    """Lower bounds over branches, as functions of the free choices.

    They bound the largest of some directions, `spec (P, S, *shape of number)` plus `offsets (P,
    S)`, over branches of a root. A weighted mean of directions is at most the largest, so a bound
    of the mean serves, whatever the weights. `rows (P,)` are the branches' places in the root;
    `cuts` by number are the ends that branching has set, (P, U) each, infinite where it has not.
    """

    def __init__(
        self,
        root: Root,
        rows: Tensor,
        number: int,
        spec: Tensor,
        offsets: Tensor | None = None,
        cuts: dict[int, Box] | None = None,
    ) -> None:
        self.root, self.rows, self.number, self.spec = root, rows, number, spec
        self.offsets = spec.new_zeros(spec.shape[:2]) if offsets is None else offsets
        self.graph, self.region, self.cuts = root.graph, root.region.take(rows), cuts or {}
        self.columns: dict[int, Columns] = {}
        self.alpha_lines: dict[int, AlphaLines] = {}
        self.sheets: dict[int, Parametrised] = {}
        for k, node in enumerate(self.graph.nodes[:number], start=1):
            if is_elementwise(node.op):
                i = node.inputs[0]
                if i not in self.columns:
                    self.columns[i] = root.columns[i].take(rows)
                ends = self.ends(i)
                self.alpha_lines[k] = AlphaLines(node.op, ends.lower, ends.upper)
            elif not is_affine(node.op):
                self.sheets[k] = self._sheet(k, node)
        one = len(rows) > 0 and len(root.region.center) == 1
        self.base = {
            k: base if one else (base[0][rows], None if base[1] is None else base[1][rows])
            for k, base in root.base.items()
            if k in self.alpha_lines
        }
        # An element may enter a sum only once: padding has weight 0.
        self.weigh = {i: c.real.to(spec.dtype) for i, c in self.columns.items()}

    def _sheet(self, k: int, node: Node) -> Parametrised:
        """Return the planes of an operation on several elements.

        In the search's dtype.
        """
        state, rows, dtype = self.root.state, self.rows, self.spec.dtype
        boxes = [state.boxes[i].take(rows) for i in node.inputs]
        ends = [(b.lower.to(dtype), b.upper.to(dtype)) for b in boxes]
        return node.op.parametrised(state.relaxations[k].take(rows).to(dtype), *ends)

    def ends(self, number: int) -> Box:
        """Return the columns' ends in the branches, (P, U).

        In the search's dtype.
        """
        return self.cut(number, self.root.ends(number, self.spec.dtype).take(self.rows))

    def cut(self, number: int, box: Box) -> Box:
        """Return the columns' ends intersected with the branches' cuts.

        An empty intersection becomes a single point.
        """
        cut, filled = self.cuts.get(number), self.columns[number].filled
        if cut is None:
            return box
        lower = torch.maximum(box.lower, filled(cut.lower).to(box.lower.dtype))
        return Box(
            lower,
            torch.maximum(torch.minimum(box.upper, filled(cut.upper).to(box.upper.dtype)), lower),
        )

    def guess(self) -> Free:
        """Return where the search begins.

        The activations' own guesses of alpha, and multipliers of 0.
        """
        alpha = {k: lines.start() for k, lines in self.alpha_lines.items()}
        alpha |= {
            k: start for k, sheet in self.sheets.items() if (start := sheet.start()) is not None
        }
        return Free(
            alpha,
            {i: torch.zeros_like(self.weigh[i]) for i in self.cuts if i in self.columns},
            self.spec.new_zeros(self.spec.shape[:2]),
        )

    def see(self, free: Free, *, forward: bool = True) -> Sight:
        """Evaluate the bounds and their minimisers.

        With `forward` also the values on the minimisers' way through the lines. Cost: a backward
        and a forward pass a row.
        """
        behind: dict[int, Tensor] = {}
        lines: dict[int, Lines] = {}
        chosen: dict[int, tuple[Tensor, Tensor]] = {}
        weights = free.weights
        offset = (weights * self.offsets).sum(1)
        pending = {
            self.number: self.spec[:, 0]
            if self.spec.shape[1] == 1
            else (weights[:, None] @ self.spec.flatten(2)).view(-1, *self.spec.shape[2:])
        }
        for k in range(self.number, 0, -1):
            if k not in pending:
                continue
            a, node = pending.pop(k), self.graph.nodes[k - 1]
            if k in free.beta and k in self.cuts:
                a, gain = self._constrained(k, a, free.beta[k])
                offset = offset + gain
            if is_affine(node.op):
                constant = self.root.constants[k]
                if constant is not None:
                    offset = offset + a.flatten(1) @ constant.flatten()
                backs = node.op.adjoint(a)
            elif is_elementwise(node.op):
                behind[k], lines[k], chosen[k], back, gain = self._through(
                    k, node.inputs[0], a, free.alpha[k]
                )
                offset = offset + gain
                backs = (back,)
            else:
                shapes = [self.graph.shape(i) for i in node.inputs]
                backs, gain = self.sheets[k].backward(a, free.alpha.get(k), shapes)
                behind[k] = a
                offset = offset + gain
            for i, back_i in zip(node.inputs, backs, strict=True):
                shaped = back_i.view(len(a), *self.graph.shape(i))
                pending[i] = pending[i] + shaped if i in pending else shaped
        if 0 not in pending:
            return Sight(offset, self.region.center, behind, lines, {})
        best = self.region.lowest(pending[0])
        values = self._forward(best.point, free, chosen, behind) if forward else {}
        return Sight(offset + best.value, best.point, behind, lines, values)

    def _constrained(self, number: int, a: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients with the multipliers' share subtracted.

        With them what the constraints' ends add to the bound.
        """
        cut, columns = self.cuts[number], self.columns[number]
        taken = a.flatten(1).scatter_add(1, columns.place, -beta * self.weigh[number]).view_as(a)
        ends = torch.where(beta > 0, cut.lower, cut.upper)
        return taken, (
            torch.where(beta == 0, torch.zeros_like(beta), beta * ends) * self.weigh[number]
        ).sum(1)

    def _through(
        self, k: int, number: int, a: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Lines, tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return what a backward step through a function leaves.

        The columns' coefficients, their lines and the line chosen of each, then the coefficients
        before the operation and their offset.
        """
        columns, lines = self.columns[number], self.alpha_lines[k].lines(alpha)
        own = columns.get(a)
        slope = torch.where(own > 0, lines.lower_slope, lines.upper_slope)
        at = torch.where(own > 0, lines.lower_intercept, lines.upper_intercept)
        base_slope, base_at = self.base[k]
        offset = (own * at * self.weigh[number]).sum(1)
        if base_at is not None:
            offset = offset + (a.flatten(1) * base_at).sum(1)
        return (
            own,
            lines,
            (slope, at),
            (a.flatten(1) * base_slope).scatter_(1, columns.place, own * slope),
            offset,
        )

    def _forward(
        self,
        point: Tensor,
        free: Free,
        chosen: dict[int, tuple[Tensor, Tensor]],
        behind: dict[int, Tensor],
    ) -> dict[int, Tensor]:
        """Return the values on the minimisers' way."""
        values: dict[int, Tensor] = {0: point}
        for k, node in enumerate(self.graph.nodes[: self.number], start=1):
            if not all(i in values for i in node.inputs):
                continue
            inputs = [values[i] for i in node.inputs]
            if is_affine(node.op):
                values[k] = node.op.value(*inputs)
            elif k in chosen:
                (slope, at), (base_slope, base_at) = chosen[k], self.base[k]
                columns, flat = self.columns[node.inputs[0]], inputs[0].flatten(1)
                chords = (
                    flat * base_slope
                    if base_at is None
                    else torch.addcmul(base_at, flat, base_slope)
                )
                values[k] = chords.scatter_(1, columns.place, columns.get(flat) * slope + at).view(
                    len(point), *self.graph.shape(k)
                )
            elif k in behind:
                values[k] = self.sheets[k].at(behind[k], free.alpha.get(k), inputs)
        return values

    def gradient(self, free: Free, sight: Sight) -> Free:
        """Return d bound / d (alpha, beta, mix)."""
        alpha = {}
        for k, lines in self.alpha_lines.items():
            i = self.graph.nodes[k - 1].inputs[0]
            if k in sight.coefficients and i in sight.values:
                alpha[k] = lines.pull(
                    free.alpha[k], sight.coefficients[k], self.columns[i].get(sight.values[i])
                )
            else:
                alpha[k] = torch.zeros_like(free.alpha[k])
        for k, sheet in self.sheets.items():
            if k in free.alpha:
                inputs = [sight.values.get(i) for i in self.graph.nodes[k - 1].inputs]
                seen = k in sight.coefficients and all(t is not None for t in inputs)
                pull = (
                    sheet.pull(sight.coefficients[k], [t for t in inputs if t is not None])
                    if seen
                    else None
                )
                alpha[k] = torch.zeros_like(free.alpha[k]) if pull is None else pull
        beta = {}
        for i, b in free.beta.items():
            if i not in sight.values:  # nothing bounded depends on it
                beta[i] = torch.zeros_like(b)
                continue
            cut, z = self.cuts[i], self.columns[i].get(sight.values[i])
            above, under = cut.lower - z, cut.upper - z  # infinite without a cut
            beta[i] = torch.where(
                cut.lower.isfinite() & ((b > 0) | (above > 0)),
                above,
                torch.where(cut.upper.isfinite(), under, torch.zeros_like(b)),
            )
        mix = torch.zeros_like(free.mix)
        if mix.shape[1] > 1 and self.number in sight.values:
            each, weights = (
                (self.spec.flatten(2) @ sight.values[self.number].flatten(1)[..., None])[..., 0]
                + self.offsets,
                free.weights,
            )
            mix = weights * (each - (weights * each).sum(1, keepdim=True))
        return Free(alpha, beta, mix)

    def clamped(self, free: Free) -> Free:
        """Return the nearest choice that is allowed."""
        beta = {}
        for i, b in free.beta.items():
            cut = self.cuts[i]
            b = torch.where(cut.lower.isfinite(), b, b.clamp(max=0))
            beta[i] = torch.where(cut.upper.isfinite(), b, b.clamp(min=0))
        return Free({k: a.clamp(0, 1) for k, a in free.alpha.items()}, beta, free.mix)

    def take(self, index: Tensor) -> Dual:
        """Return the chosen rows' problem."""
        cuts = {k: box.take(index) for k, box in self.cuts.items()}
        return Dual(
            self.root, self.rows[index], self.number, self.spec[index], self.offsets[index], cuts
        )
