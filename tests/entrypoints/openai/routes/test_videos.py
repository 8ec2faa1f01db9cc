"""`/v1/videos` with the real SDK: create, poll, list, download, remix, delete, and a video without a job."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from testbed.fakes import fake_video, make_request
from testbed.live_server import ALIAS, FAKE_VIDEO_INFO, MODEL_NAME, LiveServer, live_server
from testbed.patience import wait_for
from tests.entrypoints.openai.routes.videos import FPS, NUM_FRAMES, SYNC, VIDEOS, Paused, created, ended, made

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
FTYP = b"ftyp"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(info=FAKE_VIDEO_INFO) as running:
        yield running


def frames_of(data: bytes) -> np.ndarray:
    """uint8 [frames, height, width, 3] of a video file."""
    with av.open(io.BytesIO(data), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def is_video_of(seed: int, data: bytes) -> bool:
    """Whether the file has the frames that the fake device makes from a seed, as far as the codec keeps them."""
    frames = frames_of(data)
    expected = fake_video(make_request(num_frames=len(frames), seed=seed))
    other = fake_video(make_request(num_frames=len(frames), seed=seed + 1))
    return bool(_distance(frames, expected) < _distance(frames, other) / 1.3)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


def test_create_and_poll_then_download(sdk: openai.OpenAI) -> None:
    video = sdk.videos.create_and_poll(prompt="a rocket", size="64x64", seconds="1", extra_body={"seed": 5})
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.object, video.model, video.prompt) == ("video", MODEL_NAME, "a rocket")
    assert (video.seconds, video.size, video.remixed_from_video_id) == ("1", "64x64", None)
    assert video.completed_at is not None
    assert video.expires_at is not None
    assert video.created_at <= video.completed_at < video.expires_at
    extra = video.model_extra or {}
    assert (extra["num_frames"], extra["fps"], extra["seed"], extra["eta_seconds"]) == (NUM_FRAMES, FPS, 5, None)
    content = sdk.videos.download_content(video.id)
    assert content.response.headers["content-type"] == "video/mp4"
    assert FTYP in content.content[:16]
    assert frames_of(content.content).shape == (NUM_FRAMES, 64, 64, 3)
    assert is_video_of(5, content.content)
    thumbnail = sdk.videos.download_content(video.id, variant="thumbnail")
    assert Image.open(io.BytesIO(thumbnail.content)).format == "WEBP"
    spritesheet = sdk.videos.download_content(video.id, variant="spritesheet")
    assert Image.open(io.BytesIO(spritesheet.content)).format == "JPEG"


def test_the_poll_helper_is_told_when_to_ask_again(server: LiveServer, sdk: openai.OpenAI) -> None:
    with Paused(server):
        video = sdk.videos.create(prompt="x")
        assert video.progress == 0
        raw = sdk.videos.with_raw_response.retrieve(video.id, extra_headers={"X-Stainless-Poll-Helper": "true"})
        assert int(raw.headers["openai-poll-after-ms"]) > 0
        assert (raw.parse().model_extra or {})["eta_seconds"] > 0
    assert sdk.videos.poll(video.id).status == "completed"
    assert "openai-poll-after-ms" not in sdk.videos.with_raw_response.retrieve(video.id).headers


def test_a_job_is_queued_until_the_scheduler_admits_it() -> None:
    with (
        live_server(info=FAKE_VIDEO_INFO, max_num_seqs=1) as running,
        openai.OpenAI(api_key="none", base_url=f"{running.url}/v1", max_retries=0) as client,
        Paused(running),
    ):
        first, second = (client.videos.create(prompt="x") for _ in range(2))
        wait_for(lambda: client.videos.retrieve(first.id).status == "in_progress")
        waiting = client.videos.retrieve(second.id)
        assert (waiting.status, waiting.progress) == ("queued", 0)
        assert (waiting.model_extra or {})["eta_seconds"] > 0
        running.call(running.device.resume)
        assert client.videos.poll(second.id).status == "completed"


def delete_all(sdk: openai.OpenAI, **query: Any) -> list[str]:
    """Delete the jobs of earlier tests while the SDK turns the pages; return their ids."""
    ids = []
    for video in sdk.videos.list(**query):
        sdk.videos.delete(video.id)
        ids.append(video.id)
    return ids


def test_a_list_has_pages(sdk: openai.OpenAI, http: httpx.Client) -> None:
    delete_all(sdk)
    assert http.get(VIDEOS).json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    ids = [sdk.videos.create(prompt=f"number {number}").id for number in range(5)]
    assert [video.id for video in sdk.videos.list(limit=2)] == ids[::-1]
    assert [video.id for video in sdk.videos.list(limit=2, order="asc")] == ids
    page = http.get(VIDEOS, params={"limit": 2, "after": ids[3], "order": ""}).json()
    assert [video["id"] for video in page["data"]] == [ids[2], ids[1]]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[2], ids[1], True)
    assert http.get(f"{VIDEOS}/", params={"after": ids[1]}).json()["has_more"] is False


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_all_videos_can_be_deleted_page_by_page(
    server: LiveServer, sdk: openai.OpenAI, http: httpx.Client, order: str
) -> None:
    delete_all(sdk)
    ids = [made(http)["id"] for _ in range(5)]
    assert delete_all(sdk, limit=2, order=order) == (ids if order == "asc" else ids[::-1])
    assert list(sdk.videos.list()) == []


class LosesFirstAnswer(httpx.HTTPTransport):
    """Connection that breaks before the first answer to each `POST` arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.is_lost: set[str] = set()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.method == "POST" and request.url.path not in self.is_lost:
            self.is_lost.add(request.url.path)
            response.read()
            raise httpx.ReadError("the connection broke", request=request)
        return response


