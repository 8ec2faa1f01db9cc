"""`VideoEncoderPool`: videos that are encoded in threads while their frames come."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from tests.videos import LEFT, RIGHT, read, two_colours
from vllm_omni.video_jobs.encoding import OUTPUT_FORMATS, EncodedVideo, VideoEncoderPool

CODECS = {"mp4": "h264", "webm": "vp9", "gif": "gif"}


@pytest.fixture
async def pool() -> AsyncIterator[VideoEncoderPool]:
    pool = VideoEncoderPool(2)
    yield pool
    await pool.close()


async def encode(
    pool: VideoEncoderPool, folder: Path, frames: np.ndarray, output_format: str = "mp4", fps: float = 8
) -> EncodedVideo:
    """Encode frames that come as a video's do: one, then four at a time."""
    num_frames, height, width, _ = frames.shape
    encoding = pool.begin(output_format, num_frames, height, width, fps, folder)
    for first in (0, *range(1, num_frames, 4)):
        encoding.add(frames[first : first + 4] if first else frames[:1])
    return await encoding.finish()


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
@pytest.mark.parametrize(
    ("num_frames", "height", "width", "fps"), [(1, 48, 64, 16), (17, 64, 64, 8), (81, 47, 63, 7.5), (5, 48, 63, 29.97)]
)
async def test_frames_come_back_with_their_number_rate_size_and_colours(
    output_format: str, num_frames: int, height: int, width: int, fps: float, pool: VideoEncoderPool, tmp_path: Path
) -> None:
    original = two_colours(num_frames, height, width)
    encoded = await encode(pool, tmp_path, original, output_format, fps)
    assert encoded.content_type == OUTPUT_FORMATS[output_format].content_type
    stream, frames = read(encoded.video)
    assert stream.codec_context.name == CODECS[output_format]
    assert len(frames) == num_frames
    even = output_format != "gif"
    assert frames[0].shape == (height + height % 2 * even, width + width % 2 * even, 3)
    if output_format != "gif":
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
    for number in (0, num_frames // 2, num_frames - 1):
        frame, edge = frames[number].astype(int), min(8 + 8 * number, width)
        assert np.abs(frame[:, : edge - 3] - LEFT).max() <= 12
        assert np.abs(frame[:, edge + 3 :] - RIGHT).max(initial=0) <= 12


async def test_files_are_in_a_folder_of_their_own_until_they_are_removed(
    pool: VideoEncoderPool, tmp_path: Path
) -> None:
    first = await encode(pool, tmp_path, two_colours())
    second = await encode(pool, tmp_path, two_colours())
    assert len(os.listdir(tmp_path)) == 2
    for encoded in (first, second):
        assert sorted(os.listdir(encoded.video.parent)) == ["spritesheet.jpg", "thumbnail.webp", "video.mp4"]
        encoded.remove()
    assert not os.listdir(tmp_path)
