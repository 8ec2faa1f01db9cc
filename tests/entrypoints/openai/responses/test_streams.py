"""`stream: true` by the SDK's iterator, and the format of the bytes."""

from __future__ import annotations

import base64
import io
import json
import signal
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from sse_starlette.sse import AppStatus

from testbed.live_server import LiveServer, expected_picture, live_server


def pixels(data: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_partial_images_then_the_picture(sdk: openai.OpenAI) -> None:
    body: dict[str, Any] = {"seed": 9, "num_inference_steps": 8, "safety_identifier": "me", "cfg": 3}
    stream = sdk.images.generate(prompt="a b", stream=True, partial_images=3, extra_body=body)
    *partial, completed = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 3
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    for event, step in zip(partial, (2, 4, 6), strict=True):
        np.testing.assert_array_equal(pixels(event.b64_json), expected_picture(9, step=step))
    assert completed.type == "image_generation.completed"
    np.testing.assert_array_equal(pixels(completed.b64_json), expected_picture(9, 64, 64))
    assert (completed.size, completed.output_format, completed.background) == ("64x64", "png", "opaque")
    assert completed.created_at > 0
    assert completed.usage.total_tokens == 2 + 16
    assert completed.safety_identifier == "me"
    assert completed.to_dict()["seed"] == 9
    assert completed.to_dict()["ignored_fields"] == ["cfg"]


def test_without_partial_images_only_the_picture(sdk: openai.OpenAI) -> None:
    (event,) = sdk.images.generate(prompt="x", stream=True, extra_body={"seed": 2})
    assert event.type == "image_generation.completed"
    np.testing.assert_array_equal(pixels(event.b64_json), expected_picture(2, 64, 64))


async def test_several_pictures_async(server: LiveServer) -> None:
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{server.url}/v1") as client:
        stream = await client.images.generate(
            prompt="x y", n=2, stream=True, partial_images=1, output_format="webp", extra_body={"seed": 5}
        )
        events = [event.to_dict() async for event in stream]
    partial = [e for e in events if e["type"] == "image_generation.partial_image"]
    completed = [e for e in events if e["type"] == "image_generation.completed"]
    assert sorted((e["index"], e["partial_image_index"]) for e in partial) == [(0, 0), (1, 0)]
    assert [(e["index"], e["seed"], e["output_format"]) for e in completed] == [(0, 5, "webp"), (1, 6, "webp")]
    used = [(e["usage"]["input_tokens"], e["usage"]["output_tokens"], e["usage"]["total_tokens"]) for e in completed]
    assert used == [(2, 16, 18), (0, 16, 16)]  # the prompt counts once


def test_failure_in_the_middle_raises_in_the_iterator(sdk: openai.OpenAI) -> None:
    stream = sdk.images.generate(prompt="fail-at-3", stream=True, partial_images=3)
    assert [next(stream).type for _ in range(2)] == ["image_generation.partial_image"] * 2
    with pytest.raises(openai.APIError, match="memory"):
        next(stream)


def test_refusals_come_as_a_status_not_as_an_event(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(prompt="x", stream=True, size="65x64")
    assert caught.value.param == "size"
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(prompt="x", stream=True, response_format="url")
    assert caught.value.param == "response_format"


def test_the_bytes_are_plain_server_sent_events(http: httpx.Client) -> None:
    response = http.post("/v1/images/generations", json={"prompt": "x", "stream": True, "unknown": 1})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-omni-ignored-fields"] == "unknown"
    name, data, *rest = response.text.split("\r\n")
    assert name == "event: image_generation.completed"
    assert json.loads(data.removeprefix("data: "))["type"] == "image_generation.completed"
    assert rest == ["", ""]


def test_silence_is_filled_with_comments() -> None:
    with live_server(settings={"keep_alive_seconds": 0.01}) as running:
        running.call(running.device.pause)
        with httpx.stream(
            "POST", f"{running.url}/v1/images/generations", json={"prompt": "x", "stream": True}
        ) as response:
            lines = response.iter_lines()
            comments = [line for line in (next(lines) for _ in range(6)) if line]
            running.call(running.device.resume)
            rest = list(lines)
    assert all(line.startswith(":") for line in comments)
    assert len(comments) == 3
    assert any(line == "event: image_generation.completed" for line in rest)


def test_stream_ends_in_peace_when_the_server_is_told_to_stop() -> None:
    with live_server() as running:
        running.call(running.device.pause)
        with httpx.stream(
            "POST", f"{running.url}/v1/images/generations", json={"prompt": "x", "stream": True}
        ) as response:
            assert response.status_code == 200
            running.call(running.http.handle_exit, signal.SIGTERM, None)
            running.wait_until(lambda: not running.http.servers[0].is_serving())
            assert not AppStatus.should_exit  # sse-starlette's watcher ends streams by it
            running.call(running.device.resume)
            assert next(response.iter_lines()) == "event: image_generation.completed"