def test_a_request_that_is_repeated_with_its_key_makes_one_job(
    server: LiveServer, sdk: openai.OpenAI, http: httpx.Client
) -> None:
    delete_all(sdk)
    with openai.OpenAI(
        api_key="none", base_url=f"{server.url}/v1", http_client=httpx.Client(transport=LosesFirstAnswer())
    ) as client:
        video = client.videos.create(prompt="x", extra_headers={"Idempotency-Key": "one"})
        assert client.videos.poll(video.id, poll_interval_ms=50).status == "completed"
        remix = client.videos.remix(video.id, prompt="y", extra_headers={"Idempotency-Key": "two"})
    assert {found.id for found in sdk.videos.list()} == {video.id, remix.id}
    assert sdk.videos.create(prompt="x", extra_headers={"Idempotency-Key": "three"}).id not in (video.id, remix.id)
    for body in ({"prompt": "y"}, {"prompt": "x", "seed": 1 + (video.model_extra or {})["seed"]}):
        refused = http.post(VIDEOS, json=body, headers={"Idempotency-Key": "one"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
        assert video.id in refused.json()["error"]["message"]
    sdk.videos.delete(video.id)
    assert sdk.videos.create(prompt="y", extra_headers={"Idempotency-Key": "one"}).id != video.id


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_key_has_a_length(http: httpx.Client, key: str) -> None:
    for path in (VIDEOS, f"{VIDEOS}/video_1/remix"):
        refused = http.post(path, json={"prompt": "x"}, headers={"Idempotency-Key": key})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_delete_stops_a_job_that_runs(server: LiveServer, sdk: openai.OpenAI) -> None:
    delete_all(sdk)
    server.wait_until(lambda: server.num_unfinished() == 0)
    with Paused(server):
        video = sdk.videos.create(prompt="x")
        server.wait_until(lambda: len(server.device.pending) > 0)
        deleted = sdk.videos.delete(video.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
        server.wait_until(lambda: server.num_unfinished() == 0)
    for call in (sdk.videos.retrieve, sdk.videos.delete, sdk.videos.download_content):
        with pytest.raises(openai.NotFoundError, match=video.id):
            call(video.id)


def test_a_remix_has_the_parameters_of_its_source(server: LiveServer, sdk: openai.OpenAI) -> None:
    options = {"seed": 11, "num_frames": 5, "num_inference_steps": 3, "output_format": "webm"}
    source = sdk.videos.create_and_poll(prompt="a red apple", model=ALIAS, extra_body=options)
    remix = sdk.videos.poll(sdk.videos.remix(source.id, prompt="a green apple").id)
    assert (remix.status, remix.remixed_from_video_id, remix.prompt) == ("completed", source.id, "a green apple")
    assert remix.model == source.model == ALIAS
    extra = remix.model_extra or {}
    assert {name: extra[name] for name in options} == options
    assert is_video_of(11, sdk.videos.download_content(remix.id).content)
    assert list(server.device.prompts.values())[-1] == "a green apple"


@pytest.mark.parametrize(
    ("output_format", "content_type", "start"),
    [("mp4", "video/mp4", b"\x00\x00"), ("webm", "video/webm", b"\x1aE\xdf\xa3"), ("GIF", "image/gif", b"GIF8")],
)
def test_formats(http: httpx.Client, output_format: str, content_type: str, start: bytes) -> None:
    video = made(http, output_format=output_format, num_frames=5)
    assert video["output_format"] == output_format.lower()
    content = http.get(f"{VIDEOS}/{video['id']}/content")
    assert content.headers["content-type"] == content_type
    assert content.content.startswith(start)
    suffix = output_format.lower()
    assert content.headers["content-disposition"] == f'inline; filename="{video["id"]}.{suffix}"'
    assert content.headers["x-content-type-options"] == "nosniff"
    sync = http.post(SYNC, json={"prompt": "x", "output_format": output_format, "num_frames": 5})
    assert (sync.status_code, sync.headers["content-type"]) == (200, content_type)
    assert sync.content.startswith(start)


def test_sync_answers_with_the_file(server: LiveServer, http: httpx.Client) -> None:
    num_jobs = len(http.get(VIDEOS, params={"limit": 100}).json()["data"])
    response = http.post(
        SYNC, data={"prompt": "x", "seconds": "0.5", "seed": "4", "unknown": "1"}, files={"prompt": b"x"}
    )
    assert response.status_code == 200, response.text
    assert is_video_of(4, response.content)
    assert len(frames_of(response.content)) == 5
    assert response.headers["x-omni-ignored-fields"] == "unknown"
    assert response.headers["x-omni-seed"] == "4"
    assert len(http.get(VIDEOS, params={"limit": 100}).json()["data"]) == num_jobs


def test_sync_counts_as_load_and_stops_when_the_client_leaves(server: LiveServer, http: httpx.Client) -> None:
    def load() -> int:
        number: int = http.get("/load").json()["server_load"]
        return number

    with Paused(server):
        connection = HTTPConnection(server.url.removeprefix("http://"))
        body = json.dumps({"prompt": "x", "num_inference_steps": 100})
        connection.request("POST", SYNC, body, {"content-type": "application/json"})
        server.wait_until(lambda: server.num_unfinished() == 1)
        assert load() == 1
        assert http.get(VIDEOS).status_code == 200
        connection.close()
        server.wait_until(lambda: server.num_unfinished() == 0)
        wait_for(lambda: load() == 0)


def test_the_length_follows_from_seconds_or_frames(http: httpx.Client) -> None:
    for fields, num_frames, fps, seconds in (
        ({"seconds": "0.5"}, 5, FPS, "0.5"),
        ({"seconds": 1}, 9, FPS, "1"),
        ({"seconds": "2", "fps": 4}, 9, 4, "2"),
        ({"num_frames": 5, "fps": 16}, 5, 16, "0.25"),
        ({"seconds": None, "num_frames": ""}, NUM_FRAMES, FPS, "1"),
    ):
        video = created(http, **fields)
        assert (video["num_frames"], video["fps"], video["seconds"]) == (num_frames, fps, seconds), fields


def test_fields_that_images_take_mean_the_same(server: LiveServer, http: httpx.Client) -> None:
    video = created(
        http,
        size="48X32",
        seed=-1,
        n=1,
        num_inference_steps=2,
        priority=-1,
        quality="HIGH",
        negative_prompt="",
        true_cfg_scale=3.0,
        surprise=1,
        extra_params="{}",
        lora=None,
    )
    assert (video["size"], video["num_inference_steps"]) == ("48x32", 2)
    assert video["ignored_fields"] == ["surprise", "extra_params"]
    assert 0 <= video["seed"] < 2**32
    response = http.post(f"{VIDEOS}/", json={"prompt": "x", "true_cfg_scale": 3.0, "width": 32, "height": 48})
    assert response.json()["ignored_fields"] == ["true_cfg_scale"]
    assert response.headers["x-omni-ignored-fields"] == "true_cfg_scale"
    assert response.json()["size"] == "32x48"


def test_a_failed_job_says_why_and_has_no_content(http: httpx.Client) -> None:
    video = ended(http, created(http, prompt="fail-at-2")["id"])
    assert (video["status"], video["error"]["code"]) == ("failed", "generation_failed")
    assert "not enough memory" in video["error"]["message"]
    content = http.get(f"{VIDEOS}/{video['id']}/content")
    assert content.status_code == 404
    assert "failed" in content.json()["error"]["message"]
    remix = http.post(f"{VIDEOS}/{video['id']}/remix", json={"prompt": "x"})
    assert remix.status_code == 400
    assert "failed" in remix.json()["error"]["message"]
