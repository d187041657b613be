"""Is the house in order? Counts what a newcomer stumbles over, and prints each count beside its
goal.

    python scripts/house.py

Exit code 1 where a goal is missed. Reads the sources as text and trees: nothing of the package is
imported.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "calipers").rglob("*.py"))
WIDE, SUMMARY = 100, 72
ROOMS = ("attacks", "certificates", "geometry", "record")
# private words, for which the field has others: unstable, nonlinear, breakpoint, hyperplane, target
# class, substitution, symbol, parametrised, receptive field, piecewise linear
PRIVATE = re.compile(
    r"(?<![a-z])(bends?|bent|bending|kinks?|walls?|rivals?|slides?|crops?|cropped|straight"
    r"|switch(?:es|ing|ed)?|letters?)(?![a-z]|-clock)",
    re.IGNORECASE,
)
FORMER = "renamed.py"  # lists former names, and has to use them
LATEST = 50  # commits: what is older cannot be mended any more

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef | ast.Module


def trees() -> dict[Path, ast.Module]:
    """Return the tree of every source file."""
    return {path: ast.parse(path.read_text()) for path in SOURCES}


def public_names(room: str = "") -> list[str]:
    """Return the names that the package itself exports, or one of its packages."""
    tree = ast.parse((ROOT / "src" / "calipers" / room / "__init__.py").read_text())
    lists = (
        n.value
        for n in tree.body
        if isinstance(n, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "__all__" for t in n.targets)
    )
    return [
        str(e.value)
        for made in lists
        if isinstance(made, ast.List)
        for e in made.elts
        if isinstance(e, ast.Constant)
    ]


def walked(files: dict[Path, ast.Module], *kinds: type[ast.AST]) -> Iterator[ast.AST]:
    """Yield the nodes of these kinds in all files."""
    for tree in files.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, kinds))


def parameters(function: Function) -> int:
    """Count the parameters, `self` and `cls` left out."""
    a = function.args
    names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def summaries(files: dict[Path, ast.Module]) -> list[str]:
    """Return the first lines of all docstrings."""
    docs = (
        ast.get_docstring(node)
        for node in walked(files, ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, Documented)
    )
    return [doc.splitlines()[0] for doc in docs if doc]


def exported(files: dict[Path, ast.Module]) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Return all public classes and functions by name.

    Exceptions are left out: they have no parameters, and raise nothing.
    """
    names = {n for room in ("", *ROOMS) for n in public_names(room)}
    found = dict[str, ast.ClassDef | ast.FunctionDef]()
    for path, tree in files.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in names:
                if path.name == "errors.py":
                    continue
                found.setdefault(node.name, node)
    return found


def private_words() -> list[str]:
    """Return the private words that the sources use, each time, in code and prose alike."""
    texts = (path.read_text() for path in SOURCES if path.name != FORMER)
    return [found.lower() for text in texts for found in PRIVATE.findall(text)]


def takes_nothing(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Return whether nothing can be given: no fields, no `__init__`, no base, no parameters."""
    if isinstance(node, ast.FunctionDef):
        return parameters(node) == 0
    inside = (n for n in node.body if isinstance(n, ast.AnnAssign | ast.FunctionDef))
    makers = (n for n in inside if isinstance(n, ast.AnnAssign) or n.name == "__init__")
    return not node.bases and not any(makers)


def commits() -> tuple[int, int, int]:
    """Return how many of the latest commits there are, of how many the subject is over 70
    characters, and how many have no body.
    """
    told = subprocess.run(
        ["git", "log", "--no-merges", f"-{LATEST}", "--format=%s%x1f%b%x1e"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    pairs = [entry.strip("\n").split("\x1f") for entry in told.split("\x1e") if entry.strip()]
    return (
        len(pairs),
        sum(len(subject) > 70 for subject, _ in pairs),
        sum(not body.strip() for _, body in pairs),
    )


def main() -> int:
    """Print every count and its goal; return 1 where one is missed."""
    files = trees()
    names, shown = public_names(), exported(files)
    docs = {name: ast.get_docstring(node) or "" for name, node in shown.items()}
    counts = [
        parameters(f)
        for f in walked(files, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(f, Function)
    ]
    twice = [
        name
        for name, k in Counter(
            c.name for c in walked(files, ast.ClassDef) if isinstance(c, ast.ClassDef)
        ).items()
        if k > 1
    ]
    lines = [line for path in SOURCES for line in path.read_text().splitlines() if line.strip()]
    firsts = [len(line) for line in summaries(files)]
    total, long, bare = commits()
    wide = sum(len(line) > WIDE for line in lines) / len(lines)
    over = sum(n > SUMMARY for n in firsts) / len(firsts)
    described = sum(
        "Args:" in d or "Parameters" in d or takes_nothing(shown[name]) for name, d in docs.items()
    )
    rows: list[tuple[str, object, object, bool]] = [
        ("names that the package exports", len(names), "at most 45", len(names) <= 45),
        ("most parameters of a function", max(counts), "at most 8", max(counts) <= 8),
        (
            "functions with more than 6 parameters",
            sum(n > 6 for n in counts),
            "at most 12",
            sum(n > 6 for n in counts) <= 12,
        ),
        ("class names used twice or more", len(twice), "at most 3", len(twice) <= 3),
        (f"lines over {WIDE} characters", f"{wide:.1%}", "under 2 %", wide < 0.02),
        (
            "first line of a docstring, median",
            statistics.median(firsts),
            f"at most {SUMMARY}",
            statistics.median(firsts) <= SUMMARY,
        ),
        (f"first lines over {SUMMARY} characters", f"{over:.1%}", "0", over == 0),
        (
            "exported docstrings with parameters",
            f"{described} of {len(docs)}",
            "all",
            described == len(docs),
        ),
        (
            "exported docstrings with an example",
            sum(">>>" in d for d in docs.values()),
            "at least 20",
            sum(">>>" in d for d in docs.values()) >= 20,
        ),
        (
            "exported docstrings that name errors",
            sum("Raises" in d for d in docs.values()),
            f"{len(docs)}",
            all("Raises" in d for d in docs.values()),
        ),
        # what remains: a key of the records, and the letters of an equation of sums
        ("private words", len(private := private_words()), "at most 8", len(private) <= 8),
        ("commit subjects over 70 characters", f"{long} of {total}", "0", long == 0),
        ("commits without a body", f"{bare} of {total}", "at most 10 %", bare <= total / 10),
    ]
    for what, now, goal, good in rows:
        print(f"{what:40} {now!s:>12}   goal: {goal}{'' if good else '   MISSED'}")
    return int(not all(good for *_, good in rows))


if __name__ == "__main__":
    sys.exit(main())
