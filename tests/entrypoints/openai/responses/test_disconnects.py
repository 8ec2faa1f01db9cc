"""A client that disconnects frees the device at the next step, without effect on others."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from http.client import HTTPConnection
from typing import Any, cast

import httpx
import pytest
from starlette.types import Message

from testbed.live_server import FAKE_EDIT_INFO, LiveServer, live_server
from testbed.tiny_models import photo
from tests.entrypoints.openai.requests.pictures.decoders import decode_pids, num_queued
from tests.entrypoints.openai.routes.test_image_edits import EDITS, file_of
from vllm_omni.entrypoints.openai.responses.answers import EventStream
from vllm_omni.jobs import OutputStream


@pytest.fixture
def paused() -> Iterator[LiveServer]:
    with live_server() as running:
        running.call(running.device.pause)
        yield running


@pytest.mark.parametrize("n", [1, 3])
def test_json_client_leaves(paused: LiveServer, n: int) -> None:
    body = json.dumps({"prompt": "x", "num_inference_steps": 100, "n": n})
    connection = HTTPConnection(paused.url.removeprefix("http://"))
    connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    paused.wait_until(lambda: paused.num_unfinished() == n)
    connection.close()
    paused.wait_until(lambda: paused.num_unfinished() == 0)
    paused.call(paused.device.resume)
    assert httpx.post(f"{paused.url}/v1/images/generations", json={"prompt": "x"}).status_code == 200
    assert paused.device.num_plans < 20


def test_client_of_an_edit_leaves() -> None:
    parts = {"image": ("a.png", file_of(photo(40, 30, 1)), "image/png")}
    fields = {"prompt": "x", "num_inference_steps": "100"}
    request = httpx.Request("POST", "http://server", files=parts, data=fields)
    body, headers = request.read(), {"content-type": request.headers["content-type"]}
    with live_server(info=FAKE_EDIT_INFO) as running:
        running.call(running.device.pause)
        connection = HTTPConnection(running.url.removeprefix("http://"))
        connection.request("POST", EDITS, body, headers)
        running.wait_until(lambda: running.num_unfinished() == 1)
        connection.close()
        running.wait_until(lambda: running.num_unfinished() == 0)
        running.call(running.device.resume)
        assert running.device.num_plans < 20


LARGE = file_of(photo(400, 300, 1))
FORM_PART = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + LARGE + b"\r\n"
FORM_END = b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n--x--\r\n'
URL = "data:image/png;base64," + base64.b64encode(LARGE).decode()
CHAT_PARTS = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": URL}}]
# Path, content type, body, bytes that are announced and do not come.
UPLOADS = {
    "form": (EDITS, "multipart/form-data; boundary=x", FORM_PART + FORM_END, 0),
    "form of which more is to come": (EDITS, "multipart/form-data; boundary=x", FORM_PART + b"--x\r\n", 1000),
    "form of several pictures": (EDITS, "multipart/form-data; boundary=x", 3 * FORM_PART + FORM_END, 0),
    "json": (EDITS, "application/json", json.dumps({"prompt": "x", "image": URL}).encode(), 0),
    "chat": (
        "/v1/chat/completions",
        "application/json",
        json.dumps({"messages": [{"role": "user", "content": CHAT_PARTS}]}).encode(),
        0,
    ),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_client_leaves_while_its_picture_is_decoded(name: str) -> None:
    """The decode process of its picture is killed, and another client's picture is decoded."""
    path, kind, body, num_missing = UPLOADS[name]
    files: dict[str, Any] = {"image": LARGE, "prompt": (None, "x")}
    server = live_server(info=FAKE_EDIT_INFO, settings={"num_encoding_threads": 1})
    with server as running, ThreadPoolExecutor(1) as pool:
        assert httpx.post(running.url + EDITS, files=files).status_code == 200
        decoder = running.app.state.decode_pool
        (pid,) = decode_pids(decoder)
        os.kill(pid, signal.SIGSTOP)
        connection = HTTPConnection(running.url.removeprefix("http://"))
        headers = {"content-type": kind, "content-length": str(len(body) + num_missing)}
        connection.request("POST", path, body, headers)
        running.wait_until(lambda: decoder.num_pictures == 1 and num_queued(decoder) == 0)
        answer = pool.submit(httpx.post, running.url + EDITS, files=files)
        running.wait_until(lambda: decoder.num_pictures == 2)
        connection.close()
        assert answer.result().status_code == 200
        assert pid not in decode_pids(decoder)
        running.wait_until(lambda: running.app.state.upload_budget.num_bytes == 0)


def test_stream_client_leaves(paused: LiveServer) -> None:
    body = {"prompt": "x", "num_inference_steps": 100, "partial_images": 3, "stream": True}
    with (
        httpx.Client() as client,
        client.stream("POST", f"{paused.url}/v1/images/generations", json=body) as response,
    ):
        assert response.status_code == 200
        paused.call(paused.device.run_plans, 30)  # encoding and the steps up to the first preview
        lines = response.iter_lines()
        assert next(lines) == "event: image_generation.partial_image"
    paused.wait_until(lambda: paused.num_unfinished() == 0)
    assert paused.device.num_plans <= 33


def test_stream_client_leaves_before_the_first_event(paused: LiveServer) -> None:
    body = {"prompt": "x", "stream": True}
    with (
        httpx.Client() as client,
        client.stream("POST", f"{paused.url}/v1/images/generations", json=body) as response,
    ):
        assert response.status_code == 200
    paused.wait_until(lambda: paused.num_unfinished() == 0)


async def test_stream_client_leaves_while_the_first_bytes_are_sent() -> None:
    """The events have not begun, so they cannot end the request themselves."""

    class Outputs:
        closed = False

        async def aclose(self) -> None:
            self.closed = True

    async def events() -> AsyncGenerator[bytes, None]:
        raise AssertionError("never asked for")
        yield b""

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        await asyncio.Event().wait()  # a client that does not read

    outputs = Outputs()
    stream = EventStream(
        cast(OutputStream, outputs), events(), keep_alive_seconds=15, headers={}, reservation=nullcontext()
    )
    await stream({"type": "http", "method": "POST"}, receive, send)
    assert outputs.closed
