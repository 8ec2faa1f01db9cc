"""`VideoEncoderPool`: videos that are encoded in threads while their frames come."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from testbed.patience import until
from tests.videos import LEFT, RIGHT, read, two_colours
from vllm_omni.errors import InvalidRequestError, RequestAbortedError, UnavailableError
from vllm_omni.video_jobs.encoding import (
    OUTPUT_FORMATS,
    SLICE_FRAMES,
    EncodedVideo,
    VideoEncoderPool,
    VideoWriteError,
)
from vllm_omni.video_jobs.stills import Stills
from vllm_omni.video_writer import VideoFileWriter

CODECS = {"mp4": "h264", "webm": "vp9", "gif": "gif"}


@pytest.fixture
async def pool() -> AsyncIterator[VideoEncoderPool]:
    pool = VideoEncoderPool(2)
    yield pool
    await pool.close()


@contextmanager
def held(pool: VideoEncoderPool) -> Iterator[None]:
    """Keep all threads of `pool` busy meanwhile, so that nothing is encoded."""
    go_on = threading.Event()
    for _ in range(pool._threads._max_workers):
        pool._threads.submit(go_on.wait)
    try:
        yield
    finally:
        go_on.set()


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


@pytest.mark.parametrize("output_format", ["mp4", "webm"])
async def test_the_same_frames_are_the_same_video(output_format: str, pool: VideoEncoderPool, tmp_path: Path) -> None:
    """In a size in which x264's macroblock trees give one of several files, by what the memory held before."""
    rows, columns, times = np.ogrid[0:240, 0:64, 0:17]
    red, blue = 128 + 100 * np.sin((columns + 3 * times) / 9), 128 + 100 * np.cos((rows - 2 * times) / 7 + columns / 5)
    frames = np.stack(np.broadcast_arrays(red, 3 * rows, blue), -1).astype(np.uint8).transpose(2, 0, 1, 3)
    _, first = read((await encode(pool, tmp_path, frames, output_format)).video)
    for _ in range(10 if output_format == "mp4" else 1):
        _, other = read((await encode(pool, tmp_path, frames, output_format)).video)
        np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("fps", [0.5, 7.5, 16, 24, 50])
async def test_a_gif_shows_its_frames_at_their_rate_and_begins_again(
    fps: float, pool: VideoEncoderPool, tmp_path: Path
) -> None:
    encoded = await encode(pool, tmp_path, two_colours(17), "gif", fps)
    with Image.open(encoded.video) as image:
        assert image.info["loop"] == 0
        starts = [0]
        for number in range(image.n_frames):
            image.seek(number)
            starts.append(starts[-1] + image.info["duration"])
    # GIF counts hundredths of a second, which add up: no frame begins 10 ms too early or too late.
    assert np.abs(np.array(starts) - 1000 / fps * np.arange(18)).max() <= 10


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


async def test_frames_are_encoded_in_threads_before_the_last_has_come(pool: VideoEncoderPool, tmp_path: Path) -> None:
    frames = two_colours(9)
    encoding = pool.begin("mp4", 9, 48, 64, 8, tmp_path)
    encoding.add(frames[:8])
    await until(lambda: encoding._num_encoded == 8)
    encoding.add(frames[8:])
    assert len(read((await encoding.finish()).video)[1]) == 9


async def test_no_frame_is_copied_before_its_turn(pool: VideoEncoderPool, tmp_path: Path) -> None:
    with held(pool):
        frames = two_colours(9)
        encoding = pool.begin("mp4", 9, 48, 64, 8, tmp_path)
        encoding.add(frames)
        assert all(np.shares_memory(frame, frames) for frame in encoding._waiting)
    await encoding.finish()
    assert not encoding._waiting


async def test_videos_take_turns_of_a_few_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, order = VideoEncoderPool(1), []
    write = VideoFileWriter.write

    def noted(self: VideoFileWriter, picture: np.ndarray) -> None:
        order.append(self._size[1])
        write(self, picture)

    monkeypatch.setattr(VideoFileWriter, "write", noted)
    with held(pool):
        encodings = [pool.begin("mp4", 9, 16, width, 8, tmp_path) for width in (16, 32)]
        for encoding, width in zip(encodings, (16, 32)):
            encoding.add(two_colours(9, 16, width))
    for encoding in encodings:
        await encoding.finish()
    turns = [16] * SLICE_FRAMES + [32] * SLICE_FRAMES
    assert order == turns * 2 + [16, 32]
    await pool.close()


