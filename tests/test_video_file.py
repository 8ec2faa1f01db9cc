"""`write_video`: an MP4 that any player shows, read back by PyAV."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.videos import LEFT, RIGHT, read, two_colours
from vllm_omni.outputs import write_video


def boxes(data: bytes) -> list[str]:
    """Names of the outermost boxes of an MP4 file, in their order."""
    names, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        names.append(data[at + 4 : at + 8].decode())
        at += size
    return names


def test_frames_come_back_with_their_rate_size_and_colours(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    write_video(two_colours(), path, 12)
    stream, frames = read(path)
    assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12)
    assert (stream.frames, stream.width, stream.height, len(frames)) == (5, 64, 48, 5)
    assert float(stream.duration * stream.time_base) == pytest.approx(5 / 12, abs=1e-3)  # MP4 counts milliseconds
    for number, frame in enumerate(frames):
        edge = 8 + 8 * number
        assert np.abs(frame[:, : edge - 3].astype(int) - LEFT).max() <= 8
        assert np.abs(frame[:, edge + 3 :].astype(int) - RIGHT).max() <= 8


def test_the_index_comes_before_the_frames(tmp_path: Path) -> None:
    write_video(two_colours(), tmp_path / "out.mp4", 8)
    names = boxes((tmp_path / "out.mp4").read_bytes())
    assert names[0] == "ftyp"
    assert names.index("moov") < names.index("mdat")


@pytest.mark.parametrize(("height", "width"), [(47, 64), (48, 63), (47, 63), (1, 1), (2, 7)])
def test_an_odd_side_gets_one_more_pixel_and_nothing_is_stretched(height: int, width: int, tmp_path: Path) -> None:
    original = two_colours(3, height, width)
    write_video(original, tmp_path / "out.mp4", 8)
    stream, frames = read(tmp_path / "out.mp4")
    assert (stream.height, stream.width) == (height + height % 2, width + width % 2)
    for frame, expected in zip(frames, original):
        assert np.abs(frame[:height, : 8 - 3].astype(int) - expected[:, : 8 - 3]).max(initial=0) <= 8
        assert np.abs(frame[-1, -1].astype(int) - expected[-1, -1]).max() <= 8, "a copy of the edge"


@pytest.mark.parametrize("fps", [0.01, 1, 7.5, 23.976, 29.97, Fraction(24000, 1001), np.float32(8), 1000])
def test_any_rate(fps: Any, tmp_path: Path) -> None:
    write_video(two_colours(2), tmp_path / "out.mp4", fps)
    stream, _ = read(tmp_path / "out.mp4")
    assert float(stream.average_rate) == pytest.approx(float(fps), rel=1e-4)


FORMS: dict[str, Any] = {
    "pil": lambda frames: [Image.fromarray(frame) for frame in frames],
    "arrays": list,
    "iterator": iter,
    "torch": torch.from_numpy,
    "tensors": lambda frames: tuple(torch.from_numpy(frames)),
}


@pytest.mark.parametrize("form", FORMS)
def test_frames_may_be_pil_numpy_or_torch(form: str, tmp_path: Path) -> None:
    write_video(two_colours(), str(tmp_path / "array.mp4"), 8)
    write_video(FORMS[form](two_colours()), tmp_path / "out.mp4", 8)
    _, expected = read(tmp_path / "array.mp4")
    _, frames = read(tmp_path / "out.mp4")
    assert np.array_equal(frames, expected)


PICTURE = np.zeros((8, 8, 3), np.uint8)
WRONG: dict[str, tuple[Any, Any, str]] = {
    "none": ([], 8, "got no frame"),
    "path": ("frames.npy", 8, "got str"),
    "number": (3, 8, "got int"),
    "picture": (Image.new("RGB", (8, 8)), 8, "got Image"),
    "one array": (PICTURE, 8, r"got the shape \[8, 8, 3\]"),
    "batch": (PICTURE[None, None], 8, r"got the shape \[1, 1, 8, 8, 3\]"),
    "float": (two_colours() / 255, 8, r"got float64 \[48, 64, 3\] as frame 0"),
    "bfloat16": (torch.zeros(2, 8, 8, 3, dtype=torch.bfloat16), 8, r"got torch.bfloat16 \[8, 8, 3\] as frame 0"),
    "channels first": (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 8, r"got torch.uint8 \[3, 8, 8\] as frame 0"),
    "grey": ([PICTURE[..., 0]], 8, r"got uint8 \[8, 8\] as frame 0"),
    "mixed": ([PICTURE, "x"], 8, "got str as frame 1"),
    "sizes": ([PICTURE, PICTURE[:6]], 8, "frames have one size, got 8x8 and, as frame 1, 8x6"),
    "empty": (np.zeros((2, 0, 8, 3), np.uint8), 8, "sides of 1 to 16384 pixels, got 8x0"),
    "wide": (np.zeros((1, 2, 16386, 3), np.uint8), 8, "sides of 1 to 16384 pixels, got 16386x2"),
    "still": (two_colours(), 0, "fps takes a number from 0.01 to 1000, got 0"),
    "slow": (two_colours(), 0.0004, "got 0.0004"),
    "backwards": (two_colours(), -8, "got -8"),
    "fast": (two_colours(), 1001, "got 1001"),
    "nan": (two_colours(), float("nan"), "got nan"),
    "untold": (two_colours(), None, "got None"),
    "text": (two_colours(), "8", "got '8'"),
    "bool": (two_colours(), True, "got True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_one_line_and_leaves_no_file(name: str, tmp_path: Path) -> None:
    frames, fps, words = WRONG[name]
    with pytest.raises(ValueError, match=words) as caught:
        write_video(frames, tmp_path / "out.mp4", fps)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        write_video(two_colours(), tmp_path / "nowhere" / "out.mp4", 8)
    with pytest.raises(OSError, match=tmp_path.name):
        write_video(two_colours(), tmp_path, 8)
    assert tmp_path.is_dir()


def test_something_else_than_a_file_is_left_alone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="a video is written to a file"):
        write_video(two_colours(), pipe, 8)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_failure_of_the_encoder_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av.VideoFrame, "from_ndarray", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_video(two_colours(), tmp_path / "out.mp4", 8)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_by_a_whole_video_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "out.mp4", tmp_path / "link.mp4"
    path.write_bytes(b"earlier")
    path.chmod(0o640)
    link.symlink_to(path)
    with monkeypatch.context() as broken:
        broken.setattr(av.VideoFrame, "from_ndarray", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_video(two_colours(), path, 8)
    with pytest.raises(ValueError, match="fps takes"):
        write_video(two_colours(), path, 0.0004)
    assert path.read_bytes() == b"earlier"
    write_video(two_colours(), link, 8)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(read(path)[1]) == 5
    assert sorted(tmp_path.iterdir()) == [link, path]
