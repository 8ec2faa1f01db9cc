"""Checkpoints of a running job on their way to the media store."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.errors import JobNotFoundError, LeaseLostError, RequestError
from vllm_omni.video_jobs.checkpoint_file import to_bytes
from vllm_omni.video_jobs.media import MediaStore
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.records import ClaimedJob

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the newest checkpoint of one job; those that come while one is being written replace each other."""

    def __init__(
        self, claim: ClaimedJob, name: str, store: JobStore, media: MediaStore, observer: VideoObserver
    ) -> None:
        """`name`: of model and request, see `checkpoint_file`."""
        self._claim = claim
        self._name = name
        self._store = store
        self._media = media
        self._observer = observer
        self._next: Checkpoint | None = None
        self._writing: asyncio.Task[None] | None = None
        self.newest_key = claim.job.checkpoint
        """Media key of the newest checkpoint that the job's row names."""
        self.newest_step: int | None = None
        """Step of the newest checkpoint that was written here."""

    def add(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint` in the background."""
        self._next = checkpoint
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())

    async def finish(self) -> None:
        """Wait until what was added is written, or given up."""
        if self._writing is not None:
            await asyncio.wait([self._writing])

    async def discard(self) -> None:
        """Write nothing further; wait for the checkpoint that is being written."""
        self._next = None
        await self.finish()

    async def _write_all(self) -> None:
        while self._next is not None:
            checkpoint, self._next = self._next, None
            try:
                await self._write(checkpoint)
            except (RequestError, LeaseLostError) as error:  # the job goes on without it
                logger.warning("video job %s: its checkpoint cannot be stored: %s", self._claim.job.id, error)

    async def _write(self, checkpoint: Checkpoint) -> None:
        start, job_id, fence = time.monotonic(), self._claim.job.id, self._claim.fence
        data = await asyncio.to_thread(to_bytes, checkpoint, self._name)
        key = f"{job_id}/{fence}/checkpoint-{checkpoint.step}.safetensors"
        await self._media.put(key, data)
        try:
            old = await self._store.note_checkpoint(job_id, fence, key)
        except (LeaseLostError, JobNotFoundError):  # after other errors the row may name it
            await self._media.delete(key)
            raise
        self.newest_key, self.newest_step = key, checkpoint.step
        self._observer.on_checkpoint_stored(time.monotonic() - start, len(data))
        if old not in (None, key):
            await self._media.delete(old)
