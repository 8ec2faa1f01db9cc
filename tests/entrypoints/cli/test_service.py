"""The life of the server process: signals, draining, failures. The engine is a fake, HTTP and signals are real."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from testbed.live_server import FAKE_INFO
from testbed.patience import GUARD_SECONDS, until
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.events import EngineStatus
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.entrypoints.cli import serve
from vllm_omni.entrypoints.cli.args import ServeArgs, parse_args
from vllm_omni.entrypoints.openai.settings import HttpOptions, ServerSettings
from vllm_omni.entrypoints.server.http_protocol import HttpProtocol
from vllm_omni.entrypoints.server.listening_socket import ListeningSocket
from vllm_omni.entrypoints.server.signals import StopSignals
from vllm_omni.errors import ConfigError, OmniError, WorkerDiedError
from vllm_omni.omni import AsyncOmni
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.service import VideoJobs

PATIENT_LIMITS = serve.StopLimits(close_seconds=GUARD_SECONDS, http_seconds=GUARD_SECONDS, log_seconds=GUARD_SECONDS)


@dataclass
class FakeOmni:
    """Does what `AsyncOmni` does for the service, when the test says so."""

    start_error: OmniError | None = None
    start_gate: asyncio.Event = field(default_factory=asyncio.Event)
    work_done: asyncio.Event = field(default_factory=asyncio.Event)
    close_gate: asyncio.Event | None = None
    state: str = "running"
    ready: WorkerReady | None = None
    info: ModelInfo = FAKE_INFO
    calls: list[str] = field(default_factory=list)

    async def start(self) -> None:
        await self.start_gate.wait()
        if self.start_error:
            raise self.start_error
        self.ready = WorkerReady(1.0, 10**6, "cpu", "float32", 1024, 1e-6, 0.0, 1.0, 1.0)

    def status(self) -> EngineStatus:
        return EngineStatus(self.state, 0, 0, 0.0, True)

    def begin_drain(self) -> None:
        self.calls.append("begin_drain")

    async def drain(self, timeout: float) -> bool:
        self.calls.append("drain")
        try:
            await asyncio.wait_for(self.work_done.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        self.calls.append("close")
        if self.close_gate:
            await self.close_gate.wait()


@dataclass
class FakeJobs:
    """Video jobs that are given back when the test says so."""

    omni: FakeOmni
    given_back: asyncio.Event = field(default_factory=asyncio.Event)

    def begin_drain(self) -> None:
        self.omni.calls.append("end_streams")

    async def drain(self, timeout: float) -> None:
        self.omni.calls.append("give_back")
        await asyncio.wait_for(self.given_back.wait(), timeout)


@dataclass
class Running:
    task: asyncio.Task[int]
    address: str
    http: uvicorn.Server
    ended: list[int]
    """Exit codes of signals that end at once."""
    deadlines: list[str]

    async def code(self) -> int:
        return await asyncio.wait_for(self.task, GUARD_SECONDS)


@asynccontextmanager
async def running(
    omni: FakeOmni,
    *,
    shutdown_timeout: float = GUARD_SECONDS,
    ignored_flags: tuple[str, ...] = (),
    limits: serve.StopLimits | None = None,
    jobs: FakeJobs | None = None,
) -> AsyncIterator[Running]:
    app = FastAPI()
    app.get("/live")(lambda: "yes")
    app.get("/hangs")(asyncio.Event().wait)
    http = HttpOptions(host="127.0.0.1", port=0, shutdown_timeout=shutdown_timeout)
    args = ServeArgs(
        OmniDiffusionConfig(model="demo"),
        ServerSettings(served_model_names=("demo",)),
        http,
        ignored_flags=ignored_flags,
    )
    server = serve._Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=int(GUARD_SECONDS)))
    ended: list[int] = []
    deadlines: list[str] = []
    with ListeningSocket(http) as listener, StopSignals(ended.append) as signals:
        service = serve.Service(
            cast(AsyncOmni, omni),
            server,
            listener,
            args,
            signals,
            lambda: deadlines.append("armed"),
            limits or PATIENT_LIMITS,
            cast(VideoJobs | None, jobs),
        )
        task = asyncio.create_task(service.run())
        try:
            running = Running(task, listener.address, server, ended, deadlines)
            await until(lambda: server.started)
            yield running
        finally:
            omni.start_gate.set()
            omni.work_done.set()
            server.should_exit = True
            for request in server.server_state.tasks:
                request.cancel()
            left = asyncio.all_tasks() - {asyncio.current_task()}
            if left:
                await asyncio.wait(left)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("ignored_flags", [(), ("--max-model-len", "-cc")])
async def test_ignored_flags_are_one_warning(ignored_flags: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    async with running(FakeOmni(), ignored_flags=ignored_flags):
        pass
    warnings = [record.message for record in caplog.records if "ignored" in record.message]
    assert [message.rpartition(": ")[2] for message in warnings] == ["--max-model-len, -cc"] * bool(ignored_flags)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), None),
        (("--seed", "3"), None),
        (("--job-ttl", "60", "--max-jobs", "7", "--job-store", "sqlite:///a"), "--job-store, --job-ttl, --max-jobs"),
        (("--job-store", "mysql://host/a", "--media-store", "a"), "--job-store, --media-store"),
    ],
)
def test_flags_of_video_jobs_without_effect_are_one_warning(
    words: tuple[str, ...], named: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    args = parse_args(["serve", "demo", "--omni", *words])
    assert serve._video_jobs(cast(AsyncOmni, FakeOmni()), args, VideoObserver()) is None
    expected = [f"Without effect on a model that makes pictures, ignored: {named}"] if named else []
    assert [record.message for record in caplog.records] == expected


async def test_http_answers_while_the_engine_starts() -> None:
    async with running(FakeOmni()) as server, httpx.AsyncClient() as client:
        assert (await client.get(f"{server.address}/live")).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_drains_then_closes_and_exits_0(number: int) -> None:
    omni = FakeOmni()
    omni.start_gate.set()
    async with running(omni) as server, httpx.AsyncClient() as client:
        await until(lambda: omni.ready)
        send(number)
        await until(lambda: "drain" in omni.calls)
        assert (await client.get(f"{server.address}/live")).status_code == 200, "HTTP goes on while work runs"
        assert not server.task.done()
        omni.work_done.set()
        assert await server.code() == 0
        assert (server.ended, server.deadlines) == ([], ["armed"])
        assert omni.calls == ["begin_drain", "drain", "close"]
        with pytest.raises(httpx.ConnectError):
            await client.get(f"{server.address}/live")


async def test_video_jobs_are_given_back_while_pictures_are_finished(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    omni = FakeOmni()
    omni.start_gate.set()
    jobs = FakeJobs(omni)
    async with running(omni, jobs=jobs) as server:
        await until(lambda: omni.ready)
        send(signal.SIGTERM)
        await until(lambda: {"give_back", "drain"} <= {*omni.calls})
        omni.work_done.set()
        await asyncio.sleep(0)
        assert "finishing what runs, storing video jobs and giving them back (" in caplog.text
        assert not server.task.done()
        assert "close" not in omni.calls, "files of videos are written after the engine's part"
        jobs.given_back.set()
        assert await server.code() == 0
    assert omni.calls[0] == "begin_drain"
    assert omni.calls[-1] == "close"


async def test_draining_ends_at_the_timeout(caplog: pytest.LogCaptureFixture) -> None:
    omni = FakeOmni()
    omni.start_gate.set()
    async with running(omni, shutdown_timeout=0.05) as server:
        await until(lambda: omni.ready)
        send(signal.SIGTERM)
        assert await server.code() == 0
    assert omni.calls == ["begin_drain", "drain", "close"]
    assert "--shutdown-timeout" in caplog.text


async def test_a_second_signal_does_not_wait_for_work() -> None:
    omni = FakeOmni()
    omni.start_gate.set()
    async with running(omni) as server:
        await until(lambda: omni.ready)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert server.ended == [128 + signal.SIGINT], "at once: the loop has not run in between"


async def test_workers_that_do_not_stop_are_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    omni = FakeOmni(close_gate=asyncio.Event())
    omni.start_gate.set()
    async with running(omni, shutdown_timeout=0.0, limits=replace(PATIENT_LIMITS, close_seconds=0.05)) as server:
        await until(lambda: omni.ready)
        send(signal.SIGTERM)
        assert await server.code() == 0
    assert "Workers did not stop within 0.05 s; they end with this process" in caplog.text


async def test_connections_that_do_not_end_are_not_waited_for() -> None:
    omni = FakeOmni()
    omni.start_gate.set()
    limits = replace(PATIENT_LIMITS, http_seconds=0.05)
    async with running(omni, shutdown_timeout=0.0, limits=limits) as server, httpx.AsyncClient() as client:
        await until(lambda: omni.ready)
        request = asyncio.create_task(client.get(f"{server.address}/hangs"))
        await until(lambda: server.http.server_state.tasks)
        send(signal.SIGTERM)
        assert await server.code() == 0
        assert server.http.server_state.tasks, "uvicorn itself would have waited longer"
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


async def test_a_signal_while_the_weights_load_ends_at_once() -> None:
    omni = FakeOmni()
    async with running(omni) as server:
        send(signal.SIGTERM)
        assert await server.code() == 0
    assert omni.calls == ["close"]


async def test_streams_of_video_jobs_end_with_a_server_that_has_not_loaded_its_weights() -> None:
    omni = FakeOmni()
    async with running(omni, jobs=FakeJobs(omni)) as server:
        send(signal.SIGTERM)
        assert await server.code() == 0
    assert omni.calls == ["end_streams", "close"]


async def test_an_engine_that_does_not_start_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    omni = FakeOmni(start_error=WorkerDiedError("the worker died: no memory\nTraceback: ..."))
    omni.start_gate.set()
    async with running(omni) as server:
        assert await server.code() == 1
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert errors == ["Traceback: ...", "Stopping: the worker died: no memory"]
    assert omni.calls == ["close"]


async def test_a_wrong_setting_found_by_the_worker_is_passed_on() -> None:
    omni = FakeOmni(start_error=ConfigError("--dtype float16: not on this device"))
    omni.start_gate.set()
    async with running(omni) as server:
        with pytest.raises(ConfigError, match="--dtype"):
            await server.code()
    assert omni.calls == ["close"]


async def test_an_engine_that_fails_for_good_is_an_error() -> None:
    omni = FakeOmni()
    omni.start_gate.set()
    async with running(omni) as server:
        await until(lambda: omni.ready)
        omni.state = "failed"
        assert await server.code() == 1
    assert omni.calls == ["close"]


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port}: cannot listen there: Address already"):
            ListeningSocket(HttpOptions(host="127.0.0.1", port=port))


def test_a_host_of_another_machine_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1 --port 0: cannot listen there"):
        ListeningSocket(HttpOptions(host="192.0.2.1", port=0))
    with pytest.raises(ConfigError, match="--host takes an address of this machine, got 'no such host'"):
        ListeningSocket(HttpOptions(host="no such host", port=0))


@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost"])
def test_the_address_can_be_opened(host: str | None) -> None:
    with ListeningSocket(HttpOptions(host=host, port=0)) as listener:
        listener.socket.listen()
        url = httpx.URL(listener.address)
        socket.create_connection((url.host, url.port)).close()


def test_a_unix_socket_left_by_a_killed_server_is_replaced_and_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "omni.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    with ListeningSocket(HttpOptions(uds=path)) as listener:
        assert listener.address == f"unix:{path}"
        listener.socket.listen()
        with pytest.raises(ConfigError, match=f"--uds {path}: cannot listen there"):
            ListeningSocket(HttpOptions(uds=path))
    assert not os.path.exists(path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot listen there"):
        ListeningSocket(HttpOptions(uds=str(tmp_path / "file")))
    assert (tmp_path / "file").exists()


def test_clients_that_do_not_read_are_cut() -> None:
    assert serve._http_server(FastAPI(), HttpOptions()).config.http is HttpProtocol


def test_wrong_certificates_are_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("not a key")
    with pytest.raises(ConfigError, match=r"--ssl-keyfile .*bad.pem.*cannot be used for TLS"):
        serve._http_server(FastAPI(), HttpOptions(ssl_keyfile=str(bad), ssl_certfile=str(bad)))
