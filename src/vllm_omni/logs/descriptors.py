"""File descriptors 0, 1 and 2 of a process."""

from __future__ import annotations

import os
import stat

STDIN, STDOUT, STDERR = 0, 1, 2


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
