"""Standard output and error that never block and never raise: their descriptors, queues and replacements."""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
import threading
import time
import weakref
from collections import deque
from typing import Any, NoReturn

_PIPE_BUF = 4096
"""Bytes of the largest write to a pipe that the kernel keeps in one piece."""
_LINE_OVERHEAD = 64
"""Bytes of memory that a queued line takes besides its text."""
STDIN, STDOUT, STDERR = 0, 1, 2


class QueuedWriter:
    """Writer to `fd`, in the order of the `put` calls, which never wait and never raise.

    When `max_bytes` are queued, lines are dropped until half of them are written; then the number of dropped lines is
    written.
    """

    def __init__(self, fd: int, max_bytes: int = 2**20) -> None:
        self.num_dropped = 0
        self._fd = fd
        self._max_bytes = max_bytes
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0
        self._num_unreported = 0
        """Dropped lines that are not reported yet."""
        self._is_writing = False
        self._was_forked = False
        # A reentrant lock: a signal handler may log while the main thread is inside `put`.
        self._changed = threading.Condition(threading.RLock())
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()
        reset = weakref.WeakMethod(self._after_fork)
        os.register_at_fork(after_in_child=lambda: (method := reset()) and method())

    def put(self, line: bytes) -> None:
        with self._changed:
            if self._was_forked:
                self._write(line)
            elif self._num_unreported or self._num_bytes + len(line) + _LINE_OVERHEAD > self._max_bytes:
                self.num_dropped += 1
                self._num_unreported += 1
            else:
                self._append(line)
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait at most `seconds`; return whether everything is written."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._has_work() or self._is_writing), seconds)

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        self._num_bytes += len(line) + _LINE_OVERHEAD

    def _has_work(self) -> bool:
        return bool(self._lines or self._num_unreported)

    def _run(self) -> None:
        while True:
            self._write(self._take())

    def _take(self) -> bytes:
        """Wait for lines; return as many as fit into one write."""
        with self._changed:
            self._is_writing = False
            self._changed.notify_all()
            self._changed.wait_for(self._has_work)
            taken: list[bytes] = []
            num_bytes = 0
            while self._lines and (not taken or num_bytes + len(self._lines[0]) <= _PIPE_BUF):
                taken.append(self._lines.popleft())
                num_bytes += len(taken[-1])
            self._num_bytes -= num_bytes + len(taken) * _LINE_OVERHEAD
            if self._num_unreported and self._num_bytes <= self._max_bytes // 2:
                self._append(b"%d log lines were dropped: they were not read in time\n" % self._num_unreported)
                self._num_unreported = 0
            self._is_writing = True
            return b"".join(taken)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                if self._was_forked:
                    return
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:  # the reader is gone, or the disk is full
                with self._changed:
                    self.num_dropped += data.count(b"\n")
                return

    def _after_fork(self) -> None:
        """In a forked child, write directly: the thread, and the holder of the lock, may exist in the parent only."""
        self._was_forked = True
        self._lines.clear()
        self._num_bytes = self._num_unreported = 0
        self._is_writing = False
        self._changed = threading.Condition(threading.RLock())


def fill_standard_descriptors() -> None:
    """Open /dev/null on each of the descriptors 0, 1 and 2 that is closed.

    Otherwise the next file or socket would get that number: libuv aborts then, and error messages would go into it.
    """
    for fd in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == fd:
                os.set_inheritable(fd, True)
            else:
                os.dup2(null, fd)
                os.close(null)


def make_pipe_nonblocking(fd: int) -> None:
    """If `fd` is a pipe, let writes to it fail instead of block: C++ libraries write to it directly.

    Opens the pipe anew, because O_NONBLOCK on the inherited description would also change it for the parent.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return  # Without a reader, writes fail at once anyway; another user's pipe cannot be opened and stays blocking.
    os.dup2(own, fd)
    os.close(own)


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
