"""`POST /v1/chat/completions` by the OpenAI SDK: pictures in a chat completion."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from testbed.live_server import (
    ALIAS,
    FAKE_EDIT_INFO,
    MODEL_NAME,
    STEPS,
    LiveServer,
    expected_picture,
    live_server,
)
from testbed.tiny_models import photo
from tests.entrypoints.openai.routes.test_image_edits import data_url, newest
from tests.entrypoints.openai.routes.test_image_edits import pixels as base64_pixels

CHAT = "/v1/chat/completions"
GENERATIONS = "/v1/images/generations"
PHOTO = photo(40, 30, 1)


def says(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def shows(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image), "detail": "auto"}}


def picture(part: Any, content_type: str = "image/png") -> np.ndarray:
    """The pixels of an `image_url` part."""
    assert part["type"] == "image_url"
    head, data = part["image_url"]["url"].split(",")
    assert head == f"data:{content_type};base64"
    return base64_pixels(data)


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """A stream's chunks, after checking that `[DONE]` ends it."""
    *events, end = [line.removeprefix("data: ") for line in response.text.split("\r\n") if line]
    assert end == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.fixture(scope="module")
def editor() -> Iterator[LiveServer]:
    with live_server(info=FAKE_EDIT_INFO) as running:
        yield running


@pytest.fixture
def edit_sdk(editor: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{editor.url}/v1", max_retries=0) as client:
        yield client


def test_the_answer_is_a_picture(sdk: openai.OpenAI) -> None:
    messages: Any = [says("a red apple")]
    answer: Any = sdk.chat.completions.create(model=ALIAS, messages=messages, seed=7, extra_body={"size": "96x64"})
    assert (answer.object, answer.model) == ("chat.completion", ALIAS)
    assert answer.id.startswith("chatcmpl-")
    assert answer.created > 0
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "stop", "assistant")
    assert choice.message.content == ""
    (part,) = choice.message.images
    assert part["index"] == 0
    np.testing.assert_array_equal(picture(part), expected_picture(7, height=64, width=96))
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 24, 27)
    assert answer.timings["computed_steps"] == STEPS


async def test_async_client(server: LiveServer) -> None:
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{server.url}/v1") as client:
        answer: Any = await client.chat.completions.create(
            model=MODEL_NAME,
            messages=[says("x")],
            seed=3,
        )
    np.testing.assert_array_equal(picture(answer.choices[0].message.images[0]), expected_picture(3))


def test_the_same_bytes_as_generations(http: httpx.Client) -> None:
    options = {
        "seed": 11,
        "size": "64x128",
        "num_inference_steps": 3,
        "output_format": "webp",
        "output_compression": 70,
    }
    chat = http.post(CHAT, json={"messages": [says("x")], **options}).json()
    image = http.post(GENERATIONS, json={"prompt": "x", **options}).json()
    url = chat["choices"][0]["message"]["images"][0]["image_url"]["url"]
    assert url == "data:image/webp;base64," + image["data"][0]["b64_json"]
    assert chat["model"] == MODEL_NAME, "the first served name, where none was asked for"


def test_every_option_beside_messages_or_in_extra_body(server: LiveServer, http: httpx.Client) -> None:
    options = {
        "negative_prompt": "blur", "num_inference_steps": 2, "true_cfg_scale": 3, "priority": -1, "seed": 5, "n": None,
        "size": "32x48", "max_sequence_length": 100, "safety_identifier": "me", "quality": "low", "user": "someone",
    }  # fmt: skip
    for body in (options, {"extra_body": options}, {"seed": 5, "n": 1, "size": None, "extra_body": options}):
        response = http.post(CHAT, json={"messages": [says("x")], **body})
        assert response.status_code == 200, response.text
        assert "x-omni-ignored-fields" not in response.headers
        answer = response.json()
        np.testing.assert_array_equal(
            picture(answer["choices"][0]["message"]["images"][0]), expected_picture(5, height=48, width=32)
        )
        assert answer["timings"]["computed_steps"] == 2
        assert answer["safety_identifier"] == "me"


