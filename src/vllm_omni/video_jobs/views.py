"""Jobs as clients see them: with an estimate of the time left, and the time of the next poll."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """A job with its progress, and an estimate of the time left."""

    job: VideoJob
    """As the store has it, on every server: a newer progress that only the server of the job knows could fall again."""
    eta_seconds: float | None
    """Estimated seconds until it is completed; None once it has ended."""
    poll_after_ms: int
    """Milliseconds after which a client should ask again."""


class JobViews:
    """Makes views of jobs. What runs here gives better estimates."""

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
        eta = self._eta_seconds(job, self._live.get(job.id), seconds_before)
        return VideoView(job, eta, poll_after_ms(eta))

    def _eta_seconds(self, job: VideoJob, live: LiveJob | None, seconds_before: float) -> float:
        left = job.work_seconds * (100 - job.progress) / 100
        if self._omni.ready is None:
            return left
        if live is not None:
            is_in_engine = live.request is not None and not live.is_made
            return self._omni.eta_seconds(live.request) if is_in_engine and live.request is not None else left
        if job.status == "in_progress":  # on another server
            return left
        return self._omni.status().queue_seconds + seconds_before + left


def poll_after_ms(eta_seconds: float) -> int:
    """Milliseconds until the next poll of a client that waits for `eta_seconds`."""
    return round(1000 * min(max(eta_seconds / _POLLS_PER_WAIT, MIN_POLL_SECONDS), MAX_POLL_SECONDS))
