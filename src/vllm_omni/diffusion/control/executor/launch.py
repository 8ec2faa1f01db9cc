"""Launch the worker processes of one replica, as new interpreters or as forks of this process."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, Self

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import WorkerDiedError
from vllm_omni.logs import fill_standard_descriptors

_POLL_SECONDS = 0.01


class Process(Protocol):
    """Child process with the methods of `subprocess.Popen` that we use."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while the process runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Exit code. Raises subprocess.TimeoutExpired."""

    def kill(self) -> None: ...


@dataclass(frozen=True)
class Launched:
    """A running worker process and the parent's end of the channel to it."""

    name: str
    process: Process
    channel: socket.socket


LaunchWorker = Callable[[str, Sequence[int]], Launched]
"""Launch a worker, given its name and the descriptors that it inherits. Raises WorkerDiedError."""


class LaunchedReplica:
    """Running worker processes of one replica. Each imports libraries until it is sent `Start`.

    `close` ends the processes that nobody has taken over.
    """

    def __init__(self, config: OmniDiffusionConfig, replica_index: int, launch: LaunchWorker) -> None:
        """Launch all processes or none. Raises WorkerDiedError when the system has no process or descriptor left."""
        # First: a socket that gets the number of a closed standard descriptor would be the worker's output.
        fill_standard_descriptors()
        size = config.parallel.replica_size
        self._index = replica_index
        self._store: socket.socket | None = None
        self.workers: list[Launched] = []
        try:
            # Store where the ranks of the replica meet; rank 0 serves it.
            self._store = _listen() if size > 1 else None
            prefix = f"replica {replica_index} " if config.parallel.data_parallel_size > 1 else ""
            for rank in range(size):
                inherited = [self._store.fileno()] if self._store and rank == 0 else []
                self.workers.append(launch(f"{prefix}rank {rank}", inherited))
            self.rank_infos = [self._rank_info(rank, size) for rank in range(size)]
        except BaseException:  # also an interrupt must leave no process behind
            self.close()
            raise
        finally:
            if self._store is not None:
                self._store.close()  # rank 0 has inherited it

    def take(self) -> list[Launched]:
        """Transfer the processes to the caller, who must end them."""
        workers, self.workers = self.workers, []
        return workers

    def close(self) -> None:
        """Kill and reap the processes that were not taken. May be called twice."""
        for worker in self.take():
            worker.channel.close()
            worker.process.kill()
            worker.process.wait()

    def _rank_info(self, rank: int, size: int) -> RankInfo:
        if self._store is None:
            return RankInfo(rank, size, self._index)
        fd = self._store.fileno() if rank == 0 else None
        return RankInfo(rank, size, self._index, self._store.getsockname()[1], fd)


class EarlyWorkers:
    """Replicas that a command launched before its own imports, by replica index."""

    def __init__(self, replicas: Sequence[LaunchedReplica] = ()) -> None:
        self._replicas = dict(enumerate(replicas))

    def take(self, replica_index: int) -> LaunchedReplica | None:
        """Transfer the replica of this index to the caller; None when there is none or it was taken."""
        return self._replicas.pop(replica_index, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the replicas that were not taken."""
        for replica in self._replicas.values():
            replica.close()


def interpreter_launcher(runner_name: str, preload: Sequence[str] = ()) -> LaunchWorker:
    """Make a function that launches workers as new Python interpreters, which import the modules `preload` at once."""

    def launch(name: str, inherited_fds: Sequence[int]) -> Launched:
        ours, theirs = _socket_pair(name)
        # Not multiprocessing, which forks or imports the user's script again. `-P`: modules are not searched in the
        # current folder. A new session: a terminal's Ctrl-C goes to the parent alone.
        command = [
            sys.executable,
            "-P",
            "-m",
            "vllm_omni.diffusion.compute.worker.main",
            f"--socket-fd={theirs.fileno()}",
        ]
        command += [f"--parent-pid={os.getpid()}", f"--runner={runner_name}", f"--name={name}"]
        command += [f"--preload={module}" for module in preload]
        try:
            with theirs:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), *inherited_fds],
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise WorkerDiedError(f"{name} cannot be started: {error}") from error
        return Launched(name, process, ours)

    return launch


def fork_launcher(serve: Callable[[str, int, int], NoReturn]) -> LaunchWorker:
    """Make a function that launches workers as forks, which share the imports of this process.

    serve: called in the fork as `serve(name, socket_fd, parent_pid)`.
    This process must have a single Python thread, no event loop and no GPU context.
    """
    assert threading.active_count() == 1, "locks that other threads hold would stay locked in the child"

    def launch(name: str, inherited_fds: Sequence[int]) -> Launched:
        ours, theirs = _socket_pair(name)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # None where the descriptor was closed
                stream.flush()  # otherwise both processes would write the buffer
        parent = os.getpid()
        try:
            with theirs:
                pid = os.fork()
                if pid == 0:
                    _be_child({theirs.fileno(), *inherited_fds}, lambda: serve(name, theirs.fileno(), parent))
        except OSError as error:
            ours.close()
            raise WorkerDiedError(f"{name} cannot be started: {error}") from error
        return Launched(name, ForkedProcess(pid), ours)

    return launch


def _be_child(kept_fds: set[int], serve: Callable[[], NoReturn]) -> NoReturn:
    """Give a fork its own session, no input and no descriptors of the parent, then call `serve`."""
    try:
        gc.freeze()  # a collection would visit the parent's objects and so copy their memory
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # the parent's handlers act on the parent's objects
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in kept_fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        serve()
    except BaseException:  # nothing above this frame would report it
        traceback.print_exc()
    finally:
        os._exit(1)  # never return into the parent's stack


class ForkedProcess:
    """A forked child, with the methods of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._lock = threading.Lock()
        """Held while the child may be reaped: afterwards another process may get its number."""

    def poll(self) -> int | None:
        with self._lock:
            return self._poll()

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() >= end:
                assert timeout is not None
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            time.sleep(_POLL_SECONDS)
        assert self._code is not None
        return self._code

    def kill(self) -> None:
        with self._lock:
            if self._poll() is None:
                os.kill(self.pid, signal.SIGKILL)

    def _poll(self) -> int | None:
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # reaped elsewhere, for example because SIGCHLD is ignored
                self._code = 0
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def _socket_pair(name: str) -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair()
    except OSError as error:
        raise WorkerDiedError(f"{name} cannot be started: {error}") from error


def _listen() -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", 0))
    except OSError as error:
        raise WorkerDiedError(f"the ranks' meeting point cannot be opened: {error}") from error
