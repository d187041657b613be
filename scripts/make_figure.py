"""Draw docs/figure.svg, the README's figure, from a record: `calipers measure -m mnist-robust`,
then `python scripts/make_figure.py run.calipers`.
"""

import re
import sys
from pathlib import Path

from calipers.record.record import Record
from calipers.report.figures import FULL, curve
from calipers.report.report import summaries

ROOT = Path(__file__).parent.parent


def main(record: str) -> None:
    """Write the curve of the record's last question as a file that stands alone: the page's own
    styles, both colour schemes.
    """
    with Record(record, read_only=True) as ledger:
        drawing = curve(summaries(ledger)[-1], FULL)
    css = (ROOT / "src/calipers/report/page.css").read_text()
    colours = css[css.index(":root") : css.index("* {")].replace(":root", "svg")
    rules = "\n".join(
        line
        for line in css.splitlines()
        if line.lstrip().startswith(
            (
                "svg",
                ".fig",
                "figure svg",
                ".axis",
                ".grid",
                ".curve",
                ".band",
                ".robust",
                ".broken",
                ".unknown",
            )
        )
    )
    style = (
        f"<style>{colours}{rules} svg {{ background: var(--card); font-family: sans-serif "
        f"}}</style>"
    )
    alone = re.sub(
        r"(<svg[^>]*>)",
        lambda m: (
            m.group(1).replace(
                "<svg",
                '<svg xmlns="http://www.w3.org/2000/svg"',
                1 if "xmlns" not in m.group(1) else 0,
            )
            + style
        ),
        drawing,
        count=1,
    )
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "figure.svg").write_text(alone)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "run.calipers")
