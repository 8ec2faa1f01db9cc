"""The thread that writes behind a bounded queue."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator

import pytest

from testbed.patience import GUARD_SECONDS
from vllm_omni.logs.streams import QueuedWriter, make_pipe_nonblocking

PIPE_BYTES = 4096
OVERHEAD = 64
"""Bytes that the queue counts for a line besides its text."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(end to read, end to write) of the smallest pipe that there is."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(writer, False)
    yield reader, writer
    if fd_is_open(reader):
        os.close(reader)
    # The end to write stays open: the writer's thread may still hold its number, which another file would get.


def fd_is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def read_lines(reader: int, number: int) -> list[bytes]:
    """The next `number` lines."""
    data = b""
    while data.count(b"\n") < number:
        data += os.read(reader, PIPE_BYTES)
    return data.splitlines()


def test_lines_of_many_threads_come_whole_and_in_order(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = QueuedWriter(fd)

    def put(name: int) -> None:
        for number in range(500):
            writer.put(b"%d %d\n" % (name, number))

    threads = [threading.Thread(target=put, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    lines = [tuple(map(int, line.split())) for line in read_lines(reader, 2000)]
    for thread in threads:
        thread.join()
    assert sorted(lines) == [(name, number) for name in range(4) for number in range(500)]
    assert [number for name, number in lines if name == 2] == list(range(500))
    assert writer.num_dropped == 0


def test_a_full_queue_drops_counts_and_says_so(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = QueuedWriter(fd, max_bytes=200 * OVERHEAD + OVERHEAD + 2)
    line = b"x" * (OVERHEAD - 1) + b"\n"
    for _ in range(1000):
        writer.put(line)
    writer.put(b"s\n")  # would fit, but the lines before it are lost, and their number is not told yet
    assert not writer.flush(0.0)
    # In the pipe, in the thread's hand, in the queue; all others were dropped.
    kept = 1001 - writer.num_dropped
    assert 100 <= kept <= 100 + 3 * PIPE_BYTES // len(line)
    lines = read_lines(reader, kept + 1)
    assert lines == [line[:-1]] * kept + [b"%d log lines were dropped: they were not read in time" % writer.num_dropped]
    assert writer.flush(GUARD_SECONDS)
    writer.put(b"after\n")
    assert read_lines(reader, 1) == [b"after"]


def test_a_line_that_never_fits_is_counted(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = QueuedWriter(fd, max_bytes=100)
    writer.put(b"x" * 100)
    assert read_lines(reader, 1) == [b"1 log lines were dropped: they were not read in time"]
    assert writer.num_dropped == 1


def test_a_flush_does_not_wait_for_a_reader_that_does_not_read(pipe: tuple[int, int]) -> None:
    writer = QueuedWriter(pipe[1])
    writer.put(b"x" * 3 * PIPE_BYTES + b"\n")
    start = time.monotonic()
    assert not writer.flush(0.05)
    assert time.monotonic() - start >= 0.05
    assert len(os.read(pipe[0], PIPE_BYTES)) == PIPE_BYTES


def test_a_reader_that_left_is_no_error(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = QueuedWriter(fd)
    writer.put(b"x" * 3 * PIPE_BYTES + b"\n")
    os.read(reader, 1)
    os.close(reader)
    assert writer.flush(GUARD_SECONDS)
    writer.put(b"more\n")
    assert writer.flush(GUARD_SECONDS)
    assert writer.num_dropped == 2


def test_a_signal_handler_may_write_inside_put(pipe: tuple[int, int]) -> None:
    """`put` holds its lock when the handler runs: with a lock that is not reentrant it would wait for ever."""
    writer = QueuedWriter(pipe[1])
    with writer._changed:
        writer.put(b"inner\n")
    assert read_lines(pipe[0], 1) == [b"inner"]


def test_a_forked_child_writes_too(pipe: tuple[int, int]) -> None:
    reader, fd = pipe
    writer = QueuedWriter(fd)
    pid = os.fork()
    if pid == 0:
        writer.put(b"child\n")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    writer.put(b"parent\n")
    assert read_lines(reader, 2) == [b"child", b"parent"]


def test_another_description_of_a_pipe_is_nonblocking() -> None:
    reader, writer = os.pipe()
    copy = os.dup(writer)
    make_pipe_nonblocking(copy)
    assert (os.get_blocking(writer), os.get_blocking(copy)) == (True, False)
    os.write(copy, b"x")
    assert os.read(reader, 2) == b"x"
    os.close(reader)
    make_pipe_nonblocking(writer)  # without a reader it cannot be opened: left as it is
    for fd in (writer, copy):
        with pytest.raises(BrokenPipeError):
            os.write(fd, b"x")
        os.close(fd)


def test_a_file_keeps_its_place(tmp_path: object) -> None:
    with open(f"{tmp_path}/log", "w+") as file:
        file.write("before\n")
        file.flush()
        make_pipe_nonblocking(file.fileno())
        os.write(file.fileno(), b"after\n")
        file.seek(0)
        assert file.read() == "before\nafter\n"
