"""Claim jobs from the store while this server has room, and keep those that it runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from vllm_omni.errors import RequestError
from vllm_omni.omni import AsyncOmni
from vllm_omni.video_jobs.crowding import Crowding
from vllm_omni.video_jobs.live_job import LiveJob, StopReason
from vllm_omni.video_jobs.records import ClaimedJob

if TYPE_CHECKING:
    from vllm_omni.video_jobs.store.job_store import JobStore

logger = logging.getLogger(__name__)

MAX_FULL_SECONDS = 30.0
"""Longest pause after the engine's queue was full."""
StartJob = Callable[[LiveJob], Coroutine[Any, Any, None]]


class JobClaimer:
    """Claims as many jobs as the engine batches, and at most one more for each replica.

    A job that would only wait here goes back to the store, because another server may run it: see `Crowding`.
    """

    def __init__(
        self, omni: AsyncOmni, store: JobStore, served_model: str, poll_seconds: float, max_encoding: int
    ) -> None:
        """Make a claimer that claims nothing yet.

        poll_seconds: interval at which an idle server looks for jobs that came to other servers, or whose servers died.
        max_encoding: videos that are made and not written, each of which holds all its frames; with as many, no further
        job is claimed.
        """
        self._omni = omni
        self._store = store
        self._served_model = served_model
        self._poll_seconds = poll_seconds
        self._max_encoding = max_encoding
        self.server = uuid.uuid4().hex
        """Name of this server in the store; a restarted server has another one."""
        self.live: dict[str, LiveJob] = {}
        """Jobs that this server runs, by id."""
        self._crowding = Crowding(omni, self.live)
        self._wake = asyncio.Event()
        self._full_until = 0.0
        self._is_failing = False

    def wake(self) -> None:
        """Look for jobs now."""
        self._wake.set()

    def note_queue_full(self, seconds: float) -> None:
        """Claim nothing while the engine's queue is full, for about `seconds`."""
        self._full_until = time.monotonic() + min(seconds, MAX_FULL_SECONDS)

    async def run(self, start: StartJob) -> None:
        """Claim jobs until the task is cancelled. `start`: coroutine that runs a job, which gets a task of its own."""
        while True:
            self._wake.clear()
            self._give_back_waiting()
            if not (self._num_wanted() and await self._claim(start)):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_seconds):
                        await self._wake.wait()

    async def _claim(self, start: StartJob) -> bool:
        """Claim jobs and start them; return whether there were as many as wanted."""
        number = self._num_wanted()
        try:
            claims = await self._store.claim(self.server, self._served_model, number)
        except RequestError as error:
            if not self._is_failing:
                logger.warning("no video jobs can be claimed until the store answers: %s", error)
            self._is_failing = True
            return False
        except Exception:  # a bug of ours must not stop all further jobs
            logger.exception("video jobs cannot be claimed")
            return False
        self._is_failing = False
        for claim in claims:
            self._start(claim, start)
        return len(claims) == number

    def _give_back_waiting(self) -> None:
        for live in self._crowding.waiting_too_long():
            logger.info("video job %s goes back to the store: the jobs that run here leave no room for it", live.id)
            live.stop_reason = StopReason.CROWDED
            if live.task is not None:
                live.task.cancel()

    def _start(self, claim: ClaimedJob, start: StartJob) -> None:
        if (older := self.live.get(claim.job.id)) is not None and older.task is not None:
            older.stop_reason = StopReason.GONE  # its lease ended before this server renewed it
            older.task.cancel()
        live = LiveJob(claim, claim.job.progress)
        logger.info("video job %s: attempt %d begins", live.id, claim.job.num_attempts)
        self.live[live.id] = live
        live.task = asyncio.create_task(start(live), name=live.id)
        live.task.add_done_callback(lambda _: self._end(live))

    def _end(self, live: LiveJob) -> None:
        if self.live.get(live.id) is live:
            del self.live[live.id]
        live.note_change()
        self.wake()

    def _num_wanted(self) -> int:
        """Number of jobs to claim now."""
        ready, config, status = self._omni.ready, self._omni.config, self._omni.status()
        if ready is None or status.state != "running" or time.monotonic() < self._full_until:
            return 0
        if self._crowding.is_crowded:
            return 0
        if sum(live.is_made for live in self.live.values()) >= self._max_encoding:
            return 0
        num_replicas = config.parallel.data_parallel_size
        num_waiting = sum(not live.has_started for live in self.live.values())
        num_tokens = sum(
            request.cost.tokens_per_step
            for live in self.live.values()
            if live.request is not None and not live.is_made
            for request in live.request.requests
        )
        if num_tokens >= num_replicas * (config.max_batch_tokens or ready.max_batch_tokens):
            return 0
        most = min(limit for limit in (config.max_num_seqs, ready.max_num_seqs, ready.max_running) if limit is not None)
        num_free = num_replicas * most - sum(not live.is_made for live in self.live.values())
        return max(0, min(num_replicas - num_waiting, num_free))