def test_what_vllm_omnis_clients_send(http: httpx.Client) -> None:
    extra = {
        "height": 128, "width": 64, "num_outputs_per_prompt": 2, "num_inference_steps": 3, "true_cfg_scale": 4.0,
        "seed": 8, "negative_prompt": "blur",
    }  # fmt: skip
    response = http.post(CHAT, json={"messages": [says("x")], "extra_body": extra})
    assert response.status_code == 200, response.text
    assert "x-omni-ignored-fields" not in response.headers
    answer = response.json()
    assert answer["timings"]["computed_steps"] == 3
    for choice, seed in zip(answer["choices"], (8, 9), strict=True):
        shown = picture(choice["message"]["images"][0])
        np.testing.assert_array_equal(shown, expected_picture(seed, height=128, width=64))


def test_n_choices_have_consecutive_seeds(sdk: openai.OpenAI) -> None:
    answer: Any = sdk.chat.completions.create(model=MODEL_NAME, messages=[says("x")], n=3, seed=40)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.seed for choice in answer.choices] == [40, 41, 42]
    for choice, seed in zip(answer.choices, (40, 41, 42), strict=True):
        np.testing.assert_array_equal(picture(choice.message.images[0]), expected_picture(seed))


def test_only_the_last_user_message_is_the_prompt(server: LiveServer, http: httpx.Client) -> None:
    messages = [
        {"role": "system", "content": "You are a poet."},
        says([text("a first picture"), {"type": "input_audio", "input_audio": {}}]),
        {"role": "assistant", "content": [shows(PHOTO)]},
        {"role": "tool", "content": None, "tool_call_id": "1"},
        says([text("a cat"), text("in the rain")]),
        {"role": "assistant", "content": ""},
    ]
    assert http.post(CHAT, json={"messages": messages}).status_code == 200
    assert list(server.device.prompts.values())[-1] == "a cat\nin the rain"


def test_fields_without_effect_are_named(http: httpx.Client) -> None:
    body = {
        "messages": [says("x")], "temperature": 0.7, "max_tokens": 9, "modalities": ["image", "text"], "prompt": "y",
        "response_format": {"type": "text"}, "partial_images": 2, "true_cfg_scale": 3,
    }  # fmt: skip
    response = http.post(CHAT, json=body)
    assert response.status_code == 200
    names = ["temperature", "max_tokens", "prompt", "response_format", "partial_images", "true_cfg_scale"]
    assert response.headers["x-omni-ignored-fields"] == ",".join(names)
    assert response.json()["ignored_fields"] == names
    body |= {"stream": True, "n": 2}
    streamed = http.post(CHAT, json=body)
    assert streamed.headers["x-omni-ignored-fields"] == ",".join(names)
    assert [chunk.get("ignored_fields") for chunk in chunks_of(streamed)] == [None, names, None, names]
    with_usage = http.post(CHAT, json={**body, "stream_options": {"include_usage": True}})
    assert chunks_of(with_usage)[-1]["ignored_fields"] == names


