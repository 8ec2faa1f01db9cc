"""Clients of a soak of video jobs: they make jobs, watch them, fetch the videos, and delete some jobs early."""

from __future__ import annotations

import asyncio
import io
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import av
import httpx
import numpy as np

from benchmarks.soak_load import psnr

VIDEOS = "/v1/videos"
STATUSES = ("queued", "in_progress", "completed", "failed")
PAUSE_SECONDS = 0.2
"""Pause before a call is repeated, and the shortest time between two polls."""
PATIENCE_SECONDS = 300.0
"""Limit of the time in which a job ends, and in which a call is answered by some server."""
MOST_DELETE_SECONDS = 3.0
"""A job is deleted up to so many seconds after it was made."""


@dataclass(frozen=True)
class VideoCase:
    """Request for a video that is made before the load too."""

    prompt: str
    num_frames: int
    steps: int
    seed: int
    size: str = "64x64"

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "num_frames": self.num_frames,
            "num_inference_steps": self.steps,
            "seed": self.seed,
            "size": self.size,
        }


VIDEO_CASES = (
    VideoCase("a rocket moving up on a black background", 5, 4, seed=1),
    VideoCase("a red apple on a white background", 9, 8, seed=2),
    VideoCase("a panda moving left", 17, 6, seed=3),
    VideoCase("a sunflower on a blue background", 9, 12, seed=4, size="96x64"),
)
CalmVideos = Mapping[VideoCase, np.ndarray]
"""Frames of each case, uint8 [frames, height, width, 3], as they were made before the load."""


class UnexpectedVideoAnswerError(Exception):
    """A response that does not fit its request."""


@dataclass
class VideoTally:
    """Counts of all clients together, and what they know about their jobs."""

    completed: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Job id -> the video object with which it was first seen completed."""
    deleted: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    """Job id -> its error."""
    num_unanswered: int = 0
    """Requests for a job that were lost with their server; the job may have been made."""
    num_repeated: int = 0
    """Calls that another server, or the same one later, had to answer."""
    worst_psnr: float = float("inf")
    """Least PSNR, in dB, of a video's frames to those made before the load."""
    seconds: list[float] = field(default_factory=list)
    """Time from each job's creation to its end, as its client saw it."""
    faults: list[str] = field(default_factory=list)
    """Texts of wrong responses."""

    @property
    def num_ended(self) -> int:
        return len(self.completed) + len(self.deleted) + len(self.failed)


class Fleet:
    """Clients of the servers that run now. A server that is restarted has a new address, and so a new client."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._clients: list[httpx.AsyncClient] = []

    def add(self, url: str) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        client = httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS, limits=limits)
        self._clients.append(client)
        return client

    async def remove(self, client: httpx.AsyncClient) -> None:
        self._clients.remove(client)
        await client.aclose()

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()

    def pick(self) -> httpx.AsyncClient:
        return self._rng.choice(self._clients)

    def has(self, client: httpx.AsyncClient) -> bool:
        return client in self._clients


async def ask_any(fleet: Fleet, method: str, path: str, tally: VideoTally) -> httpx.Response:
    """Response of some server to a request without a body, which is repeated when a server dies or is busy."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        answer = await ask(fleet.pick(), method, path)
        if answer is not None and answer.status_code != 503:
            return answer
        tally.num_repeated += 1
        await asyncio.sleep(PAUSE_SECONDS)
    raise UnexpectedVideoAnswerError(f"{method} {path}: no server answered in {PATIENCE_SECONDS:g} s")


async def ask(client: httpx.AsyncClient, method: str, path: str, **body: Any) -> httpx.Response | None:
    """Response, or None if the server died."""
    try:
        return await client.request(method, path, **body)
    except (httpx.TransportError, RuntimeError):  # RuntimeError: the client was closed together with its server
        return None


async def calm_videos(client: httpx.AsyncClient) -> CalmVideos:
    """Make all cases one after another, without jobs."""
    videos = {}
    for case in VIDEO_CASES:
        answer = await client.post(f"{VIDEOS}/sync", json=case.body)
        videos[case] = frames_of(checked(answer).content)
    return videos


async def play_client(
    fleet: Fleet, rng: random.Random, calm: CalmVideos, tally: VideoTally, jobs: list[int], deletes: float
) -> None:
    """Make one job after another while `jobs` has numbers; `deletes`: share of the jobs that are deleted early."""
    while jobs:
        jobs.pop()
        case, is_deleted = rng.choice(VIDEO_CASES), rng.random() < deletes
        try:
            job_id = await _make_job(fleet, case, tally)
            if is_deleted:
                await _delete_later(fleet, rng, job_id, tally)
            else:
                await _watch_to_the_end(fleet, case, job_id, calm, tally)
        except (UnexpectedVideoAnswerError, KeyError, ValueError, av.FFmpegError) as error:
            tally.faults.append(f"{case}: {type(error).__name__}: {error}")


