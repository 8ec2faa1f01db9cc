"""Hostile and unusual HTTP on raw sockets: its cost, its response, and no effect on other clients."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from testbed.live_server import PATIENT_LIMITS, LiveServer, PatientHttpProtocol, live_server
from tests.entrypoints.server.raw_client import Answer, RawClient, raw_client

LIMITS = PATIENT_LIMITS
SHORT = 0.05
"""A time-out, in seconds, for which a test waits."""
GET = b"GET /echo HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /echo HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


class Routes:
    """Routes. /echo: responds with the received request. /begun: begins a response, then waits for the body."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.headers: list[list[tuple[str, str]]] = []
        self.num_running = 0
        self.most_running = 0

    def add(self, app: FastAPI) -> None:
        app.api_route("/echo", methods=["GET", "POST"])(self.echo)
        app.post("/begun")(self.begun)

    async def echo(self, request: Request) -> dict[str, Any]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        self.asked.append(str(request.url.query))
        try:
            body = await request.body()
        finally:  # the client may leave meanwhile
            self.num_running -= 1
        self.headers.append(request.headers.items())
        return {"query": request.url.query, "body": body.decode("latin-1"), "http": request.scope["http_version"]}

    async def begun(self, request: Request) -> StreamingResponse:
        async def pieces() -> Any:
            yield b"begun"
            async for piece in request.stream():
                yield piece

        return StreamingResponse(pieces())


@pytest.fixture(scope="module")
def shared_routes() -> Routes:
    return Routes()


@pytest.fixture(scope="module")
def server(shared_routes: Routes) -> Iterator[LiveServer]:
    with live_server(wrap=shared_routes.add) as running:
        yield running


@pytest.fixture
def routes(shared_routes: Routes, server: LiveServer) -> Routes:
    """New routes for each test: requests of earlier tests may still run and change their counters."""
    server.wait_until(lambda: shared_routes.num_running == 0)
    shared_routes.asked.clear()
    shared_routes.headers.clear()
    shared_routes.most_running = 0
    return shared_routes


def with_limits(**changes: Any) -> type[PatientHttpProtocol]:
    class Limited(PatientHttpProtocol):
        limits = replace(LIMITS, **changes)

    return Limited


def connection_of(server: LiveServer, client: RawClient) -> Any:
    """The server's side of the client's connection, as soon as it is accepted."""
    address = client.socket.getsockname()

    def find() -> list[Any]:
        connections: set[Any] = server.http.server_state.connections  # objects of our protocol
        return [one for one in connections if one.client == address]

    server.wait_until(lambda: bool(find()))
    return server.call(find)[0]


def refused(client: RawClient) -> Answer:
    """The response, after a check that it is an error object with an id and ends its connection."""
    answer = client.answer()
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["connection"] == "close"
    assert answer.headers["x-request-id"]
    assert client.rest() == b""
    return answer


def head_of(num_bytes: int) -> bytes:
    return GET + b"a: " + b"x" * (num_bytes - len(GET) - len(b"a: \r\n\r\n")) + b"\r\n\r\n"


