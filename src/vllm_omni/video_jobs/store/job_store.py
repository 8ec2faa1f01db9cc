"""Store of video jobs: one asyncio method for each transaction."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from vllm_omni.errors import LeaseLostError, RequestError, UnavailableError
from vllm_omni.video_jobs.records import ClaimedJob, JobStatus, VideoJob
from vllm_omni.video_jobs.store import leases, lifetimes, visible
from vllm_omni.video_jobs.store.database import MAX_CONNECTIONS, Database, Work
from vllm_omni.video_jobs.store.limits import StoreLimits

Result = TypeVar("Result")
# In a class that has a method `list`, this name is no type.
Page = tuple[list[VideoJob], bool]
Claims = list[ClaimedJob]
Ids = list[str]


class JobStore:
    """Store of video jobs.

    Each method is one transaction, which runs in a thread; any event loop may call it. A method raises UnavailableError
    if the database does not answer, and StoreFullError if its disk is full; then nothing has changed, unless the
    connection was lost during the commit. A method with a `fence` raises LeaseLostError if the claim does not hold any
    more.
    """

    def __init__(self, database: Database, limits: StoreLimits) -> None:
        self._database = database
        self._limits = limits
        self._threads = ThreadPoolExecutor(MAX_CONNECTIONS - 1, thread_name_prefix="omni-job-store")
        # A thread and a connection for renewals alone: a lease must not end because many clients ask for their jobs.
        self._renewals = ThreadPoolExecutor(1, thread_name_prefix="omni-job-leases")

    async def add(self, job: VideoJob) -> VideoJob | None:
        """Add a job that stays invisible until `publish`: its input pictures are stored meanwhile.

        Returns None, or without any change the owner's job of the same idempotency key. Raises TooManyJobsError and
        StoreFullError, but not for a job that is completed already, and UnavailableError while the job of the same key
        is not published. If the pictures cannot be stored, abandon the job.

        In a full store, the key that keeps most ended jobs loses the oldest of them to a key that has fewer jobs, and
        to a completed job of any key.
        """
        return await self._write(partial(lifetimes.add, job=job, limits=self._limits))

    async def publish(self, job_id: str) -> None:
        """Make the job visible, and claimable unless it was added as completed.

        Raises JobNotFoundError if it was deleted as abandoned.
        """
        await self._write(partial(lifetimes.publish, job_id=job_id))

    async def get(self, job_id: str, owner: str) -> VideoJob:
        """The job. Raises JobNotFoundError, also for another owner's job."""
        return await self._read(partial(visible.get, job_id=job_id, owner=owner))

    async def list(self, owner: str, after: str | None, limit: int, newest_first: bool) -> Page:
        """Jobs behind the job `after` in the order of creation, and whether more follow.

        `after` may be deleted: its id says its place. Raises InvalidRequestError for one that is no id.
        """
        query = partial(visible.page, owner=owner, after=after, limit=limit, newest_first=newest_first)
        return await self._read(query)

    async def claim(self, server: str, served_model: str, limit: int, skip: Collection[str] = ()) -> Claims:
        """Claim jobs that wait, or whose server let the lease end: smallest priority first, then oldest.

        skip: ids of jobs that are left to other servers: those that this server runs although it was silent for longer
        than a lease, and those that it cannot run. Claims of a call that is cancelled are released.
        """
        call = partial(
            leases.claim, server=server, served_model=served_model, limit=limit, skip=skip, limits=self._limits
        )
        running = self._submit(self._database.write, call)
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            # In a thread, behind the claim, whose own thread goes on. In a store that is closed the leases end.
            with contextlib.suppress(RuntimeError):
                self._threads.submit(self._release_claims, running)
            raise

    async def renew(self, claims: Mapping[str, int], progress: Mapping[str, int]) -> set[str]:
        """Renew claims (job id -> fence) and store their progress in percent, which never falls.

        Returns the ids of jobs that other servers have claimed or that were deleted: stop them, then `release` them,
        so that the deletion can end.
        """
        call = partial(leases.renew, claims=dict(claims), progress=dict(progress), limits=self._limits)
        return await asyncio.wrap_future(self._submit(self._database.write, call, self._renewals))

    async def note_started(self, job_id: str, fence: int) -> None:
        """The job's first step runs: `queued` becomes `in_progress`."""
        await self._write(partial(leases.note_started, job_id=job_id, fence=fence, limits=self._limits))

    async def note_checkpoint(self, job_id: str, fence: int, key: str) -> str | None:
        """Store the media key of the newest checkpoint. Returns the key of the one before, which is to be deleted.

        When this raises LeaseLostError, the caller deletes the checkpoint that it has just written.
        """
        return await self._write(partial(leases.note_checkpoint, job_id=job_id, fence=fence, key=key))

    async def complete(
        self, job_id: str, fence: int, outputs: Mapping[str, str], shown: Mapping[str, Any] | None = None
    ) -> None:
        """End the job with its media keys; `shown` replaces what was shown. Its checkpoint is forgotten."""
        await self._write(
            partial(
                leases.complete,
                job_id=job_id,
                fence=fence,
                outputs=outputs,
                shown=shown,
                limits=self._limits,
            )
        )

    async def fail(self, job_id: str, fence: int, code: str, message: str) -> None:
        """End the job with an error. Its checkpoint is forgotten."""
        await self._write(
            partial(leases.fail, job_id=job_id, fence=fence, code=code, message=message, limits=self._limits)
        )

    async def release(self, job_id: str, fence: int, refusal: str | None = None) -> None:
        """Give the job back: any server may claim it at once. It keeps its progress and its checkpoint.

        refusal: reason why the server cannot run it, for the case that no other server can either. The claim does not
        count as an attempt.
        """
        await self._write(partial(leases.release, job_id=job_id, fence=fence, refusal=refusal))

    async def begin_delete(self, job_id: str, owner: str) -> VideoJob:
        """Make the job invisible; its files are to be removed next. Raises JobNotFoundError.

        The server that runs it gets its id from `renew`.
        """
        return await self._write(partial(lifetimes.begin_delete, job_id=job_id, owner=owner))

    async def abandon(self, job: VideoJob) -> None:
        """Begin to delete a job that could not be made, whether it is published or was swept; its files go next."""
        await self._write(partial(lifetimes.abandon, job=job))

    async def end_delete(self, job_id: str) -> bool:
        """Remove the row of a job whose files are removed. Returns whether the row is gone.

        It stays while a server may still write files of the job; `unfinished_deletes` returns it again.
        """
        return await self._write(partial(lifetimes.end_delete, job_id=job_id))

    async def unfinished_deletes(self) -> Ids:
        """Ids of jobs whose files and rows are to be removed.

        They are deletes and creations that were cut off, and ended jobs that expired. A waiting job that no server
        has begun for the store's time to live fails.
        """
        return await self._write(partial(lifetimes.unfinished_deletes, limits=self._limits))

    async def counts(self, served_model: str) -> dict[JobStatus, int]:
        """Number of visible jobs of each status, of all owners."""
        return await self._read(partial(visible.counts, served_model=served_model))

    async def queued_before(self, job_ids: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Number and work seconds of the waiting jobs that are claimed before each of some jobs, by its id.

        One query for all of them. Ids of jobs that are not in the store are left out.
        """
        return await self._read(partial(visible.queued_before, job_ids=job_ids))

    async def close(self) -> None:
        """Wait for transactions under way and close the connections."""
        for threads in (self._threads, self._renewals):
            await asyncio.to_thread(threads.shutdown)
        self._database.close()

    async def _read(self, work: Work[Result]) -> Result:
        return await asyncio.wrap_future(self._submit(self._database.read, work))

    async def _write(self, work: Work[Result]) -> Result:
        return await asyncio.wrap_future(self._submit(self._database.write, work))

    def _submit(
        self, run: Callable[[Work[Result]], Result], work: Work[Result], threads: ThreadPoolExecutor | None = None
    ) -> Future[Result]:
        try:
            return (threads or self._threads).submit(run, work)
        except RuntimeError as error:
            raise UnavailableError("The store of video jobs is closed: the server is shutting down.") from error

    def _release_claims(self, running: Future[Claims]) -> None:
        """Wait for a claim whose caller was cancelled, and release the jobs. Blocks."""
        if running.cancelled() or running.exception() is not None:
            return
        for claimed in running.result():
            # Where this fails, the lease ends by itself.
            with contextlib.suppress(LeaseLostError, RequestError):
                self._database.write(partial(leases.release, job_id=claimed.job.id, fence=claimed.fence))