def test_a_stream_by_the_sdk(sdk: openai.OpenAI) -> None:
    stream: Any = sdk.chat.completions.create(
        model=MODEL_NAME,
        messages=[says("a b")],
        n=2,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert len({chunk.id for chunk in (*chunks, last)}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    by_choice: dict[int, list[Any]] = {0: [], 1: []}
    for chunk in chunks:
        (choice,) = chunk.choices
        by_choice[choice.index].append(choice)
    for index, (shown, stopped) in by_choice.items():
        assert (shown.delta.role, shown.delta.content, shown.finish_reason) == ("assistant", "", None)
        np.testing.assert_array_equal(picture(shown.delta.images[0]), expected_picture(5 + index))
        assert (stopped.delta.to_dict(), stopped.finish_reason) == ({}, "stop")
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (2, 32, 34)


def test_the_sdks_accumulating_helper_takes_a_stream(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(model=MODEL_NAME, messages=[says("x")], seed=6) as stream:
        message: Any = stream.get_final_completion().choices[0].message
    np.testing.assert_array_equal(picture(message.images[0]), expected_picture(6))


def test_a_stream_is_plain_server_sent_events(http: httpx.Client) -> None:
    response = http.post(CHAT, json={"messages": [says("x")], "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(response)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]
    assert not any("usage" in chunk for chunk in chunks), "only where it is asked for"


def test_silence_is_filled_with_comments() -> None:
    with live_server(settings={"keep_alive_seconds": 0.01}) as running:
        running.call(running.device.pause)
        body = {"messages": [says("x")], "stream": True}
        with httpx.stream("POST", running.url + CHAT, json=body) as response:
            lines = response.iter_lines()
            assert next(lines).startswith(":")
            running.call(running.device.resume)
            assert list(lines)[-2:] == ["data: [DONE]", ""]


def test_edits_take_the_pictures_of_the_last_user_message(editor: LiveServer, edit_sdk: openai.OpenAI) -> None:
    other = photo(8, 9, 2)
    messages: Any = [
        says([text("first"), shows(other), shows(other), shows(other)]),
        {"role": "assistant", "content": [shows(other)]},
        says([shows(PHOTO), text("put them together"), shows(other)]),
    ]
    answer: Any = edit_sdk.chat.completions.create(model=MODEL_NAME, messages=messages, seed=4)
    np.testing.assert_array_equal(picture(answer.choices[0].message.images[0]), expected_picture(4, 32, 48))
    images = newest(editor)
    assert len(images) == 2
    np.testing.assert_array_equal(images[0].condition, np.asarray(PHOTO))
    np.testing.assert_array_equal(images[1].condition, np.asarray(other))
    assert answer.usage.prompt_tokens == 3 + 2 * 6
    assert editor.app.state.upload_budget.num_bytes == 0


def test_a_long_history_of_pictures_is_no_obstacle(http: httpx.Client) -> None:
    """Front ends send every earlier picture again: more bytes than other JSON bodies may have."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8))
    body = {"messages": [{"role": "assistant", "content": [shows(noise)]}, says("x")]}
    assert len(json.dumps(body)) > 2 * 2**20
    assert http.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_device(stream: bool) -> None:
    body = json.dumps({"messages": [says("x")], "num_inference_steps": 100, "n": 2, "stream": stream})
    with live_server() as running:
        running.call(running.device.pause)
        connection = HTTPConnection(running.url.removeprefix("http://"))
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        running.wait_until(lambda: running.num_unfinished() == 2)
        connection.close()
        running.wait_until(lambda: running.num_unfinished() == 0)
        running.call(running.device.resume)
        assert httpx.post(running.url + CHAT, json={"messages": [says("x")]}).status_code == 200
        assert running.device.num_plans < 20


def test_metrics_count_its_pictures(http: httpx.Client) -> None:
    def num_images() -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm_omni:images_total{"))

    before = num_images()
    http.post(CHAT, json={"messages": [says("x")], "n": 2})
    assert num_images() == before + 2


def test_a_real_model_end_to_end(tiny_model: Path) -> None:
    """Both routes make the same picture, from the SDK through a real pipeline."""
    options = {"negative_prompt": "blue", "true_cfg_scale": 3, "num_inference_steps": 3}
    with (
        live_server(model=tiny_model, distributed_executor_backend="uni") as running,
        openai.OpenAI(api_key="none", base_url=f"{running.url}/v1", max_retries=0) as client,
    ):
        chat: Any = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[says("a red apple")],
            seed=7,
            extra_body=options,
        )
        image = client.images.generate(prompt="a red apple", extra_body={"seed": 7, **options})
    assert image.data is not None
    drawn = picture(chat.choices[0].message.images[0])
    assert drawn.std() > 0
    np.testing.assert_array_equal(drawn, base64_pixels(image.data[0].b64_json))


def test_a_file_of_a_stream_opens(http: httpx.Client) -> None:
    response = http.post(CHAT, json={"messages": [says("x")], "stream": True, "output_format": "jpeg", "size": "64x32"})
    url = chunks_of(response)[0]["choices"][0]["delta"]["images"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert (image.format, image.size) == ("JPEG", (64, 32))
