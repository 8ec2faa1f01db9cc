"""`vllm serve MODEL --omni` as a child process, seen from outside: its address, its log and what it holds."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 600.0
STOP_SECONDS = 120.0
LOOK_SECONDS = 0.05
WORKER = "vllm_omni.diffusion.worker.main"
"""Part of the command line of every worker process."""


@dataclass(frozen=True)
class Usage:
    """Memory and descriptors of the server's process, and the number of its child processes that still run."""

    megabytes: float
    descriptors: int
    processes: int


class ServedModel:
    """The running command; `served_model` ends it with everything that it started."""

    def __init__(self, model: str, flags: Sequence[str], log: Path) -> None:
        """log: the file for the server's output, which is written anew."""
        self._log = log
        self._family: dict[int, psutil.Process] = {}
        command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--omni"]
        with log.open("w") as output:
            # Its own session: Ctrl-C reaches this process alone, which then stops the server.
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", "0", *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """The output so far."""
        return self._log.read_text(errors="replace")

    def wait_until_ready(self) -> str:
        """The server's address, once it takes requests. Raises RuntimeError when it does not in START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            address, is_ready = re.search(r"Listening on (\S+)", self.log), "Ready: " in self.log
            if address and is_ready:
                return address[1]
            time.sleep(LOOK_SECONDS)
        raise RuntimeError(f"the server is not ready; its log ends with\n{self.log[-2000:]}")

    def workers(self) -> list[psutil.Process]:
        """The worker processes that live now."""
        return [process for process in self._children() if WORKER in _command_of(process)]

    def usage(self) -> Usage:
        process = psutil.Process(self._process.pid)
        return Usage(process.memory_info().rss / 2**20, process.num_fds(), len(self._children()))

    def stop(self) -> int:
        """Ask the server to end; its exit code. Raises subprocess.TimeoutExpired when it does not in STOP_SECONDS."""
        self._children()
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(STOP_SECONDS)

    def survivors(self) -> int:
        """How many processes that it started still run some seconds after its end."""
        return len(psutil.wait_procs(list(self._family.values()), timeout=10)[1])

    def kill(self) -> None:
        """End the server and all that it started, whatever they do."""
        self._children()
        for process in (self._process, *self._family.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(STOP_SECONDS)

    def _children(self) -> list[psutil.Process]:
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self._process.pid).children(recursive=True)
        self._family |= {process.pid: process for process in children}
        return [process for process in children if _lives(process)]


@contextlib.contextmanager
def served_model(model: str, flags: Sequence[str], log: Path) -> Iterator[ServedModel]:
    server = ServedModel(model, flags, log)
    try:
        yield server
    finally:
        server.kill()


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
