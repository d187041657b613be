"""Lists of verification instances, like the competition's instances.csv.

The first line may name the columns.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from calipers.errors import BadInput
from calipers.interchange.files import content, existing, is_file

_NETWORK, _PROPERTY, _TIMEOUT = (
    {"network", "onnx", "model"},
    {"property", "vnnlib", "specification"},
    {"timeout", "seconds"},
)


@dataclass(frozen=True)
class Instance:
    """One line of a list: a network and a property.

    Args:
        names: What the line calls them.
        network: Where the network is.
        specification: Where the property is.
        timeout: Its own limit in seconds; None where the line has none.
    """

    names: tuple[str, str]
    network: Path
    specification: Path
    timeout: float | None = None


def load_instances(source: str | Path) -> list[Instance]:
    """Return the instances of a .csv file.

    Each line holds onnx, vnnlib[, timeout], or the columns that the first line names. Paths are
    relative to the list; endings (.onnx, .vnnlib, .gz) and the folders onnx/ and vnnlib/ may be
    left out.

    Args:
        source: The list, as in the VNN-COMP benchmarks.

    Returns:
        The instances, in order. Whether their files exist is not checked.

    Raises:
        BadInput: Where the list cannot be read, or a line names no network and property, or no
            number of seconds.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "instances.csv"
        >>> _ = path.write_text("net.onnx,safe.vnnlib,60")
        >>> [(one.names, one.timeout) for one in load_instances(path)]
        [(('net.onnx', 'safe.vnnlib'), 60.0)]
    """
    path = existing(source, "instances")
    try:
        rows = [
            [cell.strip() for cell in row]
            for row in csv.reader(io.StringIO(content(path).decode()))
            if any(row)
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} cannot be read as a list of instances ({error})") from error
    if not rows:
        raise BadInput(f"{path} holds no instances: each line is network,property[,timeout]")
    names = [name.lower() for name in rows[0]]
    places: list[int | None] = [0, 1, 2]
    if _NETWORK & set(names) and _PROPERTY & set(names):
        places = [
            next((k for k, name in enumerate(names) if name in known), None)
            for known in (_NETWORK, _PROPERTY, _TIMEOUT)
        ]
        rows = rows[1:]
    return [_instance(row, places, path) for row in rows]


def _instance(row: list[str], places: list[int | None], path: Path) -> Instance:
    """Return the instance in a row, or raise `BadInput`."""
    network, specification, timeout = ("" if k is None or k >= len(row) else row[k] for k in places)
    if not network or not specification:
        raise BadInput(
            f"{path}: the line {','.join(row)[:200]!r} names no network and property; each line is "
            "network,property[,timeout]"
        )
    try:
        seconds = float(timeout) if timeout else None
    except ValueError as error:
        raise BadInput(f"{path}: {timeout[:40]!r} is no number of seconds") from error
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise BadInput(f"{path}: a time of {timeout[:40]} seconds; give a number of at least 0")
    return Instance(
        (network, specification),
        _file(path.parent, network, "onnx"),
        _file(path.parent, specification, "vnnlib"),
        seconds,
    )


def _file(folder: Path, name: str, kind: str) -> Path:
    """Return the file that a name means, with folder and ending completed."""
    tried = [
        folder / place / (name + ending)
        for place in ("", kind)
        for ending in ("", f".{kind}", ".gz", f".{kind}.gz")
    ]
    return next((path for path in tried if is_file(path)), folder / name)
