"""The benchmark of adapters runs on the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import lora


@pytest.mark.thorough
@pytest.mark.usefixtures("one_thread")
def test_it_compares_steps_with_and_without_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora.main(f"--batches 2:32x32 --ranks 2 --adapters 1 2 --rounds 1 --seconds 0 --out {tmp_path}".split())
    (rows,) = json.loads((tmp_path / "lora.json").read_text())["cases"].values()
    names = ["no adapter", "1 of rank 2, loop", "2 of rank 2, loop", "merging one of rank 2"]
    assert [row["case"] for row in rows] == [f"2:32x32: {name}" for name in names]
    assert [row["detail"].get("times a step without", 0) > 0 for row in rows] == [True, True, True, False]
    assert [line.split(" |")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"| {row['case']}" for row in rows
    ]
