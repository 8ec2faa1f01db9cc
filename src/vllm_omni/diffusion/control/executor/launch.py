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
from typing import NoReturn, Self

from tqdm import tqdm

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import WorkerDiedError
from vllm_omni.logs import fill_standard_descriptors

_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Launched:
    """A running worker process and the parent's end of the channel to it."""

    name: str
    process: subprocess.Popen[bytes] | ForkedProcess
    channel: socket.socket


LaunchWorker = Callable[[str, Sequence[int]], Launched]
"""Launch a worker, given its name and the descriptors that it inherits. Raises WorkerDiedError."""


class LaunchedReplica:
    """Running worker processes of a replica. Each imports libraries until it is sent `Start`."""

    def __init__(self, config: OmniDiffusionConfig, replica_index: int, launch: LaunchWorker) -> None:
        """Launch all processes or none. Raises WorkerDiedError when the system has no process or descriptor left."""
        # First: a socket that gets the number of a closed standard descriptor would be the worker's output.
        fill_standard_descriptors()
        size = config.parallel.replica_size
        self.workers: list[Launched] = []
        self.rank_infos: list[RankInfo] = []
        try:
            # Store where the ranks of the replica meet; rank 0 serves it.
            store = socket.create_server(("127.0.0.1", 0)) if size > 1 else None
        except OSError as error:
            raise WorkerDiedError(f"the ranks' meeting point cannot be opened: {error}") from error
        try:
            port = store.getsockname()[1] if store else 0
            prefix = f"replica {replica_index} " if config.parallel.data_parallel_size > 1 else ""
            for rank in range(size):
                fd = store.fileno() if store and rank == 0 else None
                self.workers.append(launch(f"{prefix}rank {rank}", [] if fd is None else [fd]))
                self.rank_infos.append(RankInfo(rank, size, replica_index, port, fd))
        except BaseException:  # also an interrupt must leave no process behind
            self.close()
            raise
        finally:
            if store is not None:
                store.close()  # rank 0 has inherited it

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
        # Not multiprocessing, which forks or imports the user's script again. `-P`: modules are not searched in the
        # current folder. A new session: a terminal's Ctrl-C goes to the parent alone.
        command = [sys.executable, "-P", "-m", "vllm_omni.diffusion.compute.worker.main", f"--parent-pid={os.getpid()}"]
        command += [f"--runner={runner_name}", f"--name={name}", *(f"--preload={module}" for module in preload)]

        def start(fd: int) -> subprocess.Popen[bytes]:
            fds = [fd, *inherited_fds]
            return subprocess.Popen(
                [*command, f"--socket-fd={fd}"], stdin=subprocess.DEVNULL, pass_fds=fds, start_new_session=True
            )

        return _with_channel(name, start)

    return launch


def fork_launcher(serve: Callable[[str, int, int], NoReturn]) -> LaunchWorker:
    """Make a function that launches workers as forks, which share the imports of this process.

    serve: called in the fork as `serve(name, socket_fd, parent_pid)`.
    This process must have a single Python thread, no event loop and no GPU context.
    """
    assert threading.active_count() == 1, "locks that other threads hold would stay locked in the child"

    def launch(name: str, inherited_fds: Sequence[int]) -> Launched:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # None where the descriptor was closed
                stream.flush()  # otherwise both processes would write the buffer
        parent = os.getpid()

        def start(fd: int) -> ForkedProcess:
            if (pid := os.fork()) == 0:
                _be_child({fd, *inherited_fds}, lambda: serve(name, fd, parent))
            return ForkedProcess(pid)

        return _with_channel(name, start)

    return launch


def _with_channel(name: str, start: Callable[[int], subprocess.Popen[bytes] | ForkedProcess]) -> Launched:
    """Worker that `start` launches with the descriptor of its end of the channel. Raises WorkerDiedError."""
    try:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as on_failure:
            on_failure.callback(ours.close)
            process = start(theirs.fileno())
            on_failure.pop_all()
    except OSError as error:
        raise WorkerDiedError(f"{name} cannot be started: {error}") from error
    return Launched(name, process, ours)


def _be_child(kept_fds: set[int], serve: Callable[[], NoReturn]) -> NoReturn:
    """Give a fork its own session, no input and no descriptors of the parent, then call `serve`."""
    try:
        gc.freeze()  # a collection would visit the parent's objects and so copy their memory
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # the parent's handlers act on the parent's objects
        # The inherited lock is in shared memory: a child that is killed while it holds it would block the parent.
        tqdm.set_lock(threading.RLock())
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
        self._lock = threading.RLock()
        """Held while the child may be reaped: afterwards another process may get its number."""

    def poll(self) -> int | None:
        with self._lock:
            if self._code is None:
                try:
                    pid, status = os.waitpid(self.pid, os.WNOHANG)
                except ChildProcessError:  # reaped elsewhere, for example because SIGCHLD is ignored
                    self._code = 0
                else:
                    self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code

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
            if self.poll() is None:
                os.kill(self.pid, signal.SIGKILL)
