"""`vllm serve MODEL --omni` as a child process: its address, its log, its memory and descriptors."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 600.0
STOP_SECONDS = 120.0
LOOK_SECONDS = 0.05
WORKER = "vllm_omni.diffusion.compute.worker.main"
"""Text in the command line of every worker process."""


@dataclass(frozen=True)
class Usage:
    """Memory and descriptors of the server's process, and the number of its child processes that still run."""

    megabytes: float
    descriptors: int
    processes: int


class ProcessFamily:
    """A process and all its descendants, including orphans; each call notes new ones."""

    def __init__(self, process: subprocess.Popen[Any]) -> None:
        self._process = process
        self._noted: dict[int, psutil.Process] = {}

    def children(self) -> list[psutil.Process]:
        """Descendants that run now."""
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children(recursive=True)
        self._noted |= {process.pid: process for process in children}
        return [process for process in children if _lives(process)]

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live now."""
        return workers_among(self.children())

    def survivors(self, seconds: float) -> list[psutil.Process]:
        """Noted processes that do not end within `seconds`."""
        return list(psutil.wait_procs(list(self._noted.values()), timeout=seconds)[1])

    def kill(self) -> None:
        """Kill all noted processes. The caller must still wait for the first one."""
        self.children()
        for process in (self._process, *self._noted.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class ServedModel:
    """Running server; `served_model` ends it and its descendants."""

    def __init__(self, model: str, flags: Sequence[str], log: Path) -> None:
        """`log`: file for the server's output, which is overwritten."""
        self._log = log
        command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--omni"]
        with log.open("w") as output:
            # Its own session: Ctrl-C reaches only this process, which then stops the server.
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", "0", *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._family = ProcessFamily(self._process)

    @property
    def log(self) -> str:
        """Output so far."""
        return self._log.read_text(errors="replace")

    def wait_until_ready(self) -> str:
        """Wait until the server is ready; return its address. Raises RuntimeError after START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            address, is_ready = re.search(r"Listening on (\S+)", self.log), "Ready: " in self.log
            if address and is_ready:
                return address[1]
            time.sleep(LOOK_SECONDS)
        raise RuntimeError(f"the server is not ready; its log ends with\n{self.log[-2000:]}")

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live now."""
        return self._family.workers()

    def usage(self) -> Usage:
        process = psutil.Process(self._process.pid)
        return Usage(process.memory_info().rss / 2**20, process.num_fds(), len(self._family.children()))

    def stop(self) -> int:
        """Ask the server to end; return its exit code. Raises subprocess.TimeoutExpired after STOP_SECONDS."""
        self._family.children()
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_SECONDS)

    def survivors(self) -> int:
        """Number of its descendants that still run 10 s after its end."""
        return len(self._family.survivors(10.0))

    def crash(self) -> None:
        """Kill the server's process alone. Its descendants notice and end: see `survivors`."""
        self._family.children()
        self._process.kill()
        self._process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """Kill the server and all its descendants."""
        self._family.kill()
        self._process.wait(STOP_SECONDS)


@contextlib.contextmanager
def served_model(model: str, flags: Sequence[str], log: Path) -> Iterator[ServedModel]:
    server = ServedModel(model, flags, log)
    try:
        yield server
    finally:
        server.kill()


def workers_among(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Child processes that run as workers."""
    return [process for process in processes if WORKER in _command_of(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
