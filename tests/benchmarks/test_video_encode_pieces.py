"""The benchmark of encodes in pieces runs on this machine, and finds the pieces equal to the whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.video_encode_pieces import main


@pytest.mark.thorough
@pytest.mark.usefixtures("one_thread")
def test_a_tiny_run_writes_its_rows(tmp_path: Path) -> None:
    main(["--tiny", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "video_encode_pieces.json").read_text()).values()
    assert row["latent_frames"] == 3
    assert row["largest_difference"] == 0
    assert 0 < row["piece_seconds"] <= row["pieces_seconds"]
    assert row["kept_bytes_between_pieces"] > 0
