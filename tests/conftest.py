"""Which of a test's many cases run every time? With `one_in(n)` every n-th, on a diagonal of its parameters; the others wait on the slow shelf."""

from __future__ import annotations

from collections import defaultdict

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: dict[str, int] = defaultdict(int)
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is None or item.get_closest_marker("slow") is not None:
            continue
        name, (n,) = item.nodeid.partition("[")[0], mark.args
        place, seen[name] = seen[name], seen[name] + 1
        if (place + place // n) % n:
            item.add_marker(pytest.mark.slow)
