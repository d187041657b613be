"""What does the command line say? The same words as the library: measure, distance, attack, certify, verify, check, report."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from calipers.errors import BadInput, CalipersError, Contradiction

if TYPE_CHECKING:
    from calipers.api import Result
    from calipers.measurement.plan import Plan
    from calipers.problem.classifier import Classifier
    from calipers.problem.threat import Threat
    from calipers.record.evidence import Question

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure how robust a neural network really is: attacks from above, certificates from below. "
    "`calipers measure` alone measures two small MNIST networks that ship with it.",
)

EXIT_BAD_INPUT, EXIT_CONTRADICTION, EXIT_OPEN, EXIT_INTERRUPTED = 2, 3, 4, 130
_RECORD = "run.calipers"
_PLANS = "quick, standard, brackets (distances too), thorough, complete, distance, autoattack, categorical. Default: standard, or categorical with --letters."
_RADII = "Several radii in one run, such as 0.05,0.1,0.2 or 2/255,8/255, in place of epsilon: a curve. Points are asked only where a verdict is open."
_STATISTICS = "Mean that the model's inputs were standardised with: one number, or one a channel, separated by commas."


@dataclass(frozen=True)
class Options:
    """The options that every measuring command takes."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="file.py:function, model.pt2, weights with --builder, mnist-plain or mnist-robust. Default: both embedded networks."
        ),
    ] = None
    builder: Annotated[str | None, typer.Option(help="file.py:function that builds the module, when --model is a file of weights.")] = None
    data: Annotated[
        str | None, typer.Option("--data", "-d", help=".npz with x and y, .npy (with --labels), or a folder of images by class. Default: 500 MNIST images.")
    ] = None
    labels: Annotated[str | None, typer.Option(help=".npy with the labels.")] = None
    points: Annotated[int | None, typer.Option("--points", "-n", help="Measure the first N points only.")] = None
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf"
    epsilon: Annotated[str, typer.Option("--epsilon", "-e", help="Radius in the data's own units; fractions such as 8/255 are exact.")] = "0.1"
    letters: Annotated[
        str | None,
        typer.Option(help="length,size: the input is a sequence of one-hot letters from an alphabet of that size; epsilon is then how many may be replaced."),
    ] = None
    box: Annotated[str, typer.Option("--box", help="Valid values, low,high; or none.")] = "0,1"
    mean: Annotated[str | None, typer.Option(help=_STATISTICS)] = None
    std: Annotated[str | None, typer.Option(help="Standard deviation, likewise.")] = None
    seed: Annotated[int, typer.Option(help="Seed of all random starts.")] = 0
    record: Annotated[
        str, typer.Option("--record", "--resume", help="File that keeps all evidence; the same command takes an interrupted run up again. none: keep nothing.")
    ] = _RECORD
    report: Annotated[str, typer.Option("--report", "-o", help="Page to write; none: no page.")] = "none"
    confidence: Annotated[float, typer.Option(help="Confidence of all intervals.")] = 0.95
    seconds: Annotated[float | None, typer.Option(help="Stop after about so many seconds, with what is known.")] = None
    proofs: Annotated[bool, typer.Option("--proofs", help="Keep a proof file for every certificate that has one; calipers check proves them again.")] = False
    guarantee: Annotated[str | None, typer.Option(help="Of certificates: float64-checked, or float32-executed (the network as float32 runs it).")] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False

    def classifiers(self) -> list[tuple[str, Classifier]]:
        """Return the named models; without a name both embedded ones."""
        from calipers.data import NAMES
        from calipers.interchange import load_model

        if self.model is None and self.data is not None:
            raise BadInput("name the model to measure on this data: --model file.py:function (the embedded networks read MNIST images only)")
        mean, std = (None if text is None else _numbers(text, "mean and std") for text in (self.mean, self.std))
        return [(name, _loaded(load_model, name, builder=self.builder, mean=mean, std=std)) for name in ([self.model] if self.model else NAMES)]

    def check(self) -> None:
        """Raise `BadInput` for numbers and places that would else fail only after the work is done."""
        if not 0 < self.confidence < 1:
            raise BadInput(f"the confidence is a share between 0 and 1, such as 0.95; got {self.confidence:g}")
        if self.seconds is not None and not self.seconds > 0:
            raise BadInput(f"the number of seconds must be above 0, got {self.seconds:g}")
        if self.report != "none" and not Path(self.report).absolute().parent.is_dir():
            raise BadInput(f"there is no folder {Path(self.report).parent} to write the report to: make it first, or give --report none")

    def threat(self) -> Threat:
        """Return the threat."""
        from calipers.problem.ball import Ball

        if self.letters is not None:
            return _substitutions(_numbers(self.letters, "the letters"), _numbers(self.epsilon, "a number of switches")[0])
        box = None if self.box == "none" else _numbers(self.box, "a box")
        if box is not None and len(box) != 2:
            raise BadInput(f"a box is two numbers, low,high, or none; got {self.box!r}")
        return Ball(self.norm, _numbers(self.epsilon, "a radius")[0], None if box is None else (box[0], box[1]))


