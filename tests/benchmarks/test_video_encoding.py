"""The benchmark of video encoding runs, with the embedded model."""

from __future__ import annotations

import pytest
from benchmarks.video_encoding import main


@pytest.mark.thorough
def test_each_format_is_compared_with_the_decode(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--frames", "5", "--size", "64x64"])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["mp4", "webm", "gif"]
    for row in rows:
        decode, encode, ratio, wait, _ = map(float, row.split()[1:])
        assert min(decode, encode, wait) > 0
        assert ratio == pytest.approx(encode / decode, rel=0.2, abs=0.01)
