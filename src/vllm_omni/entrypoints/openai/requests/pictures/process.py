"""Parent side of a decode process: start it, send it files, kill it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import msgspec
import numpy as np

from vllm_omni.entrypoints.openai.requests.pictures.messages import (
    Decode,
    DecoderReady,
    FromDecoder,
    Opened,
    Pixels,
    Refused,
    Resize,
)
from vllm_omni.errors import InvalidRequestError, OmniError
from vllm_omni.inputs.images import MAX_INPUT_PIXELS, InputImage, ReaderSizes
from vllm_omni.processes.channel import BlockingChannel, ChannelBrokenError

_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # each of its threads takes address space
    # glibc keeps freed memory up to these sizes, enough for 12 million pixels. Page faults are a sixth of the time.
    "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
}
_KILL_SECONDS = 5.0
"""Seconds to wait for the end of a killed process."""


class NoDecoderError(OmniError):
    """No decode process: it could not be started, or the server has no file descriptor left to reach it."""


@dataclass(frozen=True)
class DecodeLimits:
    """Limits of decoding one picture; a process that reaches one is killed."""

    seconds: float = 5.0
    """Time for a small picture. Decoders take a few milliseconds for a million pixels."""
    seconds_per_megapixel: float = 0.25
    """Time for each million pixels, added to `seconds`."""
    memory_bytes: int = 2 * 2**30
    """Address space of a process. The largest accepted picture takes about 1 GiB."""
    start_seconds: float = 60.0
    """Time for the start of a process; after it the start has failed."""
    python: str = sys.executable
    """Path of the Python interpreter of the processes."""

    def seconds_for(self, num_pixels: int) -> float:
        """Time in seconds for a picture of `num_pixels`."""
        return self.seconds + self.seconds_per_megapixel * num_pixels / 1e6


class DecodeProcess:
    """One decode process. It ends with the thread that started it, at the latest."""

    def __init__(self, limits: DecodeLimits) -> None:
        """Start the process; returns before it is ready. Raises NoDecoderError."""
        self._limits = limits
        self._is_ready = self._is_killed = False
        # Normally the wall-clock limit ends a decode. The CPU limit does while the server is suspended.
        cpu_seconds = 1 + limits.seconds_for(MAX_INPUT_PIXELS)
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise NoDecoderError(f"a decode process cannot be started: {error}") from error
        # A new interpreter in its own session: see `executor.launch`.
        command = [limits.python, "-P", "-m", "vllm_omni.entrypoints.openai.requests.pictures.worker"]
        command += [f"--socket-fd={theirs.fileno()}", f"--parent-pid={os.getpid()}"]
        command += [f"--memory-bytes={limits.memory_bytes}", f"--cpu-seconds={cpu_seconds}"]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # a client's file must not write to the log
                    env={**os.environ, **_ENVIRONMENT},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise NoDecoderError(f"a decode process cannot be started: {error}") from error
        self._channel: BlockingChannel[FromDecoder] = BlockingChannel(ours, FromDecoder)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        return not self._is_killed and self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Wait until the process accepts files. Raises NoDecoderError."""
        if self._is_ready:
            return
        try:
            ready = self._channel.receive(self._limits.start_seconds)
        except TimeoutError as error:
            raise NoDecoderError(f"a decode process did not start in {self._limits.start_seconds:g} s") from error
        except (EOFError, OSError, ChannelBrokenError) as error:
            raise NoDecoderError(f"a decode process ended at its start: {self._how_it_ended()}") from error
        assert isinstance(ready, DecoderReady)
        self._is_ready = True

    def decode(self, data: bytes | bytearray, sizes_of: Callable[[int, int], ReaderSizes]) -> InputImage:
        """Decode a picture file. `sizes_of`: `ImageInput.sizes`.

        Raises InvalidRequestError and NoDecoderError; the process may be unusable afterwards: see `is_usable`.
        """
        start = time.monotonic()
        opened = self._ask(Decode(np.frombuffer(data, np.uint8)), start, self._limits.seconds, "image")
        assert isinstance(opened, Opened)
        sizes = sizes_of(opened.width, opened.height)
        name = f"image ({opened.format}, {opened.width}x{opened.height})"
        seconds = self._limits.seconds_for(opened.width * opened.height)
        pixels = self._ask(Resize((sizes.condition, sizes.reference)), start, seconds, name)
        assert isinstance(pixels, Pixels)
        reference = np.array(pixels.reference)  # a copy: the shared memory would keep a file descriptor
        if sizes.condition == sizes.reference:
            return InputImage.of(reference, reference)
        return InputImage.of(np.array(pixels.condition), reference)

    def _ask(self, message: Decode | Resize, start: float, seconds: float, name: str) -> FromDecoder:
        """Send `message`; return the answer, due `seconds` after `start`. `name`: of the picture, in errors."""
        try:
            self._channel.send(message)
            answer = self._channel.receive(max(0.0, start + seconds - time.monotonic()))
        except TimeoutError:
            self.kill()
            _refuse(f"{name} takes more than {seconds:.3g} s to decode")
        except (EOFError, BrokenPipeError):
            self.kill()
            _refuse(f"{name} cannot be decoded: the decoder {self._how_it_ended()}")
        except (OSError, ChannelBrokenError, msgspec.MsgspecError) as error:  # such as too many open files
            self.kill()
            raise NoDecoderError(f"a decode process cannot be reached: {error}") from error
        if isinstance(answer, Refused):
            _refuse(answer.message)
        return answer

    def kill(self) -> None:
        """Kill the process. Any thread may call this; `decode` in the owning thread then raises."""
        self._is_killed = True
        self._process.kill()

    def close(self) -> None:
        """Kill the process and wait for its end. Only the owning thread may call this."""
        self.kill()
        self._channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_KILL_SECONDS)
            return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return "does not end"


def _refuse(message: str) -> NoReturn:
    raise InvalidRequestError(message, param="image")
