"""All exceptions of the package, each with a message that says what to do."""

from __future__ import annotations


class CalipersError(Exception):
    """Base class of every error that calipers raises on purpose.

    Catch it to handle all of them. Any other exception that leaves calipers is a bug of the package
    or comes from the model's own code.

    Args:
        *args: The message: what was got, what was expected, and what to do.
    """


class BadInput(CalipersError, ValueError):
    """A model, data set, threat or option that cannot be measured as given.

    Raised before any tool runs, by every function that takes such an input. It is a `ValueError`
    too. What to do: follow the message, which names the value, what was expected and a remedy.

    Args:
        *args: The message.

    Example:
        >>> import calipers
        >>> try:
        ...     calipers.Ball("linf", -0.1)
        ... except calipers.BadInput as error:
        ...     print(error)
        radius must be a finite number >= 0 in the data's own units, got -0.1
    """


class BadModel(BadInput):
    """A model that cannot be measured, whatever the data.

    Raised for a model in training mode, one with an output of the wrong shape, one that cannot be
    called on these inputs, and an object that is no model at all. What to do: change the model as
    the message says, for example `model.eval()`, or wrap it in a `torch.nn.Module` that returns
    logits.

    Args:
        *args: The message.

    Example:
        >>> import calipers
        >>> try:
        ...     calipers.load(3)
        ... except calipers.BadModel as error:
        ...     print(str(error).split(".")[0])
        int is no model
    """


class UnsupportedOp(CalipersError):
    """An operation of the model for which there are no sound bounds.

    Raised by certifiers: by `certify`, and by `verify` where the network cannot even be run for
    attacks. `measure` and `portrait` catch it, note it, and go on with attacks alone. What to do:
    run attacks, which do not need bounds, or replace the operation that the message names.

    Args:
        *args: The message, with the operation and its place in the model.
    """


class CaptureError(CalipersError):
    """A model that cannot be turned into a graph with the same outputs.

    Raised by certifiers where `torch.export` fails on the model, where the graph and the model
    disagree in float64 (state, randomness, a fixed dtype), or where the model mixes points of a
    batch. `measure` and `portrait` catch it, note it, and go on with attacks alone. What to do:
    rewrite the part that the message names, or run attacks, which do not need a graph.

    Args:
        *args: The message, with the place in the model where it is known.
    """


class ToolFailed(CalipersError):
    """A certifier that ended on an error other than those of calipers.

    Raised for whatever else ends a certifier, such as exhausted memory, so that results of other
    tools are not lost: `measure` notes it and goes on, `certify` raises it. An attack's own
    exception is passed on as it is. What to do: read the message, which holds the type and first
    line of the original error (`__cause__` has all of it); a smaller batch or another certifier may
    do.

    Args:
        *args: The message.
    """


class Contradiction(CalipersError):
    """A certificate that an adversarial example refutes.

    The certified radius exceeds the distance of the example, so one of the two tools, or a custom
    model or threat, must be wrong. Raised as soon as it is noticed, by `measure`, `curve`,
    `distance`, `certify` and `portrait`, and when a record is read that holds both facts; `check`
    reports it as a failure instead. What to do: trust neither number of that point, and please
    report it with the model.

    Args:
        *args: The message, with the point, both radii and both tools where they are known.
    """


class RecordError(CalipersError):
    """A record file that cannot be used, or that is about another model.

    Raised where the file is missing, damaged, altered, empty, a database of another program or of a
    newer calipers, and where a model of the same name, but with other weights, was measured into
    it. What to do: follow the message; usually give another file name, or update calipers.

    Args:
        *args: The message.

    Example:
        >>> import calipers
        >>> try:
        ...     calipers.Record("missing.calipers", read_only=True)
        ... except calipers.RecordError as error:
        ...     print(str(error).split(":")[0])
        no record at missing.calipers
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it is empty.

    The messages of libraries can go on for pages. At most 200 characters are returned.

    >>> first_line(ValueError("no such axis\\n  in node 7")), first_line(MemoryError())
    ('no such axis', 'MemoryError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def typed(error: BaseException) -> str:
    """Return the type of an error and the first line of its message.

    >>> typed(KeyError("x")), typed(MemoryError())
    ("KeyError: 'x'", 'MemoryError')
    """
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"
