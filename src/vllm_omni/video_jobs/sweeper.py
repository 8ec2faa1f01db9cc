"""Removal of deleted and expired jobs with their files, and the numbers of jobs that metrics show."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from vllm_omni.errors import RequestError
from vllm_omni.video_jobs.media import MediaStore
from vllm_omni.video_jobs.observer import VideoObserver

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

logger = logging.getLogger(__name__)


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
        for job_id in await self._store.unfinished_deletes():
            await self.remove(job_id)
        self._observer.on_job_counts(await self._store.counts(self._served_model))

    async def remove(self, job_id: str) -> None:
        """Remove the files of a job under deletion, then its row: unless its server may still write files."""
        await self._media.delete_tree(job_id)
        await self._store.end_delete(job_id)
