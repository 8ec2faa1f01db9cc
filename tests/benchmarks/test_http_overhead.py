"""The benchmarks of encoders and of HTTP run, on small pictures."""

from __future__ import annotations

import multiprocessing
import re
import threading

import pytest
from benchmarks.encoding import rows_of
from benchmarks.http_overhead import measure, serve

from testbed.patience import GUARD_SECONDS

SIZE = (64, 96)


def test_encoders_are_compared_with_pillow() -> None:
    (first, *_), *others = rows_of("drawing", SIZE, 1)
    assert first == "Pillow, level 1"
    assert [name for name, _, _ in others] == ["png", "jpeg 100", "jpeg 80", "webp 100", "png to base64"]
    (_, png_ms, png_bytes), *_, (_, _, base64_bytes) = others
    assert png_ms > 0
    assert base64_bytes == (png_bytes + 2) // 3 * 4


def test_what_http_adds_is_printed_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    here, there = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(there, "noise", SIZE), daemon=True)
    thread.start()
    try:
        measure(here, SIZE, rounds=1)
    finally:
        here.send(False)
        thread.join(GUARD_SECONDS)
    assert not thread.is_alive()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [re.split(r"  +", line)[0] for line in lines] == [
        "png, httpx",
        "png, openai SDK",
        "png, streamed",
        "png, streamed with 3 previews",
        "jpeg 100",
        "webp 100",
    ]
    assert all(len(line.split()[-3:]) == 3 and float(line.split()[-1]) >= 0.01 for line in lines), "median, least, MB"
