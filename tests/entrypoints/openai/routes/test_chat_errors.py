"""Chats that cannot be answered: OpenAI's error object with the name of the wrong field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from testbed.live_server import FAKE_EDIT_INFO, MODEL_NAME, LiveServer, live_server
from tests.entrypoints.openai.routes.test_chat_completions import CHAT, PHOTO, says, shows, text
from tests.entrypoints.openai.routes.test_image_errors import error_of
from vllm_omni.entrypoints.openai.requests.body_reader import MAX_JSON_BYTES, MAX_JSON_ITEMS


@pytest.fixture(scope="module")
def editor() -> Iterator[httpx.Client]:
    with live_server(info=FAKE_EDIT_INFO) as running, httpx.Client(base_url=running.url) as client:
        yield client


def refused(client: httpx.Client, body: Any, status: int = 400) -> tuple[str | None, str]:
    """`param` and message of a refusal that must not be retried."""
    response = client.post(CHAT, json=body)
    assert response.status_code == status, response.text
    assert response.headers["x-should-retry"] == "false"
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 500
    return error["param"], error["message"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: takes at least one entry, got []"),
        ("a cat", "list"),
        ([{"role": "system", "content": "x"}], "must have the role user"),
        ([{"content": "x"}], "must have the role user"),
        ([says("x"), says(None)], "text or a list of parts, got None"),
        ([says({"type": "text", "text": "x"})], "text or a list of parts"),
        ([says("")], "has no text"),
        ([says(" \n")], "has no text"),
        ([says([])], "has no text"),
        ([says([shows(PHOTO)])], "has no text"),
        ([says(["x"])], "parts of a user message are"),
        ([says([{"type": "input_audio", "input_audio": {"data": "x" * 999}}])], "parts of a user message are"),
        ([says([{"type": "text", "text": 3}])], "parts of a user message are"),
        ([says([text("x"), {"type": "image_url", "image_url": "data:"}])], "parts of a user message are"),
        ([says("x" * 32_001)], "32001 characters, at most 32000"),
        ([says("word " * 600)], "600 tokens, at most 512"),
    ],
)
def test_bad_messages(server: LiveServer, http: httpx.Client, messages: Any, message: str) -> None:
    num_before = len(server.device.prompts)
    param, words = refused(http, {"messages": messages})
    assert param == "messages"
    assert message in words
    assert len(server.device.prompts) == num_before


def test_messages_are_required(http: httpx.Client) -> None:
    response = http.post(CHAT, json={"prompt": "x"})
    assert error_of(response)["param"] == "messages"
    assert error_of(response)["code"] == "missing_required_parameter"
    assert refused(http, {"messages": ["x"]})[0] == "messages.0"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "65x64"}, "size"),
        ({"extra_body": {"size": "large"}}, "size"),
        ({"n": 11}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": "usage"}, "stream_options"),
        ({"extra_body": "size"}, "extra_body"),
        ({"modalities": "image"}, "modalities"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"background": "transparent"}, "background"),
        ({"negative_prompt": "word " * 600, "true_cfg_scale": 2}, "negative_prompt"),
        ({"seed": -2}, "seed"),
    ],
)
def test_bad_options(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert refused(http, {"messages": [says("x")], **fields})[0] == param


@pytest.mark.parametrize(
    ("fields", "extra", "param"),
    [
        ({"seed": 9}, {"seed": 5}, "seed"),
        ({"lora": {"name": "a"}}, {"lora": {"name": "b"}}, "lora"),
        ({}, {"messages": [says("y")]}, "messages"),
        ({"strange": "x" * 999}, {"strange": 1}, "strange"),
        ({"size": "64x64"}, {"height": 64, "width": 128}, "size"),
        ({"n": 2}, {"num_outputs_per_prompt": 1}, "n"),
        ({}, {"height": 64}, "size"),
    ],
)
def test_what_is_said_twice_in_different_ways(
    http: httpx.Client, fields: dict[str, Any], extra: dict[str, Any], param: str
) -> None:
    assert refused(http, {"messages": [says("x")], **fields, "extra_body": extra})[0] == param


def test_what_is_nested_deeply_and_said_twice(http: httpx.Client) -> None:
    nested = b"[" * 950 + b"]" * 950
    content = b'{"messages": [], "x": %s, "extra_body": {"x": %s}}' % (nested, nested)
    response = http.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text


def test_the_sdk_raises_what_it_raises_for_openai(sdk: openai.OpenAI) -> None:
    messages: Any = [says("x")]
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-9", messages=messages)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model=MODEL_NAME, messages=messages, stream=True, extra_body={"size": "65x64"})
    assert caught.value.param == "size"
    stream = sdk.chat.completions.create(model=MODEL_NAME, messages=[says("fail-at-2")], stream=True)
    with pytest.raises(openai.APIError, match="memory"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="memory"):
        sdk.chat.completions.create(model=MODEL_NAME, messages=[says("fail-at-2")])


def test_a_text_model_takes_no_picture(http: httpx.Client) -> None:
    param, message = refused(http, {"messages": [says([text("x"), shows(PHOTO)])]})
    assert param == "messages"
    assert "makes pictures from text" in message
    assert "/v1/" not in message, "another route would not help"


def test_an_edit_model_needs_a_picture_in_the_last_user_message(editor: httpx.Client) -> None:
    earlier = [says([text("x"), shows(PHOTO)]), {"role": "assistant", "content": [shows(PHOTO)]}]
    for messages in ([says("x")], [*earlier, says("x")]):
        param, message = refused(editor, {"messages": messages})
        assert param == "messages"
        assert "needs an image_url part" in message


@pytest.mark.parametrize(
    ("url", "param"),
    [
        ("https://example.com/a.png", "image_url"),
        ("http://169.254.169.254/latest/meta-data", "image_url"),
        ("file:///etc/passwd", "image_url"),
        ("data:image/png;base64,@@@", "image_url"),
        ("data:image/png;base64,aGVsbG8=", "image"),
    ],
)
def test_bad_pictures_are_refused_as_in_edits(editor: httpx.Client, url: str, param: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    response = editor.post("/v1/images/edits", json={"prompt": "x", "images": [{"image_url": url}]})
    in_edits = error_of(response)
    assert refused(editor, {"messages": [says([text("x"), part])]}) == (in_edits["param"], in_edits["message"])
    assert in_edits["param"] == param


def test_too_many_pictures(editor: httpx.Client) -> None:
    param, message = refused(editor, {"messages": [says([text("x"), *[shows(PHOTO)] * 4])]})
    assert param == "image"
    assert "at most 3 pictures" in message


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b'{"messages": ', "application/json"),
        (b"null", "application/json"),
        (b"", "application/json"),
        (b'{"messages": []}', "text/plain"),
        (b"", "multipart/form-data; boundary=x"),
    ],
)
def test_bodies_that_are_no_json_object(http: httpx.Client, content: bytes, content_type: str) -> None:
    response = http.post(CHAT, content=content, headers={"content-type": content_type})
    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", None)


@pytest.mark.parametrize("item", [b"{}", b"[]", b"1", b'"":0'])
@pytest.mark.parametrize("path", [CHAT, "/v1/images/edits"])
def test_a_body_of_too_many_items_is_not_parsed(editor: httpx.Client, path: str, item: bytes) -> None:
    """Parsing and checking such a body would block all requests for seconds."""
    items = b",".join([item] * MAX_JSON_ITEMS)
    content = b'{"messages": %s}' % (b"{%s}" % items if b":" in item else b"[%s]" % items)
    response = editor.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 413, response.text
    assert "commas and brackets" in error_of(response)["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/images/edits", "/v1/images/generations"])
def test_what_is_nested_deeply_is_quoted_without_its_depth(editor: httpx.Client, path: str) -> None:
    """For each depth that the parser accepts, and for greater ones."""
    for depth in range(900, 1000, 7):
        nested = b"[" * depth + b"]" * depth
        content = b'{"prompt": "x", "size": %s, "messages": [{"role": "user", "content": [%s]}]}' % (nested, nested)
        response = editor.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text


def test_a_body_too_large_is_counted_while_it_streams(server: LiveServer, http: httpx.Client) -> None:
    budget, most_held = server.app.state.upload_budget, 0

    def endless() -> Iterator[bytes]:
        nonlocal most_held
        for _ in range(2 * MAX_JSON_BYTES // 2**16):
            most_held = max(most_held, budget.num_bytes)
            yield bytes(2**16)

    response = http.post(CHAT, content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413, response.text
    assert error_of(response)["type"] == "invalid_request_error"
    assert 0 < most_held <= MAX_JSON_BYTES + 2**20
    server.wait_until(lambda: budget.num_bytes == 0)
