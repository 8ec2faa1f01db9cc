"""A thread that writes to a file descriptor, behind a bounded queue that drops and counts."""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections import deque

_PIPE_BUF = 4096
"""Bytes up to which the kernel does not mix a write to a pipe with those of other processes."""
_LINE_OVERHEAD = 64
"""Bytes of Python objects that a queued line costs besides its text."""


class QueuedWriter:
    """Write to `fd` in the order of `put`, which never waits and never raises.

    When `max_bytes` are queued, lines are dropped until half of that has been written; then their number is written.
    """

    def __init__(self, fd: int, max_bytes: int = 2**20) -> None:
        self.num_dropped = 0
        self._fd = fd
        self._max_bytes = max_bytes
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0
        self._num_untold = 0
        """Dropped lines whose number has not been queued yet."""
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
            elif self._num_untold or self._num_bytes + len(line) + _LINE_OVERHEAD > self._max_bytes:
                self.num_dropped += 1
                self._num_untold += 1
            else:
                self._append(line)
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Whether everything was written within `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._has_work() or self._is_writing), seconds)

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        self._num_bytes += len(line) + _LINE_OVERHEAD

    def _has_work(self) -> bool:
        return bool(self._lines or self._num_untold)

    def _run(self) -> None:
        while True:
            self._write(self._take())

    def _take(self) -> bytes:
        """Wait for lines and return as many as fit into one write."""
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
            if self._num_untold and self._num_bytes <= self._max_bytes // 2:
                self._append(b"%d log lines were dropped: they were not read in time\n" % self._num_untold)
                self._num_untold = 0
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
        """Write directly in a forked child: the thread exists in the parent only, and so may the lock's holder."""
        self._was_forked = True
        self._lines.clear()
        self._num_bytes = self._num_untold = 0
        self._is_writing = False
        self._changed = threading.Condition(threading.RLock())
