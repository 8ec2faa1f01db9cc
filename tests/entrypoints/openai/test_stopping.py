"""A server that stops while requests hang: they get an error object, and the log has no traceback."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, IncompleteRead
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from testbed.live_server import LiveServer, live_server
from vllm_omni.entrypoints.openai.settings import HttpOptions
from vllm_omni.entrypoints.server.middleware import add_middleware

GENERATIONS = "/v1/images/generations"


@contextmanager
def answering(server: LiveServer, body: bytes, declared: int) -> Iterator[HTTPConnection]:
    connection = HTTPConnection(server.url.removeprefix("http://"))
    connection.putrequest("POST", GENERATIONS)
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", str(declared))
    connection.putheader("x-request-id", "r-1")
    connection.endheaders(body)
    try:
        yield connection
    finally:
        connection.close()


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]


async def passes_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Middleware of a user."""
    if request.url.path == "/broken":
        raise ZeroDivisionError("secret")
    return await call_next(request)


def with_middleware(app: FastAPI) -> None:
    add_middleware(app, HttpOptions(middleware=(f"{__name__}.passes_on",)))


def test_a_broken_middleware_of_the_users_is_a_500_like_any_other() -> None:
    with live_server(wrap=with_middleware) as running:
        response = httpx.get(f"{running.url}/broken", headers={"x-request-id": "r-1"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] == "r-1"


@pytest.mark.parametrize("wrap", [None, with_middleware])
def test_a_body_that_is_still_awaited(
    log: Callable[[LiveServer], pytest.LogCaptureFixture], wrap: Callable[[FastAPI], None] | None
) -> None:
    with live_server(wrap=wrap) as running, answering(running, b'{"prom', 100) as connection:
        records = log(running)
        running.wait_until(lambda: bool(running.http.server_state.tasks))
        running.http.should_exit = True
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
    assert (response.status, error["type"], error["code"]) == (503, "server_error", "unavailable")
    assert error["message"] == "The server is stopping."
    assert int(response.getheader("retry-after", "0")) >= 1
    assert response.getheader("connection") == "close"
    assert response.getheader("x-request-id") == "r-1"
    assert tracebacks(records) == []


def test_a_stream_that_has_begun(log: Callable[[LiveServer], pytest.LogCaptureFixture]) -> None:
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    with live_server() as running:
        records = log(running)
        running.call(running.device.pause)
        with answering(running, body, len(body)) as connection, connection.getresponse() as response:
            assert response.status == 200
            running.http.should_exit = True
            with pytest.raises(IncompleteRead):
                response.read()
    assert tracebacks(records) == []
