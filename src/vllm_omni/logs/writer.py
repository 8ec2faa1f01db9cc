"""Thread that writes lines to a file descriptor; its queue is bounded and counts the lines that it drops."""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections import deque

_PIPE_BUF = 4096
"""Bytes of the largest write to a pipe that the kernel keeps in one piece."""
_LINE_OVERHEAD = 64
"""Bytes of memory that a queued line takes besides its text."""


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
