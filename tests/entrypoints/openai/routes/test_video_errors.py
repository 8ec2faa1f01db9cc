"""Requests for videos that are refused: the right status and `param`, before anything is stored or runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from testbed.live_server import FAKE_VIDEO_INFO, MODEL_NAME, LiveServer, live_server
from testbed.patience import wait_for
from tests.entrypoints.openai.routes.test_image_errors import error_of
from tests.entrypoints.openai.routes.videos import SYNC, VIDEOS, Paused, created, ended, made
from vllm_omni.entrypoints.openai.settings import HttpOptions
from vllm_omni.entrypoints.server.middleware import add_middleware
from vllm_omni.video_jobs.records import new_job_id
from vllm_omni.video_jobs.settings import VideoJobSettings

BAD_FIELDS: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", ""),
    ("prompt", 3),
    ("prompt", "x" * 32_001),
    ("prompt", "word " * 600),
    ("prompt", "\ud800"),
    ("n", 2),
    ("num_outputs_per_prompt", 2),
    ("seconds", 0),
    ("seconds", "0"),
    ("seconds", -1),
    ("seconds", "-1"),
    ("seconds", "abc"),
    ("seconds", "1e3"),
    ("seconds", [1]),
    ("seconds", True),
    ("seconds", float("nan")),
    ("seconds", float("inf")),
    ("seconds", 10**400),
    ("seconds", "9" * 5000),
    ("seconds", 0.001),
    ("seconds", 0.7),
    ("seconds", 4),
    ("seconds", 1_000_000),
    ("num_frames", 0),
    ("num_frames", 1),
    ("num_frames", -9),
    ("num_frames", 8),
    ("num_frames", "9"),
    ("num_frames", 1_000_000),
    ("num_frames", 10**400),
    ("fps", 0),
    ("fps", 1.5),
    ("fps", 10**6),
    ("size", "64"),
    ("size", "65x64"),
    ("size", "999999x999999"),
    ("output_format", "avi"),
    ("output_format", "png"),
    ("partial_images", 4),
    ("background", "transparent"),
    ("num_inference_steps", 0),
    ("num_inference_steps", 10_000),
    ("guidance_scale", 3.5),
    ("guidance_scale_2", 3.5),
    ("flow_shift", 1000.0),
    ("strength", 0.5),
    ("true_cfg_scale", -1),
    ("seed", -2),
    ("seed", 2**63),
    ("cache", True),
    ("lora", {"name": "style"}),
    ("priority", 2**40),
    ("input_reference", {"file_id": "file-1"}),
    ("input_reference", {"image_url": 3}),
    ("input_reference", {"url": "data:image/png;base64,AAAA"}),
    ("input_reference", "data:image/png;base64,AAAA"),
    ("image_reference", []),
    ("reference_url", 5),
    ("video_reference", {"video_url": "data:video/mp4;base64,AAAA"}),
    ("mask", "x"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(info=FAKE_VIDEO_INFO) as running:
        yield running


@pytest.mark.parametrize("path", [VIDEOS, SYNC])
@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=[f"{f}-{str(v)[:12]!a}" for f, v in BAD_FIELDS])
def test_bad_fields_are_refused_before_a_job_exists(
    server: LiveServer, http: httpx.Client, path: str, field: str, value: Any
) -> None:
    num_before = len(server.device.prompts)
    body = json.dumps({"prompt": "x", field: value})
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    error = error_of(response)
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", field)
    assert len(error["message"]) < 500
    assert "None" not in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert http.get(VIDEOS).json()["data"] == []
    assert len(server.device.prompts) == num_before


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-1, "seconds: input should be greater than 0, got "),
        (0.01, "seconds 0.01 at 8 frames a second: a video has 1 frame more than a multiple of 4; the nearest valid "),
        (1e6, "seconds 1000000 at 8 frames a second"),
        (1e9, "seconds 1000000000 at 8 frames a second"),
    ],
)
def test_a_number_in_a_string_is_refused_like_the_number(http: httpx.Client, value: float, words: str) -> None:
    for sent in (value, str(value), f"{value:e}"):
        for path in (VIDEOS, SYNC):
            message = error_of(http.post(path, json={"prompt": "x", "seconds": sent}))["message"]
            assert message.startswith(words), sent


def test_other_bodies_are_refused(http: httpx.Client) -> None:
    for sent, status in (
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"[]", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"json": {"prompt": "x", "model": "gpt-5"}}, 404),
        ({"json": {"prompt": "x", "num_frames": 9, "seconds": 0.5}}, 400),
        ({"json": {"prompt": "x", "width": 64}}, 400),
    ):
        for path in (VIDEOS, SYNC):
            response = http.post(path, **sent)
            assert (response.status_code, bool(error_of(response)["message"])) == (status, True), sent


UNKNOWN_ID = new_job_id(1000.0)
UNKNOWN = [UNKNOWN_ID, "video_1", "x", "%00", "%ED%A0%80", "sync", "..%2f..%2fetc", "a" * 5000]


@pytest.mark.parametrize("video_id", UNKNOWN, ids=lambda text: text[:12])
def test_unknown_ids_are_404(http: httpx.Client, video_id: str) -> None:
    path = f"{VIDEOS}/{video_id}"
    for method, path_of in (("GET", path), ("DELETE", path), ("GET", f"{path}/content"), ("GET", f"{path}/events")):
        response = http.request(method, path_of)
        assert response.status_code == 404, path_of
        assert 0 < len(error_of(response)["message"]) < 200
    assert http.post(f"{path}/remix", json={"prompt": "x"}).status_code == 404


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=-1", "limit"),
        ("limit=x", "limit"),
        ("limit=1.5", "limit"),
        ("order=up", "order"),
        ("after=x", "after"),
        (f"after={UNKNOWN_ID[:-1]}", "after"),
        (f"after={UNKNOWN_ID}x", "after"),
        ("after=%00", "after"),
    ],
    ids=lambda text: text[:12],  # the rest of an id is random
)
def test_wrong_pages_are_refused(http: httpx.Client, query: str, param: str) -> None:
    response = http.get(f"{VIDEOS}?{query}")
    assert (response.status_code, error_of(response)["param"]) == (400, param)


def test_remixes_are_checked(http: httpx.Client) -> None:
    remix = f"{VIDEOS}/{made(http)['id']}/remix"
    for body in ({}, {"prompt": ""}, {"prompt": None}, {"prompt": 3}, {"prompt": "word " * 600}, {"prompt": "\ud800"}):
        response = http.post(remix, content=json.dumps(body), headers={"content-type": "application/json"})
        assert (response.status_code, error_of(response)["param"]) == (400, "prompt"), body
    ignored = http.post(remix, json={"prompt": "y", "seed": 3}).json()
    assert ignored["ignored_fields"] == ["seed"]
    for video in http.get(VIDEOS).json()["data"]:
        ended(http, video["id"])
        assert http.delete(f"{VIDEOS}/{video['id']}").status_code == 200
        assert http.delete(f"{VIDEOS}/{video['id']}").status_code == 404


@pytest.mark.parametrize("path", ["edits", "extensions", "characters", "characters/char_1"])
def test_routes_that_no_model_can_answer_are_501(http: httpx.Client, path: str) -> None:
    response = http.get(f"{VIDEOS}/{path}")
    assert response.status_code == 501
    assert "neither edited nor extended" in error_of(response)["message"]
    assert "characters/" in path or http.post(f"{VIDEOS}/{path}", json={"prompt": "x"}).status_code == 501


def test_a_model_that_makes_pictures_names_its_routes() -> None:
    with live_server() as running, httpx.Client(base_url=running.url) as client:
        video_id = UNKNOWN_ID
        for method, path in (
            *(("POST", VIDEOS), ("POST", SYNC), ("GET", VIDEOS), ("GET", f"{VIDEOS}/{video_id}")),
            *(("DELETE", f"{VIDEOS}/{video_id}"), ("GET", f"{VIDEOS}/{video_id}/content")),
        ):
            response = client.request(method, path)
            assert (response.status_code, error_of(response)["param"]) == (400, "model")
            assert "/v1/images/generations" in error_of(response)["message"]


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_job_is_seen_by_its_key_alone() -> None:
    with (
        live_server(
            info=FAKE_VIDEO_INFO,
            settings={"requires_api_key": True},
            wrap=lambda app: add_middleware(app, HttpOptions(api_key=("one", "two"))),
        ) as running,
        openai.OpenAI(api_key="one", base_url=f"{running.url}/v1", max_retries=0) as one,
        openai.OpenAI(api_key="two", base_url=f"{running.url}/v1", max_retries=0) as two,
        openai.OpenAI(api_key="three", base_url=f"{running.url}/v1", max_retries=0) as three,
    ):
        video = one.videos.create_and_poll(prompt="x")
        assert [found.id for found in one.videos.list()] == [video.id]
        assert list(two.videos.list()) == []
        for call in (two.videos.retrieve, two.videos.download_content, two.videos.delete):
            with pytest.raises(openai.NotFoundError) as refused:
                call(video.id)
            with pytest.raises(openai.NotFoundError) as unknown:
                call(UNKNOWN_ID)
            assert _shape(refused.value) == _shape(unknown.value), "nothing shows that the job exists"
        with pytest.raises(openai.NotFoundError):
            two.videos.remix(video.id, prompt="y")
        assert list(two.videos.list(after=video.id, order="asc")) == []
        events = httpx.get(f"{running.url}{VIDEOS}/{video.id}/events", headers={"authorization": "Bearer two"})
        assert events.status_code == 404
        with pytest.raises(openai.AuthenticationError):
            three.videos.list()
        assert running.jobs is not None
        view = running.call(running.jobs.get, video.id, hashlib.sha256(b"one").hexdigest())
        assert view.job.id == video.id
        assert len(one.videos.download_content(video.id).content) > 1000


def _shape(error: openai.APIStatusError) -> tuple[int, str | None, str | None, int]:
    return error.status_code, error.code, error.type, len(error.message)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("limits", "status", "code"),
    [
        (VideoJobSettings(max_jobs_per_key=2), 429, "too_many_jobs"),
        (VideoJobSettings(max_jobs=2), 507, "store_full"),
    ],
    ids=["key", "store"],
)
def test_a_full_key_and_a_full_store_are_told(limits: VideoJobSettings, status: int, code: str, tmp_path: Path) -> None:
    settings = replace(limits, job_store=f"sqlite:///{tmp_path}/jobs.sqlite", sweep_seconds=0.02)
    with (
        live_server(info=FAKE_VIDEO_INFO, videos=settings) as running,
        httpx.Client(base_url=running.url) as client,
        Paused(running),
    ):
        first, _ = (created(client) for _ in range(2))
        refused = client.post(VIDEOS, json={"prompt": "one more"})
        assert (refused.status_code, error_of(refused)["code"]) == (status, code)
        assert ("retry-after" in refused.headers) == (status == 429)
        counted = f'vllm_omni:requests_rejected_total{{model_name="{MODEL_NAME}",reason="{code}"}} 1.0'
        assert counted in client.get("/metrics").text
        assert client.delete(f"{VIDEOS}/{first['id']}").status_code == 200
        # A job that runs counts until the server has stopped it.
        wait_for(lambda: client.post(VIDEOS, json={"prompt": "x"}).status_code == 200)
