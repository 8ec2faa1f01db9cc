"""Jobs as clients see them: with an estimate of the time left, and the time of the next poll."""

from __future__ import annotations

from collections.abc import Mapping
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
        live = self._live.get(job.id)
        if job.completed_at is not None:
            return VideoView(job, None, poll_after_ms(0.0))
        eta = await self._eta_seconds(job, live)
        return VideoView(job, eta, poll_after_ms(eta))

    async def _eta_seconds(self, job: VideoJob, live: LiveJob | None) -> float:
        left = job.work_seconds * (100 - job.progress) / 100
        if self._omni.ready is None:
            return left
        if live is not None:
            is_in_engine = live.request is not None and not live.is_made
            return self._omni.eta_seconds(live.request) if is_in_engine and live.request is not None else left
        if job.status == "in_progress":  # on another server
            return left
        _, seconds = await self._store.queued_before(job)
        return self._omni.status().queue_seconds + seconds + left


def poll_after_ms(eta_seconds: float) -> int:
    """Milliseconds until the next poll of a client that waits for `eta_seconds`."""
    return round(1000 * min(max(eta_seconds / _POLLS_PER_WAIT, MIN_POLL_SECONDS), MAX_POLL_SECONDS))
