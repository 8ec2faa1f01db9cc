"""Helpers of the tests of `/v1/videos`."""

from __future__ import annotations

from typing import Any

import httpx

from testbed.live_server import LiveServer
from testbed.patience import wait_for

VIDEOS = "/v1/videos"
SYNC = f"{VIDEOS}/sync"
NUM_FRAMES, FPS = 9, 8
"""Length of a video of `FAKE_VIDEO_INFO`, in frames, and its frames a second."""


def created(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The video object of a new job. The prompt is `x`, unless `fields` has another one."""
    response = http.post(VIDEOS, json={"prompt": "x", **fields})
    assert response.status_code == 200, response.text
    video: dict[str, Any] = response.json()
    return video


def ended(http: httpx.Client, video_id: str) -> dict[str, Any]:
    """The video object of a job, once it is completed or has failed."""
    videos: list[dict[str, Any]] = []

    def has_ended() -> bool:
        videos.append(http.get(f"{VIDEOS}/{video_id}").json())
        return videos[-1]["status"] in ("completed", "failed")

    wait_for(has_ended)
    return videos[-1]


def made(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The video object of a new job that has completed."""
    video = ended(http, created(http, **fields)["id"])
    assert video["status"] == "completed", video
    return video


class Paused:
    """The device of a server stands still inside the `with` block."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server

    def __enter__(self) -> LiveServer:
        self._server.call(self._server.device.pause)
        return self._server

    def __exit__(self, *_: object) -> None:
        self._server.call(self._server.device.resume)
