"""The commands, named as in the library.

measure, distance, attack, certify, geometry, check, report, verify, tools. Their docstrings are the
text of `calipers COMMAND --help`.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calipers import __version__
from calipers.cli.exits import EXIT_CONTRADICTION, EXIT_INTERRUPTED, EXIT_OPEN, errors
from calipers.cli.geometry import Ladder, Slices
from calipers.cli.options import RECORD, Options, numbers, shared
from calipers.cli.renamed import Command
from calipers.errors import BadInput

if TYPE_CHECKING:
    from calipers.api.results import Result
    from calipers.measurement.plan import Plan
    from calipers.models.classifier import Classifier
    from calipers.threats.threat import Threat

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure how robust a neural network really is: attacks from above, certificates from "
    "below. `calipers measure` alone measures two small MNIST networks that ship with it.",
)


def _print_version(wanted: bool) -> None:
    """Print the version and exit, where that is wanted."""
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and end."
        ),
    ] = False,
) -> None:
    pass


_words: ContextVar[tuple[str, ...]] = ContextVar("words", default=())  # of this command line
_PLANS = (
    "quick, standard, brackets (distances too), thorough, complete, distance, autoattack, "
    "categorical. Default: standard, or categorical with --one-hot."
)
_RADII = (
    "Several radii in one run, such as 0.05,0.1,0.2 or 2/255,8/255, in place of epsilon: a curve. "
    "Points are asked only where a verdict is open."
)


_EXACT = (
    "Close the brackets by mixed-integer programs: small piecewise linear networks; linf, l2, l1 "
    "or substitutions. --seconds is then for each point (default 60)."
)

_LOWER_SHARE = (
    "Certifiers that prove nothing may take this share of the attacks' time (a few seconds at "
    "least); all: whatever they take. Default: the plan's, 0.75; complete: all."
)

_LowerShare = Annotated[str | None, typer.Option("--lower-share", help=_LOWER_SHARE)]
_Exact = Annotated[bool, typer.Option("--exact", help=_EXACT)]
_Tool = Annotated[
    str | None,
    typer.Option(
        "--tool",
        "-t",
        help="A tool, with its settings as in Python: PGD(steps=100, restarts=20), FGSM, "
        "CROWN, IBP …",
    ),
]


@shared(app, report="report.html")
def measure(
    options: Options,
    plan: Annotated[str | None, typer.Option("--plan", "-p", help=_PLANS)] = None,
    radii: Annotated[str | None, typer.Option(help=_RADII)] = None,
    lower_share: _LowerShare = None,
) -> None:
    """Bound the robust accuracy and all distances from both sides.

    Attacks find adversarial examples, certifiers prove that there are none; what neither settles is
    shown as unknown.
    """
    _run(
        options,
        lambda threat: _plan_for(threat, plan, lower_share),
        None if radii is None else numbers(radii, "the radii"),
    )


@shared(app)
def distance(options: Options, exact: _Exact = False, lower_share: _LowerShare = None) -> None:
    """Bound each point's distance to its nearest adversarial example.

    Prints one line for each point; the searches begin at epsilon.
    """
    from calipers.measurement.gaps import gap_between

    for result in _run(
        options, lambda threat: _plan_for(threat, None, lower_share, "distance"), exact=exact
    ):
        threat, named = options.threat(), result.summary.names.of_class
        print("\npoint  label  answer  certified above  broken at       gap  by")
        for row in result.points:
            upper, gap = (
                ("-", "-")
                if row.upper == float("inf")
                else (f"{row.upper:.6g}", f"{gap_between(row.lower, row.upper, threat):.1e}")
            )
            tools = (
                row.note
                if row.verdict == "invalid"
                else ", ".join(t.split("(")[0] for t in (row.lower_tool, row.upper_tool) if t)
            )
            print(
                f"{row.index:5d}  {named(row.label):>5}  {named(row.prediction):>6}  "
                f"{row.lower:15.6g}  "
                f"{upper:>9}  {gap:>8}  {tools}"
            )
        said = result.summary.facts.get("exact")
        if said:
            rest = (
                f"; the widest gap of the others is {said['widest']:.2g} of the distance"
                if said["exact"] < said["points"]
                else ""
            )
            print(f"exact: {said['exact']} of {said['points']} distances{rest}")


@shared(app, without="proofs guarantee", record="none")
def attack(options: Options, tool: _Tool = None) -> None:
    """Run one attack, and verify what it finds: upper bounds alone.

    Without --tool: PGD(steps=100, restarts=20), or SubstitutionSearch with --one-hot.
    """
    _run(options, lambda threat: _plan_of(threat, "attack", tool))


@shared(app, record="none")
def certify(options: Options, tool: _Tool = None) -> None:
    """Run one certifier: lower bounds alone.

    Without --tool: CROWN. With --one-hot, Enumeration tries every combination of substitutions.
    """
    _run(options, lambda threat: _plan_of(threat, "certify", tool))


@app.command("tools", cls=Command)
def tools_command(
    norm: Annotated[
        str | None,
        typer.Option(help="Only tools for a norm: linf, l2, l1, l0, pixels; or for substitutions."),
    ] = None,
    markdown: Annotated[bool, typer.Option(help="As the table of the README.")] = False,
) -> None:
    """List the tools: their task, threat models and what they need."""
    from calipers.cli.tools import as_markdown, as_text
    from calipers.problem.capabilities import EVERY

    with errors():
        if norm not in (None, "substitutions", *EVERY):
            raise BadInput(f"--norm is one of {', '.join(EVERY)} or substitutions, got {norm}")
        print(as_markdown() if markdown else as_text(norm))


@shared(
    app,
    without="one_hot record confidence proofs guarantee",
    report="geometry.html",
    record="none",
    limit=12,
)
def geometry(
    options: Options, ladder: Ladder = None, slices: Slices = 2, exact: _Exact = False
) -> None:
    """Show why a model is fragile at a few points.

    Prints a table of linear regions, gradients and a ladder of bounds, and writes a page with
    pictures.
    """
    from calipers.cli.geometry import run

    with errors():
        run(options, ladder, slices, exact)


@shared(
    app,
    without="limit norm epsilon one_hot box grid seed record report confidence seconds proofs "
    "guarantee quiet",
)
def check(
    options: Options,
    record: Annotated[str, typer.Argument(help="The record to check.")] = RECORD,
    certificates: Annotated[
        bool, typer.Option(help="Prove every certificate again, not only the witnesses.")
    ] = True,
    specification: Annotated[
        str | None,
        typer.Option(
            "--property",
            help="Of a proof file: the .vnnlib it has to be about, with --model net.onnx.",
        ),
    ] = None,
) -> None:
    """Replay a record's witnesses, and prove its certificates again.

    --model names the model that was measured. --data is needed for large inputs only, of which a
    record keeps digests. Given a proof file (.npz) instead of a record, prove it again, and compare
    it with --model and --property.
    """
    from calipers.api.check import check as check_record
    from calipers.api.verify import proved_again
    from calipers.interchange import load_data
    from calipers.interchange.files import is_archive

    with errors():
        if is_archive(Path(record)):

            def load(name: str) -> Classifier:
                return replace(options, model=[name]).classifiers()[0]

            if options.model and len(options.model) > 1:
                raise BadInput(f"{record} is the proof of one claim: give one --model")
            model = options.model[0] if options.model else None
            good, told = proved_again(record, model, specification, load)
            print(f"{record}: {told}")
            raise typer.Exit(0 if good else EXIT_CONTRADICTION)
        if specification is not None:
            raise BadInput(
                f"{record} is no proof file, which --property is for: a record holds its own "
                "questions"
            )
        classifiers = replace(options, data=None).classifiers()  # without names: the embedded ones
        x = None if options.data is None else load_data(options.data, options.labels, None)[0]
        settings = {"x": x, "certificates": certificates}
        found = [
            (c.name, one)
            for c in classifiers
            for one in _checked(check_record, record, c, settings, skip=len(classifiers) > 1)
        ]
        if not found:
            raise BadInput(
                f"{record} holds no question about these models. Name the model that was measured: "
                "--model file.py:function"
            )
        for name, one in found:
            print(
                f"{name}: {one.witnesses} witnesses replayed, {one.certificates} certificates "
                f"proved again, {len(one.failures)} failed"
            )
            for line in (*one.proofs, *one.failures, *one.left):
                print(f"  {line}")
        if any(not one.sound for _, one in found):
            raise typer.Exit(EXIT_CONTRADICTION)
        if any(one.left for _, one in found):
            raise typer.Exit(EXIT_OPEN)


@app.command("report", cls=Command)
def report_command(
    record: Annotated[str, typer.Argument(help="The record to show.")] = RECORD,
    output: Annotated[
        str, typer.Option("--report", "-o", help="Page to write; none: no page.")
    ] = "report.html",
    confidence: Annotated[float, typer.Option(help="Confidence of all intervals.")] = 0.95,
) -> None:
    """Print the tables of a record, and write its page.

    Needs neither the model nor torch.
    """
    from calipers.record.record import Record, making_sense
    from calipers.report.render import render_html
    from calipers.report.text import render_text

    with errors():
        Options(report=output, confidence=confidence).check()
    with errors(), Record(record, read_only=True) as ledger, making_sense(ledger):
        print(render_text(ledger, confidence))
        if output != "none":
            print(f"\n{render_html(ledger, output, confidence)}")


@app.command(
    cls=Command,
    epilog="Exit codes: 0 all answered (sat or unsat), 4 some unknown or out of time, 2 files "
    "that cannot be read or do not belong together, 3 two tools contradict each other.",
)
def verify(
    network: Annotated[str | None, typer.Argument(help="The network, .onnx or .onnx.gz.")] = None,
    specification: Annotated[
        str | None,
        typer.Argument(help="The property, .vnnlib or .vnnlib.gz: what would be unsafe."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--seconds", help="For each instance; a list's own limits count first."),
    ] = None,
    instances: Annotated[
        str | None,
        typer.Option(
            "--csv",
            help="A list, onnx,vnnlib[,timeout] a line; prints network,property,verdict,seconds.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random starts.")] = 0,
    proof: Annotated[
        str | None,
        typer.Option(
            "--proofs",
            help="Write a proof file (.npz) of what is unsat here, which record/checker.py proves "
            "again.",
        ),
    ] = None,
) -> None:
    """Decide a VNN-LIB property of an ONNX network.

    Prints sat with an unsafe input, unsat (proven safe), unknown or timeout.
    """
    from calipers.cli.verify import run

    with errors():
        run(network, specification, timeout, instances, seed, proof)


def _plan_of(threat: Threat, command: str, tool: str | None) -> Plan:
    """Return the plan of one tool alone."""
    from calipers.presets import plan_of

    return plan_of(command, tool, threat)


def _plan_for(threat: Threat, name: str | None, share: str | None, usual: str = "standard") -> Plan:
    """Return the named plan with the share of time that certifiers may take."""
    from calipers.measurement.plan import Plan
    from calipers.presets import plan_for

    given = None if share is None else math.inf
    if share not in (None, "all"):
        given = numbers(str(share), "a share of the attacks' time")[0]
        if not given >= 0:
            raise BadInput(
                f"--lower-share is a share of the attacks' time, 0 or more, or all; got {share}"
            )
    return plan_for(threat, Plan(name or "", lower_share=given), usual)


def _run(
    options: Options,
    plan: Callable[[Threat], Plan],
    radii: list[float] | None = None,
    *,
    exact: bool = False,
) -> list[Result]:
    """Measure every named model, print the tables and write the page.

    One radius or several; exact distances where asked for.
    """
    with errors():
        from calipers.api.measure import EXACT_SECONDS, curve, measure_exactly
        from calipers.api.measure import measure as measure_problem
        from calipers.interchange import load_data
        from calipers.record.record import Record, making_sense
        from calipers.report.text import render_text

        options.check()
        threat, classifiers = options.threat(), options.classifiers()
        chosen = options.set(plan(threat))
        ask: Callable[..., Result] = (
            measure_problem if radii is None else partial(curve, radii=radii)
        )
        if exact:  # --seconds is then the limit of each point
            ask = partial(measure_exactly, exact=options.seconds or EXACT_SECONDS)
            chosen = replace(chosen, seconds=None)
        x, y = load_data(options.data, options.labels, options.limit)
        results: list[Result] = []
        bars = sys.stderr.isatty() and not options.quiet
        with (
            Record(
                None if options.record == "none" else options.record, argv=_words.get()
            ) as ledger,
            making_sense(ledger),
        ):
            for classifier in classifiers:
                found = ask(classifier, x, y, threat, plan=chosen, record=ledger, progress=bars)
                results.append(found.at_confidence(options.confidence))
                if not found.finished:
                    break
            print(render_text([r.summary for r in results], options.confidence))
            _show(results, options.report, options.record)
        return results


def _show(results: list[Result], report: str, record: str) -> None:
    """Write the page, and report where the run was stopped."""
    from calipers.report.render import render_html

    if report != "none":
        print(f"\n{render_html([r.summary for r in results], report)}")
    if not results[-1].finished:
        kept = (
            ""
            if record == "none"
            else f" Everything admitted is in {record}: the same command goes on from there."
        )
        print(f"Stopped before the plan's end; what is known is shown.{kept}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED)


def _checked(
    check_record: Callable[..., Any],
    record: str,
    classifier: Classifier,
    settings: dict[str, Any],
    *,
    skip: bool,
) -> Iterator[Any]:
    """Yield the checks of one model.

    With `skip`, a model that the record does not know gives none instead of an error.
    """
    from calipers.record.record import Record, making_sense

    with Record(record, read_only=True) as ledger, making_sense(ledger):
        try:
            yield from check_record(ledger, classifier, **settings)
        except BadInput:
            if not skip:
                raise


def main() -> None:
    """Run the `calipers` command."""
    # Must come before torch is loaded. Threads that spin while they wait made a measurement take
    # eight times as long beside another program.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _words.set(tuple(sys.argv[1:]))
    app()
