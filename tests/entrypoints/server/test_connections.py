"""The acceptor: more clients than the limit of open files allows, and TLS handshakes. Sockets and uvicorn are real."""

from __future__ import annotations

import asyncio
import errno
import json
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request
from uvicorn.loops.auto import auto_loop_factory

from testbed.patience import GUARD_SECONDS, until
from tests.entrypoints.cli.test_serve import self_signed
from vllm_omni.entrypoints.cli import serve
from vllm_omni.entrypoints.cli.serve import _http_server
from vllm_omni.entrypoints.openai.settings import HttpOptions
from vllm_omni.entrypoints.server import connections
from vllm_omni.entrypoints.server.listening_socket import ListeningSocket

REQUEST = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"
MOST = 3
LoopFactory = Callable[[], asyncio.AbstractEventLoop]
loops = pytest.mark.parametrize("loop_factory", [None, auto_loop_factory()], ids=["asyncio", "served"])


@pytest.fixture(autouse=True)
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (MOST + 1, MOST + 1))


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[int]:
    """Serve with a limit of connections; yield the port."""
    app = FastAPI()
    app.get("/live")(lambda: "yes")

    @app.get("/link")
    async def link(request: Request) -> str:
        return str(request.url_for("link"))

    http = HttpOptions(**{"host": "127.0.0.1", "port": 0, **options})
    server = _http_server(app, http)
    with ListeningSocket(http) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener.socket]))
        try:
            async with asyncio.timeout(GUARD_SECONDS):
                yield listener.socket.getsockname()[1]
        finally:
            server.should_exit = True
            await task


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def ask(self) -> None:
        self._writer.write(REQUEST)

    async def status(self) -> int:
        self.ask()
        return await self.told()

    async def told(self) -> int:
        """The status of the next answer."""
        self.head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(self.head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        self.body = json.loads(await self.reader.readexactly(length))
        return int(self.head.split()[1])

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


def on_loop(scenario: Callable[[], Coroutine[Any, Any, None]], loop_factory: LoopFactory | None) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scenario())


@loops
def test_clients_beyond_the_limit_are_told_and_the_others_served(loop_factory: LoopFactory | None) -> None:
    on_loop(clients_beyond_the_limit, loop_factory)


@loops
def test_clients_that_come_at_once_are_counted_too(loop_factory: LoopFactory | None) -> None:
    on_loop(clients_at_once, loop_factory)


async def clients_beyond_the_limit() -> None:
    async with serving() as port:
        held = [await Client.connect(port) for _ in range(MOST)]
        for client in held:
            assert await client.status() == 200
        late = [await Client.connect(port) for _ in range(5)]
        for client in late:
            assert await client.told() == 503
            assert client.body["error"]["code"] == "unavailable"
            assert b"retry-after: 1" in client.head
            assert b"x-request-id: " in client.head
            assert await client.reader.read() == b""  # closed
            await client.close()
        assert [await client.status() for client in held] == [200] * MOST
        for client in held:
            await client.close()
        await assert_served_again(port)


async def clients_at_once() -> None:
    async with serving() as port:
        clients = await asyncio.gather(*(Client.connect(port) for _ in range(20)))
        told = [asyncio.create_task(client.told()) for client in clients]
        waiting = set(told)
        while len(waiting) > MOST:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert len(waiting) == MOST
        for client, task in zip(clients, told):
            if task in waiting:
                client.ask()
        assert sorted([await task for task in told]) == [200] * MOST + [503] * (20 - MOST)
        for client in clients:
            await client.close()


async def assert_served_again(port: int) -> None:
    """A client is served as soon as the server has noticed that others disconnected."""
    while True:
        client = await Client.connect(port)
        try:
            if await client.status() == 200:
                return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            await client.close()


@loops
def test_far_too_many_clients_are_closed_at_once(
    loop_factory: LoopFactory | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "Acceptor", partial(connections.Acceptor, most_lingering=2))
    on_loop(far_too_many_clients, loop_factory)


