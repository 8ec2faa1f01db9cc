"""The benchmark of adapters runs on the demo model."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import lora


@pytest.mark.thorough
@pytest.mark.usefixtures("one_thread")
def test_it_compares_steps_with_and_without_adapters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sequences", "2", "--ranks", "2", "--adapters", "1", "2", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["benchmarks.lora", *arguments])
    lora.main()
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"rank 2: 2 sequences without adapters \d+\.\d\d ms", lines[0])
    for line, count in zip(lines[1:], (1, 2), strict=True):
        assert re.fullmatch(rf"rank 2: {count} different adapters: \d+\.\d\d times as long", line)
