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
    """Queued standard output and error, for processes that we started; not for a program that imports the library.

    After `install`, everything that Python code writes goes through queues: logging, print, bars, tracebacks.
    """

    def __init__(self, max_bytes: int = 2**20, flush_seconds: float = 1.0) -> None:
        """`max_bytes`: limit of each queue. `flush_seconds`: longest time that `flush` waits."""
        self._max_bytes = max_bytes
        self._flush_seconds = flush_seconds
        self._writers: dict[tuple[int, int], QueuedWriter] = {}
        """Writer by the file's device and inode: two streams into one file share a writer, which keeps their order."""

    def install(self) -> None:
        sys.stdout = self._replacement(sys.stdout, STDOUT)
        sys.stderr = self._replacement(sys.stderr, STDERR)

    @property
    def num_dropped(self) -> int:
        """Number of lines that could not be written."""
        return sum(writer.num_dropped for writer in self._writers.values())

    def flush(self) -> None:
        """Wait until all lines are written, at most `flush_seconds`: the reader may have stopped reading."""
        end = time.monotonic() + self._flush_seconds
        for writer in self._writers.values():
            writer.flush(max(0.0, end - time.monotonic()))

    def leave(self, code: int) -> NoReturn:
        """Flush, then end the process without exit handlers: those would wait for threads that may hang."""
        self.flush()
        os._exit(code)

    def _replacement(self, stream: Any, fd: int) -> io.TextIOWrapper:
        if stream is None:  # The descriptor was closed when Python started, and may belong to another file now.
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
    """Binary file under a text stream; passes its bytes to a QueuedWriter."""

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