async def far_too_many_clients() -> None:
    async with serving() as port:
        clients = [await Client.connect(port) for _ in range(MOST + 2)]
        for client in clients[MOST:]:
            assert await client.told() == 503
        # The refused ones stay open: their clients have not read the end.
        last = await Client.connect(port)
        assert await last.reader.read() == b""
        for client in [*clients, last]:
            await client.close()
        await assert_served_again(port)


@loops
def test_handshakes_count_and_end_in_time(
    loop_factory: LoopFactory | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Clients that never begin a handshake count as connections until their time is over."""
    key, certificate = self_signed(tmp_path)
    acceptors: list[connections.Acceptor] = []

    def make_acceptor(*args: Any, **settings: Any) -> connections.Acceptor:
        acceptors.append(connections.Acceptor(*args, **settings, handshake_seconds=GUARD_SECONDS, most_lingering=0))
        return acceptors[0]

    monkeypatch.setattr(serve, "Acceptor", make_acceptor)
    on_loop(partial(handshakes, key, certificate, acceptors), loop_factory)


async def handshakes(key: Path, certificate: Path, acceptors: list[connections.Acceptor]) -> None:
    tls = ssl.create_default_context(cafile=certificate)
    async with serving(ssl_keyfile=str(key), ssl_certfile=str(certificate)) as port:
        silent = [await Client.connect(port) for _ in range(MOST)]
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        for client in silent:
            await client.close()
        await until(lambda: not acceptors[0]._opening)
        acceptors[0].handshake_seconds = 0.05
        for client in [await Client.connect(port) for _ in range(MOST)]:
            assert await client.reader.read() == b""
            await client.close()
        await until(lambda: not acceptors[0]._opening)
        acceptors[0].handshake_seconds = GUARD_SECONDS
        client = Client(*await asyncio.open_connection("127.0.0.1", port, ssl=tls))
        assert await client.status() == 200
        await client.close()
        words = await Client.connect(port)
        words.ask()
        assert b"HTTP" not in await words.reader.read()
        await words.close()


class Exhausted(socket.socket):
    """A socket whose `accept` first fails with `errors`."""

    errors: list[int]

    def accept(self) -> tuple[socket.socket, Any]:
        if self.errors:
            raise OSError(self.errors.pop(0), "as the test says")
        return super().accept()


@loops
def test_accepting_goes_on_when_files_are_left_again(
    loop_factory: LoopFactory | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        made = asyncio.Event()

        class Made(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                transport.close()
                made.set()

        with Exhausted() as listener:
            listener.errors = [errno.ECONNABORTED, errno.EMFILE, errno.ENFILE]
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            acceptor = connections.Acceptor(listener, lambda _: Made(), lambda: 0, None, most=1, pause_seconds=0.01)
            client = await Client.connect(listener.getsockname()[1])
            async with asyncio.timeout(GUARD_SECONDS):
                await made.wait()
            await client.close()
            acceptor.close()
            await acceptor.wait_closed()
        assert listener.errors == []

    on_loop(scenario, loop_factory)
    assert caplog.text.count("Accepting no connection for 0.01 s") == 2


PROXIED = b"GET /link HTTP/1.1\r\nhost: x.example\r\nx-forwarded-proto: https\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("host", "proxies", "scheme"),
    [
        ("127.0.0.1", (), "https"),
        ("::", (), "https"),
        ("::", ("127.0.0.0/8",), "https"),
        ("::", ("192.0.2.1",), "http"),
        ("127.0.0.1", ("192.0.2.1", "*"), "https"),
    ],
)
@loops
def test_links_have_the_scheme_that_a_trusted_proxy_names(
    loop_factory: LoopFactory | None, host: str, proxies: tuple[str, ...], scheme: str
) -> None:
    """A trusted proxy is recognized on an IPv6 socket too, where it is ::ffff:127.0.0.1."""

    async def scenario() -> None:
        async with serving(host=host, forwarded_allow_ips=proxies) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(PROXIED)
            assert (await reader.read()).endswith(b'"%b://x.example/link"' % scheme.encode())
            writer.close()
            await writer.wait_closed()

    on_loop(scenario, loop_factory)
