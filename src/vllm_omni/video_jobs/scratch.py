"""Folder of one process for files that are being written; none outlives the process for long."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_NAME = re.compile(r"encoding-[0-9a-f]{16}")


class ScratchFolder:
    """A new folder `path`, removed by `close` or, if the process dies, by the next process that opens its parent.

    The process holds a lock on its folder, which the kernel releases when the process ends, however it ends.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, parent: Path) -> Self:
        """Make a folder in `parent`, which is created, and remove folders of processes that have ended. Blocks.

        Raises OSError.
        """
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _held(parent):  # or another process would find the new folder before it is locked
            for path in parent.iterdir():
                if _NAME.fullmatch(path.name):
                    _remove_abandoned(path)
            path = parent / f"encoding-{secrets.token_hex(8)}"
            path.mkdir(mode=0o700)
            return cls(path, _lock(path, blocking=False))

    def close(self) -> None:
        """Remove the folder with its files. Blocks."""
        shutil.rmtree(self.path, ignore_errors=True)
        _unlock(self._lock)


def _remove_abandoned(path: Path) -> None:
    """Remove a folder, unless a process that runs holds it."""
    with contextlib.suppress(BlockingIOError, FileNotFoundError):
        lock = _lock(path, blocking=False)
        shutil.rmtree(path, ignore_errors=True)
        _unlock(lock)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    lock = _lock(folder, blocking=True)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, *, blocking: bool) -> int:
    """Lock `folder` and return its descriptor. Raises BlockingIOError if another process has the lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(descriptor: int) -> None:
    """Unlock first: a process that was forked meanwhile has the descriptor too, and would keep the lock."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
