"""Which of a test's many cases run every time? A share of them, on a diagonal of the parameters;
the others wait on the slow shelf.

With `one_in(n)` every n-th; of tests that do not say, the more cases there are the smaller a share.
What was skipped for lack of files beside the project is named at the end of the run.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import beside
import pytest

SHARES = ((100, 6), (24, 4), (6, 2))  # cases from which on one in so many runs every time


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    fast = [item for item in items if item.get_closest_marker("slow") is None]
    cases = Counter(name_of(item) for item in fast)
    seen: dict[str, int] = defaultdict(int)
    for item in fast:
        name, mark = name_of(item), item.get_closest_marker("one_in")
        n = (
            next((share for least, share in SHARES if cases[name] >= least), 1)
            if mark is None
            else mark.args[0]
        )
        place, seen[name] = seen[name], seen[name] + 1
        if (place + place // n) % n:
            item.add_marker(pytest.mark.slow)


def name_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what was skipped because it needs more than the project itself."""
    skipped = terminalreporter.stats.get("skipped", [])
    line = beside.summary((r.nodeid, r.longrepr[2]) for r in skipped if len(r.longrepr or ()) == 3)
    if line:
        terminalreporter.write_line(line)
