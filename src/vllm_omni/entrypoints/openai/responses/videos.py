"""Answers of `/v1/videos`: video objects, lists, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any
from weakref import WeakKeyDictionary

from vllm_omni.entrypoints.openai.responses.answers import frame_around
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder, ImageFormat, json_around_image
from vllm_omni.entrypoints.openai.schema.videos import Video, VideoFailure, VideoList
from vllm_omni.video_jobs.views import VideoView
from vllm_omni.video_jobs.watching import Ended, PreviewImage, Progress, VideoEvent

PREVIEW_FORMAT = ImageFormat("webp", 80)


def video_fields(view: VideoView) -> dict[str, Any]:
    """Fields of the API's object for one job."""
    job = view.job
    failure = None
    if job.status == "failed":
        failure = VideoFailure(code=job.error_code or "server_error", message=job.error_message or "The video failed.")
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=job.progress,
        created_at=int(job.created_at),
        started_at=_seconds(job.started_at),
        completed_at=_seconds(job.completed_at),
        expires_at=_seconds(job.expires_at),
        eta_seconds=None if view.eta_seconds is None else round(view.eta_seconds, 3),
        prompt=job.request["prompt"],
        output_format=job.request["output_format"],
        remixed_from_video_id=job.remixed_from,
        error=failure,
        **{name: job.shown[name] for name in ("size", "seconds", "num_frames", "fps", "seed", "num_inference_steps")},
    ).model_dump()


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def is_live(view: VideoView) -> bool:
    """Whether the job has not ended."""
    return view.job.status in ("queued", "in_progress")


def video_list(views: list[VideoView], has_more: bool) -> dict[str, Any]:
    """One page of a list."""
    ids = [view.job.id for view in views]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    page = VideoList(data=[], first_id=first, last_id=last, has_more=has_more).model_dump()
    return {**page, "data": [video_fields(view) for view in views]}


class EventEncoder:
    """Encodes events of jobs as server-sent events, each of them once for all its listeners."""

    def __init__(self, encoder: ImageEncoder) -> None:
        self._encoder = encoder
        self._encoded: WeakKeyDictionary[VideoEvent, asyncio.Task[bytes]] = WeakKeyDictionary()

    async def sent(self, events: AsyncGenerator[VideoEvent, None]) -> AsyncGenerator[bytes, None]:
        """Events of a stream: `video.progress`, `video.preview`, and at the end `video.completed` or `.failed`."""
        async for event in events:
            if (encoding := self._encoded.get(event)) is None:
                encoding = self._encoded[event] = asyncio.create_task(self._encode(event))
            yield await asyncio.shield(encoding)  # a listener that leaves does not cancel it for the others

    async def _encode(self, event: VideoEvent) -> bytes:
        match event:
            case Progress(view):
                return _framed("video.progress", {"video": video_fields(view)})
            case PreviewImage(view, pixels):
                kind, size = "video.preview", f"{pixels.shape[1]}x{pixels.shape[0]}"
                fields = {"type": kind, "output_format": PREVIEW_FORMAT.name, "size": size, "video": video_fields(view)}
                (start, end), (before, after) = frame_around(kind), json_around_image(fields)
                return await self._encoder.base64(pixels, PREVIEW_FORMAT, start + before, after + end)
            case Ended(view):
                return _framed(f"video.{view.job.status}", {"video": video_fields(view)})


def _framed(kind: str, fields: dict[str, Any]) -> bytes:
    start, end = frame_around(kind)
    return start + json.dumps({"type": kind, **fields}, separators=(",", ":")).encode() + end
