"""The command whose output nobody reads, whose reader has left, or which has no output at all. The demo model, real
workers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from benchmarks.served import workers_among

from testbed.patience import GUARD_SECONDS, wait_for
from tests.entrypoints.cli.server_process import VLLM, num_running, start_generation

ROOT = Path(__file__).parents[3]
SMALLEST_PIPE = 4096
PATIENCE = f"{GUARD_SECONDS:g}"


@contextlib.contextmanager
def serving(path: Path, output: int | None, fake: bool = False) -> Iterator[tuple[psutil.Popen, httpx.Client]]:
    """The server on the Unix socket `path`, once it is ready; `output`: its standard output and error, None: closed."""
    words: list[str | Path] = [VLLM, "serve", "demo", "--omni", "--uds", path, "--shutdown-timeout", PATIENCE]
    if fake:
        words = [sys.executable, "-m", "tests.entrypoints.cli.fake_server", path, PATIENCE, PATIENCE]
    command = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words] if output is None else words
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=ROOT)
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(base_url="http://server", transport=transport) as client:
        try:
            wait_for(lambda: listens(server, path))
            wait_for(lambda: client.get("/ready").status_code == 200)
            yield server, client
        finally:
            family = [server, *(server.children(recursive=True) if server.is_running() else [])]
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            server.wait()


def listens(server: psutil.Popen, path: Path) -> bool:
    assert server.poll() is None, f"exit code {server.returncode}"
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def worker_of(server: psutil.Popen) -> psutil.Process:
    (worker,) = workers_among(server.children())
    return worker


def generate(client: httpx.Client, num_steps: int = 2) -> None:
    generation = start_generation(client, num_steps)
    generation.join()
    assert generation.response.status_code == 200


def kill_a_worker(server: psutil.Popen, client: httpx.Client) -> None:
    """Kill it under a request, which its successor answers."""
    worker = worker_of(server)
    worker.suspend()
    generation = start_generation(client, 2)
    wait_for(lambda: num_running(client))
    worker.kill()
    generation.join()
    assert generation.response.status_code == 200


@pytest.mark.thorough
def test_a_pipe_that_nobody_reads_and_then_a_reader_that_leaves(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    with serving(tmp_path / "omni.sock", writer) as (server, client):
        os.close(writer)
        for _ in range(100):  # an access line each: more than the pipe takes
            assert client.get("/health").status_code == 200
        kill_a_worker(server, client)
        assert len(os.read(reader, SMALLEST_PIPE)) > SMALLEST_PIPE - 200, "the pipe was full"
        os.close(reader)
        kill_a_worker(server, client)
        generate(client)
        wait_for(lambda: num_dropped(client))
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def num_dropped(client: httpx.Client) -> float:
    found = re.search(r"^vllm_omni:log_lines_dropped_total\{.*\} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_a_full_pipe_does_not_hold_up_the_end(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    try:
        with serving(tmp_path / "omni.sock", writer, fake=True) as (server, client):
            for _ in range(100):
                client.get("/health")
            server.send_signal(signal.SIGTERM)
            assert server.wait() == 0
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.thorough
def test_closed_descriptors(tmp_path: Path) -> None:
    with serving(tmp_path / "omni.sock", None) as (server, client):
        for process in (server, worker_of(server)):
            assert [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)] == [os.devnull] * 3
        generate(client)
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