async def _make_job(fleet: Fleet, case: VideoCase, tally: VideoTally) -> str:
    while True:
        answer = await ask(fleet.pick(), "POST", VIDEOS, json=case.body)
        if answer is not None and answer.status_code != 503:
            made: str = checked(answer).json()["id"]
            return made
        tally.num_unanswered += answer is None
        tally.num_repeated += 1
        await asyncio.sleep(PAUSE_SECONDS)


async def _delete_later(fleet: Fleet, rng: random.Random, job_id: str, tally: VideoTally) -> None:
    await asyncio.sleep(rng.uniform(0, MOST_DELETE_SECONDS))
    num_repeated = tally.num_repeated
    answer = await ask_any(fleet, "DELETE", f"{VIDEOS}/{job_id}", tally)
    if answer.status_code == 404 and tally.num_repeated > num_repeated:
        pass  # the server that died had deleted it
    elif checked(answer).json() != {"id": job_id, "object": "video.deleted", "deleted": True}:
        raise UnexpectedVideoAnswerError(f"a delete was answered with {answer.text[:200]}")
    tally.deleted.add(job_id)
    for path in (job_id, f"{job_id}/content"):
        answer = await ask_any(fleet, "GET", f"{VIDEOS}/{path}", tally)
        if answer.status_code != 404:
            raise UnexpectedVideoAnswerError(f"{path} was deleted and is answered with {answer.status_code}")


async def _watch_to_the_end(fleet: Fleet, case: VideoCase, job_id: str, calm: CalmVideos, tally: VideoTally) -> None:
    start = time.monotonic()
    video = await _ended(fleet, job_id, tally)
    tally.seconds.append(time.monotonic() - start)
    if video["status"] == "failed":
        tally.failed[job_id] = str(video["error"])
        return
    tally.completed[job_id] = video
    content = checked(await ask_any(fleet, "GET", f"{VIDEOS}/{job_id}/content", tally))
    frames, wanted = frames_of(content.content), calm[case]
    if frames.shape != wanted.shape:
        raise UnexpectedVideoAnswerError(f"{job_id} has the shape {frames.shape}, not {wanted.shape}")
    tally.worst_psnr = min(tally.worst_psnr, psnr(frames, wanted))


async def _ended(fleet: Fleet, job_id: str, tally: VideoTally) -> dict[str, Any]:
    """The video object of a job that has ended. It is polled at one server for as long as this one lives.

    Another server shows the progress as it was when the running server last wrote it: an older number is no fault.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    client, shown = fleet.pick(), (0, 0)
    while time.monotonic() < deadline:
        answer = await ask(client, "GET", f"{VIDEOS}/{job_id}")
        if answer is None or answer.status_code == 503:
            tally.num_repeated += 1
            if not fleet.has(client) or answer is None:
                client, shown = fleet.pick(), (0, 0)
            await asyncio.sleep(PAUSE_SECONDS)
            continue
        video: dict[str, Any] = checked(answer).json()
        state = STATUSES.index(video["status"]), video["progress"]
        if state < shown:
            raise UnexpectedVideoAnswerError(f"{job_id} goes back from {shown} to {state}")
        shown = state
        if video["status"] in ("completed", "failed"):
            return video
        await asyncio.sleep(max(PAUSE_SECONDS, int(answer.headers["openai-poll-after-ms"]) / 1000))
    raise UnexpectedVideoAnswerError(f"{job_id} has not ended in {PATIENCE_SECONDS:g} s; it is {shown}")


async def list_all(fleet: Fleet, tally: VideoTally, limit: int = 20) -> dict[str, dict[str, Any]]:
    """All jobs of the store by their ids, read page by page."""
    videos: dict[str, dict[str, Any]] = {}
    after = ""
    while True:
        page = checked(await ask_any(fleet, "GET", f"{VIDEOS}?limit={limit}&order=asc{after}", tally)).json()
        videos |= {video["id"]: video for video in page["data"]}
        if not page["has_more"]:
            return videos
        after = f"&after={page['last_id']}"


def checked(answer: httpx.Response) -> httpx.Response:
    if answer.status_code != 200:
        raise UnexpectedVideoAnswerError(f"{answer.status_code} {answer.text[:200]}")
    return answer


def frames_of(file: bytes) -> np.ndarray:
    """Frames of a video file, uint8 [frames, height, width, 3]."""
    with av.open(io.BytesIO(file), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