def _command(**defaults: Any) -> Callable[[Callable[..., None]], None]:
    """Register a command that takes its own parameters, then the shared options (with other defaults where given)."""

    def register(command: Callable[..., None]) -> None:
        hints, shared = get_type_hints(command, include_extras=True), get_type_hints(Options, include_extras=True)
        own = [p.replace(annotation=hints[p.name]) for p in list(inspect.signature(command).parameters.values())[1:]]
        names = [f.name for f in fields(Options)]

        def run(**given: Any) -> None:
            options = Options(**{name: given.pop(name) for name in names})
            command(options, **given)

        usual = {f.name: defaults.get(f.name, f.default) for f in fields(Options)}
        common = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=usual[n], annotation=shared[n]) for n in names]
        run.__signature__ = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + common)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in own + common}
        app.command(command.__name__, help=command.__doc__)(run)

    return register


_Tool = Annotated[str | None, typer.Option("--tool", "-t", help="A tool, with its settings as in Python: PGD(steps=100, restarts=20), Steepest, CROWN, IBP …")]


@_command(report="report.html")
def measure(
    options: Options,
    plan: Annotated[str | None, typer.Option("--plan", "-p", help=_PLANS)] = None,
    radii: Annotated[str | None, typer.Option(help=_RADII)] = None,
) -> None:
    """Robust accuracy from both sides, and a bracket on every point's adversarial distance."""
    _run(options, lambda threat: _plan_for(threat, plan), None if radii is None else _numbers(radii, "the radii"))


@_command()
def distance(options: Options) -> None:
    """Brackets on the distance to the nearest adversarial example, one line a point; the searches begin at epsilon."""
    for result in _run(options, lambda threat: _plan_for(threat, None, "distance")):
        print("\npoint  label  answer  certified above  broken at  by")
        for row in result.points:
            upper = "-" if row.upper == float("inf") else f"{row.upper:.6g}"
            tools = row.note if row.verdict == "invalid" else ", ".join(t.split("(")[0] for t in (row.lower_tool, row.upper_tool) if t)
            print(f"{row.index:5d}  {row.label:5d}  {row.prediction:6d}  {row.lower:15.6g}  {upper:>9}  {tools}")


@_command(record="none")
def attack(options: Options, tool: _Tool = None) -> None:
    """The upper jaw alone: one attack, refereed. Without --tool: PGD(steps=100, restarts=20), or Replace with --letters."""
    _run(options, lambda threat: _plan_of(threat, "attack", tool))


@_command(record="none")
def certify(options: Options, tool: _Tool = None) -> None:
    """The lower jaw alone: one certifier. Without --tool: CROWN; with --letters, Enumeration goes through every way to replace them."""
    _run(options, lambda threat: _plan_of(threat, "certify", tool))


@app.command()
def check(
    record: Annotated[str, typer.Argument(help="The record to check.")] = _RECORD,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model that was measured. Default: the embedded networks.")] = None,
    builder: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    mean: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    std: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    certificates: Annotated[bool, typer.Option(help="Prove every certificate again, not only the witnesses.")] = True,
) -> None:
    """Replay every witness of a record, and prove its certificates again."""
    from calipers.api import check as check_record

    with _errors():
        classifiers = Options(model=model, builder=builder, mean=mean, std=std).classifiers()
        found = [(name, one) for name, c in classifiers for one in _checked(check_record, record, c, certificates, skip=len(classifiers) > 1)]
        if not found:
            raise BadInput(f"{record} holds no question about these models. Name the model that was measured: --model file.py:function")
        for name, one in found:
            print(f"{name}: {one.witnesses} witnesses replayed, {one.certificates} certificates proved again, {len(one.failures)} failed")
            for line in (*one.proofs, *one.failures):
                print(f"  {line}")
        if any(not one.sound for _, one in found):
            raise typer.Exit(EXIT_CONTRADICTION)


