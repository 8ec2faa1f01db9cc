"""A process that is short of file descriptors, or has used up the low ones."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

SELECT_LIMIT = 1024
"""select(2) knows no descriptor from here on."""


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """No more than `count` files can be opened; those that are open stay so."""
    free = [os.open(os.devnull, os.O_RDONLY) for _ in range(count + 1)]  # the kernel gives the lowest numbers
    for fd in free:
        os.close(fd)
    with _limit(max(free)):
        yield


@contextmanager
def low_descriptors_taken() -> Iterator[None]:
    """The next files that are opened have numbers that select(2) does not know."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    try:
        with _limit(min(hard, 2 * SELECT_LIMIT)):
            while not taken or taken[-1] < SELECT_LIMIT:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            yield
    finally:
        for fd in taken:
            os.close(fd)


@contextmanager
def _limit(num_files: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
