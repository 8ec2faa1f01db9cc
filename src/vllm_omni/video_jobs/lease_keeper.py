"""Renewal of the leases of claimed jobs, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_omni.errors import error_line

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3
PROGRESS_SECONDS = 1.0
"""Shortest time between two renewals that report new progress to clients of other servers."""


class LeaseKeeper:
    """Renews leases and reports progress, from a thread that a busy event loop does not delay.

    A loop that does nothing for as long as a lease hangs: its leases end, and other servers run its jobs.
    """

    def __init__(
        self,
        store: JobStore,
        lease_seconds: float,
        on_gone: Callable[[set[str]], None],
        on_progress: Callable[[set[str]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a keeper without a thread. Both functions are called on the event loop that calls `start`.

        on_gone: gets ids of jobs that are lost or deleted; on_progress: ids of jobs whose progress is stored now.
        """
        self._store = store
        self._lease_seconds = lease_seconds
        self._interval = lease_seconds / RENEWALS_PER_LEASE
        self._on_gone = on_gone
        self._on_progress = on_progress
        self._clock = clock
        self._is_hanging = False
        self._lock = threading.Lock()
        self._fences: dict[str, int] = {}
        self._progress: dict[str, int] = {}
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="omni-video-leases", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last_beat = self._clock()
        self._beating = asyncio.create_task(self._beat(), name="video-jobs-beat")
        self._thread.start()

    def hold(self, job_id: str, fence: int) -> None:
        """Renew the lease of a job from now on."""
        with self._lock:
            self._fences[job_id] = fence

    def note_progress(self, job_id: str, fence: int, percent: int) -> None:
        """Report the progress of a job with the next renewal, which comes soon."""
        with self._lock:
            if self._fences.get(job_id) == fence:
                self._progress[job_id] = percent
        self._wake.set()

    def drop(self, job_id: str, fence: int) -> None:
        """Renew the lease of a job no more, unless it was claimed again meanwhile."""
        with self._lock:
            if self._fences.get(job_id) == fence:
                del self._fences[job_id]
                self._progress.pop(job_id, None)

    async def close(self) -> None:
        """Stop the thread. Leases that are still held end by themselves."""
        self._closing.set()
        self._wake.set()
        self._beating.cancel()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        pause = min(PROGRESS_SECONDS, self._interval)
        wait_seconds = self._interval
        with asyncio.Runner() as runner:
            while not self._closing.is_set():
                self._wake.wait(wait_seconds)
                is_renewed = runner.run(self._renew())
                self._closing.wait(pause)  # also when progress came meanwhile: it must not become frequent writes
                wait_seconds = self._interval - pause if is_renewed else 0.0

    async def _beat(self) -> None:
        """Show until the task is cancelled that the event loop runs its tasks."""
        while True:
            self._last_beat = self._clock()
            await asyncio.sleep(self._interval)

    def _note_hanging(self) -> bool:
        """Whether the event loop hangs; log when that begins and ends."""
        silence = self._clock() - self._last_beat
        is_hanging = silence >= self._lease_seconds
        if is_hanging != self._is_hanging:
            self._is_hanging = is_hanging
            if is_hanging:
                logger.error("the event loop hangs for %.1f s: leases of video jobs are renewed no more", silence)
            else:
                logger.warning("the event loop runs again: leases of video jobs are renewed")
        return is_hanging

    async def _renew(self) -> bool:
        """Renew all leases; return whether that succeeded."""
        self._wake.clear()
        if self._note_hanging():
            return False
        with self._lock:
            fences, progress = dict(self._fences), dict(self._progress)
            self._progress.clear()
        if not fences:
            return True
        try:
            gone = await self._store.renew(fences, progress)
        except Exception as error:  # a store may be away for a while, and this thread must outlive every error
            # Jobs go on: the store refuses writes of a claim that ended meanwhile.
            logger.warning("the leases of %d video jobs cannot be renewed: %s", len(fences), error_line(error))
            with self._lock:
                self._progress = {**progress, **self._progress}
            return False
        with self._lock:
            # A job that was claimed again meanwhile has another fence.
            gone = {job_id for job_id in gone if self._fences.get(job_id) == fences[job_id]}
        for notify, job_ids in ((self._on_gone, gone), (self._on_progress, set(progress))):
            if job_ids:
                with contextlib.suppress(RuntimeError):  # the loop was closed
                    self._loop.call_soon_threadsafe(notify, job_ids)
        return True
