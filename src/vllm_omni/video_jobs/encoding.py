"""Pool of threads that encode videos while their later frames are decoded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from vllm_omni.errors import (
    GenerationError,
    InvalidRequestError,
    RequestAbortedError,
    RequestError,
    UnavailableError,
    error_line,
)
from vllm_omni.video_file import frame_rate
from vllm_omni.video_jobs.stills import Stills
from vllm_omni.video_writer import MAX_SIDE, OUTPUT_FORMATS, VideoFileFormat, VideoFileWriter

__all__ = [
    "OUTPUT_FORMATS",
    "EncodedVideo",
    "VideoEncoderPool",
    "VideoEncoding",
    "VideoWriteError",
    "check_video_file",
]

logger = logging.getLogger(__name__)

SLICE_FRAMES = 4
"""Frames that a thread encodes of one video before it turns to the next video that waits."""
ENCODER_THREADS = min(4, len(os.sched_getaffinity(0)))
"""Threads of one encoder. More of them would hold more frames, and compete with the threads that feed the device."""

POOL_CLOSE_SECONDS = 5.0
"""Time for threads to end when their pool is closed."""


class VideoWriteError(GenerationError):
    """A video's file cannot be written."""

    code = "video_write_failed"


def check_video_file(output_format: str, num_frames: int, height: int, width: int, fps: float) -> Fraction:
    """The frame rate as a fraction. Raises InvalidRequestError for a video that no file of the format can hold."""
    if output_format not in OUTPUT_FORMATS:
        accepted = ", ".join(OUTPUT_FORMATS)
        raise InvalidRequestError(f"output_format takes {accepted}, got {output_format!r:.60}", param="output_format")
    if num_frames < 1:
        raise InvalidRequestError(f"a video has at least 1 frame, got {num_frames}", param="num_frames")
    if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise InvalidRequestError(f"a video has sides of 1 to {MAX_SIDE} pixels, got {width}x{height}", param="size")
    try:
        return frame_rate(fps, OUTPUT_FORMATS[output_format].max_fps)
    except ValueError as error:
        raise InvalidRequestError(f"{output_format}: {error}", param="fps") from None


@dataclass(frozen=True)
class EncodedVideo:
    """Files of a finished video, in a folder of their own."""

    video: Path
    thumbnail: Path
    """WebP of the middle frame, at most 512 pixels on its longer side."""
    spritesheet: Path
    """JPEG of 1 to 25 frames in a grid; see `stills.grid`."""
    content_type: str
    """MIME type of `video`."""
    seconds: float
    """Time in which threads of the pool worked on this video."""

    def remove(self) -> None:
        """Remove the folder with the files. Blocks."""
        shutil.rmtree(self.video.parent, ignore_errors=True)


class VideoEncoderPool:
    """Threads that encode several videos at once, a few frames of each in turn.

    The encoders' work runs without the GIL; the copy of a frame of 1280x720 holds it for 1 to 3 ms.
    `on_encoded` is called on the event loop with the seconds of encoding and the frames of each finished video.
    """

    def __init__(
        self, num_threads: int, on_encoded: Callable[[float, int], None] = lambda seconds, frames: None
    ) -> None:
        import av  # noqa: F401  # here, at start: the import holds the GIL for a fifth of a second

        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="omni-video")
        self.on_encoded = on_encoded
        self._is_closed = False
        self._encodings: set[VideoEncoding] = set()
        self._running: set[Future[None]] = set()
        """Work of the threads that has not ended."""

    def begin(
        self, output_format: str, num_frames: int, height: int, width: int, fps: float, folder: Path
    ) -> VideoEncoding:
        """Begin a video, whose files are written in a new folder inside `folder`. Nothing blocks.

        Raises InvalidRequestError as `check_video_file` does, and UnavailableError after `close`.
        """
        if self._is_closed:
            raise UnavailableError("the server is shutting down")
        rate = check_video_file(output_format, num_frames, height, width, fps)
        video_format = OUTPUT_FORMATS[output_format]
        encoding = VideoEncoding(self, video_format, num_frames, (height, width), rate, folder)
        self._encodings.add(encoding)
        return encoding

    async def close(self, timeout: float = POOL_CLOSE_SECONDS) -> None:
        """Cancel all videos and wait for the threads, which end after the frames that they encode now.

        timeout: seconds after which a thread that a disk holds is left alone.
        """
        for encoding in list(self._encodings):
            encoding.cancel()
        self._is_closed = True
        self._threads.shutdown(wait=False)
        if running := [asyncio.wrap_future(work) for work in list(self._running)]:
            _, late = await asyncio.wait(running, timeout=timeout)
            if late:
                logger.warning("%d videos are still being written; the server ends without them", len(late))

    def submit(self, function: Callable[[], None]) -> bool:
        """Run `function` in a thread; False after `close`."""
        if self._is_closed:
            return False
        work = self._threads.submit(function)
        self._running.add(work)
        work.add_done_callback(self._running.discard)
        return True

    def ended(self, encoding: VideoEncoding) -> None:
        """Note that a video is finished, failed or cancelled. Called by its thread."""
        self._encodings.discard(encoding)


