"""More clients than the server may have open files. The sockets and uvicorn are real."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI

from vllm_omni.entrypoints.cli.args import HttpOptions
from vllm_omni.entrypoints.cli.listen import Listener
from vllm_omni.entrypoints.cli.serve import _http_server, _loop_factory

REQUEST = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"
MOST = 3
LoopFactory = Callable[[], asyncio.AbstractEventLoop]
loops = pytest.mark.parametrize("loop_factory", [None, _loop_factory()], ids=["asyncio", "served"])


@pytest.fixture(autouse=True)
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (MOST + 1, MOST + 1))


@asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """The port."""
    app = FastAPI()
    app.get("/live")(lambda: "yes")
    http = HttpOptions(host="127.0.0.1", port=0)
    server = _http_server(app, http)
    with Listener(http) as listener:
        task = asyncio.create_task(server.serve(sockets=[listener.socket]))
        try:
            async with asyncio.timeout(20):
                yield listener.socket.getsockname()[1]
        finally:
            server.should_exit = True
            await task


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

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
        self.head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(self.head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        self.body = json.loads(await self._reader.readexactly(length))
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
            assert await client._reader.read() == b""  # closed
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
    """As soon as the server has seen that the others are gone."""
    while True:
        client = await Client.connect(port)
        try:
            if await client.status() == 200:
                return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            await client.close()
