"""Video jobs of a server: made by clients, kept in a store, run by this server or another one of the same store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from vllm_omni.diffusion.control.request_builder import CheckedPrompt
from vllm_omni.errors import (
    InvalidRequestError,
    JobNotFoundError,
    RequestError,
    StoreFullError,
    TooManyJobsError,
    UnavailableError,
)
from vllm_omni.jobs import Job, OutputStream
from vllm_omni.omni import AsyncOmni
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.video_jobs.content import MediaFile, open_content
from vllm_omni.video_jobs.draining import Drain
from vllm_omni.video_jobs.encoding import EncodedVideo
from vllm_omni.video_jobs.job_requests import (
    NewVideo,
    check_repeats,
    check_row,
    decoding_bytes,
    new_job,
    params_from_json,
    stored_prompt,
)
from vllm_omni.video_jobs.media import MediaNotFoundError, MediaStore, MediaStoreFullError
from vllm_omni.video_jobs.observer import VideoObserver
from vllm_omni.video_jobs.parts import ServiceParts
from vllm_omni.video_jobs.records import VideoJob
from vllm_omni.video_jobs.retrying import uninterrupted
from vllm_omni.video_jobs.settings import VideoJobSettings
from vllm_omni.video_jobs.store import check_job_store, check_job_store_form
from vllm_omni.video_jobs.store.limits import CREATION_SECONDS
from vllm_omni.video_jobs.views import VideoView
from vllm_omni.video_jobs.watching import VideoEvent


def check_stores(settings: VideoJobSettings) -> None:
    """Raise ConfigError unless both stores can be read and written; their folders and tables are made. Blocks.

    Nothing is made for a store that is named beside a wrong one.
    """
    check_job_store_form(settings.job_store_url)
    if settings.media_store is not None:
        MediaStore.open(settings.media_store_url).check_access()
    check_job_store(settings.job_store_url)
    if settings.media_store is None:  # beside the SQLite file, whose folder is made first, for this user alone
        MediaStore.open(settings.media_store_url).check_access()


class VideoJobs:
    """Makes, runs, shows and deletes video jobs. All methods belong to the event loop of the engine."""

    def __init__(
        self,
        omni: AsyncOmni,
        settings: VideoJobSettings,
        served_model: str,
        observer: VideoObserver | None = None,
    ) -> None:
        """`served_model`: first served name; servers of one store run the jobs of their own model only."""
        self._omni = omni
        self._settings = settings
        self._served_model = served_model
        self._observer: VideoObserver = observer or VideoObserver()
        self._parts: ServiceParts | None = None
        self._drain = Drain()

    async def start(self) -> None:
        """Open the stores; claim and run jobs from now on, as soon as the engine is ready. Raises ConfigError."""
        assert self._parts is None, "video jobs start once"
        self._parts = await ServiceParts.open(self._omni, self._settings, self._served_model, self._observer)

    def begin_drain(self) -> None:
        """Refuse new jobs from now on, and end the streams of events (UnavailableError)."""
        self._drain.begin()

    async def drain(self, timeout: float) -> None:
        """Claim no further job; give those that run here back to the store with checkpoints of their newest steps.

        A job whose frames are all made is completed. What is not done within `timeout` seconds is given back without
        a further checkpoint. Jobs can still be read and deleted, but not made.
        """
        self.begin_drain()
        if self._parts is not None:
            await self._parts.stop_jobs(timeout)

    async def close(self) -> None:
        """Give running jobs back and close the stores. May be called twice."""
        if (parts := self._parts) is not None:
            self._parts = None
            await parts.close()

    # Calls of clients ---------------------------------------------------------------------------------------

    async def create(self, new: NewVideo) -> VideoJob:
        """Make a job, or return the owner's job of the same idempotency key.

        Raises TooManyJobsError, StoreFullError, and as `new_job`, `check_repeats` and the engine do.
        """
        parts = self._running_parts()
        self._drain.check()
        job = await asyncio.to_thread(self._omni.make_checked_job, new.checked)
        row = self._row(new, job)
        if (earlier := await self._add(row, dict(zip(row.inputs, new.input_files)))) is not None:
            check_repeats(new, row, earlier)
            return earlier
        parts.claimer.wake()
        return row

    def encode(
        self, job: Job, outputs: OutputStream, output_format: str
    ) -> AsyncGenerator[tuple[OmniRequestOutput, EncodedVideo | None], None]:
        """Encode the videos of a request that runs without a job in the store: see `VideoMaker.encode`."""
        return self._running_parts().maker.encode(job, outputs, output_format)

    async def keep(self, new: NewVideo, job: Job, encoded: EncodedVideo) -> VideoJob:
        """Store a video that was made without a job: as a completed one, whose content can be fetched.

        `job`: the engine's job for this video alone. The caller removes the files. Raises as `create`, and
        MediaStoreError.
        """
        row = self._row(new, job)
        files = {"video": encoded.video, "thumbnail": encoded.thumbnail, "spritesheet": encoded.spritesheet}
        outputs = {variant: f"{row.id}/0/{file.name}" for variant, file in files.items()}
        row = replace(row, status="completed", progress=100, outputs=outputs)
        row = replace(row, started_at=row.created_at, completed_at=time.time())
        contents: dict[str, bytes | Path] = {outputs[variant]: file for variant, file in files.items()}
        await self._add(row, contents | dict(zip(row.inputs, new.input_files)))
        return row

    def _row(self, new: NewVideo, job: Job) -> VideoJob:
        return new_job(new, job, self._served_model, self._omni.work_seconds(job), self._omni.info)

    async def _add(self, row: VideoJob, files: Mapping[str, bytes | Path]) -> VideoJob | None:
        """Add a row and its files (key -> content), or nothing; return the job that has its idempotency key already."""
        parts = self._running_parts()
        try:
            if (earlier := await parts.store.add(row)) is not None:
                return earlier
        except (TooManyJobsError, StoreFullError) as error:
            self._observer.on_job_refused("too_many_jobs" if isinstance(error, TooManyJobsError) else "store_full")
            raise
        try:
            for key, content in files.items():
                await parts.media.put(key, content)
            await parts.store.publish(row.id)
        except (RequestError, asyncio.CancelledError) as error:
            await uninterrupted(parts.abandon(row))
            if isinstance(error, MediaStoreFullError):
                self._observer.on_job_refused("store_full")
            if isinstance(error, JobNotFoundError):
                raise UnavailableError(
                    f"The job was not made: its files were not stored within {CREATION_SECONDS:g} s.", retry_after=5.0
                ) from error
            raise
        return None

    async def get(self, job_id: str, owner: str) -> VideoView:
        """A job of `owner` with its newest progress. Raises JobNotFoundError."""
        parts = self._running_parts()
        return await parts.views.view(await parts.store.get(job_id, owner))

    async def list(self, owner: str, after: str | None, limit: int, newest_first: bool) -> tuple[list[VideoView], bool]:
        """At most `limit` jobs of `owner` behind the job `after` in the order of creation; whether more follow."""
        parts = self._running_parts()
        jobs, has_more = await parts.store.list(owner, after, limit, newest_first)
        return await parts.views.views(jobs), has_more

    async def delete(self, job_id: str, owner: str) -> None:
        """Delete a job and its files; one that runs stops after its step. Raises JobNotFoundError."""
        await self._running_parts().delete(job_id, owner)

    async def remix(
        self,
        job_id: str,
        owner: str,
        prompt: str,
        reserve: Callable[[int], None],
        idempotency_key: str | None = None,
    ) -> VideoJob:
        """Make a job like a completed one, its seed and pictures included, with another prompt.

        reserve: called with the bytes of each picture's file and of its pixels, before they are read and decoded.
        Raises JobNotFoundError, InvalidRequestError for a job that is not completed, and whatever `reserve` and
        `create` raise.
        """
        parts = self._running_parts()
        job = await parts.store.get(job_id, owner)
        if job.status != "completed":
            raise InvalidRequestError(
                f"a completed video can be remixed; the status of {job_id} is {job.status}", param="video_id"
            )
        files = []
        try:
            for key in job.inputs:
                reserve((await parts.media.info(key)).size)
                files.append(await parts.media.get(key))
                reserve(decoding_bytes(files[-1]))
        except MediaNotFoundError:
            await parts.store.get(job_id, owner)  # raises if the job was deleted meanwhile
            raise
        checked = await asyncio.to_thread(self._check, job, files, prompt)
        return await self.create(
            NewVideo(
                owner,
                job.model,
                checked.prompt,
                checked,
                tuple(files),
                job.request["output_format"],
                remixed_from=job.id,
                idempotency_key=idempotency_key,
            )
        )

    async def content(self, job_id: str, owner: str, variant: str) -> MediaFile:
        """File of a completed job: its video, thumbnail or spritesheet. Raises as `open_content`."""
        parts = self._running_parts()
        return await open_content(await parts.store.get(job_id, owner), variant, parts.media)

    def events(self, job_id: str, owner: str) -> AsyncGenerator[VideoEvent]:
        """Progress, previews and the end of a job; see `JobWatcher.events`. Raises UnavailableError in a drain."""
        self._drain.check()
        return self._drain.stream(self._running_parts().watcher.events(job_id, owner))

    @asynccontextmanager
    async def make_now(
        self,
        new: NewVideo,
        on_output: Callable[[OmniRequestOutput], None] = lambda output: None,
        job: Job | None = None,
    ) -> AsyncIterator[EncodedVideo]:
        """Make a video without a job: the files exist inside the `async with` block.

        A caller that is cancelled before stops the request. `on_output`: called with each output of the engine; `job`:
        the engine's request for `new`, if it was made before. Raises whatever the engine raises.
        """
        maker = self._running_parts().maker
        if job is None:
            job = await asyncio.to_thread(self._omni.make_checked_job, new.checked)
        encoded = await maker.make(job, new.output_format, on_output)
        try:
            yield encoded
        finally:
            await asyncio.to_thread(encoded.remove)

    def _check(self, job: VideoJob, files: Sequence[bytes], prompt: str) -> CheckedPrompt:
        """Check a stored request with another prompt, in a thread: it decodes pictures."""
        check_row(job)
        return self._omni.check(stored_prompt(job, files, prompt), params_from_json(job.request["params"]))

    def _running_parts(self) -> ServiceParts:
        if self._parts is None:
            raise UnavailableError("video jobs are not available while the server starts or stops", retry_after=1.0)
        return self._parts
