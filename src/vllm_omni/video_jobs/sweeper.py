"""Removal of deleted and expired jobs with their files, and the numbers of jobs that metrics show."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_omni.errors import RequestError
from vllm_omni.video_jobs.media import MediaStore, MediaStoreError
from vllm_omni.video_jobs.observer import VideoObserver

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

logger = logging.getLogger(__name__)


MAX_FAILURES = 3
"""Jobs whose files cannot be removed, after which a sweep ends: the store may be away, and each try takes long."""
MAX_PAUSE_SECONDS = 300.0
"""Longest pause before the files of one job are tried again."""


@dataclass(frozen=True)
class Failure:
    """A job whose files could not be removed."""

    retry_at: float
    """Time of `time.monotonic`."""
    pause: float
    """Seconds; twice as long after each failure."""


class Sweeper:
    """Finishes deletions that were cut off, expires jobs, and counts jobs, at regular times."""

    def __init__(
        self, store: JobStore, media: MediaStore, observer: VideoObserver, served_model: str, sweep_seconds: float
    ) -> None:
        """`served_model`: the model whose jobs are counted; jobs of all models are removed."""
        self._store = store
        self._media = media
        self._observer = observer
        self._served_model = served_model
        self._sweep_seconds = sweep_seconds
        self._failures: dict[str, Failure] = {}

    async def run(self) -> None:
        """Sweep until the task is cancelled."""
        is_failing = False
        while True:
            try:
                await self.sweep()
                is_failing = False
            except RequestError as error:
                if not is_failing:
                    logger.warning("deleted and expired video jobs wait until the stores answer: %s", error)
                is_failing = True
            except Exception:  # a bug of ours must not end all further sweeps
                logger.exception("deleted and expired video jobs cannot be removed")
            await asyncio.sleep(self._sweep_seconds)

    async def sweep(self) -> None:
        """Count jobs, and remove those that are due. Raises RequestError if the database does not answer."""
        self._observer.on_job_counts(await self._store.counts(self._served_model))
        job_ids = await self._store.unfinished_deletes()
        self._failures = {job_id: self._failures[job_id] for job_id in job_ids if job_id in self._failures}
        num_failures = 0
        for job_id in job_ids:
            failure = self._failures.get(job_id)
            if failure is not None and time.monotonic() < failure.retry_at:
                continue
            try:
                await self.remove(job_id)
            except Exception as error:
                if isinstance(error, RequestError) and not isinstance(error, MediaStoreError):
                    raise  # the database: all jobs wait for it
                logger.warning("the files of the deleted video job %s cannot be removed now: %s", job_id, error)
                pause = min(2 * failure.pause if failure else self._sweep_seconds, MAX_PAUSE_SECONDS)
                self._failures[job_id] = Failure(time.monotonic() + pause, pause)
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    return

    async def remove(self, job_id: str) -> None:
        """Remove the files of a job under deletion, then its row: unless its server may still write files."""
        await self._media.delete_tree(job_id)
        await self._store.end_delete(job_id)
