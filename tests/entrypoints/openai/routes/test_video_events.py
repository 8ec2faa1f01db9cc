"""`/v1/videos/{id}/events`: progress, previews and the end of a job, as server-sent events."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from testbed.live_server import FAKE_VIDEO_INFO, LiveServer, expected_picture, live_server
from testbed.patience import GUARD_SECONDS
from tests.entrypoints.openai.routes.videos import VIDEOS, Paused, created, ended, made


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(info=FAKE_VIDEO_INFO, settings={"keep_alive_seconds": 0.05}) as running:
        yield running


def events_in(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Data of each event, after a check that its name is its type; comments are left out."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data: dict[str, Any] = json.loads(line.removeprefix("data: "))
            assert data["type"] == name
            yield data


def test_a_job_from_the_queue_to_its_end(server: LiveServer, http: httpx.Client) -> None:
    events = []
    with Paused(server):
        video = created(http, seed=3, partial_images=1, num_inference_steps=6)
        with http.stream("GET", f"{VIDEOS}/{video['id']}/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            stream = events_in(lines)
            first = next(stream)
            assert first["type"] == "video.progress"
            assert first["video"]["eta_seconds"] > 0
            assert any(line.startswith(":") for line in lines), "comments keep the stream open"
            server.call(server.device.run_plans, 4)  # the encode, and three steps: then a preview is due
            for event in stream:
                events.append(event)
                if event["type"] == "video.preview":
                    server.call(server.device.resume)
    kinds = [event["type"] for event in events]
    assert kinds[-1] == "video.completed"
    assert kinds.count("video.preview") == 1
    assert {"video.progress", "video.preview", "video.completed"} == set(kinds)
    progress = [event["video"]["progress"] for event in events]
    assert progress == sorted(progress)
    assert progress[-1] == 100
    assert "in_progress" in [event["video"]["status"] for event in events]
    assert events[-1]["video"] == http.get(f"{VIDEOS}/{video['id']}").json()
    (preview,) = (event for event in events if event["type"] == "video.preview")
    assert (preview["output_format"], preview["size"]) == ("webp", "64x64")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(preview["b64_json"]))).convert("RGB"), dtype=np.int16)
    right, wrong = (np.abs(pixels - expected_picture(3, step=step)).mean() for step in (3, 2))
    assert right < wrong / 1.5, "as near as WebP gets to noise"


def test_a_job_that_has_ended_is_one_event(http: httpx.Client) -> None:
    for video, kind in (
        (made(http), "video.completed"),
        (ended(http, created(http, prompt="fail-at-1")["id"]), "video.failed"),
    ):
        with http.stream("GET", f"{VIDEOS}/{video['id']}/events") as response:
            (event,) = events_in(response.iter_lines())
        assert event == {"type": kind, "video": video}


def test_a_job_that_is_deleted_ends_with_an_error_object(server: LiveServer, http: httpx.Client) -> None:
    with Paused(server):
        video = created(http)
        with http.stream("GET", f"{VIDEOS}/{video['id']}/events") as response:
            lines = response.iter_lines()
            assert next(events_in(lines))["type"] == "video.progress"
            with httpx.Client(base_url=server.url) as other:
                assert other.delete(f"{VIDEOS}/{video['id']}").status_code == 200
            *_, last = (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
    assert last["error"]["code"] == "video_not_found"


def test_a_listener_that_leaves_changes_nothing(server: LiveServer, http: httpx.Client) -> None:
    with Paused(server):
        video = created(http)
        with httpx.Client(base_url=server.url) as other, other.stream("GET", f"{VIDEOS}/{video['id']}/events") as gone:
            next(events_in(gone.iter_lines()))
    assert ended(http, video["id"])["status"] == "completed"


@pytest.mark.thorough
def test_streams_end_with_an_error_object_when_the_server_drains(
    log: Callable[[LiveServer], pytest.LogCaptureFixture],
) -> None:
    with live_server(info=FAKE_VIDEO_INFO) as server, httpx.Client(base_url=server.url, timeout=GUARD_SECONDS) as http:
        records = log(server)
        server.call(server.device.pause)
        paths = [f"{VIDEOS}/{created(http)['id']}/events" for _ in range(4)]  # more than the server runs
        with ExitStack() as open_streams:
            streams = [open_streams.enter_context(http.stream("GET", path)).iter_lines() for path in paths]
            for lines in streams:
                assert next(events_in(lines))["type"] == "video.progress"
            assert server.jobs is not None
            server.call(server.jobs.begin_drain)
            errors = [json.loads(line.removeprefix("data: "))["error"] for lines in streams for line in lines if line]
        assert [(error["code"], error["message"]) for error in errors] == [
            ("unavailable", "the server is draining")
        ] * 4
        response = http.get(paths[0])
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        server.call(server.device.resume)  # else the close would wait for the jobs that run
    assert [record for record in records.records if record.levelname == "ERROR"] == []
