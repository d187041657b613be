"""The smooth functions that networks use.

Each has an entry of its own: function, derivative, inflections, extrema. Inflections and extrema
without a closed form are roots found in 30-digit arithmetic. The stored place differs from the true
root by a rounding. Over that distance a curve that has no curvature there departs from its tangents
by less than the allowance that every line includes anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from calipers.graph.parameters import argument, require, require_numbers
from calipers.graph.smooth_relaxation import Smooth, Wave

_DENSITY = 1 / math.sqrt(2 * math.pi)
_TANH_GELU = math.sqrt(2 / math.pi), 0.044715
_EXP_FAR = 700.0  # beyond it exp overflows, and log(1 + exp(x)) is x
# larger exponents overflow in every format, and err by more than a few units in the last place
_STEEPEST = 1000


def _positive(lower: Tensor, upper: Tensor) -> Tensor:
    return lower > 0


def _not_negative(lower: Tensor, upper: Tensor) -> Tensor:
    return lower >= 0


def _without_zero(lower: Tensor, upper: Tensor) -> Tensor:
    return (lower > 0) | (upper < 0)


def _bell(x: Tensor) -> Tensor:
    """Return the standard normal density."""
    density: Tensor = _DENSITY * (-x.square() / 2).exp()
    return density


def _gelu_slope(x: Tensor) -> Tensor:
    slope: Tensor = torch.special.ndtr(x) + x * _bell(x)
    return slope


def _tanh_gelu_slope(x: Tensor) -> Tensor:
    c, k = _TANH_GELU
    # beyond this range the tanh is 1 and its derivative 0 in any format, while the cube would
    # overflow
    x = x.clamp(-1e3, 1e3)
    t = (c * (x + k * x.pow(3))).tanh()
    return 0.5 * (1 + t) + 0.5 * x * (1 - t) * (1 + t) * c * (1 + 3 * k * x.square())


def _silu_slope(x: Tensor) -> Tensor:
    s = x.sigmoid()
    return s + torch.nan_to_num(x * s * (-x).sigmoid())


def _mish_slope(x: Tensor) -> Tensor:
    t = functional.softplus(x).tanh()
    return t + x.clamp(-1e3, 1e3) * x.sigmoid() * (1 - t) * (1 + t)


def _power_slope(x: Tensor, p: float) -> Tensor:
    return p * x.pow(p - 1)


TANH = Smooth("tanh", torch.tanh, lambda x: (1 - x.tanh()) * (1 + x.tanh()), True, (0.0,))
SIGMOID = Smooth("sigmoid", torch.sigmoid, lambda x: x.sigmoid() * (-x).sigmoid(), True, (0.0,))
ERF = Smooth("erf", torch.erf, lambda x: 2 / math.sqrt(math.pi) * (-x.square()).exp(), True, (0.0,))
ATAN = Smooth("atan", torch.atan, lambda x: 1 / (1 + x.square()), True, (0.0,))
GELU = Smooth(
    "gelu",
    functional.gelu,
    _gelu_slope,
    False,
    (-math.sqrt(2), math.sqrt(2)),
    (-0.75179152469356445746,),
)
TANH_GELU = Smooth(
    "gelu by tanh", lambda x: functional.gelu(x, approximate="tanh"), _tanh_gelu_slope, False,
    (-1.4185040087908283555, 1.4185040087908283555),
    (-0.75246142207101625849,),
)  # fmt: skip
SILU = Smooth(
    "silu",
    functional.silu,
    _silu_slope,
    False,
    (-2.3993572805154676678, 2.3993572805154676678),
    (-1.2784645427610737951,),
)
MISH = Smooth(
    "mish",
    functional.mish,
    _mish_slope,
    False,
    (-2.25637639636079312, 1.4905711794854284593),
    (-1.1924312145154952121,),
)
LOG_SIGMOID = Smooth(
    "log sigmoid", functional.logsigmoid, lambda x: (-x).sigmoid(), False, rough=False
)
HARD_SWISH = Smooth(
    "hardswish", functional.hardswish,
    lambda x: torch.where(x.abs() <= 3, (2 * x + 3) / 6, (x > 0).to(x.dtype)), False, (-3.0, 3.0),
    (-3.0, -1.5),
    curved=(-3.0, 3.0),
)  # fmt: skip
EXP = Smooth("exp", torch.exp, torch.exp, True, rough=False)
EXPM1 = Smooth("expm1", torch.expm1, torch.exp, True, rough=False)
LOG = Smooth("log", torch.log, torch.reciprocal, False, defined=_positive, rough=False)
LOG1P = Smooth(
    "log1p",
    torch.log1p,
    lambda x: 1 / (1 + x),
    False,
    defined=lambda lower, upper: lower > -1,
    rough=False,
)
SQRT = Smooth(
    "sqrt", torch.sqrt, lambda x: 0.5 / x.sqrt(), False, defined=_not_negative, rough=False
)
RSQRT = Smooth(
    "rsqrt", torch.rsqrt, lambda x: -0.5 * x.rsqrt() / x, True, defined=_positive, rough=False
)
RECIPROCAL = Smooth(
    "reciprocal",
    torch.reciprocal,
    lambda x: -1 / x.square(),
    False,
    (0.0,),
    defined=_without_zero,
    rough=False,
)


@dataclass(frozen=True)
class OrZero(Smooth):
    """A function whose value at 0 is 0, where the function itself has none.

    Bounds treat 0 as a place without a value: nothing finite holds on both sides of it.
    """

    def value(self, x: Tensor) -> Tensor:
        """Return f(x), and 0 at 0."""
        known = torch.where(x == 0, 1.0, x)  # a branch without a value would spoil the gradient
        return torch.where(x == 0, 0.0, self.run(known))


def or_zero(function: Smooth) -> OrZero:
    """Return the function with the value 0 at 0."""
    return OrZero(**{f.name: getattr(function, f.name) for f in fields(function)})


RSQRT_OR_0, RECIPROCAL_OR_0 = or_zero(RSQRT), or_zero(RECIPROCAL)
SQUARE = Smooth("square", torch.square, lambda x: 2 * x, True, turns=(0.0,), rough=False)
SIN = Wave("sin", torch.sin, torch.cos, True)
COS = Wave("cos", torch.cos, lambda x: -x.sin(), True, shift=math.pi / 2)


def softplus(beta: float, threshold: float) -> Smooth:
    """Return log(1 + exp(beta x)) / beta as a curve.

    torch returns x itself where beta x is above `threshold`, which is less by log(1 +
    exp(-threshold)) / beta.
    """
    require(
        0 < beta < math.inf and not math.isnan(threshold),
        "softplus",
        "beta above 0",
        beta=beta,
        threshold=threshold,
    )
    fall = math.log1p(math.exp(-threshold)) if threshold > -_EXP_FAR else -threshold

    def run(x: Tensor) -> Tensor:
        return functional.softplus(x, beta, threshold)

    def slope(x: Tensor) -> Tensor:
        return torch.where(beta * x > threshold, 1.0, (beta * x).sigmoid())

    return Smooth(
        f"softplus {beta!r} {threshold!r}",
        run,
        slope,
        True,
        (threshold / beta,),
        rough=False,
        jump=fall / beta,
        parameters=(beta, threshold),
    )


def elu(alpha: float, scale: float, inner: float) -> Smooth:
    """Return scale * x above 0, scale * alpha * (exp(inner x) - 1) below.

    selu and celu are included. A breakpoint at which the slope falls is an inflection.
    """
    require_numbers("elu", alpha=alpha, scale=scale, inner=inner)
    require(
        min(alpha, scale, inner) > 0,
        "elu",
        "every parameter above 0",
        alpha=alpha,
        scale=scale,
        inner=inner,
    )

    def run(x: Tensor) -> Tensor:
        return torch.where(x > 0, scale * x, scale * alpha * torch.expm1(inner * x.clamp(max=0)))

    def slope(x: Tensor) -> Tensor:
        return torch.where(x > 0, scale, scale * alpha * inner * torch.exp(inner * x.clamp(max=0)))

    return Smooth(
        f"elu {alpha!r} {scale!r} {inner!r}",
        run,
        slope,
        True,
        (0.0,) if alpha * inner > 1 else (),
        curved=(-math.inf, 0.0),
        rough=False,
        parameters=(alpha, scale, inner),
    )


def power(exponent: float) -> Smooth | None:
    """Return x to a constant exponent as a curve, or None for exponents 0, 1.

    Whole exponents are defined everywhere (negative ones except at 0), others above 0. None means
    that the function is linear.
    """
    require(
        abs(exponent) <= _STEEPEST,
        "a power",
        f"an exponent of at most {_STEEPEST} in size",
        exponent=exponent,
    )
    named = {2.0: SQUARE, 0.5: SQRT, -0.5: RSQRT, -1.0: RECIPROCAL}
    if exponent in named or exponent in (0.0, 1.0):
        return named.get(exponent)
    whole, odd = exponent == math.floor(exponent), exponent % 2 == 1
    if not whole:
        convex, defined = not 0 < exponent < 1, _not_negative if exponent > 0 else _positive
        return _powered(exponent, convex, (), (), defined)
    defined = _without_zero if exponent < 0 else lambda lower, upper: lower <= upper
    return _powered(
        exponent, not odd, (0.0,) if odd else (), () if odd or exponent < 0 else (0.0,), defined
    )


def _powered(
    p: float,
    convex: bool,
    inflections: tuple[float, ...],
    turns: tuple[float, ...],
    defined: Callable[[Tensor, Tensor], Tensor],
) -> Smooth:
    return Smooth(
        f"power {p!r}",
        lambda x: x.pow(p),
        lambda x: _power_slope(x, p),
        convex,
        inflections,
        turns,
        defined=defined,
        rough=False,
        parameters=(p,),
    )


def _softplus(args: tuple[Any, ...]) -> Smooth:
    return softplus(argument(args, 1, 1.0), argument(args, 2, 20.0))


def _elu(args: tuple[Any, ...]) -> Smooth:
    return elu(argument(args, 1, 1.0), argument(args, 2, 1.0), argument(args, 3, 1.0))


def _celu(args: tuple[Any, ...]) -> Smooth:
    alpha = argument(args, 1, 1.0)
    require(alpha > 0, "celu", "alpha above 0", alpha=alpha)
    return elu(alpha, 1.0, 1 / alpha)


def _always(curve: Smooth) -> Callable[[tuple[Any, ...]], Smooth | None]:
    return lambda args: curve


_PLAIN = {
    "tanh": TANH, "sigmoid": SIGMOID, "erf": ERF, "atan": ATAN, "silu": SILU, "mish": MISH,
    "log_sigmoid": LOG_SIGMOID, "hardswish": HARD_SWISH,
    "exp": EXP, "expm1": EXPM1, "log": LOG, "log1p": LOG1P, "sqrt": SQRT, "rsqrt": RSQRT,
    "reciprocal": RECIPROCAL, "square": SQUARE, "sin": SIN, "cos": COS,
}  # fmt: skip

CURVES: dict[str, Callable[[tuple[Any, ...]], Smooth | None]] = {
    **{f"aten.{name}.default": _always(curve) for name, curve in _PLAIN.items()},
    "aten.gelu.default": lambda args: TANH_GELU if args[1:2] == ("tanh",) else GELU,
    "aten.softplus.default": _softplus,
    "aten.elu.default": _elu,
    "aten.celu.default": _celu,
    "aten.selu.default": lambda args: elu(1.6732632423543772, 1.0507009873554805, 1.0),
    "aten.pow.Tensor_Scalar": lambda args: power(argument(args, 1, 1.0)),
}
"""Builders by exported name, from the call's arguments.

A builder returns None where the arguments ask for something else.
"""
