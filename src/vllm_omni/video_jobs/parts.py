"""Parts of the video jobs of a running server, from the opening of the stores to their closing."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Self

from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.omni import AsyncOmni
from vllm_omni.video_jobs.claimer import JobClaimer
from vllm_omni.video_jobs.encoding import VideoEncoderPool
from vllm_omni.video_jobs.lease_keeper import LeaseKeeper
from vllm_omni.video_jobs.media import MediaStore
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.records import VideoJob
from vllm_omni.video_jobs.runner import JobRunner
from vllm_omni.video_jobs.scratch import ScratchFolder
from vllm_omni.video_jobs.settings import VideoJobSettings
from vllm_omni.video_jobs.store import open_store
from vllm_omni.video_jobs.sweeper import Sweeper
from vllm_omni.video_jobs.video_maker import VideoMaker
from vllm_omni.video_jobs.views import JobViews
from vllm_omni.video_jobs.watching import JobWatcher

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

logger = logging.getLogger(__name__)

ENCODINGS_PER_THREAD = 2
"""Videos that wait for an encoding thread with all their frames, before the server claims no further jobs."""
CLOSE_SECONDS = 5.0
"""Time in which `close` stores checkpoints of jobs that still run, and in which each store ends its calls."""
GIVE_BACK_SECONDS = 5.0
"""Time in which jobs that are stopped give up their claims."""


class ServiceParts:
    """Stores, encoders and tasks of the video jobs of one server."""

    def __init__(
        self,
        omni: AsyncOmni,
        settings: VideoJobSettings,
        served_model: str,
        observer: VideoObserver,
        store: JobStore,
        media: MediaStore,
        scratch: ScratchFolder,
    ) -> None:
        """Start the tasks and threads; the stores are open."""
        self._omni = omni
        self.store = store
        self.media = media
        self._scratch = scratch
        self._encoders = VideoEncoderPool(
            settings.num_encoding_threads, lambda seconds, num_frames: observer.on_video_encoded(seconds)
        )
        max_encoding = ENCODINGS_PER_THREAD * settings.num_encoding_threads
        self.claimer = JobClaimer(omni, store, served_model, settings.poll_seconds, max_encoding)
        self.maker = VideoMaker(omni, self._encoders, scratch.path)
        self.views = JobViews(omni, store, self.claimer.live)
        self.watcher = JobWatcher(store, self.views, self.claimer.live, settings.poll_seconds)
        self.leases = LeaseKeeper(store, settings.lease_seconds, self._stop_gone, self._note_progress)
        self._runner = JobRunner(
            omni=omni,
            store=store,
            media=media,
            leases=self.leases,
            maker=self.maker,
            observer=observer,
            checkpoint_seconds=settings.checkpoint_seconds,
            on_pause=self.claimer.pause,
            on_refused=self.claimer.note_refused,
            on_room=self.claimer.wake,
        )
        self._sweeper = Sweeper(store, media, observer, served_model, settings.sweep_seconds)
        self.leases.start()
        self._claiming = asyncio.create_task(self.claimer.run(self._runner.run), name="video-jobs-claim")
        self._sweeping = asyncio.create_task(self._sweeper.run(), name="video-jobs-sweep")

    @classmethod
    async def open(
        cls, omni: AsyncOmni, settings: VideoJobSettings, served_model: str, observer: VideoObserver
    ) -> Self:
        """Open the stores and start everything. Raises ConfigError."""
        store = await asyncio.to_thread(
            open_store,
            settings.job_store_url,
            lease_seconds=settings.lease_seconds,
            job_ttl_seconds=settings.job_ttl_seconds,
            max_jobs_per_key=settings.max_jobs_per_key,
            max_jobs=settings.max_jobs,
        )
        try:
            media = await asyncio.to_thread(MediaStore.open, settings.media_store_url)
            scratch = await asyncio.to_thread(_open_scratch, settings)
        except BaseException:
            await store.close()
            raise
        return cls(omni, settings, served_model, observer, store, media, scratch)

    async def delete(self, job_id: str, owner: str) -> None:
        """Delete a job; its files go at once where that is possible, else by a sweep. Raises JobNotFoundError."""
        await self.store.begin_delete(job_id, owner)
        await self._remove(job_id)

    async def abandon(self, job: VideoJob) -> None:
        """Remove what is stored of a job that could not be made; what cannot be removed now goes by a sweep."""
        try:
            await self.store.abandon(job)
        except RequestError as error:  # the row is still one of a creation, which ends
            logger.warning("video job %s was not made; what is stored of it goes later: %s", job.id, error)
            return
        await self._remove(job.id)

    async def _remove(self, job_id: str) -> None:
        """Stop a job under deletion, and remove its files and its row as far as the stores answer."""
        self._stop_gone({job_id})
        try:
            await self._sweeper.remove(job_id)
        except RequestError as error:
            logger.warning("video job %s is deleted, its files later: %s", job_id, error)

    def _stop_gone(self, job_ids: set[str]) -> None:
        """Stop jobs that were deleted, or that another server has claimed."""
        for job_id in job_ids:
            if (live := self.claimer.live.get(job_id)) is not None and live.stop_gone():
                logger.info("video job %s stops here: it was deleted, or another server runs it", job_id)

    def _note_progress(self, job_ids: set[str]) -> None:
        """Show clients the progress of jobs that is stored now."""
        for job_id in job_ids:
            if (live := self.claimer.live.get(job_id)) is not None:
                live.note_change()

    async def stop_jobs(self, timeout: float) -> None:
        """Claim nothing further, and give all jobs back to the store.

        Jobs may store checkpoints for `timeout` seconds. Then they have `GIVE_BACK_SECONDS` to let go of the store. One
        that waits for a store for longer is free when its lease ends.
        """
        self._claiming.cancel()
        await asyncio.wait([self._claiming])
        live = list(self.claimer.live.values())
        if not live:
            return
        drains = [asyncio.create_task(self._runner.drain(one)) for one in live]
        _, late = await asyncio.wait(drains, timeout=timeout)
        for drain in late:
            drain.cancel()
        begun = [one for one in live if one.task is not None]
        for one in begun:
            one.let_go(self._omni)
        tasks = [one.task for one in begun if one.task is not None]
        _, late_tasks = await asyncio.wait(tasks, timeout=GIVE_BACK_SECONDS)
        if late_tasks:
            logger.warning("%d video jobs wait for a store; they are free when their leases end", len(late_tasks))

    async def close(self) -> None:
        """Give running jobs back, and close everything."""
        await self.stop_jobs(CLOSE_SECONDS)
        self._sweeping.cancel()
        await asyncio.wait([self._sweeping])
        await self.leases.close()
        await self._encoders.close()
        await asyncio.to_thread(self._scratch.close)
        for name, closing in (("media store", self.media.close()), ("job store", self.store.close())):
            try:
                await asyncio.wait_for(closing, CLOSE_SECONDS)
            except TimeoutError:
                logger.warning("the %s still answers a call; the server ends without it", name)


def _open_scratch(settings: VideoJobSettings) -> ScratchFolder:
    """Folder for the files that this process writes. Blocks. Raises ConfigError."""
    try:
        return ScratchFolder.open(settings.scratch_folder)
    except OSError as error:
        raise ConfigError(
            f"--job-store: its folder takes the files that are being written, and {settings.scratch_folder} cannot be "
            f"made: {error.strerror}"
        ) from error