@app.command("report")
def report_command(
    record: Annotated[str, typer.Argument(help="The record to show.")] = _RECORD,
    output: Annotated[str, typer.Option("--report", "-o", help="Page to write; none: no page.")] = "report.html",
    confidence: Annotated[float, typer.Option(help="Confidence of all intervals.")] = 0.95,
) -> None:
    """Print the tables of a record, and write its page. Needs neither the model nor torch."""
    from calipers.record.ledger import Ledger
    from calipers.report.render import render_html
    from calipers.report.text import render_text

    with _errors(), Ledger(record, read_only=True) as ledger:
        print(render_text(ledger, confidence))
        if output != "none":
            print(f"\n{render_html(ledger, output, confidence)}")


@app.command(
    epilog="Exit codes: 0 all answered (sat or unsat), 4 some unknown or out of time, 2 files that cannot be read or do not belong together, "
    "3 two tools contradict each other."
)
def verify(
    network: Annotated[str | None, typer.Argument(help="The network, .onnx or .onnx.gz.")] = None,
    specification: Annotated[str | None, typer.Argument(help="The property, .vnnlib or .vnnlib.gz: what would be unsafe.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for each instance; a list's own limits count first.")] = None,
    instances: Annotated[str | None, typer.Option("--csv", help="A list, onnx,vnnlib[,timeout] a line; prints network,property,verdict,seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random starts.")] = 0,
) -> None:
    """Is a property true for all inputs? Prints sat with an unsafe input, unsat (proved), unknown or timeout."""
    from calipers.instances import listed
    from calipers.instances import verify as answer

    with _errors():
        if instances is None and network and specification:
            found = answer(network, specification, timeout=timeout, seed=seed)
            print(found.answer, *([found.witness.text()] if found.witness else []), sep="\n")
            for note in found.notes:
                print(f"calipers: {note}", file=sys.stderr)
            raise typer.Exit(0 if found.decided else EXIT_OPEN)
        if instances is None or network or specification:
            raise BadInput("give a network and a property (calipers verify net.onnx spec.vnnlib), or a list of them alone (--csv instances.csv)")
        worst = 0
        for one in listed(instances, timeout, seed):
            print(one.line, flush=True)
            if one.error:
                print(f"calipers: {one.error}", file=sys.stderr)
            worst = max(worst, EXIT_BAD_INPUT if one.error else 0 if one.decided else EXIT_OPEN, key=(0, EXIT_OPEN, EXIT_BAD_INPUT).index)
        raise typer.Exit(worst)


def _numbers(text: str, what: str) -> list[float]:
    try:
        return [float(Fraction(part.strip())) for part in text.split(",")]
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(f"{text!r} is no number for {what}; write 0.1, 8/255, or several separated by commas") from error


def _substitutions(shape: list[float], k: float) -> Threat:
    from calipers.problem.substitutions import Substitutions, letters

    if len(shape) != 2 or not all(n >= 1 and n == int(n) for n in shape):
        raise BadInput(f"letters are two whole numbers, length,size (60,4 for 60 nucleotides), got {', '.join(map('{:g}'.format, shape))}")
    return Substitutions(letters(int(shape[0]), int(shape[1])), k)


def _loaded(load: Callable[..., Classifier], source: str, **settings: Any) -> Classifier:
    """Return the model; what its own code raises on the way is told in one line."""
    try:
        return load(source, **settings)
    except CalipersError:
        raise
    except (Exception, SystemExit) as error:
        raise BadInput(f"{source} cannot be loaded: its code raises {type(error).__name__} ({error})") from error


def _plan_of(threat: Threat, command: str, tool: str | None) -> Plan:
    from calipers.presets import plan_of

    return plan_of(command, tool, threat)