class VideoEncoding:
    """A video that is being encoded: frames go in as they are decoded, files come out.

    Frames are kept as views of the arrays that they came in, until they are encoded.
    """

    def __init__(
        self,
        pool: VideoEncoderPool,
        video_format: VideoFileFormat,
        num_frames: int,
        size: tuple[int, int],
        rate: Fraction,
        parent: Path,
    ) -> None:
        self._pool, self._format, self._num_frames, self._size, self._rate = pool, video_format, num_frames, size, rate
        self._folder = parent / secrets.token_hex(8)
        self._video = self._folder / f"video.{video_format.name}"
        # Only the thread that works on this video uses these.
        self._stills = Stills(num_frames)
        self._writer: VideoFileWriter | None = None
        self._num_encoded = 0
        self._seconds = 0.0
        # Shared with the event loop, under the lock.
        self._lock = threading.Lock()
        self._waiting: deque[np.ndarray] = deque()
        self._num_added = 0
        self._is_scheduled = False
        self._is_cancelled = False
        self._result: Future[EncodedVideo] = Future()
        self._result.set_running_or_notify_cancel()  # a waiter that is cancelled does not cancel it

    def add(self, frames: np.ndarray) -> None:
        """Encode `frames`, uint8 [n, height, width, 3], after those that were added before. Returns at once.

        Raises VideoWriteError if frames before could not be written, and ValueError for frames of another form or
        more frames than were announced.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != (*self._size, 3):
            height, width = self._size
            raise ValueError(f"frames take uint8 [n, {height}, {width}, 3], got {frames.dtype} {list(frames.shape)}")
        with self._lock:
            if self._num_added + len(frames) > self._num_frames:
                raise ValueError(f"a video of {self._num_frames} frames got {self._num_added + len(frames)}")
            self._num_added += len(frames)
            if self._result.done():
                self._result.result()  # raises
            self._waiting.extend(frames)
            self._schedule()

    async def finish(self) -> EncodedVideo:
        """The files, when all frames are encoded. A caller that is cancelled cancels the video.

        Raises VideoWriteError, RequestAbortedError after `cancel`, and ValueError if frames are missing.
        """
        if self._num_added < self._num_frames and not self._result.done():
            self.cancel()
            raise ValueError(f"a video of {self._num_frames} frames got {self._num_added}")
        try:
            encoded = await asyncio.wrap_future(self._result)
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._pool.on_encoded(encoded.seconds, self._num_frames)
        return encoded

    def cancel(self) -> None:
        """Stop after the frame that is encoded now, and remove the files. Returns at once."""
        with self._lock:
            self._is_cancelled = True
            self._waiting.clear()
            self._schedule()

    def _schedule(self) -> None:
        """Let a thread go on with this video. The lock is held."""
        if not self._is_scheduled:
            self._is_scheduled = self._pool.submit(self._advance)

    def _advance(self) -> None:
        """Encode a few frames, in a thread; then wait behind the other videos."""
        error: RequestError | None = None
        try:
            self._encode_slice()
            if self._num_encoded == self._num_frames and not self._result.done():
                self._result.set_result(self._finish())
        except Exception as failure:
            error = _write_error(failure)
        with self._lock:
            if self._is_cancelled and error is None:
                error = RequestAbortedError("the video was cancelled")
            if error is None:  # else this is the last time
                self._is_scheduled = False
                if self._waiting:
                    self._schedule()
        if error is not None:
            self._discard(error)
        if self._result.done():
            self._pool.ended(self)

    def _encode_slice(self) -> None:
        start = time.perf_counter()
        for _ in range(SLICE_FRAMES):
            with self._lock:
                if not self._waiting:
                    break
                frame = self._waiting.popleft()
            if self._writer is None:
                self._folder.mkdir(mode=0o700)
                height, width = self._size
                self._writer = VideoFileWriter(
                    self._video, self._format, self._rate, height, width, num_threads=ENCODER_THREADS
                )
            self._writer.write(frame)
            self._stills.add(self._num_encoded, frame)
            self._num_encoded += 1
        self._seconds += time.perf_counter() - start

    def _finish(self) -> EncodedVideo:
        assert self._writer is not None
        start = time.perf_counter()
        self._writer.finish()
        thumbnail, spritesheet = self._folder / "thumbnail.webp", self._folder / "spritesheet.jpg"
        self._stills.write(thumbnail, spritesheet)
        seconds = self._seconds + time.perf_counter() - start
        return EncodedVideo(self._video, thumbnail, spritesheet, self._format.content_type, seconds)

    def _discard(self, error: RequestError) -> None:
        """Close and remove the files; end with `error` unless the video has ended."""
        with self._lock:
            self._waiting.clear()
            if not self._result.done():
                self._result.set_exception(error)
        if self._writer is not None:
            with contextlib.suppress(Exception):  # the file goes anyway
                self._writer.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _write_error(error: Exception) -> RequestError:
    """Error for the client, which names no path of the server; the log has the rest."""
    logger.error("A video was not written: %s", error_line(error), exc_info=not isinstance(error, OSError))
    reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
    return VideoWriteError(f"The video could not be written: {reason}.")
