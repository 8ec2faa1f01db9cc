"""Pool of decode processes: from uploaded files to pixels at the sizes that the model takes."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

from vllm_omni.entrypoints.openai.requests.pictures.process import DecodeLimits, DecodeProcess, NoDecoderError
from vllm_omni.errors import InvalidRequestError, UnavailableError
from vllm_omni.inputs.images import InputImage, ReaderSizes

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_CLOSE_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_MAX_URL_QUOTE = 40
# Decoding one chunk holds the interpreter lock for about a millisecond; a multiple of 4.
_BASE64_CHUNK = 2**20


class _Job:
    """A picture to decode, shared by the task that waits for it and the thread that decodes it."""

    def __init__(self, read: Callable[[], bytes | bytearray], sizes_of: Callable[[int, int], ReaderSizes]) -> None:
        self.future: Future[InputImage] = Future()
        self._read: Callable[[], bytes | bytearray] | None = read
        self._sizes_of = sizes_of
        self._lock = threading.Lock()
        self._process: DecodeProcess | None = None

    def run(self, process: DecodeProcess) -> InputImage:
        """Decode in `process`. Raises InvalidRequestError, NoDecoderError, and CancelledError if it was abandoned."""
        with self._lock:
            if (read := self._read) is None:
                raise CancelledError
            self._process = process
        try:
            return process.decode(read(), self._sizes_of)
        finally:
            with self._lock:
                self._process = None

    def abandon(self) -> None:
        """Free the file, and kill the process that decodes it: no task waits for the picture any more."""
        with self._lock:
            self._read = None
            if self._process is not None:
                self._process.kill()


class _DecodeThread(threading.Thread):
    """Owns one decode process at a time, and replaces it after it was killed."""

    def __init__(self, jobs: queue.SimpleQueue[_Job | None], limits: DecodeLimits, number: int) -> None:
        super().__init__(name=f"omni-decode-{number}", daemon=True)
        self.process: DecodeProcess | None = None
        self._jobs = jobs
        self._limits = limits

    def run(self) -> None:
        self._replace()
        while (job := self._jobs.get()) is not None:
            if job.future.set_running_or_notify_cancel():
                self._do(job)
            del job  # free its picture
            self._replace()
        self._close_process()

    def _do(self, job: _Job) -> None:
        try:
            job.future.set_result(job.run(self._ready_process()))
        except NoDecoderError as error:
            logger.error("%s", error)
            job.future.set_exception(
                UnavailableError("The server has no process to decode pictures.", retry_after=_RETRY_SECONDS)
            )
        except Exception as error:
            job.future.set_exception(error)

    def _ready_process(self) -> DecodeProcess:
        """A process that has started. Raises NoDecoderError."""
        process = self._usable_process()
        try:
            process.wait_until_ready()
        except NoDecoderError:
            self._close_process()
            raise
        return process

    def _usable_process(self) -> DecodeProcess:
        """The process, or a new one if it was killed. Raises NoDecoderError."""
        if self.process is None or not self.process.is_usable:
            self._close_process()
            self.process = DecodeProcess(self._limits)
        return self.process

    def _replace(self) -> None:
        """Start a process if there is none, so that it is ready for the next picture."""
        try:
            self._usable_process()
        except NoDecoderError as error:
            logger.error("%s", error)

    def _close_process(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None


class DecodePool:
    """A bounded pool of decode processes, and of threads for other work on pictures.

    Pictures are decoded in order of arrival. A request waits for each of its pictures before it sends the next, so
    requests take turns: a request with many pictures delays another request by at most one picture.
    """

    def __init__(self, num_processes: int, limits: DecodeLimits = DecodeLimits()) -> None:  # noqa: B008 (frozen)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [_DecodeThread(self._jobs, limits, number) for number in range(num_processes)]
        self.num_pictures = 0
        """Number of pictures that wait or are being decoded."""
        self._resizing = ThreadPoolExecutor(num_processes, thread_name_prefix="omni-resize")

    def start(self) -> None:
        """Start the processes without waiting for them."""
        for thread in self._threads:
            thread.start()

    async def file(self, data: bytes | bytearray, sizes_of: Callable[[int, int], ReaderSizes]) -> InputImage:
        """Decode a picture file. `sizes_of`: `ImageInput.sizes`. Cancelling removes the picture or kills its process.

        Raises InvalidRequestError; UnavailableError if no process can be started.
        """
        return await self._decode(_Job(lambda: data, sizes_of))

    async def data_url(self, url: str, sizes_of: Callable[[int, int], ReaderSizes]) -> InputImage:
        """Decode the file in a `data:` URL, as `file` does."""
        return await self._decode(_Job(lambda: data_url_bytes(url), sizes_of))

    async def _decode(self, job: _Job) -> InputImage:
        self.num_pictures += 1
        self._jobs.put(job)
        try:
            return await asyncio.wrap_future(job.future)
        except asyncio.CancelledError:
            job.abandon()
            raise
        finally:
            self.num_pictures -= 1

    async def run(self, function: Callable[[], Result]) -> Result:
        """Run `function`, which works on pixels, in a thread; return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._resizing, function)

    def close(self) -> None:
        """Kill all processes, also those that decode."""
        self._resizing.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(queue.Empty):
            while (job := self._jobs.get_nowait()) is not None:
                job.future.cancel()
        started = [thread for thread in self._threads if thread.is_alive()]
        for _ in started:
            self._jobs.put(None)
        for thread in started:
            if (process := thread.process) is not None:
                process.kill()
        for thread in started:
            thread.join(_CLOSE_SECONDS)


def data_url_bytes(url: str) -> bytes:
    """The file in a `data:` URL. Raises InvalidRequestError."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequestError(
            f"image_url takes data:TYPE;base64,... URLs, got {url[:_MAX_URL_QUOTE]!r}", param="image_url"
        )
    try:
        chunks = (body[i : i + _BASE64_CHUNK] for i in range(0, len(body), _BASE64_CHUNK))
        return b"".join(binascii.a2b_base64(chunk, strict_mode=True) for chunk in chunks)
    except ValueError as error:  # from binascii, or for text that is not ASCII
        raise InvalidRequestError(f"image_url is not valid base64: {error}", param="image_url") from error
