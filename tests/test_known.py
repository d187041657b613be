"""Does evidence that is joined as it comes say the same as evidence that is joined at the end?"""

from __future__ import annotations

import numpy as np
import pytest

from calipers.errors import Contradiction
from calipers.measurement.joined import Known
from calipers.record.bracket import Bracket
from calipers.record.evidence import Evidence

NAMES, TOOLS = [f"p{i}" for i in range(6)], ("A", "B", "C")
RADII = np.array([0.0, 0.25, 0.5, 0.5, 0.75, 1.0])


def drawn(seed: int) -> list[Evidence]:
    """Return facts in random order, many of them at the radius asked: certificates at most there,
    witnesses there or beyond, or all nearer.
    """
    draw, facts = np.random.default_rng(seed), list[Evidence]()
    for i, name in enumerate([*NAMES, "a stranger"]):
        radius, broken = float(RADII[i % len(NAMES)]), bool(draw.integers(2))
        for _ in range(4):
            tool, step = str(draw.choice(TOOLS)), 0.05 * float(draw.integers(3))
            low, up = (
                (0.3 * radius, 0.6 * radius + step)
                if broken
                else (radius - step, radius + 0.1 + step)
            )
            facts += [Evidence(name, "certificate", tool, low)] * bool(low > 0) + [
                Evidence(name, "witness", tool, up if up > 0 else 0.1)
            ]
            facts.append(Evidence(name, "attempt", tool, radius))
            if draw.integers(2) and broken:
                # after a nearer one: it counts for nothing
                facts.append(Evidence(name, "witness", tool, radius + 0.1))
            elif not broken and radius:
                facts.append(Evidence(name, "certificate", tool, radius))
    return [facts[i] for i in draw.permutation(len(facts))]


def same(known: Known, facts: list[Evidence]) -> None:
    """Assert that everything that is known follows from the facts as a whole."""
    whole = Bracket.of(NAMES, facts)
    held = known.bracket()
    assert (held.lower == whole.lower).all() and (held.upper == whole.upper).all()
    assert (held.lower_tool, held.upper_tool) == (whole.lower_tool, whole.upper_tool)
    assert known.settled == sum(v != "unknown" for v in whole.verdicts(RADII))
    for tool in TOOLS:
        mine = [e for e in facts if e.tool == tool]
        alone = Bracket.of(NAMES, mine).verdicts(RADII)
        for i in range(1, len(NAMES)):  # at radius 0 there is nothing to settle
            assert known.settled_by(tool, [i], RADII) == (alone[i] != "unknown"), (tool, i)
            assert known.narrowed_by(tool, [i]) == any(
                e.point == NAMES[i] and e.kind != "attempt" for e in mine
            )
        assert set(known.tried(tool)) == {(e.point, e.radius) for e in mine if e.kind == "attempt"}


@pytest.mark.parametrize("seed", range(20))
def test_joining_as_it_comes_is_joining_at_the_end(seed: int) -> None:
    facts, draw = drawn(seed), np.random.default_rng(seed)
    known, done = Known(NAMES, RADII), 0
    while done < len(facts):
        step = int(draw.integers(1, 5))
        known.add(facts[done : done + step])
        done += step
        same(known, facts[:done])


@pytest.mark.parametrize("seed", range(20))
def test_facts_that_are_passed_over_leave_no_trace(seed: int) -> None:
    facts = drawn(seed)
    known, over = Known(NAMES, RADII, facts), {e.key for e in facts[::3] if e.kind != "attempt"}
    list_held = known.facts
    tried = [Evidence("p1", "attempt", "A", 0.125)]
    known.finish(over, tried)
    same(known, [*(e for e in facts if e.key not in over), *tried])
    assert list_held is known.facts


def test_ends_that_cross_are_told_at_once() -> None:
    known = Known(NAMES, RADII, [Evidence("p1", "witness", "A", 0.2)])
    with pytest.raises(Contradiction, match=r"B certifies 0\.3"):
        known.add([Evidence("p1", "certificate", "B", 0.3)])
