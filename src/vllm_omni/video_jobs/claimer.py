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

MAX_PAUSE_SECONDS = 30.0
"""Longest pause without claims."""
REFUSED_SECONDS = 60.0
"""Time for which a job is left to other servers after this one could not run it."""
MAX_REFUSED = 1000
"""Most such jobs that are remembered."""
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
        self._paused_until = 0.0
        self._refused: dict[str, float] = {}
        """Time until which each job that this server cannot run is left to others; the oldest refusal first."""
        self._is_failing = False

    def wake(self) -> None:
        """Look for jobs now."""
        self._wake.set()

    def pause(self, seconds: float) -> None:
        """Claim nothing for about `seconds`: the engine's queue is full, or the media store does not answer."""
        self._paused_until = time.monotonic() + min(seconds, MAX_PAUSE_SECONDS)

    def note_refused(self, job_id: str) -> None:
        """Leave a job that this server cannot run to others, for `REFUSED_SECONDS`."""
        self._refused.pop(job_id, None)  # the newest is the last
        self._refused[job_id] = time.monotonic() + REFUSED_SECONDS
        if len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]

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
            claims = await self._store.claim(self.server, self._served_model, number, self._not_claimed())
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

    def _not_claimed(self) -> tuple[str, ...]:
        """Ids of the jobs that this server runs, although a lease may have ended meanwhile, or cannot run."""
        now = time.monotonic()
        self._refused = {job_id: end for job_id, end in self._refused.items() if now < end}
        return (*self.live, *self._refused)

    def _give_back_waiting(self) -> None:
        """Give back jobs that would only wait here: beside others, or until the engine is woken."""
        if self._omni.status().state == "sleeping":
            reason = "this server sleeps"
            leaving = [live for live in self.live.values() if live.stop_reason is None and not live.is_made]
        else:
            reason, leaving = "the jobs that run here leave no room for it", self._crowding.waiting_too_long()
        for live in leaving:
            logger.info("video job %s goes back to the store: %s", live.id, reason)
            live.stop_reason = StopReason.CROWDED
            if live.task is not None:
                live.let_go(self._omni)

    def _start(self, claim: ClaimedJob, start: StartJob) -> None:
        assert claim.job.id not in self.live, "a server does not claim a job that it runs"
        live = LiveJob(claim, claim.job.progress)
        logger.info("video job %s: attempt %d begins", live.id, claim.job.num_attempts)
        self.live[live.id] = live
        live.task = asyncio.create_task(start(live), name=live.id)
        live.task.add_done_callback(lambda _: self._end(live))

    def _end(self, live: LiveJob) -> None:
        del self.live[live.id]
        live.note_change()
        self.wake()

    def _num_wanted(self) -> int:
        """Number of jobs to claim now."""
        ready, config, status = self._omni.ready, self._omni.config, self._omni.status()
        if ready is None or status.state != "running" or time.monotonic() < self._paused_until:
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
