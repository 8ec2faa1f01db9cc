"""Half of a UTF-16 pair, which JSON can carry and UTF-8 cannot, anywhere in a request: 400 or no effect, no 500."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from testbed.live_server import FAKE_EDIT_INFO, LiveServer, live_server
from testbed.tiny_models import photo
from tests.entrypoints.openai.routes.test_image_edits import EDITS, data_url, file_of
from tests.entrypoints.openai.routes.test_image_errors import error_of
from vllm_omni.entrypoints.openai.errors import error_body
from vllm_omni.entrypoints.openai.schema.chat import ChatCompletionRequest
from vllm_omni.entrypoints.openai.schema.images import ImageEditRequest
from vllm_omni.errors import InvalidRequestError

HALF = "a\ud800b"
CHAT = "/v1/chat/completions"
URL = data_url(photo(40, 30, 1))
PARTS = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": URL}}]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "edits": (EDITS, {"prompt": "x", "images": [{"image_url": URL}]}),
    "chat": (CHAT, {"messages": [{"role": "user", "content": PARTS}]}),
}
VALUES: tuple[Any, ...] = (
    HALF,
    {HALF: HALF},
    [HALF],
    {"name": HALF},
    [{"image_url": HALF}],
    f"http://photos.example/{HALF}",
)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    settings = {"allowed_media_domains": ("photos.example",), "log_prompts": True, "num_encoding_threads": 1}
    with live_server(info=FAKE_EDIT_INFO, settings=settings) as running:
        yield running


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    response = http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert error_of(response)["type"] == "invalid_request_error"
    response.json()  # is UTF-8
    return response


@pytest.mark.parametrize("route", BODIES)
def test_in_every_field(http: httpx.Client, route: str) -> None:
    path, base = BODIES[route]
    fields = {*ImageEditRequest.model_fields, *ChatCompletionRequest.model_fields, "unknown"} - {"stream"}
    num_refused = 0
    for field in sorted(fields):
        for value in VALUES:
            num_refused += post(http, path, {**base, field: value}).status_code == 400
        post(http, path, {**base, "extra_body": {field: HALF}})
        post(http, path, {**base, field: "x", "extra_body": {field: HALF}})
    assert num_refused > len(fields)


@pytest.mark.parametrize("route", BODIES)
def test_as_a_key(http: httpx.Client, route: str) -> None:
    path, base = BODIES[route]
    for body in ({**base, HALF: 1}, {**base, "extra_body": {HALF: HALF}}, {HALF: HALF}, HALF, [HALF]):
        post(http, path, body)
    if route == "chat":
        response = post(http, path, {**base, HALF: 1, "extra_body": {HALF: 2}})
        assert (response.status_code, error_of(response)["param"]) == (400, r"a\ud800b")
        assert error_of(response)["message"] == r"'a\ud800b' is 1 and, in extra_body, 2: give it once"


def test_in_a_conversation(http: httpx.Client) -> None:
    for message in (
        {"role": "user", "content": HALF},
        {"role": HALF, "content": HALF},
        {"role": "user", "content": [{"type": HALF, HALF: HALF}]},
        {"role": "user", "content": [{"type": "text", "text": HALF}, PARTS[1]]},
        {"role": "user", "content": [PARTS[0], {"type": "image_url", "image_url": {"url": HALF}}]},
        {
            "role": "user",
            "content": [PARTS[0], {"type": "image_url", "image_url": {"url": f"data:{HALF};base64,YQ=="}}],
        },
        {"role": "user", "content": [PARTS[0], {"type": "image_url", "image_url": {"url": f"data:;base64,{HALF}"}}]},
    ):
        assert post(http, CHAT, {"messages": [message]}).status_code == 400
    earlier = {"role": "assistant", "content": HALF, HALF: HALF}
    assert post(http, CHAT, {"messages": [earlier, *BODIES["chat"][1]["messages"]]}).status_code == 200


def test_in_a_prompt(http: httpx.Client) -> None:
    """Tokenizers do not accept lone surrogates."""
    for name in ("prompt", "negative_prompt"):
        response = post(http, EDITS, {**BODIES["edits"][1], name: HALF})
        assert (response.status_code, error_of(response)["param"]) == (400, name)
    response = post(http, CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}, PARTS[1]]}]})
    assert (response.status_code, error_of(response)["param"]) == (400, "messages")
    assert "messages: prompt is not valid Unicode" in error_of(response)["message"]


def test_in_a_form(http: httpx.Client) -> None:
    png = file_of(photo(40, 30, 1))
    for name, value in (
        ("prompt", b"\xed\xa0\x80"),
        ("lora", json.dumps({"name": HALF}).encode()),
        ("lora", json.dumps({HALF: HALF}).encode()),
        ("size", b"\xed\xa0\x80"),
        ("unknown", b"\xed\xa0\x80"),
    ):
        response = http.post(EDITS, files={"image": png, "prompt": (None, "x"), name: (None, value)})
        assert response.status_code == 400, response.text
    head = b'--x\r\ncontent-disposition: form-data; name="\xed\xa0\x80"\r\n\r\nx\r\n--x--\r\n'
    response = http.post(EDITS, content=head, headers={"content-type": "multipart/form-data; boundary=x"})
    assert response.status_code == 400


def test_every_error_object_can_be_sent() -> None:
    body = error_body(InvalidRequestError(f"got {HALF}", param=HALF))
    assert json.loads(body.model_dump_json()) == {
        "message": r"got a\ud800b",
        "type": "invalid_request_error",
        "param": r"a\ud800b",
        "code": "invalid_value",
    }
