"""Replacements of sys.stdout and sys.stderr that never block and never raise."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from typing import Any, NoReturn

from vllm_omni.logs.descriptors import STDERR, STDOUT, make_pipe_nonblocking
from vllm_omni.logs.writer import QueuedWriter


class QueuedStreams:
    """Standard output and error of a process that is ours alone; never of a program that imports the library.

    After `install`, all that Python code writes goes through queues: logging, print, bars, warnings, tracebacks.
    """

    def __init__(self, max_bytes: int = 2**20, flush_seconds: float = 1.0) -> None:
        """`max_bytes`: bound of each queue. `flush_seconds`: longest time that `flush` takes."""
        self._max_bytes = max_bytes
        self._flush_seconds = flush_seconds
        self._writers: dict[tuple[int, int], QueuedWriter] = {}
        """By the device and inode of the file: two streams into one file share a queue, which keeps their order."""

    def install(self) -> None:
        sys.stdout = self._replacement(sys.stdout, STDOUT)
        sys.stderr = self._replacement(sys.stderr, STDERR)

    @property
    def num_dropped(self) -> int:
        """Lines that could not be written."""
        return sum(writer.num_dropped for writer in self._writers.values())

    def flush(self) -> None:
        """Wait until what was written has left the process, but not long for a reader that does not read."""
        end = time.monotonic() + self._flush_seconds
        for writer in self._writers.values():
            writer.flush(max(0.0, end - time.monotonic()))

    def leave(self, code: int) -> NoReturn:
        """Flush and end the process: without exit handlers, which would wait for threads that may hang."""
        self.flush()
        os._exit(code)

    def _replacement(self, stream: Any, fd: int) -> io.TextIOWrapper:
        if stream is None:  # The descriptor was closed when Python started, and may be another file's by now.
            fd = os.open(os.devnull, os.O_WRONLY)
        else:
            make_pipe_nonblocking(fd)
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        if key not in self._writers:
            self._writers[key] = QueuedWriter(fd, self._max_bytes)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        sink: Any = _Sink(self._writers[key], fd, getattr(stream, "name", os.devnull))
        return io.TextIOWrapper(sink, encoding=encoding, errors="backslashreplace", line_buffering=True)


class _Sink(io.RawIOBase):
    """The binary file beneath a text stream: hands what it gets to a QueuedWriter."""

    def __init__(self, writer: QueuedWriter, fd: int, name: str) -> None:
        super().__init__()
        self.name = name
        self._writer = writer
        self._fd = fd

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._writer.put(bytes(data))
        return len(data)

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)
