"""Workers of a program whose output nobody reads, or which has none; and what they log."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest

from tests.diffusion.control.executor.workers import ROOT

PROGRAM = textwrap.dedent(
    """
    import asyncio, logging, os, signal, sys
    from testbed.fakes import make_config, make_request
    from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
    from vllm_omni.diffusion.messages.plan import StepPlan

    CLOSE = "close"

    def state():
        signals = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        loggers = [(logger.level, logger.handlers) for logger in map(logging.getLogger, (None, "vllm_omni"))]
        return sys.stdout, sys.stderr, signals, loggers

    async def main(file, log=None):
        before = state()
        if log == CLOSE:
            os.closerange(0, 3)
        executor = MultiprocExecutor(make_config(), "tests.diffusion.control.executor.workers:Chatty")
        await executor.start()
        executor.submit(StepPlan(0, new_requests=[make_request("a")], encode=["a"]))
        await executor.next_result()
        (pid,) = executor.worker_pids
        while log not in (None, CLOSE) and "the last line" not in open(log).read():
            await asyncio.sleep(0.01)
        outputs = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]
        await executor.close()
        assert state() == before, "the program is the user's"
        with open(file, "w") as result:
            print(*outputs, sep="\\n", file=result)

    asyncio.run(main(*sys.argv[1:]))
    """
)


def run(file: str, *log: str, command: tuple[str, ...] = (), **settings: Any) -> subprocess.CompletedProcess[str]:
    """`log`: what the workers write into; the program ends when their last line is there. `close`: no output at all."""
    words = [*command, sys.executable, "-W", "ignore", "-c", PROGRAM, file, *log]
    return subprocess.run(words, check=True, text=True, cwd=ROOT, **settings)


def test_a_pipe_that_nobody_reads(tmp_path: Any) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    run(f"{tmp_path}/done", stdout=writer, stderr=writer)
    os.close(reader)
    os.close(writer)
    assert "pipe:" in (tmp_path / "done").read_text()


def test_a_reader_that_left(tmp_path: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    run(f"{tmp_path}/done", stdout=writer, stderr=writer)
    os.close(writer)
    assert "pipe:" in (tmp_path / "done").read_text()


def test_closed_descriptors(tmp_path: Any) -> None:
    """Descriptors 0 to 2 are closed from the start, or later, so that sockets would get their numbers."""
    run(f"{tmp_path}/done", command=("/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"))
    assert (tmp_path / "done").read_text().split() == [os.devnull] * 3
    run(f"{tmp_path}/done", "close")
    assert (tmp_path / "done").read_text().split() == [os.devnull] * 3


@pytest.mark.parametrize(("level", "number", "debugged"), [("INFO", 500, 0), ("DEBUG", 500, 500), ("ERROR", 0, 0)])
def test_the_level_of_the_log(level: str, number: int, debugged: int, tmp_path: Any) -> None:
    log = tmp_path / "log"
    with log.open("w") as file:
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": level}
        run(f"{tmp_path}/done", str(log), stdout=file, stderr=file, env=environment)
    text = log.read_text()
    assert len(re.findall(r"^INFO .* \[vllm-omni rank 0\] a line of the log: \d+$", text, re.MULTILINE)) == number
    assert len(re.findall(r"^DEBUG .* \[vllm-omni rank 0\] a line for those", text, re.MULTILINE)) == debugged
    assert text.count("a line of the output") == 500


def test_a_wrong_level_ends_the_start(tmp_path: Any) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(f"{tmp_path}/done", capture_output=True, env={**os.environ, "VLLM_LOGGING_LEVEL": "LOUD"})
    assert failed.value.stderr.splitlines()[-1].startswith(
        "vllm_omni.errors.ConfigError: VLLM_LOGGING_LEVEL takes DEBUG, INFO, WARNING, ERROR or CRITICAL, got 'LOUD'"
    )
