"""Run claimed jobs to their end on this server: completed, failed, or given back to the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.errors import (
    InvalidRequestError,
    JobNotFoundError,
    LeaseLostError,
    OmniError,
    QueueFullError,
    RequestAbortedError,
    RequestError,
    UnavailableError,
)
from vllm_omni.jobs import Job
from vllm_omni.omni import AsyncOmni
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.video_jobs.checkpoint_file import from_bytes
from vllm_omni.video_jobs.checkpoint_writer import CheckpointWriter
from vllm_omni.video_jobs.encoding import EncodedVideo
from vllm_omni.video_jobs.job_requests import params_from_json, stored_prompt
from vllm_omni.video_jobs.lease_keeper import LeaseKeeper
from vllm_omni.video_jobs.live_job import LiveJob, StopReason
from vllm_omni.video_jobs.media import MediaNotFoundError, MediaStore, MediaStoreError, MediaStoreFullError
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.progress import WRITING_PERCENT, JobProgress
from vllm_omni.video_jobs.retrying import retrying, uninterrupted
from vllm_omni.video_jobs.video_maker import VideoMaker, is_whole_output

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

logger = logging.getLogger(__name__)

STORE_SECONDS, MEDIA_SECONDS = 300.0, 60.0
"""Time for which writes to the stores are repeated while these do not answer."""


@dataclass(frozen=True)
class JobRunner:
    """Runs one claimed job at a call; all of them share the engine and the stores."""

    omni: AsyncOmni
    store: JobStore
    media: MediaStore
    leases: LeaseKeeper
    maker: VideoMaker
    observer: VideoObserver
    checkpoint_seconds: float
    on_queue_full: Callable[[float], None]
    """Called with the seconds after which the engine's queue may have room."""
    on_room: Callable[[], None]
    """Called when the engine may have room for another job."""

    async def run(self, live: LiveJob) -> None:
        """Run a claimed job to its end, or until the task is cancelled; see `LiveJob.stop_reason`.

        Raises CancelledError only.
        """
        self.leases.hold(live.id, live.claim.fence)
        try:
            await self._complete(live, await self._make(live))
            logger.info("video job %s completed", live.id)
        except asyncio.CancelledError:
            await self._give_back(live)
            raise
        except (LeaseLostError, JobNotFoundError, RequestAbortedError):
            await self._give_back(live)
        except QueueFullError as error:
            self.on_queue_full(error.retry_after or 1.0)
            await self._give_back(live)
        except UnavailableError as error:
            logger.warning("video job %s goes back to the store: %s", live.id, error)
            await self._give_back(live)
        except RequestError as error:
            await self._end_failed(live, error)
        except Exception:
            logger.exception("video job %s failed", live.id)
            await self._fail(live, "server_error", "The server failed on this request.")
        finally:
            self.leases.drop(live.id, live.claim.fence)

    async def drain(self, live: LiveJob) -> None:
        """Give a job back to the store with a checkpoint of its newest step; one that is made is completed instead."""
        assert live.task is not None
        live.stop_reason = StopReason.DRAIN
        if live.has_started and not live.is_made and live.request is not None:
            self.omni.request_checkpoint(live.request.request_id)
            answered = asyncio.create_task(live.checkpointed.wait())
            await asyncio.wait([answered, live.task], return_when=asyncio.FIRST_COMPLETED)
            answered.cancel()
            self.omni.abort(live.request.request_id)  # its task still writes the checkpoint
        elif not live.is_made:
            live.task.cancel()
        await asyncio.wait([live.task])

    # Making -----------------------------------------------------------------------------------------------

    async def _make(self, live: LiveJob) -> EncodedVideo:
        """Make the video from the job's checkpoint, or from the start if there is none that fits."""
        if (checkpoint := await self._read_checkpoint(live)) is not None:
            try:
                return await self._make_from(live, checkpoint)
            except InvalidRequestError as error:
                logger.warning("video job %s begins from the start: %s", live.id, error)
        return await self._make_from(live, None)

    async def _make_from(self, live: LiveJob, checkpoint: Checkpoint | None) -> EncodedVideo:
        job = live.claim.job
        files = [
            await retrying(partial(self.media.get, key), MediaStoreError, MEDIA_SECONDS, never=MediaNotFoundError)
            for key in job.inputs
        ]
        request = await asyncio.to_thread(self._engine_job, live, files, checkpoint)
        live.request, progress = request, JobProgress(request.requests[0], live.percent)
        live.checkpoints = CheckpointWriter(
            live.claim, self._checkpoint_name(live), self.store, self.media, self.observer
        )
        try:
            output_format = job.request["output_format"]
            return await self.maker.make(request, output_format, partial(self._note_output, live, progress))
        finally:
            await (live.checkpoints.finish() if live.stop_reason is StopReason.DRAIN else live.checkpoints.discard())

    def _engine_job(self, live: LiveJob, input_files: list[bytes], checkpoint: Checkpoint | None) -> Job:
        """The engine's job for a row, made in a thread: it decodes pictures and counts tokens."""
        job = live.claim.job
        checked = self.omni.check(stored_prompt(job, input_files), params_from_json(job.request["params"]))
        # An aborted request may not have ended yet when the same job begins again, so each begin has its own id.
        live.num_begins += 1
        request_id = f"{job.id}-{live.claim.fence}-{live.num_begins}"
        return self.omni.make_checked_job(
            checked, request_id, resume=checkpoint, checkpoint_seconds=self.checkpoint_seconds
        )

    async def _read_checkpoint(self, live: LiveJob) -> Checkpoint | None:
        key = live.claim.job.checkpoint
        if key is None:
            return None
        try:
            data = await retrying(
                partial(self.media.get, key), MediaStoreError, MEDIA_SECONDS, never=MediaNotFoundError
            )
            checkpoint = await asyncio.to_thread(from_bytes, data, self._checkpoint_name(live))
        except OmniError as error:
            logger.warning("video job %s begins from the start: its checkpoint cannot be read: %s", live.id, error)
            return None
        logger.info("video job %s goes on after step %d", live.id, checkpoint.step)
        return checkpoint

    def _checkpoint_name(self, live: LiveJob) -> str:
        return f"{live.claim.job.served_model} {live.id}"

    def _note_output(self, live: LiveJob, progress: JobProgress, output: OmniRequestOutput) -> None:
        """Pass on what an output of the engine says: start, progress, preview, checkpoint."""
        if output.started and not live.has_started:
            live.has_started = True
            self.on_room()
            live.start_note = asyncio.create_task(self._note_started(live))
        if output.checkpoint is not None and live.checkpoints is not None:
            live.checkpoints.add(output.checkpoint)
        if output.checkpointed and live.stop_reason is StopReason.DRAIN:
            live.checkpointed.set()
        if output.images and output.step < output.num_inference_steps:
            live.preview = output.images[0]
            live.note_change()
        if not live.is_made and is_whole_output(output):
            live.is_made = True
            self.on_room()
        progress.note(output)
        self._note_percent(live, progress.percent)

    def _note_percent(self, live: LiveJob, percent: int) -> None:
        if percent > live.percent:
            live.percent = percent
            self.leases.note_progress(live.id, live.claim.fence, percent)

    async def _note_started(self, live: LiveJob) -> None:
        try:
            await self._persist(partial(self.store.note_started, live.id, live.claim.fence))
        except (LeaseLostError, RequestError) as error:  # the next renewal stops the job if it is lost
            logger.warning("video job %s: its start cannot be noted: %s", live.id, error)
        live.note_change()

    # Ends -------------------------------------------------------------------------------------------------

    async def _complete(self, live: LiveJob, encoded: EncodedVideo) -> None:
        """Store the files, then the row that names them."""
        self._note_percent(live, WRITING_PERCENT)
        try:
            outputs = await self._store_files(live, encoded)
        finally:
            await asyncio.to_thread(encoded.remove)
        if live.start_note is not None:
            await live.start_note  # a late one must not come after the end
        complete = partial(self.store.complete, live.id, live.claim.fence, outputs)
        await self._persist(lambda: uninterrupted(complete()))
        live.unrecorded.clear()
        await self._discard_checkpoint(live)

    async def _store_files(self, live: LiveJob, encoded: EncodedVideo) -> dict[str, str]:
        files = {"video": encoded.video, "thumbnail": encoded.thumbnail, "spritesheet": encoded.spritesheet}
        outputs = {variant: f"{live.folder}/{file.name}" for variant, file in files.items()}
        for variant, file in files.items():
            live.unrecorded.add(outputs[variant])
            await retrying(
                partial(self.media.put, outputs[variant], file),
                MediaStoreError,
                MEDIA_SECONDS,
                never=MediaStoreFullError,
            )
        return outputs

    async def _has_recorded(self, live: LiveJob) -> bool:
        """Whether the job's row names the files of this claim. Raises JobNotFoundError and UnavailableError."""
        job = await self.store.get(live.id, live.claim.job.owner)
        return bool(job.outputs) and {*job.outputs.values()} == live.unrecorded

    async def _end_failed(self, live: LiveJob, error: RequestError) -> None:
        if self.omni.status().state == "failed":
            # The engine gave up, perhaps because of this job: the lease ends by itself, and the attempt counts.
            logger.warning("video job %s waits for another server: %s", live.id, error)
            await self._discard(*live.unrecorded)
            return
        logger.warning("video job %s failed: %s", live.id, error)
        await self._fail(live, error.code or error.type, str(error))

    async def _fail(self, live: LiveJob, code: str, message: str) -> None:
        await self._discard(*live.unrecorded)
        try:
            await self._persist(partial(self.store.fail, live.id, live.claim.fence, code, message))
        except (LeaseLostError, RequestError) as error:
            logger.warning("video job %s: its failure cannot be stored: %s", live.id, error)
            return
        await self._discard_checkpoint(live)

    async def _give_back(self, live: LiveJob) -> None:
        """End the claim, so that any server may go on, or the deletion of the job can end."""
        try:
            if live.unrecorded and await self._has_recorded(live):
                # It is completed: its task was cancelled during the commit, or the answer was lost and the commit
                # refused when it was repeated.
                await self._discard_checkpoint(live)
                return
        except JobNotFoundError:
            pass
        except RequestError as error:  # the files go with the job
            logger.warning("video job %s is free when its lease ends: %s", live.id, error)
            return
        await self._discard(*live.unrecorded)
        try:
            await self.store.release(live.id, live.claim.fence)
        except LeaseLostError:
            pass
        except RequestError as error:
            logger.warning("video job %s is free when its lease ends: %s", live.id, error)

    async def _discard_checkpoint(self, live: LiveJob) -> None:
        """Remove the checkpoint of a job that has ended: its row does not name it any more."""
        newest = live.claim.job.checkpoint if live.checkpoints is None else live.checkpoints.newest_key
        if newest is not None:
            await self._discard(newest)

    async def _discard(self, *keys: str) -> None:
        for key in keys:
            try:
                await self.media.delete(key)
            except MediaStoreError as error:  # it goes with the job
                logger.warning("%s cannot be removed: %s", key, error)

    async def _persist(self, call: Callable[[], Awaitable[object]]) -> None:
        """Write to the store, however often it does not answer or its disk is full."""
        await retrying(call, RequestError, STORE_SECONDS)
