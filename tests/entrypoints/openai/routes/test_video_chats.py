"""`POST /v1/chat/completions` with a model that makes videos: videos in a chat completion."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from testbed.live_server import (
    ALIAS,
    FAKE_VIDEO_INFO,
    MODEL_NAME,
    STEPS,
    FakeImageInput,
    LiveServer,
    live_server,
)
from testbed.tiny_models import photo
from testbed.tiny_wan import build_tiny_wan
from tests.entrypoints.openai.routes.test_chat_completions import CHAT, chunks_of, says, shows, text
from tests.entrypoints.openai.routes.test_pictures_of_video_models import refusal
from tests.entrypoints.openai.routes.test_videos import frames_of, is_video_of
from tests.entrypoints.openai.routes.videos import FPS, NUM_FRAMES, SYNC, VIDEOS, Paused
from vllm_omni.entrypoints.openai.responses import video_chat
from vllm_omni.video_jobs.settings import VideoJobSettings

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
FROM_PICTURES = replace(FAKE_VIDEO_INFO, image_input=FakeImageInput())


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(info=FAKE_VIDEO_INFO, settings={"requires_api_key": True}) as running:
        yield running


def file_of(part: Any, content_type: str = "video/mp4") -> bytes:
    """File in a `video_url` part."""
    assert (part["type"], part["index"]) == ("video_url", 0)
    head, _, data = part["video_url"]["url"].partition(",")
    assert head == f"data:{content_type};base64"
    return base64.b64decode(data)


def test_the_answer_is_a_video(sdk: openai.OpenAI) -> None:
    messages: Any = [says("a rocket")]
    answer: Any = sdk.chat.completions.create(model=ALIAS, messages=messages, seed=7, extra_body={"size": "96x64"})
    assert (answer.object, answer.model) == ("chat.completion", ALIAS)
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.seed, choice.message.role) == (0, "stop", 7, "assistant")
    assert choice.message.content == ""
    assert "images" not in choice.message.to_dict()
    (part,) = choice.message.videos
    assert frames_of(file_of(part)).shape == (NUM_FRAMES, 64, 96, 3)
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 3 * 24
    assert answer.timings["computed_steps"] == STEPS


def test_n_choices_have_consecutive_seeds_and_leave_no_job(sdk: openai.OpenAI) -> None:
    messages: Any = [says("x")]
    answer: Any = sdk.chat.completions.create(model=MODEL_NAME, messages=messages, n=3, seed=40)
    assert [choice.seed for choice in answer.choices] == [40, 41, 42]
    for choice in answer.choices:
        assert is_video_of(choice.seed, file_of(choice.message.videos[0]))
    assert sdk.videos.list().data == []


def test_fields_of_videos_are_taken_and_others_are_named(http: httpx.Client) -> None:
    body = {"messages": [says("x")], "seconds": "0.5", "fps": FPS, "extra_body": {"output_format": "webm", "foo": 1}}
    response = http.post(CHAT, json=body)
    answer = response.json()
    assert frames_of(file_of(answer["choices"][0]["message"]["videos"][0], "video/webm")).shape[0] == 5
    assert answer["ignored_fields"] == ["foo"]
    assert response.headers["x-omni-ignored-fields"] == "foo"


def test_a_stream_by_the_sdk(sdk: openai.OpenAI) -> None:
    messages: Any = [says("x")]
    options: Any = {"stream_options": {"include_usage": True}, "seed": 5, "n": 2}
    stream = sdk.chat.completions.create(model=MODEL_NAME, messages=messages, stream=True, **options)
    chunks = [chunk.to_dict() for chunk in stream]
    *of_choices, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2 * 3 * 16
    choices: list[Any] = [chunk["choices"][0] for chunk in of_choices]
    assert sorted((choice["index"], choice["seed"]) for choice in choices) == [(0, 5)] * 2 + [(1, 6)] * 2
    for choice in choices:
        if choice["finish_reason"] is None:
            assert choice["delta"]["content"] == ""
            assert is_video_of(choice["seed"], file_of(choice["delta"]["videos"][0]))
        else:
            assert (choice["finish_reason"], choice["delta"]) == ("stop", {})


def test_silence_is_filled_with_comments() -> None:
    with live_server(info=FAKE_VIDEO_INFO, settings={"keep_alive_seconds": 0.02}) as running:
        body = {"messages": [says("x")], "stream": True}
        with Paused(running), httpx.stream("POST", running.url + CHAT, json=body) as response:
            lines = response.iter_lines()
            assert next(line for line in lines if line).startswith(":")


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_file_is_a_link_to_a_job_of_the_same_key(
    server: LiveServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(video_chat, "MAX_DATA_URL_BYTES", 100)
    key = {"authorization": "Bearer mine"}
    body = {"messages": [says("a rocket")], "seed": 9, "n": 2, "stream": stream}
    response = http.post(CHAT, json=body, headers=key)
    if stream:
        messages = [choice["delta"] for chunk in chunks_of(response) for choice in chunk["choices"]]
        urls = sorted(message["videos"][0]["video_url"]["url"] for message in messages if message)
    else:
        urls = [choice["message"]["videos"][0]["video_url"]["url"] for choice in response.json()["choices"]]
    listed = http.get(VIDEOS, headers=key).json()["data"]
    assert sorted(urls) == sorted(f"{server.url}{VIDEOS}/{video['id']}/content" for video in listed)
    for video in listed:
        assert (video["status"], video["progress"], video["prompt"]) == ("completed", 100, "a rocket")
        path = f"{VIDEOS}/{video['id']}"
        assert is_video_of(video["seed"], http.get(f"{path}/content", headers=key).content)
        assert http.get(f"{path}/content?variant=thumbnail", headers=key).status_code == 200
        assert http.get(f"{path}/content").status_code == 404, "another key's"
        remix = http.post(f"{path}/remix", json={"prompt": "a car"}, headers=key).json()
        assert (remix["seed"], remix["remixed_from_video_id"]) == (video["seed"], video["id"])
        for made in (video["id"], remix["id"]):
            assert http.delete(f"{VIDEOS}/{made}", headers=key).status_code == 200
    assert sorted(video["seed"] for video in listed) == [9, 10]


def test_a_large_file_is_kept_although_the_store_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(video_chat, "MAX_DATA_URL_BYTES", 100)
    stores = VideoJobSettings(job_store=f"sqlite:///{tmp_path}/jobs.sqlite", max_jobs=1)
    with live_server(info=FAKE_VIDEO_INFO, videos=stores) as running, httpx.Client(base_url=running.url) as http:
        for seed in (3, 4):
            answer = http.post(CHAT, json={"messages": [says("x")], "seed": seed}).json()
            url = answer["choices"][0]["message"]["videos"][0]["video_url"]["url"]
            assert is_video_of(seed, http.get(url).content)
            (listed,) = http.get(VIDEOS).json()["data"]
            assert listed["seed"] == seed, "it takes the place of the one before"


def test_pictures_of_the_message_begin_the_video() -> None:
    with live_server(info=FROM_PICTURES) as running, httpx.Client(base_url=running.url) as http:
        parts = [text("make it move"), shows(photo(64, 48, 1))]
        answer = http.post(CHAT, json={"messages": [says(parts)], "seed": 3}).json()
        # The fake model reads pictures at 48x32.
        assert frames_of(file_of(answer["choices"][0]["message"]["videos"][0])).shape == (NUM_FRAMES, 32, 48, 3)
        ((image,),) = running.device.images.values()
        assert image.reference.shape == (32, 48, 3)
        param, message = refusal(http.post(CHAT, json={"messages": [says("move")]}))
        assert param == "messages"
        assert message.startswith("messages: this model makes videos from pictures and got none")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"num_frames": 1}, "num_frames", "num_frames: input should be greater than or equal to 2"),
        ({"num_frames": 4}, "num_frames", "is not 1 more than a multiple of 4"),
        ({"seconds": 0}, "seconds", "greater than 0"),
        ({"seconds": "abc"}, "seconds", "takes a number"),
        ({"output_format": "png"}, "output_format", "'mp4', 'webm' or 'gif'"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"output_format": "gif", "fps": 60, "stream": True}, "fps", "50"),
        ({"messages": [says([text("x"), shows(photo(8, 8, 1))])]}, "messages", "makes videos from text and takes no"),
        ({"messages": [says("x " * 600)]}, "messages", "tokens, at most 512"),
    ],
)
def test_bad_chats_are_refused_by_name(http: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    got, message = refusal(http.post(CHAT, json={"messages": [says("x")], **fields}))
    assert got == param
    assert words in message


def test_a_text_task_gets_empty_text(http: httpx.Client, server: LiveServer) -> None:
    num_prompts = len(server.device.prompts)
    answer = http.post(CHAT, json={"messages": [says("### Task:\nGenerate a concise title")]}).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": ""}
    assert len(server.device.prompts) == num_prompts


def test_a_full_queue_is_a_429_before_the_stream_begins() -> None:
    with live_server(info=FAKE_VIDEO_INFO, max_num_queued_reqs=1) as running:
        body = {"messages": [says("x")], "stream": True}
        with Paused(running), httpx.stream("POST", running.url + CHAT, json=body) as first:
            assert first.status_code == 200
            running.wait_until(lambda: running.num_unfinished() == 1)
            second = httpx.post(running.url + CHAT, json=body)
        assert second.status_code == 429
        assert second.json()["error"]["code"] == "queue_full"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_device(stream: bool) -> None:
    with live_server(info=FAKE_VIDEO_INFO) as running, Paused(running):
        connection = HTTPConnection(running.url.removeprefix("http://"))
        body = json.dumps({"messages": [says("x")], "stream": stream})
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        running.wait_until(lambda: running.num_unfinished() == 1)
        connection.close()
        running.wait_until(lambda: running.num_unfinished() == 0)


def test_a_real_model_makes_the_frames_of_the_videos_route(tmp_path: Path) -> None:
    defaults: dict[str, object] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    path = build_tiny_wan(tmp_path / "wan", "i2v-2.1", default_sampling_params=defaults)
    with (
        live_server(model=path, distributed_executor_backend="uni") as running,
        httpx.Client(base_url=running.url) as http,
    ):
        image = shows(photo(32, 32, 1))
        chat = http.post(CHAT, json={"messages": [says([text("move"), image])], "seed": 3}).json()
        body = {"prompt": "move", "seed": 3, "input_reference": image["image_url"]["url"]}
        sync = http.post(SYNC, json=body)
        assert sync.status_code == 200, sync.text
        frames = frames_of(file_of(chat["choices"][0]["message"]["videos"][0]))
        assert frames.std() > 5, "flat frames prove nothing"
        assert np.array_equal(frames, frames_of(sync.content))
