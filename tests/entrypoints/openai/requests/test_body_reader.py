"""The size of JSON bodies: one limit for each route, checked before a body arrives and while it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from testbed.live_server import FAKE_EDIT_INFO, FakeImageInput, LiveServer, live_server
from tests.entrypoints.server.raw_client import raw_client
from vllm_omni.entrypoints.openai.requests.body_reader import MAX_JSON_BYTES
from vllm_omni.entrypoints.openai.settings import ServerSettings

MAX_BYTES = {
    "/v1/images/generations": ServerSettings.max_body_bytes,
    "/v1/images/edits": MAX_JSON_BYTES,
    "/v1/chat/completions": MAX_JSON_BYTES,
}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(info=replace(FAKE_EDIT_INFO, image_input=FakeImageInput(min_images=0))) as running:
        yield running


@pytest.mark.parametrize("path", MAX_BYTES)
def test_a_declared_length_is_refused_before_the_body_arrives(server: LiveServer, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    with raw_client(server) as client:
        client.send(f"{head}content-length: {MAX_BYTES[path] + 1}\r\n\r\n".encode())
        answer = client.answer()
    assert answer.status == 413
    assert f" {MAX_BYTES[path]} bytes" in answer.error["message"]
    assert ("multipart" in answer.error["message"]) == (path != "/v1/images/generations")


@pytest.mark.parametrize("num_more", [0, 1])
def test_the_limit_is_exact(http: httpx.Client, num_more: int) -> None:
    """For a body that declares no length too: its bytes are counted."""
    body = json.dumps({"prompt": "x", "user": ""})
    body = body.replace('""', '"%s"' % ("x" * (ServerSettings.max_body_bytes + num_more - len(body))))
    headers = {"content-type": "application/json"}
    for content in (body.encode(), iter([body.encode()])):
        response = http.post("/v1/images/generations", content=content, headers=headers)
        assert response.status_code == (413 if num_more else 200), response.text
