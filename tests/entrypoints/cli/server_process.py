"""`vllm serve MODEL --omni` as a child process of a test."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
from benchmarks.served import ProcessFamily

from testbed.patience import GUARD_SECONDS, wait_for

VLLM = Path(sys.executable).with_name("vllm")


class OutputReader:
    """Reads the standard output of a process, in text mode, while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            self._lines.extend(iter(self._process.stdout.readline, ""))

    @property
    def text(self) -> str:
        return "".join(self._lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first match in the output; asserts that the process lives until then."""

        def find() -> re.Match[str] | None:
            assert self._process.poll() is None, f"exit code {self._process.returncode}:\n{self.text}"
            return re.search(pattern, self.text)

        return wait_for(find)

    def join(self) -> None:
        """Wait for the end of the output, which is the process's at the latest."""
        self._thread.join()


class ServerProcess:
    """The running command; everything it started dies with `kill`."""

    def __init__(self, *flags: str, model: str = "demo") -> None:
        self._process = subprocess.Popen(
            [VLLM, "serve", model, "--omni", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # On a shared machine torch's threads spend their time waiting for each other.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._output = OutputReader(self._process)
        self._family = ProcessFamily(self._process)

    @property
    def output(self) -> str:
        return self._output.text

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        return self._output.wait_for(pattern)

    def address(self) -> str:
        """Address that the server prints as soon as it listens."""
        return self.wait_for_line(r"Listening on (\S+)")[1]

    def wait_until_ready(self) -> None:
        self.wait_for_line(r"Ready: \S+ \(")

    def signal(self, number: int) -> None:
        self._family.children()
        self._process.send_signal(number)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def workers(self) -> list[psutil.Process]:
        return self._family.workers()

    def wait(self) -> int:
        """The exit code."""
        code = self._process.wait(GUARD_SECONDS)
        self._output.join()
        return code

    def survivors(self) -> list[psutil.Process]:
        """Processes of ours that do not end after the server."""
        return self._family.survivors(GUARD_SECONDS)

    def kill(self) -> None:
        self._family.kill()
        self.wait()


@contextlib.contextmanager
def server_process(*flags: str, model: str = "demo") -> Iterator[ServerProcess]:
    server = ServerProcess(*flags, model=model)
    try:
        yield server
    except BaseException:
        print(server.output)
        raise
    finally:
        server.kill()


def stop(server: ServerProcess) -> int:
    server.signal(signal.SIGTERM)
    return server.wait()


class Generation(threading.Thread):
    """A request under way. `response` is its answer, once the thread has ended."""

    response: httpx.Response

    def __init__(self, client: httpx.Client, num_steps: int) -> None:
        super().__init__()
        self._client = client
        self._num_steps = num_steps

    def run(self) -> None:
        self.response = self._client.post(
            "/v1/images/generations",
            json={"prompt": "red apple", "num_inference_steps": self._num_steps, "seed": 1},
            timeout=GUARD_SECONDS,
        )


def start_generation(client: httpx.Client, num_steps: int) -> Generation:
    generation = Generation(client, num_steps)
    generation.start()
    return generation


def num_running(client: httpx.Client) -> float:
    found = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])
