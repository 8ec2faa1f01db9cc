"""Write the table of families and features into README.md, from tests/features.py.

.venv/bin/python -m tools.matrix
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.features import COLUMNS, FEATURES, Feature

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- matrix: written by tools/matrix.py from tests/features.py -->"
END = "<!-- end of matrix -->"


def main() -> None:
    README.write_text(with_table(README.read_text(), table(COLUMNS, FEATURES)))
    print(f"{README}: {len(FEATURES)} features")


def table(columns: Sequence[str], features: Sequence[Feature]) -> str:
    """In Markdown, a row a feature. Raises ValueError for one that has not a cell a column."""
    lines = [_row("", *columns), "|---" * (1 + len(columns)) + "|"]
    for feature in features:
        if len(feature.cells) != len(columns):
            raise ValueError(f"{feature.name!r} needs {len(columns)} cells, got {len(feature.cells)}")
        lines.append(_row(feature.name, *(cell.text for cell in feature.cells)))
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """`text` with `table` between its two markers. Raises ValueError where they are missing."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the text lacks {BEGIN} and, after it, {END}")
    return f"{before}{BEGIN}\n{table}\n{end}{after}"


def _row(first: str, *cells: str) -> str:
    return "".join(f"| {text} " if text else "| " for text in (first, *cells)) + "|"


if __name__ == "__main__":
    main()
