#!/usr/bin/env python3
"""Make the environment, then do one thing in it. Standard library only; Linux and macOS.

    python3 dev.py measure [...]     measure the embedded default; the page lands in this folder
    python3 dev.py test [...]        lints, type-checks, runs the examples of docstrings and the
                                     fast tests; arguments: pytest alone
    python3 dev.py test-slow [...]   the slow reference tests; arguments: pytest
    python3 dev.py lint              ruff, mypy and import-linter alone
    python3 dev.py calipers ...      any calipers command line

The first call makes .venv beside this file and installs into it, which takes a minute or two; later
calls start at once.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit(
        f"dev.py needs Python 3.11 or newer, this is {sys.version.split()[0]} at "
        f"{sys.executable}. Start it with a newer one: python3.11 dev.py ..."
    )

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
STAMP = VENV / "installed"  # line 1: what was installed, as a digest; line 2: where
UNFINISHED = "unfinished"

RUFF = [("ruff check", ["ruff", "check", "."]), ("ruff format", ["ruff", "format", "--check", "."])]
LINT = [*RUFF, ("mypy", ["mypy", "--strict"]), ("import-linter", ["lint-imports", "--no-logo"])]
PYTEST = ["pytest", "-n", "2"]
DOCTESTS = ("doctests", ["pytest", "-q", "--doctest-modules", "src/calipers"])


def main(arguments: list[str]) -> int:
    """Do what the command line asks and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command == "measure":
        return in_place_of_this("", ["calipers", "measure", "--plan", "brackets", *rest])
    if command == "calipers":
        return in_place_of_this("", ["calipers", *rest])
    if command == "test":
        examples = [] if rest else [DOCTESTS]
        tests = ("pytest", [*PYTEST, "--durations=5", "--durations-min=1", *rest])
        return all_of([*LINT, *examples, tests])
    if command == "test-slow":
        return all_of(
            [("pytest", [*PYTEST, "-m", "slow", "--durations=0", "--durations-min=1", *rest])]
        )
    if command == "lint":
        return all_of(LINT)
    print(
        f"dev.py does not know '{command}'. Its commands: measure, test, test-slow, lint, "
        "calipers. More: python3 dev.py --help",
        file=sys.stderr,
    )
    return 2


def in_place_of_this(extra: str, command: list[str]) -> int:
    """Become the command, in the caller's folder: its exit code, its signals and its terminal are
    the caller's.
    """
    prepare(extra)
    sys.stdout.flush()
    os.execv(BIN / command[0], command)


def all_of(steps: list[tuple[str, list[str]]]) -> int:
    """Run every step, also after one has failed; print a summary and return 1 if any failed."""
    import subprocess

    prepare("dev")
    # More threads than cores make torch spin: each of the two test workers gets one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines, failed = [], False
    for name, command in steps:
        print(f"\n── {name}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(
            [BIN / command[0], *command[1:]],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            check=False,
        ).returncode
        failed |= code != 0
        lines.append(
            f"  {'ok    ' if code == 0 else 'FAILED'}  {name:<14} "
            f"{time.perf_counter() - start:6.1f} s"
        )
    print("\n── summary", *lines, sep="\n", flush=True)
    return int(failed)


def prepare(extra: str) -> None:
    """Make sure that .venv holds the package with the extra; takes milliseconds when it does."""
    import fcntl

    if is_current(extra):
        return
    with (ROOT / "pyproject.toml").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another dev.py, which is installing")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_current(extra):
            install(extra, lock.fileno())


def is_current(extra: str) -> bool:
    """Was the package installed here, with this extra or with `dev`, which holds all of them?"""
    return stamp() in ([digest(name), str(ROOT)] for name in (extra, "dev"))


def stamp() -> list[str]:
    """Return the lines of the stamp, none if nothing was installed."""
    return STAMP.read_text().splitlines() if STAMP.exists() else []


def digest(extra: str) -> str:
    """Return what an installation depends on, as one number: the two files, the Python of .venv,
    the extra.
    """
    import hashlib

    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt", VENV / "pyvenv.cfg"]
    return hashlib.sha256(
        b"\0".join([extra.encode(), *(file.read_bytes() for file in files if file.exists())])
    ).hexdigest()


def install(extra: str, lock: int) -> None:
    """Install the package and its extra; the stamp is valid only once all of it is there."""
    start = time.perf_counter()
    if not is_usable():
        say(f"making .venv with Python {sys.version.split()[0]}")
        run([sys.executable, "-m", "venv", "--clear", str(VENV)], lock)
    STAMP.write_text(f"{UNFINISHED}\n{ROOT}\n")
    what = f".[{extra}]" if extra else "."
    say(
        f"installing calipers{extra and f' with what {extra} needs'} into .venv (a minute or two "
        "the first time)"
    )
    run(
        [
            str(BIN / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-input",
            "--disable-pip-version-check",
            "-c",
            "constraints.txt",
            "-e",
            what,
        ],
        lock,
    )
    finished = STAMP.with_suffix(".new")
    finished.write_text(f"{digest(extra)}\n{ROOT}\n")
    finished.replace(STAMP)
    say(f"installed in {time.perf_counter() - start:.0f} s")


def is_usable() -> bool:
    """Can .venv be installed into? Not without pip, nor half installed, nor after its folder was
    moved: scripts hold its path.
    """
    if not ((BIN / "python").exists() and (BIN / "pip").exists()):
        return False
    lines = stamp()
    return not lines or (lines[0] != UNFINISHED and lines[1:] == [str(ROOT)])


def run(command: list[str], lock: int) -> None:
    """Run one step of the installation quietly; show its output and stop if it fails."""
    import subprocess

    # The child holds the lock as well: should this process be killed alone, nobody installs beside
    # the child.
    done = subprocess.run(
        command,
        cwd=ROOT,
        pass_fds=(lock,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        STAMP.unlink(missing_ok=True)
        print(done.stdout, file=sys.stderr)
        sys.exit(f"dev.py: this failed, see above: {' '.join(command)}")


def say(text: str) -> None:
    """Tell what is going on, beside the output of the command itself."""
    print(f"dev.py: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
