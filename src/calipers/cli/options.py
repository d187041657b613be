"""Options that all measuring commands share, read and checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from calipers.cli.renamed import Command
from calipers.errors import BadInput, CalipersError

if TYPE_CHECKING:
    from calipers.measurement.plan import Plan
    from calipers.models.classifier import Classifier
    from calipers.threats.threat import Threat

RECORD = "run.calipers"
_STATISTICS = (
    "Mean that the model's inputs were standardised with: one number, or one a channel, "
    "separated by commas."
)


@dataclass(frozen=True)
class Options:
    """The options of a measuring command, in the order of its help."""

    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="file.py:function, net.onnx, net.pt2, weights with --builder, mnist-plain or "
            "mnist-robust; given again: several in turn. Default: both embedded networks.",
        ),
    ] = None
    builder: Annotated[
        str | None,
        typer.Option(
            help="file.py:function that builds the module, when --model is a file of weights."
        ),
    ] = None
    output: Annotated[
        str | None,
        typer.Option(help="Name or number of the logits, where the model returns several things."),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help=".npz or .pt with x and y, .npy (with --labels), or a folder of images by class. "
            "Default: 500 MNIST images.",
        ),
    ] = None
    labels: Annotated[str | None, typer.Option(help=".npy with the labels.")] = None
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", help="Measure the first N points only.")
    ] = None
    norm: Annotated[
        str,
        typer.Option(
            help="linf, l2 or l1; l0 or pixels: epsilon is then how many features, or pixels, may "
            "change."
        ),
    ] = "linf"
    epsilon: Annotated[
        str,
        typer.Option(
            "--epsilon",
            "-e",
            help="Radius in the data's own units; fractions such as 8/255 are exact.",
        ),
    ] = "0.1"
    one_hot: Annotated[
        str | None,
        typer.Option(
            "--one-hot",
            help="length,size or length,symbols (60,ACGT): the input is a sequence of one-hot "
            "symbols; epsilon is then how many may be replaced.",
        ),
    ] = None
    box: Annotated[
        str, typer.Option("--box", help="Valid values: low,high; data (their range); or none.")
    ] = "0,1"
    grid: Annotated[
        str | None,
        typer.Option(help="Step between values that count, 1/255 for 8-bit images."),
    ] = None
    mean: Annotated[str | None, typer.Option(help=_STATISTICS)] = None
    std: Annotated[str | None, typer.Option(help="Standard deviation, likewise.")] = None
    seed: Annotated[int, typer.Option(help="Seed of all random starts.")] = 0
    record: Annotated[
        str,
        typer.Option(
            "--record",
            help="File that keeps all evidence; the same command takes an interrupted run up "
            "again. none: keep nothing.",
        ),
    ] = RECORD
    report: Annotated[str, typer.Option("--report", "-o", help="Page to write; none: no page.")] = (
        "none"
    )
    confidence: Annotated[float, typer.Option(help="Confidence of all intervals.")] = 0.95
    seconds: Annotated[
        float | None, typer.Option(help="Stop after about so many seconds, with what is known.")
    ] = None
    proofs: Annotated[
        bool,
        typer.Option(
            "--proofs",
            help="Keep a proof file for every certificate that has one; calipers check proves "
            "them again.",
        ),
    ] = False
    guarantee: Annotated[
        str | None,
        typer.Option(
            help="Of certificates: float64-checked, or float32-executed (the network as float32 "
            "runs it)."
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False

    def classifiers(self) -> list[Classifier]:
        """Return the named models; without a name, both embedded ones."""
        from calipers.data import NAMES
        from calipers.interchange import load

        if not self.model and self.data is not None:
            raise BadInput(
                "name the model to measure on this data: --model file.py:function (the embedded "
                "networks read MNIST images only)"
            )
        mean, std = (
            None if text is None else numbers(text, "mean and std")
            for text in (self.mean, self.std)
        )
        number = self.output is not None and self.output.isdigit()
        output = int(str(self.output)) if number else self.output
        settings = {"builder": self.builder, "mean": mean, "std": std, "output": output}
        found = []
        for source in dict.fromkeys(self.model or NAMES):
            found.append(_loaded(load, source, **settings))
            found[-1].name = _title(source)
        return found

    def set(self, plan: Plan) -> Plan:
        """Return the plan with the settings of these options."""
        return replace(
            plan,
            seed=self.seed,
            seconds=self.seconds,
            proofs=self.proofs,
            guarantee=self.guarantee,  # type: ignore[arg-type]
        )

    def check(self) -> None:
        """Raise `BadInput` for options that would fail only after the work."""
        if not 0 < self.confidence < 1:
            raise BadInput(
                f"the confidence is a share between 0 and 1, such as 0.95; got {self.confidence:g}"
            )
        if self.seconds is not None and not self.seconds > 0:
            raise BadInput(f"the number of seconds must be above 0, got {self.seconds:g}")
        if self.report != "none" and not Path(self.report).absolute().parent.is_dir():
            raise BadInput(
                f"there is no folder {Path(self.report).parent} to write the report to: make it "
                "first, or give --report none"
            )

    def threat(self) -> Threat:
        """Return the threat."""
        from calipers.threats.ball import Ball

        step = None if self.grid is None else numbers(self.grid, "a grid")[0]
        if self.one_hot is not None:
            if step is not None:
                raise BadInput("one-hot symbols have no grid of values: leave --grid out")
            return _substitutions(
                self.one_hot, numbers(self.epsilon, "a number of substitutions")[0]
            )
        radius = numbers(self.epsilon, "a radius")[0]
        if self.box == "data":
            return Ball(self.norm, radius, "data", grid=step)
        box = None if self.box == "none" else numbers(self.box, "a box")
        if box is not None and len(box) != 2:
            raise BadInput(f"a box is two numbers, low,high, or data, or none; got {self.box!r}")
        ends = None if box is None else (box[0], box[1])
        return Ball(self.norm, radius, ends, grid=step)


def shared(
    app: typer.Typer, without: str = "", **defaults: Any
) -> Callable[[Callable[..., None]], None]:
    """Register a command that takes its own and the shared options.

    Options named in `without` mean nothing to the command and are not offered; `defaults` replaces
    the usual defaults of some.
    """
    absent = set(without.split())
    names = [f.name for f in fields(Options) if f.name not in absent]
    assert absent | set(defaults) <= {f.name for f in fields(Options)}

    def register(command: Callable[..., None]) -> None:
        hints, common_hints = (
            get_type_hints(command, include_extras=True),
            get_type_hints(Options, include_extras=True),
        )
        own = [
            p.replace(annotation=hints[p.name])
            for p in list(inspect.signature(command).parameters.values())[1:]
        ]

        def run(**given: Any) -> None:
            fixed = {name: value for name, value in defaults.items() if name in absent}
            options = Options(**fixed, **{name: given.pop(name) for name in names})
            command(options, **given)

        usual = {f.name: defaults.get(f.name, f.default) for f in fields(Options)}
        common = [
            inspect.Parameter(
                n, inspect.Parameter.KEYWORD_ONLY, default=usual[n], annotation=common_hints[n]
            )
            for n in names
        ]
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + common
        run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in own + common}
        app.command(command.__name__, help=command.__doc__, cls=Command)(run)

    return register


def numbers(text: str, what: str) -> list[float]:
    """Return numbers separated by commas, fractions included."""
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(
            f"{text!r} is no number for {what}; write 0.1, 8/255, or several separated by commas"
        ) from error


def _substitutions(text: str, k: float) -> Threat:
    """Return the threat of k substitutions in one-hot symbols.

    The text is "60,4", or "60,ACGT" where the symbols have names.
    """
    from calipers.threats.substitutions import Substitutions, one_hot_groups

    length, _, alphabet = text.partition(",")
    named = alphabet.isalpha() and len(alphabet) > 1
    shape = numbers(f"{length},{len(alphabet)}" if named else text, "the symbols")
    if len(shape) != 2 or not all(n >= 1 and n == int(n) for n in shape):
        raise BadInput(
            "symbols are two whole numbers, length,size (60,4 for 60 nucleotides), or "
            f"length,symbols (60,ACGT); got {', '.join(map('{:g}'.format, shape))}"
        )
    groups = one_hot_groups(int(shape[0]), int(shape[1]))
    return Substitutions(groups, k, symbols=alphabet if named else None)


def _title(source: str) -> str:
    """Return the model's name without the folders of its file."""
    file, colon, function = source.rpartition(":")
    return f"{Path(file).name}:{function}" if colon and file.endswith(".py") else source


def _loaded(load: Callable[..., Classifier], source: str, **settings: Any) -> Classifier:
    """Return the model; an error of its own code becomes a `BadInput`."""
    try:
        return load(source, **settings)
    except CalipersError:
        raise
    except (Exception, SystemExit) as error:
        raise BadInput(
            f"{source} cannot be loaded: its code raises {type(error).__name__} ({error})"
        ) from error
