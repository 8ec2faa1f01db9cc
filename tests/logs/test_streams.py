"""sys.stdout and sys.stderr of a process of ours, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from vllm_omni.errors import ConfigError
from vllm_omni.logs import logging_level
from vllm_omni.logs.bars import progress_bar

START = "from vllm_omni.logs import QueuedStreams\nstreams = QueuedStreams(flush_seconds=60)\nstreams.install()\n"


def run(code: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    script = START + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-W", "default", "-c", script], text=True, **settings)


def test_all_writers_come_out_in_order() -> None:
    ended = run(
        """
        import faulthandler, logging, sys, warnings
        from tqdm import tqdm
        print("printed", 1, "Ä")
        logging.warning("logged %d", 2)
        warnings.warn("warned 3")
        with tqdm(total=2, desc="bar") as bar:
            bar.update(2)
        try:
            raise ValueError("traced 4")
        except ValueError:
            logging.exception("logged 5")
        print("last", end="")
        streams.leave(7)
        """,
        stderr=subprocess.STDOUT,
    )
    assert ended.returncode == 7
    texts = ["printed 1 Ä", "logged 2", "warned 3", "bar: 100%", "logged 5", "traced 4"]
    places = [ended.stdout.find(text) for text in texts]
    assert -1 not in places
    assert places == sorted(places)


def test_both_streams_into_one_file_keep_their_order() -> None:
    code = "import sys\nfor n in range(1000): print(n, file=(sys.stdout, sys.stderr)[n % 2])\nstreams.leave(0)"
    assert list(map(int, run(code, stderr=subprocess.STDOUT).stdout.split())) == list(range(1000))


def test_two_files_stay_apart() -> None:
    ended = run("import sys\nprint('out')\nprint('err', file=sys.stderr)\nstreams.leave(0)")
    assert (ended.stdout, ended.stderr) == ("out\n", "err\n")


def test_text_that_cannot_be_encoded_is_escaped() -> None:
    ended = run("print('\\ud800 \\u2713')\nstreams.leave(0)", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ended.stdout == "\\ud800 \\u2713\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_lead_nowhere(closed: str, tmp_path: Path) -> None:
    """A file that is opened meanwhile gets nothing of what is written."""
    file = tmp_path / "file"
    code = f"""
        import os, sys
        file = os.open({str(file)!r}, os.O_RDWR | os.O_CREAT)
        from vllm_omni.logs import fill_standard_descriptors
        fill_standard_descriptors()
        later = QueuedStreams(flush_seconds=60)
        later.install()
        print("out")
        print("err", file=sys.stderr)
        assert all(os.fstat(fd) for fd in range(3))
        assert all(os.get_inheritable(fd) for fd in range(3) if fd != file)
        later.leave(0)
    """
    script = textwrap.dedent(code).replace("later = ", "from vllm_omni.logs import QueuedStreams\nlater = ")
    command = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert file.read_text() == ""
    assert ended.stdout == ("" if ">&-" in closed.split() else "out\n")
    assert ended.stderr == ("" if "2>&-" in closed.split() else "err\n")


@pytest.mark.parametrize(("value", "level"), [(None, 20), ("", 20), ("debug", 10), ("WARNING", 30), ("CRITICAL", 50)])
def test_levels(value: str | None, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_LOGGING_LEVEL", value)
    assert logging_level() == level


def test_a_wrong_level_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "LOUD")
    with pytest.raises(ConfigError, match=r"VLLM_LOGGING_LEVEL takes DEBUG, INFO, .*, got 'LOUD'"):
        logging_level()


class Broken:
    """A terminal that went away, a pipe without a reader, or a file that was closed."""

    encoding = "utf-8"

    def __init__(self, error: Exception) -> None:
        self._error = error

    def _fail(self, *_: object) -> None:
        raise self._error

    write = flush = _fail


@pytest.mark.parametrize("error", [BrokenPipeError(32, "gone"), OSError(5, "gone"), ValueError("I/O on closed file")])
def test_a_bar_never_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(error))
    with progress_bar(10, "bar", shown=True, mininterval=0) as bar:
        for _ in range(10):
            bar.update()
        assert not bar.disable
    assert bar.n == 10


def test_a_bar_without_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(1, "bar", shown=True) as bar:
        bar.update()
