"""The benchmark of compressed weights runs, at a small size."""

from __future__ import annotations

import pytest
from benchmarks.compressed import main


def test_forms_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--width", "256", "--tokens", "4", "--forms", "Q4_K", "int8"])
    _, _, *rows = capsys.readouterr().out.splitlines()
    cells = {row.split("|")[1].strip(): row.split("|")[2:] for row in rows}
    assert {name: float(each[0]) for name, each in cells.items()} == {"Q4_K": 4.5, "int8": 8.25}
    assert all(float(cell.split()[0]) >= 0 for each in cells.values() for cell in each[1:5])
