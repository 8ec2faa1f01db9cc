"""Jobs as clients see them: with the newest progress, an estimate of the time left, and the time of the next poll."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_omni.omni import AsyncOmni
from vllm_omni.video_jobs.live_job import LiveJob
from vllm_omni.video_jobs.records import VideoJob

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.2, 10.0
_POLLS_PER_WAIT = 10
"""Polls of a client during the time that is left, as long as they are neither too frequent nor too rare."""


@dataclass(frozen=True)
class VideoView:
    """A job with its newest progress."""

    job: VideoJob
    eta_seconds: float | None
    """Estimated seconds until it is completed; None once it has ended."""
    poll_after_ms: int
    """Milliseconds after which a client should ask again."""


class JobViews:
    """Makes views of jobs, from the store and from what runs here."""

    def __init__(self, omni: AsyncOmni, store: JobStore, live: Mapping[str, LiveJob]) -> None:
        self._omni = omni
        self._store = store
        self._live = live

    async def view(self, job: VideoJob) -> VideoView:
        """View of a job that was just read from the store. Raises UnavailableError if the store does not answer."""
        (view,) = await self.views([job])
        return view

    async def views(self, jobs: Sequence[VideoJob]) -> list[VideoView]:
        """Views of jobs that were just read, with at most one further query. Raises UnavailableError."""
        waiting = [job.id for job in jobs if self._waits_in_store(job)]
        before = await self._store.queued_before(waiting) if waiting else {}
        views = []
        for job in jobs:
            _, seconds_before = before.get(job.id, (0, 0.0))
            views.append(self._view(job, seconds_before))
        return views

    def _waits_in_store(self, job: VideoJob) -> bool:
        return self._omni.ready is not None and job.status == "queued" and job.id not in self._live

    def _view(self, job: VideoJob, seconds_before: float) -> VideoView:
        """View of a job. `seconds_before`: work of the jobs that wait in the store before it."""
        if job.completed_at is not None:
            return VideoView(job, None, poll_after_ms(0.0))
        if (live := self._live.get(job.id)) is not None:
            started = "in_progress" if live.has_started else job.status
            job = replace(job, status=started, progress=max(job.progress, live.percent))
        eta = self._eta_seconds(job, live, seconds_before)
        return VideoView(job, eta, poll_after_ms(eta))

    def _eta_seconds(self, job: VideoJob, live: LiveJob | None, seconds_before: float) -> float:
        left = job.work_seconds * (100 - job.progress) / 100
        if self._omni.ready is None:
            return left
        if live is not None:
            is_in_engine = live.request is not None and not live.is_made
            return self._omni.eta_seconds(live.request) if is_in_engine and live.request is not None else left
        if job.status == "in_progress":  # on another server: at the speed that it had so far
            return _at_own_speed(job) or left
        return self._omni.status().queue_seconds + seconds_before + left


def _at_own_speed(job: VideoJob) -> float | None:
    if job.started_at is None or not job.progress:
        return None
    return max(0.0, time.time() - job.started_at) * (100 - job.progress) / job.progress


def poll_after_ms(eta_seconds: float) -> int:
    """Milliseconds until the next poll of a client that waits for `eta_seconds`."""
    return round(1000 * min(max(eta_seconds / _POLLS_PER_WAIT, MIN_POLL_SECONDS), MAX_POLL_SECONDS))
