"""Classifiers in the data's native units: frozen, checked and counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calipers.calls import (
    HALVES,
    Fresh,
    InHalf,
    cure,
    uncompiled,
    undressed,
    with_gradients,
)
from calipers.errors import BadModel, first_line, typed
from calipers.models.adapters import (
    Chosen,
    LastCalls,
    LogProbabilities,
    Standardise,
    TwoLogits,
    check_outputs,
    choice,
    picked,
    without_last,
)
from calipers.models.batch_dependence import are_probabilities, in_company, is_probability
from calipers.models.fast_gradient import search_copy
from calipers.models.hidden_state import copied, loose, made_in, usable
from calipers.models.identity import Identity, identify
from calipers.models.passes import PassCounter
from calipers.models.stochastic import ballot, differ, drawn, seeded
from calipers.models.widening import widened, widening
from calipers.models.wrappers import BlackBox

_MODE_DEPENDENT = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
# points and bytes of one call at most: all points at once may not fit into memory
_ROWS, _BYTES = 256, 2**26
# points of a batch of unusual size, unknown to caches; features of a point up to which it is used
_UNUSUAL, _SMALL = 13, 20_000


class Classifier:
    """A frozen model that maps inputs in native units to logits.

    `module` maps (N, *D) to logits (N, K), or to a single logit (N,) or (N, 1), which becomes two
    classes. Device and dtype are those of its parameters. A softmax or sigmoid at its end is
    undone, as `notes` and the result say.

    A model that draws random numbers is refused unless `samples` > 0 declares it: points are then
    judged by the median margin of that many fresh draws (see stochastic.py), and nothing is
    certified.

    The module itself is changed only inside `frozen()`, which restores every flag, mode and random
    state, also after an exception.

    Args:
        module: the model, from (N, *D) to logits (N, K) or to what `output` picks the logits from.
        mean: what the model's inputs were standardised by in training, one number or one a channel;
            data, box and radius are then in native units. Give both `mean` and `std`, or neither.
        std: the standard deviation, likewise.
        samples: how many fresh draws judge a model with random outputs (usually 100); 0 for all
            others.
        output: the name or number of the logits where the model returns several things. None takes
            the output called `logits`, or the only tensor.
        name: what reports and the record call the model; by default the name of the module's class.

    Raises:
        BadModel: if `module` is no module or the statistics do not fit; at the first call (`check`)
            also for a model that cannot be measured.

    Example:
        >>> Classifier(nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)), mean=0.5, std=0.25)
        Classifier(Sequential; not asked yet; float32 on cpu; mean 0.5; std 0.25)
    """

    def __init__(
        self,
        module: nn.Module,
        mean: float | Sequence[float] | Tensor | None = None,
        std: float | Sequence[float] | Tensor | None = None,
        samples: int = 0,
        output: str | int | None = None,
        name: str = "",
    ) -> None:
        if not isinstance(module, nn.Module):
            raise BadModel(
                f"a Classifier wraps a torch.nn.Module, got {type(module).__name__}. Anything else "
                "that answers is read by calipers.load: the name of a file, a fitted estimator, a "
                "function with its kind."
            )
        if (mean is None) != (std is None):
            raise BadModel(
                "give both mean and std (the ones the model was trained with), or neither"
            )
        if samples < 0:
            raise BadModel(
                "samples is the number of draws that judge a random model (usually 100), or 0 for "
                "a "
                f"model without chance, got {samples}"
            )
        self.module, self.samples, self.output = usable(undressed(module)), samples, output
        self.name = name or type(self.module).__name__
        self._loose, plain = loose(self.module)
        self.passes = PassCounter()
        anchor = next(
            (t for t in [*self._tensors(), *plain] if t.is_floating_point()), torch.zeros(())
        )
        half = anchor.dtype in HALVES
        self.device, self.dtype = anchor.device, torch.float32 if half else anchor.dtype
        self.mean, self.std = (
            None
            if v is None
            else torch.as_tensor(v, dtype=self.dtype, device=self.device).reshape(-1)
            for v in (mean, std)
        )
        if self.std is not None and not bool((self.std > 0).all()):
            raise BadModel(f"std must be positive in every channel, got {self.std.tolist()}")
        self._head: list[nn.Module] = (
            [] if self.mean is None or self.std is None else [Standardise(self.mean, self.std)]
        )
        self._base: nn.Module = InHalf(self.module) if half else self.module
        self._tail: list[nn.Module] = []
        self._double: tuple[object, nn.Module | None, str] | None = None
        self._read(None, False)
        self._notes: dict[str, str] = {}
        self.origin = ""  # what was done to the model before it was wrapped
        self._shape: tuple[int, ...] | None = None
        self._classes: int | None = None
        self._makes = False  # whether forward makes tensors whose dtype has to follow
        self._casts = False  # whether forward casts to float32
        self.no_gradient, self._fails_with_gradients = "", False
        self._identity: tuple[object, Identity] | None = None
        self._few: Tensor | None = None
        self.repeats = False  # whether a second call agreed bit for bit in `check`

    @property
    def network(self) -> nn.Module:
        """The whole map from native inputs to at least two logits.

        It shares the module's parameters; each call gets a copy of its input.
        """
        return Fresh(self._whole, self._fails_with_gradients)

    @property
    def _whole(self) -> nn.Module:
        """The same map without the copy of the input."""
        parts = [*self._head, self._body, *self._tail]
        return parts[0] if len(parts) == 1 else nn.Sequential(*parts)

    @property
    def in_half(self) -> bool:
        """Whether it is in half precision; its float32 copy gives only hints."""
        return isinstance(self._base, InHalf)

    @property
    def no_float64(self) -> str:
        """Why there is no float64 copy, once one was needed; else empty."""
        return "" if self._double is None else self._double[2]

    def _tensors(self) -> list[Tensor]:
        """Return parameters and buffers, those of networks in lists included."""
        return [
            t for part in (self.module, *self._loose) for t in [*part.parameters(), *part.buffers()]
        ]

    def check(self, x: Tensor, *, classifies: bool = True) -> Tensor:
        """Check the model on points x (N, *D), and return their logits (N, K).

        Args:
            x: points (N, *D), finite.
            classifies: the outputs are scores of classes, so that probabilities are turned into
                logits.

        Returns:
            The logits (N, K); K is 2 for a model with a single output.

        Raises:
            BadModel: for active dropout or batch norm in training mode, a call that fails, an
                output that is no logits, and outputs that depend on the other points of a batch, or
                on chance where no `samples` are declared.
        """
        self._check_mode()
        few = x[:2]
        self._identity, self._few = None, few.detach().clone()
        z = self._first_answer(few, x, classifies)
        check_outputs(z, len(few))
        if not self.samples:
            self._check_chance(few, z)
        single = z.dim() == 1 or z.shape[1] == 1
        if single:
            self._tail = [TwoLogits(self.dtype, self.device)]
        self._look_for_gradients(few)
        if not self.samples:
            self._check_company(x)
        logits = self.logits(x)
        if classifies:
            logits = self._undo_probabilities(x, logits, single)
        self._shape, self._classes = tuple(x.shape[1:]), logits.shape[1]
        return logits

    @property
    def labels(self) -> Any:
        """Names of the classes in the order of outputs; None for 0, 1, 2, ..."""
        if isinstance(self.module, BlackBox):
            return self.module.labels
        return getattr(self.module, "classes_", None)

    @property
    def features(self) -> Any:
        """Names of the columns of a point; None where the model knows none."""
        if isinstance(self.module, BlackBox):
            return self.module.features
        return getattr(self.module, "feature_names_in_", None)

    def _first_answer(self, few: Tensor, x: Tensor, classifies: bool) -> Tensor:
        """Run the model on a few points, and return their logits.

        This settles which of its outputs are the logits, and whether a last softmax or sigmoid is
        left out.
        """
        self._read(None, False)
        self._tail, self._notes = [], {}
        self.passes.add(forwards=len(few))
        try:
            with self.frozen(), torch.no_grad(), LastCalls() as seen:
                answer: object = self.network(few)
        except Exception as error:
            raise BadModel(
                f"the model could not be called on inputs of shape {tuple(x.shape[1:])} and dtype "
                f"{x.dtype}: {error}. {cure(self.module)}"
            ) from error
        output = choice(answer, self.output)
        if output is not None and output != self.output:
            self._notes["output"] = f"its output {output!r} is taken for the logits"
        z = answer if output is None else picked(answer, output)
        last = seen.before(z)
        # a model that provides its own graph keeps its last layer: its outputs are probabilities
        left_out = (
            last if classifies and not callable(getattr(self.module, "graph", None)) else None
        )
        self._read(output, left_out is not None)
        if left_out is None:
            assert isinstance(z, Tensor)
            return z
        self._notes["last"] = (
            f"the {left_out[0]} at its end is left out: what goes into it is the logits"
        )
        logits: Tensor = left_out[1]
        return logits

    def _read(self, output: str | int | None, without: bool) -> None:
        """Take this output as logits; `without`: the input of its last layer."""
        self._chosen, self._without, self._double = output, without, None
        self._body = self._base if output is None else Chosen(self._base, output)
        self._body = without_last(self._body) if without else self._body

    def read_like(self, other: Classifier) -> None:
        """Interpret the outputs as another classifier does, without a call."""
        self._read(other._chosen, other._without)
        self._tail = other._tail

    def _undo_probabilities(self, x: Tensor, logits: Tensor, single: bool) -> Tensor:
        """Return the logits, of probabilities their logarithms."""
        if single:
            if not is_probability(x, logits[:, 1], lambda p: self.logits(p)[:, 1]):
                return logits
        elif not are_probabilities(logits):
            return logits
        self._tail, self._double = [LogProbabilities()], None
        self._notes["last"] = (
            "its single output lies in [0, 1] at all points, also far away: it is read as the "
            "probability of class 1, which wins above 1/2, through its logarithm"
            if single
            else "its outputs are probabilities: their logarithms are taken for the logits (better "
            "let it return what goes into its softmax, where float32 still tells small ones apart)"
        )
        return self.logits(x)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what `check` did to the model to obtain logits."""
        return (*([self.origin] if self.origin else []), *self._notes.values())

    def __repr__(self) -> str:
        """Return a summary of how the model is understood."""
        shape = "not asked yet" if self._shape is None else f"input {self._shape}"
        said = [
            self.name,
            shape,
            *([] if self._classes is None else [f"{self._classes} classes"]),
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
            *([] if self.mean is None else [f"mean {_short(self.mean)}"]),
            *([] if self.std is None else [f"std {_short(self.std)}"]),
            *([] if self.output is None else [f"output {self.output!r}"]),
            *(["computes in half precision"] if self.in_half else []),
            *([f"judged by {self.samples} random draws"] if self.samples else []),
            *([f"no gradients: {self.no_gradient}"] if self.no_gradient else []),
            *self.notes,
        ]
        return f"Classifier({'; '.join(said)})"

    def _look_for_gradients(self, x: Tensor) -> None:
        """Set `no_gradient`, and whether the model fails with gradients on."""
        self.no_gradient, self._fails_with_gradients = "", False
        self.passes.add(forwards=len(x))
        try:
            with self.frozen():
                x = x.clone().requires_grad_()
                z = self.network(x)
                (slope,) = (
                    torch.autograd.grad(z.sum(), x, allow_unused=True)
                    if z.requires_grad
                    else (None,)
                )
        except Exception as error:
            self.no_gradient, self._fails_with_gradients = (
                f"the model fails where gradients are on ({first_line(error)})",
                True,
            )
        else:
            self.passes.add(backwards=0 if slope is None else len(x))
            self.no_gradient = "its graph is cut between input and logits" if slope is None else ""

    def _check_company(self, x: Tensor) -> None:
        """Raise `BadModel` where logits depend on the rest of the batch."""
        precise = (
            self.logits64 if self.dtype == torch.float32 and self._precise(x) is not None else None
        )
        try:
            found = in_company(x, self.logits, precise)
        except Exception as error:
            raise BadModel(
                f"the model answers a batch of points, but not one alone, or not {len(x)}: "
                f"{first_line(error)}. Let the batch be the first axis, of any size."
            ) from error
        if found is not None:
            place, gap = found
            raise BadModel(
                f"the model answers point {place} differently beside other points than alone (a "
                f"logit moves by {gap:.3g}): what is found in a batch would not hold. Usual "
                "causes: sums, normalisation or a scale of quantisation over the whole batch. "
                "Make it answer each point by itself; torch.cat([model(point) for point in "
                "x.split(1)]) in forward does."
            )

    def _check_mode(self) -> None:
        """Raise `BadModel` for active dropout or batch norm."""
        active = in_training(self.module)
        if active:
            raise BadModel(
                "the model is in training mode with active dropout or batch norm "
                f"({', '.join(active[:3])}{', …' if len(active) > 3 else ''}): its answer would "
                "depend on chance and on the rest of the batch. Call model.eval() first."
            )

    def _check_chance(self, x: Tensor, before: Tensor) -> None:
        """Raise `BadModel` where a second call with other random numbers differs."""
        self.passes.add(forwards=len(x))
        with self.frozen(), torch.no_grad():
            (after,) = drawn(self.network, x, 1, 0)
        self.repeats = torch.equal(before, after)
        if differ(before, after):
            raise BadModel(
                "the model answers differently when it is asked twice: one pass decides nothing "
                "about a point. If chance is part of its defence, say so with Classifier(model, "
                "samples=100): a point then counts as broken where at least half of 100 fresh "
                "draws "
                "are fooled. Otherwise turn the randomness off."
            )

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze the model while inside, and restore everything at the end.

        Evaluation mode, no parameter gradients, random state forked, gradients on; all is restored,
        whatever happens. A declared random model begins with the same draws each time: what a tool
        finds does not depend on what others have drawn before.
        """
        held = (self.module, *self._loose)
        modes = [(m, m.training) for part in held for m in part.modules()]
        flags = [(p, p.requires_grad) for part in held for p in part.parameters()]
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            with_gradients(),
            uncompiled(),
            seeded(0, self.device) if self.samples else torch.random.fork_rng(devices=devices),
        ):
            try:
                for module, _ in modes:
                    module.training = False
                for parameter, _ in flags:
                    parameter.requires_grad_(False)
                yield
            finally:
                for module, mode in modes:
                    module.training = mode
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) without gradients; counts N forwards."""
        self.passes.add(forwards=len(x))
        with self.frozen(), torch.no_grad():
            return _in_parts(self.network, x)

    def logits64(self, x: Tensor) -> Tensor:
        """Return the logits (N, K) of a float64 copy; counts N forwards.

        Nearly exact arithmetic, to tell a margin from its rounding. Where such a copy cannot be
        made or run (`no_float64` says why: `forward` makes float32 tensors itself, say), the
        model's own logits as float64.
        """
        precise = None if self.dtype == torch.float64 else self._precise(x)
        if precise is None:
            return self.logits(x).double()
        self.passes.add(forwards=len(x))
        with self.frozen(), torch.no_grad(), self._doubled():
            return _in_parts(precise, x.double()).double()

    @contextlib.contextmanager
    def precisely(self) -> Iterator[nn.Module]:
        """Freeze the model, and give a float64 copy of the network.

        Tensors that `forward` makes are float64, too, and for a float32 model also what it casts to
        float32. Raises what copying raises.
        """
        with self.frozen(), made_in(torch.float64):
            network = copied(self.network, torch.float64)
            yield widening(network) if self.dtype == torch.float32 else network

    @contextlib.contextmanager
    def _doubled(self) -> Iterator[None]:
        """Run the float64 copy with the settings it was found to need."""
        with made_in(torch.float64 if self._makes else None), widened(self._casts):
            yield

    def _precise(self, x: Tensor) -> nn.Module | None:
        """Return the float64 copy, tested on two points when it is made."""
        if self._double is None or self._double[0] != self.state():
            made, reason = None, ""
            # the default dtype is global to the process: it is changed only where necessary
            for self._makes, self._casts in ((False, False), (False, True), (True, True)):
                try:
                    with self.frozen(), torch.no_grad():
                        made, few = copied(self.network, torch.float64), x[:2].double()
                        with self._doubled():
                            answer = made(few)
                        if self._casts:
                            break
                        with widened(True):
                            if torch.equal(made(few), answer):
                                break
                except Exception as error:
                    made, reason = None, typed(error)
            self._double = (self.state(), made, "" if made is not None else reason)
        return self._double[1]

    def ballot(self, x: Tensor) -> Tensor:
        """Return logits (draws, N, K) of fresh draws, each point alone.

        Of a random model (see stochastic.py). Counts draws x N forwards.
        """
        self.passes.add(forwards=self.samples * len(x))
        with self.frozen():
            return ballot(self.network, x, self.samples)

    def state(self) -> tuple[object, ...]:
        """Return what changes with any weight, buffer or use of the outputs.

        It changes whenever a tensor is replaced or written to, or the outputs are interpreted
        otherwise; copies of the model are valid only for the state they were made in.
        """
        parts = (type(self._body).__name__, *(type(part).__name__ for part in self._tail))
        return (*parts, *((id(t), t._version) for t in self._tensors()))

    def step(self, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
        """Return the map from inputs to logits for use inside `frozen()`.

        It is a copy with faster gradients (see search_copy.py), in the model's dtype or another
        one. Raises `BadModel` where the model cannot be copied into another one.
        """
        try:
            with self.frozen():
                low = search_copy(self.network, dtype or self.dtype)
        except Exception as error:
            if dtype not in (None, self.dtype):
                raise BadModel(
                    f"the model cannot be copied into {dtype} ({first_line(error)}): search in its "
                    "own precision"
                ) from error
            low = self.network
        return low if dtype in (None, self.dtype) else lambda x: low(x.to(dtype)).to(self.dtype)

    def digest(self) -> str:
        """Return the digest that names this model in a record (identity.py)."""
        return self.identity().digest

    def identity(self) -> Identity:
        """Return the parts of the program, anew after `check` or new weights."""
        state = self.state()
        if self._identity is None or self._identity[0] != state:
            extra = {
                "mean": self.mean,
                "std": self.std,
                "samples": self.samples or None,
                "output": self.output,
            }
            self._identity = (
                state,
                identify(self.module, extra, None if self._few is None else self._call),
            )
        return self._identity[1]

    def _call(self) -> None:
        """Run a batch of unusual size, which changes counters and caches."""
        assert self._few is not None
        rows = self._few[:1].expand(
            _UNUSUAL if self._few[0].numel() <= _SMALL else 3, *self._few.shape[1:]
        )
        # a model that fails on such a batch reveals nothing by it
        with (
            self.frozen(),
            torch.no_grad(),
            contextlib.suppress(Exception),
        ):
            self.network(0.5 * rows)


def in_training(module: nn.Module) -> list[str]:
    """Return the names of layers in training mode that behave differently."""
    return [
        name or type(m).__name__
        for name, m in module.named_modules()
        if m.training and isinstance(m, _MODE_DEPENDENT)
    ]


def _in_parts(network: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs, in batches so that memory stays bounded."""
    rows = max(1, min(_ROWS, _BYTES // max(1, x[:1].numel() * x.element_size())))
    z: Tensor = (
        network(x) if len(x) <= rows else torch.cat([network(part) for part in x.split(rows)])
    )
    return z


def _short(statistics: Tensor) -> str:
    """Return the first four statistics as text."""
    return ", ".join(f"{v:.4g}" for v in statistics[:4].tolist()) + (
        ", ..." if len(statistics) > 4 else ""
    )
