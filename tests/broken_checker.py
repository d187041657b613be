"""What does a checker with a mistake in it prove?"""

from __future__ import annotations

import re
import types
from pathlib import Path

from calipers.record import checker


def mutated(changes: dict[str, str]) -> types.ModuleType:
    """Return the checker with some changes in it."""
    source = Path(str(checker.__file__)).read_text(encoding="utf-8")
    for old, new in changes.items():
        # a line may be broken anywhere
        found = re.findall(r"\s*".join(map(re.escape, re.sub(r"\s", "", old))), source)
        assert len(found) == 1, f"{old!r} stands {len(found)} times in the checker"
        source = source.replace(found[0], new)
    changed = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), changed.__dict__)
    return changed


def only_proved_by(changes: dict[str, str], data: bytes) -> bool:
    """Does the checker with these changes prove what the true one does not?"""
    return not checker.prove(data).proved and bool(mutated(changes).prove(data).proved)
