"""Run claimed jobs to their end on this server: completed, failed, or given back to the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
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
    error_line,
)
from vllm_omni.inputs.images import MAX_INPUT_PIXELS
from vllm_omni.jobs import Job
from vllm_omni.omni import AsyncOmni
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.video_jobs.checkpoint_file import from_bytes, max_file_bytes
from vllm_omni.video_jobs.checkpoint_writer import CheckpointWriter
from vllm_omni.video_jobs.encoding import EncodedVideo
from vllm_omni.video_jobs.job_ends import JobEnds, persist
from vllm_omni.video_jobs.job_requests import check_file, check_row, num_pixels, params_from_json, stored_prompt
from vllm_omni.video_jobs.lease_keeper import LeaseKeeper
from vllm_omni.video_jobs.live_job import LiveJob, StopReason
from vllm_omni.video_jobs.media import FINAL_ERRORS, MediaStore, MediaStoreError
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.progress import WRITING_PERCENT, JobProgress
from vllm_omni.video_jobs.retrying import retrying, uninterrupted
from vllm_omni.video_jobs.video_maker import VideoMaker, is_whole_output

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

logger = logging.getLogger(__name__)

READ_SECONDS, WRITE_SECONDS = 10.0, 300.0
"""Time for which calls of the media store are repeated while it does not answer: a finished video waits for longer."""
MEDIA_PAUSE_SECONDS = 5.0
"""Pause without claims after a job was given back because the media store does not answer."""
_MAX_INPUT_BYTES = 5 * MAX_INPUT_PIXELS
"""Most bytes of an input picture: PNG of four channels, with room for its overhead."""


class NotRunnableHereError(OmniError):
    """This server cannot run a job that another one has accepted: the other one is newer, or has other settings."""


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
    on_pause: Callable[[float], None]
    """Called with the seconds after which the engine's queue may have room, or the media store may answer."""
    on_refused: Callable[[str], None]
    """Called with the id of a job that this server cannot run now."""
    on_room: Callable[[], None]
    """Called when the engine may have room for another job."""

    @property
    def _ends(self) -> JobEnds:
        return JobEnds(self.store, self.media, self.leases)

    async def run(self, live: LiveJob) -> None:
        """Run a claimed job to its end, or until the task is cancelled; see `LiveJob.stop_reason`.

        Once the end of the job is being stored, cancelling the task only waits for that. Raises CancelledError only.
        """
        self.leases.hold(live.id, live.claim.fence)
        try:
            try:
                end = self._ends.complete(live, await self._store_files(live, await self._make(live)))
            except asyncio.CancelledError:
                end = self._ends.give_back(live)
            except Exception as error:
                end = self._end_after(live, error)
            live.is_ending = True
            await uninterrupted(end)
        except Exception:
            logger.exception("video job %s is free when its lease ends", live.id)
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
            self.omni.give_back(live.request.request_id)  # its task still writes the checkpoint
        elif not live.is_made:
            live.let_go(self.omni)
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
        try:
            check_row(job)
        except InvalidRequestError as error:
            raise NotRunnableHereError(str(error)) from error
        files = [await self._read(key, _MAX_INPUT_BYTES) for key in job.inputs]
        request = await asyncio.to_thread(self._engine_job, live, files, checkpoint)
        live.request, progress = request, JobProgress(request.requests[0], live.percent)
        live.checkpoints = CheckpointWriter(
            live.claim, self._checkpoint_name(live), self.store, self.media, self.observer
        )
        encoded: EncodedVideo | None = None
        try:
            output_format = job.request["output_format"]
            encoded = await self.maker.make(request, output_format, partial(self._note_output, live, progress))
        finally:
            try:
                # A checkpoint that came after the end of the claim would outlive its job.
                is_draining = live.stop_reason is StopReason.DRAIN
                await uninterrupted(live.checkpoints.finish() if is_draining else live.checkpoints.discard())
            except asyncio.CancelledError:
                if encoded is not None:
                    await asyncio.to_thread(encoded.remove)
                raise
        return encoded

    def _engine_job(self, live: LiveJob, input_files: list[bytes], checkpoint: Checkpoint | None) -> Job:
        """The engine's job for a row, made in a thread: it decodes pictures and counts tokens."""
        job = live.claim.job
        # An aborted request may not have ended yet when the same job begins again, so each begin has its own id.
        live.num_begins += 1
        request_id = f"{job.id}-{live.claim.fence}-{live.num_begins}"
        try:
            checked = self.omni.check(stored_prompt(job, input_files), params_from_json(job.request["params"]))
            made = self.omni.make_checked_job(
                checked, request_id, resume=checkpoint, checkpoint_seconds=self.checkpoint_seconds
            )
            check_file(job.request["output_format"], made.requests[0].request)
            return made
        except InvalidRequestError as error:
            if checkpoint is not None:  # it may be the checkpoint that does not fit
                raise
            raise NotRunnableHereError(str(error)) from error

    async def _read_checkpoint(self, live: LiveJob) -> Checkpoint | None:
        """The stored checkpoint; None if there is none that can be read. Raises MediaStoreError: it is away."""
        key = live.claim.job.checkpoint
        if key is None:
            return None
        try:
            data = await self._read(key, max_file_bytes(num_pixels(live.claim.job)))
            checkpoint = await asyncio.to_thread(from_bytes, data, self._checkpoint_name(live))
        except Exception as error:
            if isinstance(error, MediaStoreError) and not isinstance(error, FINAL_ERRORS):
                raise
            logger.warning(
                "video job %s begins from the start: its checkpoint cannot be read: %s", live.id, error_line(error)
            )
            return None
        logger.info("video job %s goes on after step %d", live.id, checkpoint.step)
        return checkpoint

    async def _read(self, key: str, max_bytes: int) -> bytes:
        """A stored file. Raises MediaStoreError; it is one of FINAL_ERRORS, or the store is away."""
        get = partial(self.media.get, key, max_bytes)
        return await retrying(get, MediaStoreError, READ_SECONDS, never=FINAL_ERRORS)

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
            await persist(partial(self.store.note_started, live.id, live.claim.fence))
        except (LeaseLostError, RequestError) as error:  # the next renewal stops the job if it is lost
            logger.warning("video job %s: its start cannot be noted: %s", live.id, error)
        live.note_change()

    # Ends -------------------------------------------------------------------------------------------------

    async def _store_files(self, live: LiveJob, encoded: EncodedVideo) -> dict[str, str]:
        """Move the files to the media store; return the media key of each variant."""
        self._note_percent(live, WRITING_PERCENT)
        files = {"video": encoded.video, "thumbnail": encoded.thumbnail, "spritesheet": encoded.spritesheet}
        outputs = {variant: f"{live.folder}/{file.name}" for variant, file in files.items()}
        try:
            for variant, file in files.items():
                live.unrecorded.add(outputs[variant])
                put = partial(self.media.put, outputs[variant], file)
                await retrying(put, MediaStoreError, WRITE_SECONDS, never=FINAL_ERRORS)
        finally:
            await asyncio.to_thread(encoded.remove)
        return outputs

    async def _end_after(self, live: LiveJob, error: Exception) -> None:
        """End the claim of a job that an error has stopped."""
        if isinstance(error, LeaseLostError | JobNotFoundError | RequestAbortedError):
            await self._ends.give_back(live)
        elif isinstance(error, QueueFullError):
            self.on_pause(error.retry_after or 1.0)
            await self._ends.give_back(live)
        elif isinstance(error, NotRunnableHereError):
            logger.warning("video job %s is left to other servers: this one cannot run it: %s", live.id, error)
            self.on_refused(live.id)
            await self._ends.give_back(live, str(error))
        elif isinstance(error, MediaStoreError) and not isinstance(error, FINAL_ERRORS):
            logger.warning("video job %s waits until the media store answers: %s", live.id, error)
            self.on_pause(MEDIA_PAUSE_SECONDS)
            self.on_refused(live.id)  # the store may answer for the files of other jobs
            await self._ends.give_back(live, str(error))
        elif isinstance(error, UnavailableError):
            logger.warning("video job %s goes back to the store: %s", live.id, error)
            await self._ends.give_back(live)
        elif not isinstance(error, RequestError):
            logger.error("video job %s failed", live.id, exc_info=error)
            await self._ends.fail(live, "server_error", "The server failed on this request.")
        elif self.omni.status().state == "failed":
            # The engine gave up, perhaps because of this job: the lease ends by itself, and the attempt counts.
            logger.warning("video job %s waits for another server: %s", live.id, error)
            await self._ends.discard(*live.unrecorded)
        else:
            logger.warning("video job %s failed: %s", live.id, error)
            await self._ends.fail(live, error.code or error.type, str(error))
