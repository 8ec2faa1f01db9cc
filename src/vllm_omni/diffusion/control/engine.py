"""Engine: schedule, execute, update, one denoising step at a time. asyncio and plain Python, no torch.

Everything here runs on one event loop. `add` queues requests and returns the queue of their events; `_run_steps` is the
loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from vllm_omni.diffusion.control.engine_sleep import EngineSleep, check_level
from vllm_omni.diffusion.control.events import (
    EngineEvent,
    EngineObserver,
    EngineStatus,
    reporting_rejects,
)
from vllm_omni.diffusion.control.executor import Executor
from vllm_omni.diffusion.control.plans_in_flight import MAX_PLANS_IN_FLIGHT
from vllm_omni.diffusion.control.request_errors import request_error
from vllm_omni.diffusion.control.resident_adapters import ResidentAdapters
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.control.scheduler import Scheduler
from vllm_omni.diffusion.control.step_timer import STALL_FACTOR, STALL_SECONDS, StepTimer
from vllm_omni.diffusion.control.tracked_requests import TrackedRequests
from vllm_omni.diffusion.control.updates import Update
from vllm_omni.diffusion.control.worker_deaths import (
    MAX_RESTART_BACKOFF_SECONDS,
    RESTART_BACKOFF_SECONDS,
    RESTART_WINDOW_SECONDS,
    WorkerDeaths,
)
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead
from vllm_omni.diffusion.messages.item_error import ItemError
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.request import DiffusionRequest, check_sendable
from vllm_omni.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    RequestAbortedError,
    RequestError,
    UnavailableError,
    WorkerDiedError,
)

logger = logging.getLogger(__name__)


class DiffusionEngine:
    """Runs requests on an executor's workers, one step of all of them at a time."""

    def __init__(
        self,
        config: OmniDiffusionConfig,
        executor: Executor,
        observer: EngineObserver | None = None,
        *,
        restart_backoff_seconds: float = RESTART_BACKOFF_SECONDS,
        max_restart_backoff_seconds: float = MAX_RESTART_BACKOFF_SECONDS,
        stall_seconds: float = STALL_SECONDS,
        stall_factor: float = STALL_FACTOR,
    ) -> None:
        """Make an engine that is not started.

        restart_backoff_seconds, max_restart_backoff_seconds: pause before a restart; see `WorkerDeaths`.
        stall_seconds, stall_factor: a step that takes longer than both of these hangs; see `StepTimer`.
        """
        self._config = config
        self._executor = executor
        self._observer: EngineObserver = observer or EngineObserver()
        self._state = "starting"
        self._failure = ""
        self._draining = False
        self._drain_ends = 0.0
        """Time at which a drain gives up requests that still run."""
        self._load_seconds = 1.0
        self._attention_backend: str | None = None
        self._tracked = TrackedRequests(self._observer)
        self._submitted: deque[StepPlan] = deque()
        self._timer = StepTimer(stall_seconds, stall_factor)
        """Times of the oldest submitted plan."""
        self._deaths = WorkerDeaths(restart_backoff_seconds, max_restart_backoff_seconds)
        self._sleep = EngineSleep()
        self._wakeup = asyncio.Event()
        self._adapter_loads: dict[str, asyncio.Future[None]] = {}
        """Calls of `load_adapter` under way, by the id under which they hold the adapter."""
        executor.on_adapter_read = self._take_adapter
        self._scheduler: Scheduler | None = None
        self._task: asyncio.Task[None] | None = None

    # Calls ----------------------------------------------------------------------------------------------

    async def start(self) -> WorkerReady:
        """Start the workers and the loop. Raises ConfigError or WorkerDiedError; the engine is then `failed`.

        Raises UnavailableError after `close` or `kill`, WorkerDiedError when one of them is called during the start;
        the engine is then `stopped`.
        """
        assert self._task is None, "an engine starts once"
        if self._state == "stopped":
            raise UnavailableError("the engine was stopped")
        try:
            ready = await self._executor.start()
        except BaseException:  # also where the start is cancelled
            if self._state != "stopped":
                self._state = "failed"
            raise
        self._load_seconds = max(ready.load_seconds, 1.0)
        self._attention_backend = ready.attention_backend
        self._scheduler = Scheduler(self._config, ready)
        self._state = "running"
        self._task = asyncio.create_task(self._run(), name="diffusion-engine")
        return ready

    def check_open(self) -> None:
        """Raise UnavailableError when no requests are accepted."""
        if self._draining or self._sleep.is_on or self._state not in ("running", "restarting"):
            state = self.status().state
            hint = ", and takes requests after wake_up" if state == "sleeping" else ""
            raise UnavailableError(f"the engine is {state}{hint}", retry_after=self._retry_after())

    def check(self, requests: Sequence[ScheduledRequest]) -> None:
        """Raise what `add` would raise for `requests`, and add nothing."""
        self.check_open()
        check_sendable([scheduled.request for scheduled in requests])
        self._live_scheduler.check(requests)

    def add(
        self, requests: Sequence[ScheduledRequest], events: asyncio.Queue[EngineEvent] | None = None
    ) -> asyncio.Queue[EngineEvent]:
        """Queue all of `requests` or none. Returns the queue of their events: `events`, or a new one.

        Each request's last event is Finished or Failed. Raises QueueFullError and UnavailableError, both with
        `retry_after` in seconds, and InvalidRequestError for an id in use or a request that no worker can be sent.
        """
        with reporting_rejects(self._observer):
            self.check_open()
            check_sendable([scheduled.request for scheduled in requests])
            self._live_scheduler.add(requests)
        events = asyncio.Queue() if events is None else events
        self._tracked.add(requests, events)
        self._observer.on_add([scheduled.request for scheduled in requests])
        self._wakeup.set()
        return events

    def abort(self, request_ids: Sequence[str], error: RequestAbortedError | None = None) -> None:
        """End requests at once with Failed(error), by default a RequestAbortedError. Unknown ids are ignored."""
        if self._scheduler is None:
            return
        known = self._scheduler.abort(request_ids)
        if (sent := [request_id for request_id, is_sent in known.items() if is_sent]) and self._state == "running":
            self._executor.abort(sent)
        for request_id in known:
            self._tracked.end(request_id, error or RequestAbortedError("the request was aborted"))
        self._wakeup.set()

    def request_checkpoint(self, request_ids: Sequence[str]) -> None:
        """Ask for a checkpoint of each request as it is after the step that runs; other steps do not wait for it.

        Each request gets a Checkpointed, at once where no step can be saved. Unknown ids are ignored.
        """
        for request_id in request_ids:
            if request_id not in self._tracked:
                continue
            if not self._live_scheduler.request_checkpoint(request_id):
                self._tracked.publish_checkpoint(request_id, self._live_scheduler.newest_checkpoint(request_id))
        self._wakeup.set()

    def status(self) -> EngineStatus:
        """State, numbers of requests and estimated work."""
        scheduler, state = self._scheduler, self._state
        healthy = state == "running"
        if state in ("running", "restarting") and (self._draining or self._sleep.is_on):
            state = "draining" if self._draining else "sleeping"
        if scheduler is None:
            return EngineStatus(state, 0, 0, 0.0, healthy, failure=self._failure)
        return EngineStatus(
            state,
            scheduler.num_running,
            scheduler.num_waiting,
            scheduler.queue_seconds,
            healthy,
            () if self._attention_backend is None else (self._attention_backend,),
            self._failure,
            self._sleep.level,
        )

    def eta_seconds(self, requests: Sequence[ScheduledRequest]) -> float:
        """Estimated time until the last of `requests` is done. They may be in the queue or about to be added."""
        restart = self._load_seconds if self._state == "restarting" else 0.0
        return restart + self._live_scheduler.eta_seconds(requests)

    def work_seconds(self, requests: Sequence[ScheduledRequest]) -> float:
        """Estimated time that `requests` take when nothing else runs."""
        return self._live_scheduler.work_seconds(requests)

    def holds(self, request_id: str) -> bool:
        """Whether a request with this id was added and has not ended."""
        return request_id in self._tracked

    async def sleep(self, level: int = 1) -> int:
        """Sleep at level 1 or 2, after the plans in flight; see `AsyncOmni.sleep`. Returns the level."""
        check_level(level)
        if level == 1 and self._config.weight_sharding:
            raise InvalidRequestError("with --weight-sharding, level takes 2, got 1", param="level")
        return await self._sleep.fall_asleep(level, self._check_running, self._wakeup.set)

    async def wake_up(self) -> None:
        """Wake up; see `AsyncOmni.wake_up`."""
        await self._sleep.wake_up(self._check_running)

    def _check_running(self) -> None:
        if self._draining or self._state not in ("running", "restarting"):
            raise UnavailableError(f"the engine is {self.status().state}", retry_after=self._retry_after())

    async def load_adapter(self, key: AdapterKey) -> None:
        """Let all ranks read an adapter, and keep it while there is room. Waits for room and through restarts.

        Raises InvalidRequestError if the model does not take it or too many workers died while they read it,
        UnavailableError when the engine stops.
        """
        if self._sleep.is_on or self._state not in ("running", "restarting"):
            raise UnavailableError(f"the engine is {self.status().state}", retry_after=self._retry_after())
        adapters, loaded = self._live_scheduler.adapters, asyncio.get_running_loop().create_future()
        if error := adapters.refusal([key]):
            raise request_error(error)
        holder = f"load {uuid.uuid4().hex}"
        self._adapter_loads[holder] = loaded
        adapters.hold(holder, [key], self._end_load)
        self._wakeup.set()
        try:
            await loaded
        finally:
            del self._adapter_loads[holder]
            adapters.release(holder)
            self._wakeup.set()  # its place may be free: reads of others are due

    def _end_load(self, holder: str) -> None:
        if not (load := self._adapter_loads[holder]).done():
            load.set_result(None)

    async def wait_for_ends(self, is_meant: Callable[[DiffusionRequest], bool]) -> None:
        """Wait until all requests of now for which `is_meant` holds have ended."""
        await self._tracked.wait_for_ends(is_meant)

    def forget_adapters(self, is_forgotten: Callable[[AdapterKey], bool]) -> None:
        """Let all ranks drop adapters that no request holds."""
        if self._scheduler is not None:
            self._scheduler.adapters.forget(is_forgotten)
            self._wakeup.set()

    @property
    def resident_adapters(self) -> list[ResidentAdapters]:
        """Adapters of this replica; empty before the start."""
        return [] if self._scheduler is None else [self._scheduler.adapters]

    def begin_drain(self) -> None:
        """Accept no new requests from now on."""
        self._draining = True

    async def drain(self, timeout: float) -> bool:
        """Accept no new requests; return whether all requests ended within `timeout` seconds."""
        self.begin_drain()
        self._drain_ends = time.monotonic() + timeout
        if self._sleep.is_on:  # nothing runs before somebody wakes it, which nobody may do any more
            self._fail_all(UnavailableError("the engine stops while it sleeps", retry_after=self._load_seconds))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._tracked.wait_until_empty()
        return not self._tracked.ids

    async def close(self) -> None:
        """Stop the loop and the workers. Requests get Failed(UnavailableError). May be called twice."""
        self._state = "stopped"
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail_all(UnavailableError("the engine was stopped", retry_after=self._load_seconds))
        await self._executor.close()

    def kill(self) -> None:
        """Do what `close` does without awaiting anything: for callers whose event loop may have ended."""
        self._state = "stopped"
        if self._task is not None and not self._task.get_loop().is_closed():
            self._task.cancel()
            self._fail_all(UnavailableError("the engine was stopped", retry_after=self._load_seconds))
        self._executor.kill()

    # The loop ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._run_steps()
                    self._apply(self._live_scheduler.reset(has_died=False))
                    await self._sleep.run(self._executor)
                except WorkerDiedError as error:
                    await self._restart(error)
        except WorkerDiedError as error:
            # Logged by the owner of the engine: see `EngineStatus.failure`.
            failure = (
                f"worker deaths within {RESTART_WINDOW_SECONDS:g} s: {len(self._deaths)}, --max-worker-restarts allows "
                f"{self._config.max_worker_restarts}; the last one: {_first_line(error)}"
            )
            await self._give_up(failure, GenerationError("the device failed too often"))
        except Exception as error:  # a bug of ours: callers that wait must get an error
            logger.exception("the engine's loop failed")
            await self._give_up(f"the engine's loop failed: {_first_line(error)}", GenerationError("the engine failed"))

    async def _run_steps(self) -> None:
        """Schedule, execute, update. The next plan is sent before the last one is done.

        Returns when the engine shall sleep and no plan is in flight. Raises WorkerDiedError.
        """
        scheduler, executor = self._live_scheduler, self._executor
        result = asyncio.ensure_future(executor.next_result())
        try:
            while True:
                self._wakeup.clear()
                if self._sleep.is_on and not self._submitted:
                    return
                self._send_adapters()
                while not self._sleep.is_on and self._may_send() and (plan := scheduler.schedule()):
                    executor.submit(plan)
                    self._note_submitted(plan)
                await self._wait(result)
                if result.done():
                    self._update(result.result())
                    result = asyncio.ensure_future(executor.next_result())
                elif self._submitted and self._timer.is_overdue(time.monotonic()):
                    seconds, estimate = time.monotonic() - self._timer.began, scheduler.plan_seconds
                    raise WorkerDiedError(f"a step has taken {seconds:.1f} s so far, {estimate:.1f} s were expected")
        finally:
            result.cancel()

    def _send_adapters(self) -> None:
        """Send the reads of adapters that are due, after the drops: a key may be dropped and read again."""
        adapters = self._live_scheduler.adapters
        if forgotten := adapters.take_forgets():
            self._executor.forget_adapters(forgotten)
        for key in adapters.take_reads():
            self._executor.read_adapter(key, adapters.kept_files(key))

    def _take_adapter(self, read: AdapterRead, in_step: bool = False) -> None:
        """Take the result of a read: requests that wait for it go on, or fail."""
        for holder, error in self._live_scheduler.note_adapter(read, in_step).items():
            self._fail(holder, error)
        self._wakeup.set()

    def _fail(self, holder: str, error: ItemError) -> None:
        """End a request, or a call of `load_adapter`."""
        if (load := self._adapter_loads.get(holder)) is None:
            self._tracked.fail(holder, error)
        elif not load.done():
            load.set_exception(request_error(error))

    def _may_send(self) -> bool:
        """Whether the device is idle, or about to be."""
        if not self._submitted:
            return True
        return len(self._submitted) < MAX_PLANS_IN_FLIGHT and time.monotonic() >= self._timer.next_due

    async def _wait(self, result: asyncio.Future[StepResult]) -> None:
        """Wait for a result, a call of `add` or `abort`, the time to send the next plan, or a step that is overdue."""
        timeout = None
        if self._submitted:
            timeout = self._timer.wait_seconds(time.monotonic(), len(self._submitted) < MAX_PLANS_IN_FLIGHT)
        woken = asyncio.ensure_future(self._wakeup.wait())
        either: set[asyncio.Future[Any]] = {result, woken}
        try:
            await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()

    def _note_submitted(self, plan: StepPlan) -> None:
        self._submitted.append(plan)
        if len(self._submitted) == 1:
            self._note_begin()

    def _note_begin(self) -> None:
        """Note that the oldest plan in flight begins to run now."""
        now = time.monotonic()
        self._timer.begin(now, self._live_scheduler.plan_seconds)
        self._tracked.note_started(self._submitted[0].encode, now)

    def _update(self, result: StepResult) -> None:
        plan = self._submitted.popleft()
        seconds = time.monotonic() - self._timer.began
        update = self._live_scheduler.update(result, seconds)
        for read in result.adapters:
            self._take_adapter(read, in_step=True)
        if self._submitted:
            self._note_begin()
        self._observer.on_step(plan, result, seconds)
        self._tracked.count(plan, result)
        for request_id, share in update.encoded.items():
            self._tracked.publish_encoded(request_id, share)
        for request_id, step in update.steps.items():
            self._tracked.publish_step(request_id, step, result.previews.get(request_id))
        for request_id, checkpoint in result.checkpoints.items():
            if request_id in update.checkpoints:
                share = result.checkpoint_seconds / len(result.checkpoints)
                self._observer.on_checkpoint(self._tracked.request(request_id), checkpoint.num_bytes, share)
        for request_id in update.frames:
            self._tracked.publish_frames(request_id, result.frames[request_id])
        for request_id in update.finished:
            self._tracked.finish(request_id, result.images.get(request_id))
        self._apply(update)

    def _apply(self, update: Update) -> None:
        """Publish checkpoints, end failed requests, and reset the numbers of those that start again."""
        for request_id, checkpoint in update.checkpoints.items():
            self._tracked.publish_checkpoint(request_id, checkpoint)
        for request_id, error in update.failed.items():
            if error.kind not in ("invalid", "blocked"):
                # Errors of other kinds than `internal` are explained by their message.
                trace = f"\n{error.traceback}" if error.kind == "internal" else ""
                logger.error("request %s failed (%s): %s%s", request_id, error.kind, error.message, trace)
            self._fail(request_id, error)
        self._tracked.start_again(update.replayed)

    async def _restart(self, error: WorkerDiedError) -> None:
        """Start new workers and run every request again, from its newest checkpoint.

        Raises WorkerDiedError after too many deaths.
        """
        self._state = "restarting"
        self._submitted.clear()
        update = self._live_scheduler.reset()
        self._apply(update)
        while True:
            self._deaths.note(time.monotonic())
            logger.error("worker died (%d within ten minutes): %s", len(self._deaths), error)
            if len(self._deaths) > self._config.max_worker_restarts:
                raise error
            await asyncio.sleep(self._deaths.pause_seconds)
            try:
                # The new measurements are not used: the scheduler and the pixels follow the first start.
                await self._executor.start()
                break
            except (WorkerDiedError, ConfigError) as failure:
                error = WorkerDiedError(f"the worker does not start again: {failure}")
        self._state = "running"
        self._observer.on_worker_restart(sum(request_id in self._tracked for request_id in update.replayed))

    # Helpers ----------------------------------------------------------------------------------------------

    @property
    def _live_scheduler(self) -> Scheduler:
        assert self._scheduler is not None, "the engine was not started"
        return self._scheduler

    async def _give_up(self, failure: str, error: RequestError) -> None:
        self._state = "failed"
        self._failure = failure
        self._fail_all(error)
        await self._executor.close()

    def _fail_all(self, error: RequestError) -> None:
        if self._state in ("failed", "stopped"):
            self._sleep.end(error)
        if self._scheduler is not None:
            self._scheduler.abort(self._tracked.ids)
        for request_id in self._tracked.ids:
            self._tracked.end(request_id, error)
        for load in self._adapter_loads.values():
            if not load.done():
                load.set_exception(error)

    def _retry_after(self) -> float:
        """Estimated seconds until a server that replaces this one has loaded. This one takes no work."""
        if self._scheduler is None or self._state not in ("running", "restarting"):
            return self._load_seconds
        drain_seconds = max(0.0, self._drain_ends - time.monotonic())
        return min(self._scheduler.queue_seconds, drain_seconds) + self._load_seconds


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
