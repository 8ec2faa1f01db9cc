"""Responses that are not read end; responses that are read slowly arrive complete and in order."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from sse_starlette.sse import EventSourceResponse
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from testbed.live_server import LiveServer, PatientHttpProtocol, live_server
from testbed.patience import GUARD_SECONDS
from tests.entrypoints.cli.test_serve import self_signed
from vllm_omni.entrypoints.openai.middlewares import PIECE_BYTES, SendInPieces

BODY = b"".join(i.to_bytes(4, "big") for i in range(4 * 2**20))
"""Body of 16 MiB: more than the socket buffers of both ends hold."""


class Impatient(PatientHttpProtocol):
    unread_seconds = 0.2


class Counting(PatientHttpProtocol):
    num_pauses = 0
    waits = False
    deadlines: list[asyncio.TimerHandle]

    def pause_writing(self) -> None:
        super().pause_writing()
        assert self._unread_timer is not None
        Counting.num_pauses += 1
        Counting.waits = True
        Counting.deadlines.append(self._unread_timer)

    def resume_writing(self) -> None:
        super().resume_writing()
        Counting.waits = False


class Routes:
    """/whole: in one message; /pieces: for ever; /events: for ever, as events."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ended: list[str] = []

    def add(self, app: FastAPI) -> None:
        app.get("/whole")(self.whole)
        app.get("/pieces")(self.pieces)
        app.get("/events")(self.events)

    async def whole(self) -> Response:
        self.asked.append("/whole")
        return Response(BODY)

    async def pieces(self) -> Response:
        return StreamingResponse(self._endless("/pieces"))

    async def events(self) -> Response:
        events: Response = EventSourceResponse(self._endless("/events"))
        return events

    async def _endless(self, path: str) -> AsyncIterator[bytes]:
        self.asked.append(path)
        try:
            while True:
                yield BODY[:100_000]
                await asyncio.sleep(0)  # as whoever makes pictures
        finally:
            self.ended.append(path)


Tls = tuple[Path, Path] | None


@pytest.fixture(params=["http", "https"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> Tls:
    return self_signed(tmp_path) if request.param == "https" else None


@contextmanager
def asking(server: LiveServer, path: str, tls: Tls = None) -> Iterator[socket.socket]:
    """A client that sent a request and does not read."""
    _, _, address = server.url.partition("://")
    host, port = address.split(":")
    with ExitStack() as closing:
        client = closing.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        client.settimeout(GUARD_SECONDS)
        client.connect((host, int(port)))
        if tls is not None:
            context = ssl.create_default_context(cafile=tls[1])
            client = closing.enter_context(context.wrap_socket(client, server_hostname=host))
        client.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        yield client


def rest_of(client: socket.socket) -> int:
    """Number of bytes until the end of the connection."""
    num_bytes = 0
    try:
        while data := client.recv(2**20):
            num_bytes += len(data)
    except (ConnectionResetError, ssl.SSLError):
        pass
    return num_bytes


@pytest.mark.parametrize("path", ["/whole", "/pieces", "/events"])
def test_a_client_that_never_reads_is_disconnected(path: str, tls: Tls) -> None:
    routes = Routes()
    with live_server(protocol=Impatient, wrap=routes.add, tls=tls) as server:
        with asking(server, path, tls) as client:
            state = server.http.server_state
            server.wait_until(lambda: routes.asked == [path])
            server.wait_until(lambda: not state.connections and not state.tasks)
            assert rest_of(client) < len(BODY)
        assert routes.ended == ([] if path == "/whole" else [path])


def test_a_client_that_reads_slowly_gets_all(tls: Tls) -> None:
    """The client reads a little whenever the server waits for it; each time the server's timer starts again."""
    Counting.num_pauses, Counting.deadlines = 0, []
    routes = Routes()
    with live_server(protocol=Counting, wrap=routes.add, tls=tls) as server, asking(server, "/whole", tls) as client:
        state = server.http.server_state
        server.wait_until(lambda: Counting.waits)
        received = bytearray()
        while data := client.recv(2**16):
            received += data
            server.wait_until(lambda: Counting.waits or not state.tasks)
        assert received.partition(b"\r\n\r\n")[2] == BODY
    assert Counting.num_pauses > 3
    assert all(deadline.cancelled() for deadline in Counting.deadlines)


def test_little_is_written_ahead_of_a_client() -> None:
    """The rest of a large response waits without a copy."""
    most = 0

    class Watching(Counting):
        def pause_writing(self) -> None:
            nonlocal most
            super().pause_writing()
            most = max(most, self.transport.get_write_buffer_size())

    Counting.num_pauses, Counting.deadlines = 0, []
    with live_server(protocol=Watching, wrap=Routes().add) as server:
        assert httpx.get(f"{server.url}/whole").content == BODY
    assert most <= PIECE_BYTES


async def sent_by(app: Callable[[Scope, Receive, Send], object]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        await asyncio.sleep(0)
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("nobody asks")

    await SendInPieces(app)({"type": "http"}, receive, send)  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize("num_bytes", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 5 * PIECE_BYTES - 1])
@pytest.mark.parametrize("more_body", [False, True])
async def test_pieces_are_the_body(num_bytes: int, more_body: bool) -> None:
    start = {"type": "http.response.start", "status": 200, "headers": []}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start)
        await send({"type": "http.response.body", "body": BODY[:num_bytes], "more_body": more_body})

    first, *pieces = await sent_by(app)
    assert first == start
    assert b"".join(piece["body"] for piece in pieces) == BODY[:num_bytes]
    assert max(len(piece["body"]) for piece in pieces) <= PIECE_BYTES
    assert len(pieces) == max(1, -(-num_bytes // PIECE_BYTES))
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [more_body]


async def test_a_comment_does_not_come_between_the_pieces_of_an_event() -> None:
    event, comment = BODY[: 3 * PIECE_BYTES], b": ping\r\n\r\n"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.gather(
            *(send({"type": "http.response.body", "body": body, "more_body": True}) for body in (event, comment))
        )

    assert b"".join(piece["body"] for piece in await sent_by(app)) == event + comment
