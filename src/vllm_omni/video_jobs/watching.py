"""Events of a job for clients that listen, instead of asking again and again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_omni.video_jobs.live_job import LiveJob
from vllm_omni.video_jobs.views import JobViews, VideoView

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore


@dataclass(frozen=True)
class Progress:
    """The status or the progress of a job has changed; also the first event of each listener."""

    view: VideoView


@dataclass(frozen=True)
class PreviewImage:
    """A new preview of the video. Only the server that runs the job has previews."""

    view: VideoView
    pixels: np.ndarray
    """uint8 [height, width, 3]."""


@dataclass(frozen=True)
class Ended:
    """Last event: the job has completed or failed."""

    view: VideoView


VideoEvent = Progress | PreviewImage | Ended


class JobWatcher:
    """Makes the events of jobs from their newest state: a slow listener misses some, and none are kept for it."""

    def __init__(self, store: JobStore, views: JobViews, live: Mapping[str, LiveJob], look_seconds: float) -> None:
        """`look_seconds`: interval at which a job is looked up that waits, or that another server runs."""
        self._store = store
        self._views = views
        self._live = live
        self._look_seconds = look_seconds

    async def events(self, job_id: str, owner: str) -> AsyncGenerator[VideoEvent]:
        """Events from now on, until the job has ended. Raises JobNotFoundError, also when the job is deleted."""
        shown: tuple[str, int] | None = None
        num_previews = 0
        while True:
            live = self._live.get(job_id)
            change = None if live is None else live.next_change
            view = await self._views.view(await self._store.get(job_id, owner))
            if view.job.completed_at is not None:
                yield Ended(view)
                return
            if (state := (view.job.status, view.job.progress)) != shown:
                shown = state
                yield Progress(view)
            if live is not None and live.preview is not None and live.num_previews > num_previews:
                num_previews = live.num_previews
                yield PreviewImage(view, live.preview)
            await self._pause(change)

    async def _pause(self, change: asyncio.Event | None) -> None:
        """Wait for the next change of a job that runs here, but not for longer than another server's would take."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._look_seconds):
                if change is None:
                    await asyncio.sleep(self._look_seconds)
                else:
                    await change.wait()
