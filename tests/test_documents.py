"""Are the documents short where they must be, and does every link in them lead somewhere?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_in(1)

ROOT = Path(__file__).resolve().parent.parent
LONGEST_ROW, LONGEST_NOTE = 240, 100
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "benchmarks").rglob("*.md"), *(ROOT / "docs").rglob("*.md")]
)


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of every row of every table, the heads among them."""
    rows = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]


def too_long(text: str) -> list[str]:
    """Return the rows that nobody reads, and those of a log with a long note."""
    logged = [row for row in rows_of(text) if re.match(r"\d{4}-\d\d-\d\d$", row[0])]
    wide = [line for line in text.splitlines() if line.startswith("|") and len(line) > LONGEST_ROW]
    return wide + [" | ".join(row) for row in logged if len(row[-1]) > LONGEST_NOTE]


def broken_links(path: Path, text: str) -> list[str]:
    """Return links to files that are not there, and references that nobody defines."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    defined = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, flags=re.MULTILINE))
    used = set(re.findall(r"\]\[([\w-]+)\]", prose))
    targets = [*re.findall(r"\]\(([^)\s]+)\)", prose), *defined.values()]
    files = [t.split("#")[0] for t in targets if not t.startswith(("http", "mailto:", "#"))]
    return [t for t in files if not (path.parent / t).exists()] + sorted(used - set(defined))


def test_rows_of_performance_stay_short() -> None:
    found = too_long((ROOT / "PERFORMANCE.md").read_text(encoding="utf-8"))
    assert not found, (
        "A row holds one pair of numbers and a short note; the rest goes into a report beside the "
        "others, benchmarks/reports/DATE-name.md:\n" + "\n".join(found)
    )


def test_performance_begins_with_where_we_stand() -> None:
    text = (ROOT / "PERFORMANCE.md").read_text(encoding="utf-8")
    standing = text.split("## ")[1]
    assert standing.startswith("Where we stand")
    head, _, *rows = rows_of(standing)
    assert head == ["task", "ours", "peer", "ratio", "command", "date"]
    assert all(all(row) and len(row) == len(head) for row in rows)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text(encoding="utf-8")) == []


def test_planted_faults_are_found(tmp_path: Path) -> None:
    note = "x" * (LONGEST_NOTE + 1)
    assert too_long(f"| 2026-11-30 | change | `a.py` | 1 | 2 | {note} |")
    assert too_long("| network | " + "y" * LONGEST_ROW + " |")
    assert not too_long("| 2026-11-30 | change | `a.py` | 1 | 2 | short |\n" + "z" * 999)
    page = tmp_path / "page.md"
    assert broken_links(page, "[a](gone.md) and [b][nowhere]") == ["gone.md", "nowhere"]
    assert broken_links(page, "`x[0](1)` and [c](https://example.org) and [d](#here)") == []
