"""Threads and loops that hang do not hold up the end of the server process."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from testbed.patience import GUARD_SECONDS
from tests.entrypoints.cli.fake_server import FAR_HOST
from tests.entrypoints.cli.server_process import OutputReader

ROOT = Path(__file__).parents[3]
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


class FakeServer:
    """The process of `tests.entrypoints.cli.fake_server`."""

    def __init__(self, path: Path, shutdown_timeout: float, stop_seconds: float) -> None:
        words = ["-m", "tests.entrypoints.cli.fake_server", str(path), str(shutdown_timeout), str(stop_seconds)]
        self._process = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        self._output = OutputReader(self._process)
        self._path = path
        self._threads: list[threading.Thread] = []

    @property
    def output(self) -> str:
        return self._output.text

    def wait_for(self, text: str) -> None:
        self._output.wait_for(re.escape(text))

    def send(self, path: str, **body: Any) -> None:
        """Post from a thread that ends with the process."""

        def post() -> None:
            transport = httpx.HTTPTransport(uds=str(self._path))
            with (
                contextlib.suppress(httpx.TransportError),
                httpx.Client(base_url="http://server", transport=transport) as client,
            ):
                client.post(path, **body)

        self._threads.append(threading.Thread(target=post))
        self._threads[-1].start()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        code = self._process.wait(GUARD_SECONDS)
        self._output.join()
        return code

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.join()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def fake_server(path: Path, *, shutdown_timeout: float = 0.0, stop_seconds: float = 0.5) -> Iterator[FakeServer]:
    server = FakeServer(path, shutdown_timeout, stop_seconds)
    try:
        server.wait_for("Ready: ")
        yield server
    except BaseException:
        print(server.output)
        raise
    finally:
        server.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "omni.sock"


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.thorough
def test_no_pool_holds_up_the_end(path: Path) -> None:
    with fake_server(path, shutdown_timeout=1e15, stop_seconds=30.0) as server:
        far = {"prompt": "x", "images": [{"image_url": f"http://{FAR_HOST}/picture.png"}]}
        near = {"prompt": "x", "images": [{"image_url": data_url()}]}
        for place, url, body in (
            ("encode", GENERATIONS, {"prompt": "x"}),
            ("resolve", GENERATIONS, {"prompt": "resolve"}),
            ("decode", EDITS, near),
            ("fetch", EDITS, far),
            ("thread", "/hang/thread", {}),
        ):
            server.send(url, json=body)
            server.wait_for(f"hanging in {place}")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert "Timeout (" not in server.output, "it ended by itself, before the bound"
    assert not path.exists()


def data_url() -> str:
    return f"data:image/png;base64,{base64.b64encode(picture()).decode()}"


def test_a_second_signal_while_the_loop_hangs(path: Path) -> None:
    with fake_server(path, stop_seconds=3600.0) as server:
        server.send("/hang/loop")
        server.wait_for("hanging in loop")
        server.signal(signal.SIGTERM)
        server.wait_for("SIGTERM: refusing new requests")
        server.signal(signal.SIGINT)
        assert server.wait() == 128 + signal.SIGINT
    assert server.output.splitlines()[-1].endswith("SIGINT: ending at once")
    assert not path.exists()


@pytest.mark.thorough
def test_a_loop_that_hangs_ends_with_the_bound(path: Path) -> None:
    with fake_server(path, shutdown_timeout=0.1, stop_seconds=0.1) as server:
        server.send("/hang/loop")
        server.wait_for("hanging in loop")
        server.signal(signal.SIGTERM)
        assert server.wait() == 1
    assert "Timeout (0:00:00.400000)!" in server.output
    assert "fake_server.py" in server.output, "shows where it hangs"
