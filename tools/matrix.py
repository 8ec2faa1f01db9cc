"""Write the generated tables into README.md and docs/: families and features (tests/features.py), and step caches.

.venv/bin/python -m tools.matrix
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from tests.features import COLUMNS, FEATURES, Feature

from vllm_omni.diffusion.data import STEP_CACHES, step_cache_config_class
from vllm_omni.inputs.field_values import field_types

ROOT = Path(__file__).parent.parent
TEXTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
"""Each table is in one of these files, between its two markers."""


def main() -> None:
    for path in TEXTS:
        text = path.read_text()
        if (new := with_tables(text)) != text:
            path.write_text(new)
            print(f"{path}: changed")


def with_tables(text: str) -> str:
    """`text` with the tables whose markers it has."""
    for begin, make in TABLES.items():
        if begin in text:
            text = with_table(text, begin, make())
    return text


def feature_table(columns: Sequence[str], features: Sequence[Feature]) -> str:
    """Markdown table, one row a feature. Raises ValueError for a feature that has not one cell a column."""
    rows = []
    for feature in features:
        if len(feature.cells) != len(columns):
            raise ValueError(f"{feature.name!r} needs {len(columns)} cells, got {len(feature.cells)}")
        rows.append((feature.name, *(cell.text for cell in feature.cells)))
    return _markdown(("", *columns), rows)


def step_cache_table() -> str:
    """Markdown table, one row a registered step cache: its description, and its settings with their defaults."""
    rows = []
    for name in STEP_CACHES:
        cls: Any = step_cache_config_class(name)
        settings = (f"`{f.name}` ({_default(f.default, field_types(cls)[f.name])})" for f in fields(cls))
        rows.append((f"`{name}`", f"{cls.__doc__.splitlines()[0]} {', '.join(settings)}"))
    return _markdown(("backend", "settings (defaults)"), rows)


def _default(value: object, kind: Any) -> str:
    """Default of a setting as JSON has it; for a setting with a choice of words, also the other words."""
    words = next((get_args(k) for k in (kind, *get_args(kind)) if get_origin(k) is Literal), ())
    default = f"`{value}`" if value in words else "none" if value is None else json.dumps(value)
    return ", ".join([default, *(f"`{word}`" for word in words if word != value)])


TABLES: Mapping[str, Callable[[], str]] = {
    "<!-- matrix: written by tools/matrix.py from tests/features.py -->": lambda: feature_table(COLUMNS, FEATURES),
    "<!-- step caches: written by tools/matrix.py from their settings -->": step_cache_table,
}
"""Line before a table -> the function that makes the table."""


def with_table(text: str, begin: str, table: str) -> str:
    """`text` with `table` between the line `begin` and its end marker. Raises ValueError if one is missing."""
    end = f"<!-- end of {begin.removeprefix('<!-- ').partition(':')[0]} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the text lacks {begin} and, after it, {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(*header), "|---" * len(header) + "|", *(_row(*row) for row in rows)])


def _row(*cells: str) -> str:
    return "".join(f"| {text} " if text else "| " for text in cells) + "|"


if __name__ == "__main__":
    main()
