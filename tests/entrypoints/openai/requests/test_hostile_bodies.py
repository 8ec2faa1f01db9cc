"""Bodies with many wrong items: refused for the first one, and checked outside the event loop."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from testbed.live_server import LiveServer
from tests.entrypoints.openai.routes.test_image_errors import error_of
from vllm_omni.entrypoints.openai.quotes import MAX_QUOTE, quote
from vllm_omni.entrypoints.openai.requests import body_reader, chat_body, parameters
from vllm_omni.entrypoints.openai.schema.chat import MAX_MESSAGES, ChatCompletionRequest
from vllm_omni.entrypoints.openai.schema.images import (
    UNION_TAGS,
    ImageEditRequest,
    ImageGenerationRequest,
    RequestBody,
)
from vllm_omni.entrypoints.openai.schema.videos import VideoRequest

CHAT, GENERATIONS = "/v1/chat/completions", "/v1/images/generations"
TURN = {"role": "user", "content": "a"}
MANY = 60_000
MANY_KEYS = {str(i): 0 for i in range(MANY)}

HOSTILE: list[tuple[type[RequestBody], dict[str, Any], str]] = [
    (ChatCompletionRequest, {"messages": [TURN], "modalities": [1] * MANY}, "modalities"),
    (ChatCompletionRequest, {"messages": [1] * MANY}, "messages"),
    (ChatCompletionRequest, {"messages": [1] * MAX_MESSAGES}, "messages.0"),
    (ChatCompletionRequest, {"messages": [TURN], "lora": {"name": "a", **MANY_KEYS}}, "lora"),
    (ChatCompletionRequest, {"messages": [TURN], "extra_body": [1] * MANY}, "extra_body"),
    (ChatCompletionRequest, {"messages": [TURN], "stream_options": [1] * MANY}, "stream_options"),
    (ImageGenerationRequest, {"prompt": "a", "lora": {"name": "a", **MANY_KEYS}}, "lora"),
    (ImageGenerationRequest, {"prompt": "a", "lora": [{"name": "a"}] * MANY}, "lora"),
    (ImageGenerationRequest, {"prompt": "a", "size": MANY_KEYS}, "size"),
    (ImageGenerationRequest, {"prompt": [1] * MANY}, "prompt"),
    (ImageGenerationRequest, {"prompt": "a", "lora": [MANY_KEYS] * 8}, "lora.0"),
    (ImageEditRequest, {"prompt": "a", "images": [1] * MANY}, "images"),
    (ImageEditRequest, {"prompt": "a", "images": [MANY_KEYS] * 16}, "images.0"),
    (ImageEditRequest, {"prompt": "a", "image": [1] * MANY}, "image"),
    (VideoRequest, {"prompt": "a", "input_reference": [1] * MANY}, "input_reference"),
    (VideoRequest, {"prompt": "a", "input_reference": MANY_KEYS}, "input_reference"),
    (VideoRequest, {"prompt": "a", "input_reference": f'{{"image_url": [{"1," * MANY}1]}}'}, "input_reference"),
]


@pytest.mark.parametrize(("model", "body", "param"), HOSTILE)
def test_many_wrong_items_are_few_errors(model: type[RequestBody], body: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 16
    where = [str(part) for part in caught.value.errors()[0]["loc"] if part not in UNION_TAGS]
    assert ".".join(where) == param


@pytest.mark.parametrize(("model", "body", "param"), HOSTILE[:10])
def test_the_answer_names_the_first(
    http: httpx.Client, model: type[RequestBody], body: dict[str, Any], param: str
) -> None:
    response = http.post(CHAT if model is ChatCompletionRequest else GENERATIONS, json=body)
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert len(error_of(response)["message"]) < 200


def test_a_long_conversation_passes(http: httpx.Client) -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "a cat, please"}]}
    assert http.post(CHAT, json={"messages": [turn] * MAX_MESSAGES}).status_code == 200
    response = http.post(CHAT, json={"messages": [turn] * (MAX_MESSAGES + 1)})
    assert response.status_code == 400
    assert "at most 10000 entries" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "body", "module", "name"),
    [
        (CHAT, {"messages": [TURN]}, chat_body, "last_user_message"),
        (CHAT, {"messages": [1]}, chat_body, "validated"),
        (CHAT, {"messages": [TURN], "extra_body": {"seed": 1}}, chat_body, "with_extra_body"),
        (GENERATIONS, {"prompt": 1}, body_reader, "validated"),
    ],
)
def test_bodies_are_checked_off_the_loop(
    server: LiveServer,
    http: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: Any,
    module: ModuleType,
    name: str,
) -> None:
    check, threads = getattr(module, name), []

    def watched(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return check(*args)

    monkeypatch.setattr(module, name, watched)
    assert http.post(path, json=body).status_code in (200, 400)
    assert threads
    assert server.call(threading.get_ident) not in threads


def test_of_many_unknown_fields_few_are_looked_at(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    printable, seen = parameters._printable, []

    def watched(name: str) -> str:
        seen.append(name)
        return printable(name)

    monkeypatch.setattr(parameters, "_printable", watched)
    response = http.post(GENERATIONS, json={"prompt": "a", **MANY_KEYS})
    assert response.status_code == 200
    *names, rest = response.headers["x-omni-ignored-fields"].split(",")
    assert names == seen == [str(i) for i in range(20)]
    assert rest == f"+{MANY - 20} more"


def test_an_object_is_quoted_without_a_look_at_its_end() -> None:
    class Key(str):
        num_compared = 0

        def __lt__(self, other: str) -> bool:
            Key.num_compared += 1
            return str(self) < other

    assert len(quote([{Key(i): 0 for i in range(1000)}])) <= MAX_QUOTE + 3
    assert quote({"b": 1, "a": 2}) == "{'a': 2, 'b': 1}"
    assert Key.num_compared < 100