async def test_the_callers_thread_encodes_nothing(
    pool: VideoEncoderPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop may call every method: opening, encoding, closing and removing files is left to the pool."""
    threads = set()

    def noting(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            threads.add(threading.current_thread().name.rstrip("0123456789"))
            return function(*args, **kwargs)

        return call

    for name in ("__init__", "write", "finish", "close"):
        monkeypatch.setattr(VideoFileWriter, name, noting(getattr(VideoFileWriter, name)))
    monkeypatch.setattr("vllm_omni.video_jobs.stills.Stills.add", noting(Stills.add))
    monkeypatch.setattr("shutil.rmtree", noting(shutil.rmtree))
    await encode(pool, tmp_path, two_colours())
    cancelled = pool.begin("mp4", 5, 48, 64, 8, tmp_path)
    cancelled.add(two_colours(3))
    cancelled.cancel()
    await until(lambda: not pool._encodings)
    assert threads == {"omni-video_"}


async def test_the_time_and_the_frames_are_reported(tmp_path: Path) -> None:
    reported: list[tuple[float, int]] = []
    pool = VideoEncoderPool(1, lambda seconds, frames: reported.append((seconds, frames)))
    encoded = await encode(pool, tmp_path, two_colours())
    assert reported == [(encoded.seconds, 5)]
    assert encoded.seconds > 0
    await pool.close()


async def test_a_pool_is_closed_although_a_disk_hangs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool, go_on = VideoEncoderPool(1), threading.Event()

    def hang() -> None:
        go_on.wait()

    assert pool.submit(hang)
    pool.begin("mp4", 5, 48, 64, 8, tmp_path).add(two_colours(1))
    await pool.close(timeout=0.01)
    assert "2 videos are still being written; the server ends without them" in caplog.text
    go_on.set()
    await until(lambda: not pool._running and not os.listdir(tmp_path))


@pytest.mark.parametrize("num_added", [0, 3, 5])
async def test_a_cancelled_video_leaves_no_file(num_added: int, pool: VideoEncoderPool, tmp_path: Path) -> None:
    encoding = pool.begin("mp4", 5, 48, 64, 8, tmp_path)
    if num_added:
        encoding.add(two_colours(num_added))
        await until(lambda: encoding._num_encoded == num_added)
    encoding.cancel()
    encoding.cancel()
    await until(lambda: not pool._encodings and not os.listdir(tmp_path))
    if num_added < 5:
        with pytest.raises(RequestAbortedError, match="cancelled"):
            await encoding.finish()
        with pytest.raises(RequestAbortedError, match="cancelled"):
            encoding.add(two_colours(1))


async def test_a_waiter_that_is_cancelled_cancels_its_video(pool: VideoEncoderPool, tmp_path: Path) -> None:
    with held(pool):
        encoding = pool.begin("mp4", 5, 48, 64, 8, tmp_path)
        encoding.add(two_colours())
        waiter = asyncio.create_task(encoding.finish())
        await asyncio.sleep(0)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
    await until(lambda: not pool._encodings)
    assert not os.listdir(tmp_path)


async def test_closing_the_pool_cancels_what_runs_and_waits(tmp_path: Path) -> None:
    pool = VideoEncoderPool(1)
    encoding = pool.begin("mp4", 81, 48, 64, 8, tmp_path)
    encoding.add(two_colours(80))
    waiter = asyncio.create_task(encoding.finish())
    await asyncio.sleep(0)
    await pool.close()
    assert not os.listdir(tmp_path)
    with pytest.raises((RequestAbortedError, ValueError)):
        await waiter
    encoding.cancel()  # has no effect, and raises nothing
    with pytest.raises(UnavailableError, match="shutting down"):
        pool.begin("mp4", 5, 48, 64, 8, tmp_path)


async def test_a_cancellation_at_any_moment_leaves_no_file(tmp_path: Path) -> None:
    """Cancel after each number of iterations of the loop, while the threads encode, finish or have ended."""
    pool = VideoEncoderPool(2)
    for num_waits in range(40):
        encoding = pool.begin("gif", 3, 8, 8, 8, tmp_path)
        encoding.add(two_colours(3, 8, 8))
        for _ in range(num_waits):
            await asyncio.sleep(0.0002)
        encoding.cancel()
    await pool.close()
    assert not os.listdir(tmp_path)


async def test_a_video_that_is_cancelled_while_its_file_is_finished_leaves_none(
    pool: VideoEncoderPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding = pool.begin("mp4", 5, 48, 64, 8, tmp_path)
    finish = VideoFileWriter.finish

    def cancelled(self: VideoFileWriter) -> None:
        encoding.cancel()
        finish(self)

    monkeypatch.setattr(VideoFileWriter, "finish", cancelled)
    encoding.add(two_colours())
    await until(lambda: not pool._encodings)
    assert not os.listdir(tmp_path)


async def test_frames_may_be_views_in_any_order_of_memory(pool: VideoEncoderPool, tmp_path: Path) -> None:
    frames = two_colours()
    wide = np.repeat(frames, 2, axis=2)[:, :, ::2]
    planar = np.ascontiguousarray(frames.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert not wide.flags.c_contiguous
    assert not planar.flags.c_contiguous
    for output_format in OUTPUT_FORMATS:
        _, expected = read((await encode(pool, tmp_path, frames, output_format)).video)
        for views in (wide, planar):
            _, got = read((await encode(pool, tmp_path, views, output_format)).video)
            assert np.array_equal(got, expected)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "output_format": ({"output_format": "avi"}, "output_format takes mp4, webm, gif, got 'avi'"),
    "fps": ({"output_format": "gif", "fps": 60}, "gif: fps takes a number from 0.01 to 50, got 60"),
    "num_frames": ({"num_frames": 0}, "a video has at least 1 frame, got 0"),
    "size": ({"width": 16400}, "a video has sides of 1 to 16384 pixels, got 16400x48"),
}


@pytest.mark.parametrize("param", WRONG)
async def test_a_video_that_no_file_can_hold_is_refused_at_once(
    param: str, pool: VideoEncoderPool, tmp_path: Path
) -> None:
    changes, words = WRONG[param]
    announced: dict[str, Any] = {"output_format": "mp4", "num_frames": 5, "height": 48, "width": 64, "fps": 8}
    with pytest.raises(InvalidRequestError, match=words) as caught:
        pool.begin(**announced | changes, folder=tmp_path)
    assert caught.value.param == param
    assert not pool._encodings


async def test_other_frames_than_announced_are_refused(pool: VideoEncoderPool, tmp_path: Path) -> None:
    encoding = pool.begin("mp4", 5, 48, 64, 8, tmp_path)
    for frames in (two_colours(2, 64, 48), two_colours(2) / 255, two_colours(2)[0]):
        with pytest.raises(ValueError, match=r"frames take uint8 \[n, 48, 64, 3\], got "):
            encoding.add(frames)
    encoding.add(two_colours(4))
    with pytest.raises(ValueError, match="a video of 5 frames got 6"):
        encoding.add(two_colours(2))
    with pytest.raises(ValueError, match="a video of 5 frames got 4"):
        await encoding.finish()
    await until(lambda: not pool._encodings)
    assert not os.listdir(tmp_path)


async def test_a_failure_of_the_encoder_ends_its_video_alone(
    pool: VideoEncoderPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = VideoFileWriter.write

    def failing(self: VideoFileWriter, picture: np.ndarray) -> None:
        if self._size == (16, 16) and self._num_written == 2:
            raise ZeroDivisionError
        write(self, picture)

    monkeypatch.setattr(VideoFileWriter, "write", failing)
    failed = pool.begin("mp4", 5, 16, 16, 8, tmp_path)
    failed.add(two_colours(4, 16, 16))
    whole = await encode(pool, tmp_path, two_colours())
    await until(failed._result.done)
    with pytest.raises(VideoWriteError, match=r"The video could not be written: ZeroDivisionError\."):
        failed.add(two_colours(1, 16, 16))
    with pytest.raises(VideoWriteError, match="ZeroDivisionError"):
        await failed.finish()
    await until(lambda: os.listdir(tmp_path) == [whole.video.parent.name])


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_a_disk_that_fills_up_fails_the_videos_that_do_not_fit(output_format: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.video_jobs.full_disk", output_format, tmp_path],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    ends = {int(limit): ends for limit, *ends in (line.split("|") for line in result.stdout.splitlines())}
    full = "VideoWriteError: The video could not be written: File too large."
    assert ends[0] == [full, full]
    assert ends[20_000] == ["whole", full], "the small video is not hurt"
    assert ends[10_000_000] == ["whole", "whole"]
    assert {end for both in ends.values() for end in both} == {full, "whole"}