def _plan_for(threat: Threat, name: str | None, usual: str = "standard") -> Plan:
    from calipers.presets import plan_for

    return plan_for(threat, name, usual)


def _run(options: Options, plan: Callable[[Threat], Plan], radii: list[float] | None = None) -> list[Result]:
    """Measure every model that the options name, at one radius or several, print the tables, and write the page."""
    with _errors():
        from calipers.api import curve
        from calipers.api import measure as measure_problem
        from calipers.interchange import load_data
        from calipers.record.ledger import Ledger
        from calipers.report.text import render_text

        options.check()
        threat, classifiers = options.threat(), options.classifiers()
        chosen = plan(threat)
        x, y = load_data(options.data, options.labels, options.points)
        results: list[Result] = []
        with Ledger(None if options.record == "none" else options.record) as ledger:
            for name, classifier in classifiers:
                with _watch(name, len(x), options.quiet) as watch:
                    settings = {k: getattr(options, k) for k in ("seed", "confidence", "seconds", "proofs", "guarantee")}
                    ask: Callable[..., Result] = measure_problem if radii is None else partial(curve, radii=radii)
                    results.append(ask(classifier, x, y, threat, plan=chosen, record=ledger, watch=watch, title=_title(name), **settings))
                if not results[-1].finished:
                    break
            print(render_text([r.summary for r in results], options.confidence))
            _show(results, options.report, options.record)
        return results


def _title(source: str) -> str:
    return source if ".py:" not in source else f"{Path(source.rpartition(':')[0]).name}:{source.rpartition(':')[2]}"


def _show(results: list[Result], report: str, record: str) -> None:
    """Write the page, and say what is left to do."""
    from calipers.report.render import render_html

    if report != "none":
        print(f"\n{render_html([r.summary for r in results], report)}")
    if not results[-1].finished:
        kept = "" if record == "none" else f" Everything admitted is in {record}: the same command goes on from there."
        print(f"Stopped before the plan's end; what is known is shown.{kept}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED)


def _checked(check_record: Callable[..., Any], record: str, classifier: Classifier, certificates: bool, *, skip: bool) -> Iterator[Any]:
    """Yield the checks of one model; with `skip` a model the record does not know is passed over."""
    from calipers.record.ledger import Ledger

    with Ledger(record, read_only=True) as ledger:
        try:
            yield from check_record(ledger, classifier, lambda q: _recorded_threat(q, ledger), certificates=certificates)
        except BadInput:
            if not skip:
                raise


def _recorded_threat(question: Question, ledger: Any) -> Threat:
    import torch

    from calipers.problem.threat import recorded_threat

    return recorded_threat(question.facts["threat"], torch.tensor([p.radius for p in ledger.points(question.fingerprint)], dtype=torch.float64))


@contextmanager
def _watch(name: str, points: int, quiet: bool) -> Iterator[Any]:
    """Show a bar for the stage at work: points dealt, points of the run that have a verdict, time left."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("points, {task.fields[settled]} decided"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bars(progress, name, points)


class _Bars:
    """Tells a progress display how far a run has come."""

    def __init__(self, progress: Any, name: str, points: int) -> None:
        self.bars, self.name, self.total = progress, name, points
        self.task: Any = None

    def stage(self, name: str, points: int) -> None:
        """A new bar in place of the last one."""
        if self.task is not None:
            self.bars.remove_task(self.task)
        short = name if len(name) < 34 else f"{name[:30]} …"
        self.task = self.bars.add_task(f"{self.name}: {short}", total=points, settled=f"0 of {self.total}")

    def progress(self, done: int, settled: int) -> None:
        """Move the bar."""
        self.bars.update(self.task, advance=done, settled=f"{settled} of {self.total}")


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the package's own exceptions into a message and an exit code; others are bugs and keep their trace."""
    try:
        yield
    except Contradiction as error:
        print(f"contradiction: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_CONTRADICTION) from error
    except CalipersError as error:
        print(f"calipers: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_BAD_INPUT) from error
    except KeyboardInterrupt:
        print("calipers: interrupted before anything was measured", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def main() -> None:
    """Entry point of the `calipers` command."""
    # Must stand before torch is loaded. Threads that spin while they wait made a measurement take eight times as long beside another program.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()


if __name__ == "__main__":
    main()