def test_a_head_of_exactly_the_limit_is_served_and_a_byte_more_is_431(server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(head_of(LIMITS.head_bytes))
        assert client.answer().status == 200
        client.send(head_of(LIMITS.head_bytes + 1))
        answer = refused(client)
    assert (answer.status, answer.error["code"]) == (431, "request_header_fields_too_large")
    assert "65536 bytes" in answer.error["message"]


def test_a_long_url_is_414(server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(b"GET /" + b"a" * LIMITS.head_bytes)
        assert refused(client).status == 414


def test_the_number_of_headers(server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(GET + b"a: b\r\n" * (LIMITS.num_headers - 1) + b"\r\n")
        assert client.answer().status == 200
        client.send(GET + b"a: b\r\n" * LIMITS.num_headers + b"\r\n")
        assert refused(client).status == 431


@pytest.mark.parametrize("blank", [b"", b"\r\n"])
def test_a_head_may_come_in_any_pieces(blank: bytes, routes: Routes) -> None:
    request = blank + b"POST /echo?q HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
    with live_server(wrap=routes.add) as server:
        for end in range(1, len(request)):
            with raw_client(server) as client:
                client.send(request[:end])
                server.call(lambda: None)  # the server has read the first piece or will read both at once
                client.send(request[end:])
                assert client.answer().body == b'{"query":"q","body":"abc","http":"1.1"}'


@pytest.mark.parametrize("flood", [b"a:\r\n" * 2**18, b"x" * 2**20], ids=["tiny headers", "one endless header"])
def test_headers_without_end_cost_no_memory_and_nobodys_time(flood: bytes) -> None:
    process = psutil.Process(os.getpid())
    with live_server(protocol=with_limits(linger_seconds=SHORT)) as server:
        httpx.get(f"{server.url}/health")
        before = process.memory_info().rss
        for _ in range(8):
            with raw_client(server) as client:
                client.send(GET + b"a: ")
                while client.send(flood):
                    assert httpx.get(f"{server.url}/health").status_code == 200
                    assert process.memory_info().rss - before < 32 * 2**20


@pytest.mark.parametrize("beginning", [b"G", GET, GET + b"\r", b"\r\nG"])
def test_a_head_that_is_not_complete_in_time_is_408(beginning: bytes, routes: Routes) -> None:
    with live_server(wrap=routes.add, protocol=with_limits(head_seconds=SHORT)) as server, raw_client(server) as client:
        client.send(GET + b"\r\n")
        assert client.answer().status == 200
        client.send(beginning)
        answer = refused(client)
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    assert routes.asked == [""]


def test_bytes_that_trickle_in_do_not_set_the_clock_back(server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(GET)
        connection = connection_of(server, client)
        server.wait_until(lambda: connection._received == GET)
        timer = connection._timer
        for end in range(1, 5):
            client.send(b"a")
            server.wait_until(lambda end=end: connection._received == GET + b"a" * end)  # type: ignore[misc]
        assert connection._timer is timer
        assert 0 < timer.when() - server.call(server.loop.time) <= LIMITS.head_seconds


def test_a_new_connection_that_sends_nothing_is_closed() -> None:
    """Empty lines do not begin a request."""
    with live_server(protocol=with_limits(first_byte_seconds=SHORT)) as server:
        for data in (b"", b"\r\n\r\n"):
            with raw_client(server) as client:
                client.send(data)
                assert client.rest() == b""


@pytest.mark.parametrize(("end", "late_body"), [(b"\r\n", b""), (b"content-length: 1\r\n\r\n", b"a")])
def test_a_keep_alive_connection_is_closed_when_it_is_idle(end: bytes, late_body: bytes, routes: Routes) -> None:
    """The idle time begins after the response, or after a body that arrives later."""
    with live_server(wrap=routes.add) as server:
        server.http.config.timeout_keep_alive = SHORT  # type: ignore[assignment]  # as asyncio takes it
        with raw_client(server) as client:
            client.send(GET.replace(b"/echo", b"/nowhere") + end)
            assert client.answer().status == 404
            client.send(late_body + b"\r\n")
            assert client.rest() == b""


@pytest.mark.parametrize("body", [b"", b"ab"])
def test_a_body_that_the_answer_did_not_need_must_end_in_time(body: bytes) -> None:
    with live_server(protocol=with_limits(drain_seconds=SHORT)) as server, raw_client(server) as client:
        client.send(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n" + body)
        assert client.answer().status == 404
        assert client.rest() == b""


@pytest.mark.parametrize(
    "body", [b"content-length: 9\r\n\r\nabcdefghi", b"transfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"]
)
def test_a_connection_goes_on_after_a_body_that_was_not_needed(body: bytes, server: LiveServer) -> None:
    with raw_client(server) as client:
        for _ in range(3):
            client.send(b"POST /nowhere HTTP/1.1\r\nhost: x\r\n" + body[:-1])
            assert client.answer().status == 404
            client.send(body[-1:] + GET + b"\r\n")
            assert client.answer().status == 200


INVALID = {
    "TLS on a plain port": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "words": (b"hello\r\n", 400),
    "HTTP/0.9": (b"GET /echo\r\n", 400),
    "HTTP/0.9 in full": (b"GET /echo\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a method that does not exist": (b"FOO /echo HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "a NUL in a header": (GET + b"a: b\x00c\r\n\r\n", 400),
    "a NUL in the URL": (b"GET /ec\x00ho HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "bytes in the URL that are not ASCII": (b"GET /echo?\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "a URL without a path": (b"GET http://[ HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "a space before the colon": (GET + b"a : b\r\n\r\n", 400),
    "a folded header": (GET + b"a: b\r\n c\r\n\r\n", 400),
    "a header without a colon": (GET + b"abc\r\n\r\n", 400),
    "a bare line feed": (GET + b"a: b\nc: d\r\n\r\n", 400),
    "two lengths": (POST + b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc", 400),
    "a list of lengths": (POST + b"content-length: 3, 3\r\n\r\nabc", 400),
    "a signed length": (POST + b"content-length: +3\r\n\r\nabc", 400),
    "a length that is too long": (POST + b"content-length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "a length and chunks": (POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n" + LAST_CHUNK, 400),
    "chunks and a length": (POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n" + LAST_CHUNK, 400),
    "chunks twice": (POST + b"transfer-encoding: chunked, chunked\r\n\r\n" + LAST_CHUNK, 400),
    "chunks that are not last": (POST + b"transfer-encoding: chunked, gzip\r\n\r\n" + LAST_CHUNK, 400),
    "another encoding": (POST + b"transfer-encoding: gzip, chunked\r\n\r\n" + LAST_CHUNK, 501),
    "an encoding alone": (POST + b"transfer-encoding: xchunked\r\n\r\n" + LAST_CHUNK, 501),
    "chunks in HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + LAST_CHUNK, 501),
    "two hosts": (GET + b"host: y\r\n\r\n", 400),
    "CONNECT": (b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n", 501),
    "a websocket": (GET + b"connection: Upgrade\r\nupgrade: WebSocket\r\nsec-websocket-key: a\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_not_http_is_an_error_object_and_reaches_no_route(
    name: str, routes: Routes, server: LiveServer
) -> None:
    data, status = INVALID[name]
    with raw_client(server) as client:
        client.send(data + GET.replace(b"/echo", b"/echo?smuggled") + b"\r\n")
        assert refused(client).status == status
    assert routes.asked == []


CHUNKS = {
    "an extension without end": CHUNKED + b"1;" + b"x" * 2**17,
    "extensions without content": CHUNKED + (b"1;" + b"x" * 2**13 + b"\r\na\r\n") * 20,
    "trailers without end": CHUNKED + b"1\r\na\r\n0\r\n" + b"a: b\r\n" * 2**15,
    "many trailers": CHUNKED + b"1\r\na\r\n0\r\n" + b"a: b\r\n" * (LIMITS.num_headers + 1) + b"\r\n",
    "one endless trailer": CHUNKED + b"1\r\na\r\n0\r\na: " + b"x" * 2**17,
    "a head and trailers, together": head_of(60 * 2**10).replace(b"GET", b"POST")[:-2]
    + b"transfer-encoding: chunked\r\n\r\n0\r\na: "
    + b"x" * (24 * 2**10),
    "chunks of one byte": CHUNKED + b"1\r\na\r\n" * 2**15,
    "content of empty lines": CHUNKED + b"40000\r\n" + b"\r\n\r\n" * 2**16 + b"\r\n" + LAST_CHUNK,
    "a size that is none": CHUNKED + b"x\r\n",
    "content that is longer than its size": CHUNKED + b"1\r\nab\r\n",
}


@pytest.mark.parametrize("name", CHUNKS)
def test_the_framing_of_chunks_is_bounded(name: str, server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(CHUNKS[name])
        assert refused(client).status in (400, 431)


def test_chunks_in_any_pieces_and_trailers_that_the_app_does_not_see(routes: Routes, server: LiveServer) -> None:
    request = CHUNKED + b"3;ext=1\r\n\r\n\r\r\n2\r\n\n\r\r\n0\r\nx-late: v\r\n\r\n"
    for end in range(len(CHUNKED), len(request)):
        with raw_client(server) as client:
            client.send(request[:end])
            server.wait_until(lambda: routes.num_running == 1)
            client.send(request[end:] + GET + b"upgrade: websocket\r\n\r\n")
            assert client.answer().body == b'{"query":"","body":"\\r\\n\\r\\n\\r","http":"1.1"}'
            assert refused(client).status == 400, "the end of the body is found, and the next head is checked"
    assert not [name for headers in routes.headers for name, _ in headers if name == "x-late"]


def test_large_chunked_and_plain_uploads_arrive_whole(server: LiveServer) -> None:
    body = bytes(range(32, 127)) * 8000
    with raw_client(server) as client:
        client.send(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        plain = client.answer()
        chunks = [body[start : start + 1000] for start in range(0, len(body), 1000)]
        client.send(CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + LAST_CHUNK)
        assert client.answer().body == plain.body
    assert len(plain.body) > len(body)


def test_requests_that_are_sent_ahead_are_answered_in_order_one_at_a_time(routes: Routes, server: LiveServer) -> None:
    names = [f"q{i}" for i in range(200)]
    requests = [
        (CHUNKED + b"1\r\na\r\n" + LAST_CHUNK if i % 3 == 0 else GET + b"\r\n").replace(
            b"/echo", f"/echo?{name}".encode()
        )
        for i, name in enumerate(names)
    ]
    with raw_client(server) as client:
        client.send(b"".join(requests) + b"nonsense\r\n")
        answers = [client.answer().body for _ in names]
        assert refused(client).status == 400
    assert [body.split(b'"')[3].decode() for body in answers] == names == routes.asked
    assert routes.most_running == 1


@pytest.mark.parametrize(
    "framing", [b"content-length: 3\r\n\r\nabc", b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]
)
def test_an_upgrade_that_the_server_does_not_know_is_ignored(framing: bytes, server: LiveServer) -> None:
    """Java's client offers h2c with its first request."""
    with raw_client(server) as client:
        upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUPGRADE: h2c\r\nHTTP2-Settings: AAM\r\n"
        client.send(POST + upgrade + framing + GET + b"\r\n")
        assert client.answer().body == b'{"query":"","body":"abc","http":"1.1"}'
        assert client.answer().status == 200


def test_expect_100_continue(server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(POST + b"expect: 100-continue\r\ncontent-length: 3\r\n\r\n")
        assert client.answer().status == 100
        client.send(b"abc")
        assert b'"abc"' in client.answer().body


def test_http_1_0_is_served_and_closed(server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(GET.replace(b"1.1", b"1.0") + b"\r\n")
        assert b'"1.0"' in client.rest()


@pytest.mark.parametrize("data", [b"nonsense\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300 + b"\r\n"])
def test_the_clients_id_is_echoed_by_refusals(data: bytes, server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(POST + b"X-Request-Id: run-7<b>\r\ncontent-length: +1\r\n\r\n")
        assert refused(client).headers["x-request-id"] == "run-7b"
    with raw_client(server) as client:
        client.send(data)
        assert len(refused(client).headers["x-request-id"]) == 32


def test_an_answer_that_has_begun_just_ends(server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(CHUNKED.replace(b"/echo", b"/begun"))
        assert client.answer().status == 200
        client.send(b"x\r\n")
        assert b"HTTP" not in client.rest()
    server.wait_until(lambda: not server.http.server_state.tasks)


def test_a_refused_client_gets_its_answer_although_it_goes_on_sending(server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(GET + b"a: " + b"x" * 2**22)
        assert refused(client).status == 431


def test_a_refused_client_that_does_not_leave_is_closed() -> None:
    with live_server(protocol=with_limits(linger_seconds=SHORT)) as server, raw_client(server) as client:
        client.send(b"nonsense\r\n")
        server.wait_until(lambda: not server.http.server_state.connections)
        assert client.answer().status == 400


def test_no_timer_outlives_its_connection(server: LiveServer) -> None:
    with raw_client(server) as client:
        client.send(b"GET")
        connection = connection_of(server, client)
        server.wait_until(lambda: connection._received == b"GET")
        timer: asyncio.TimerHandle = connection._timer
    server.wait_until(lambda: not server.http.server_state.connections)
    assert timer.cancelled()
