"""Ends of a claim in the stores: the job is completed, fails, or is given back for any server to go on."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vllm_omni.errors import JobNotFoundError, LeaseLostError, RequestError
from vllm_omni.video_jobs.lease_keeper import LeaseKeeper
from vllm_omni.video_jobs.live_job import LiveJob, StopReason
from vllm_omni.video_jobs.media import MediaStore, MediaStoreError
from vllm_omni.video_jobs.retrying import retrying

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

logger = logging.getLogger(__name__)

STORE_SECONDS = 300.0
"""Time for which writes to the stores are repeated while these do not answer."""


@dataclass(frozen=True)
class JobEnds:
    """Ends claims. Each method runs to its end in one piece: its caller does not cancel it (`uninterrupted`)."""

    store: JobStore
    media: MediaStore
    leases: LeaseKeeper

    async def complete(self, live: LiveJob, outputs: Mapping[str, str]) -> None:
        """Store the row that names the files `outputs` (variant -> media key); they are stored already."""
        if live.start_note is not None:
            await live.start_note  # a late one must not come after the end
        try:
            await persist(partial(self.store.complete, live.id, live.claim.fence, outputs))
        except (LeaseLostError, JobNotFoundError):
            await self.give_back(live)
        except RequestError as error:
            logger.warning("video job %s goes back to the store: %s", live.id, error)
            await self.give_back(live)
        else:
            await self._note_completed(live)

    async def fail(self, live: LiveJob, code: str, message: str) -> None:
        """Store that the job failed."""
        await self.discard(*live.unrecorded)
        try:
            await persist(partial(self.store.fail, live.id, live.claim.fence, code, message))
        except LeaseLostError:
            await self.give_back(live)
        except RequestError as error:
            logger.warning("video job %s: its failure cannot be stored: %s", live.id, error)
        else:
            self.leases.drop(live.id, live.claim.fence)
            await self._discard_checkpoint(live)

    async def give_back(self, live: LiveJob, refusal: str | None = None) -> None:
        """End the claim, so that any server may go on, or the deletion of the job can end.

        refusal: see `JobStore.release`.
        """
        self.leases.drop(live.id, live.claim.fence)
        try:
            if live.unrecorded and await self._has_recorded(live):  # the answer to the commit was lost
                await self._note_completed(live)
                return
        except JobNotFoundError:
            pass
        except RequestError as error:  # the files go with the job
            logger.warning("video job %s is free when its lease ends: %s", live.id, error)
            return
        await self.discard(*live.unrecorded)
        try:
            await self.store.release(live.id, live.claim.fence, refusal)
        except LeaseLostError:
            pass
        except RequestError as error:
            logger.warning("video job %s is free when its lease ends: %s", live.id, error)
        else:
            if live.stop_reason is StopReason.DRAIN:
                step = None if live.checkpoints is None else live.checkpoints.newest_step
                stored = "" if step is None else f" stored after step {step},"
                logger.info("video job %s:%s given back for another server, or for a restart", live.id, stored)

    async def discard(self, *keys: str) -> None:
        """Remove files that no row names."""
        for key in keys:
            try:
                await self.media.delete(key)
            except MediaStoreError as error:  # it goes with the job
                logger.warning("%s cannot be removed: %s", key, error)

    async def _note_completed(self, live: LiveJob) -> None:
        self.leases.drop(live.id, live.claim.fence)
        logger.info("video job %s completed", live.id)
        await self._discard_checkpoint(live)

    async def _has_recorded(self, live: LiveJob) -> bool:
        """Whether the job's row names the files of this claim. Raises JobNotFoundError and UnavailableError."""
        job = await self.store.get(live.id, live.claim.job.owner)
        return bool(job.outputs) and {*job.outputs.values()} == live.unrecorded

    async def _discard_checkpoint(self, live: LiveJob) -> None:
        """Remove the checkpoint of a job that has ended: its row does not name it any more."""
        newest = live.claim.job.checkpoint if live.checkpoints is None else live.checkpoints.newest_key
        if newest is not None:
            await self.discard(newest)


async def persist(call: Callable[[], Awaitable[object]]) -> None:
    """Write to the store, however often it does not answer or its disk is full."""
    await retrying(call, RequestError, STORE_SECONDS)
