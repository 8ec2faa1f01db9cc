"""The engine: schedule, execute, update, one denoising step at a time. asyncio and plain Python, no torch.

Everything here runs on one event loop. Requests come in by `add`, which returns the queue that their events
go to; `_run_steps` is the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_omni.diffusion.control.events import (
    EngineEvent,
    EngineObserver,
    EngineStatus,
    Failed,
    Finished,
    NullObserver,
    Preview,
    StepDone,
    reporting_rejects,
)
from vllm_omni.diffusion.control.executor.base import Executor
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.control.scheduler import MAX_PLANS_IN_FLIGHT, Scheduler, Update
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.request import check_sendable
from vllm_omni.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    ModerationBlockedError,
    RequestAbortedError,
    RequestError,
    UnavailableError,
    WorkerDiedError,
)

logger = logging.getLogger(__name__)

RESTART_WINDOW_SECONDS = 600.0
RESTART_BACKOFF_SECONDS = 0.5
MAX_RESTART_BACKOFF_SECONDS = 30.0
_SEND_AHEAD_SHARE = 0.2
"""The next plan is sent when this share of the running one is left (and `_SEND_AHEAD_SECONDS` more): early
enough that the device never waits, late enough that a request that arrives meanwhile is in it."""
_SEND_AHEAD_SECONDS = 0.01
STALL_SECONDS = 300.0
STALL_FACTOR = 30.0
"""A step that takes longer than both of these (the second times its estimate) hangs. Far beyond what a live one takes:
a false alarm costs all requests their work so far, and again when they are replayed."""


@dataclass
class _Tracked:
    """A request between `add` and its last event."""

    request: ScheduledRequest
    events: asyncio.Queue[EngineEvent]
    started: float | None = None
    """When its first plan began to run."""
    stages: dict[str, float] = field(default_factory=dict)
    """Device seconds by stage of the steps it took part in."""
    num_steps: int = 0
    """That the model made for it."""
    cached_steps: float = 0.0
    """What part of them came from a step cache."""
    last_step: int = 0
    """Last step told: a replay does not tell a step or a preview twice."""

    def timings(self, now: float) -> dict[str, float]:
        arrival = self.request.arrival
        stages = {name: self.stages.get(name, 0.0) for name in ("text_encode", "denoise", "vae_decode")}
        queue = (now if self.started is None else self.started) - arrival
        return {"queue": queue, **stages, "total": now - arrival, **self._steps()}

    def _steps(self) -> dict[str, float]:
        return {"computed_steps": self.num_steps - self.cached_steps, "cached_steps": self.cached_steps}


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
        """A step that takes longer than `stall_seconds` and `stall_factor` times its estimate ends its workers.

        Fresh ones start at once after the first death, then after a pause that about doubles, from
        `restart_backoff_seconds` to `max_restart_backoff_seconds`.
        """
        self._config = config
        self._executor = executor
        self._observer: EngineObserver = observer or NullObserver()
        self._restart_backoff_seconds = restart_backoff_seconds
        self._max_restart_backoff_seconds = max_restart_backoff_seconds
        self._stall_seconds = stall_seconds
        self._stall_factor = stall_factor
        self._state = "starting"
        self._failure = ""
        self._draining = False
        self._drain_ends = 0.0
        """When what then still runs will be given up."""
        self._load_seconds = 1.0
        self._attention_backend: str | None = None
        self._tracked: dict[str, _Tracked] = {}
        self._submitted: deque[StepPlan] = deque()
        self._step_began = 0.0
        """When the oldest submitted plan began to run, as far as can be seen from here."""
        self._send_at = 0.0
        """When the plan after it is due to be sent."""
        self._overdue_at = 0.0
        """When the workers that run it are taken for hung."""
        self._deaths: deque[float] = deque()
        self._wakeup = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._scheduler: Scheduler | None = None
        self._task: asyncio.Task[None] | None = None

    # What callers use -------------------------------------------------------------------------------------

    async def start(self) -> WorkerReady:
        """Start the workers and the loop. Raises ConfigError or WorkerDiedError; the engine is then `failed`.

        Raises UnavailableError after `close` or `kill`; when one is called meanwhile, WorkerDiedError. The engine is
        then `stopped`.
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
        """Raise UnavailableError unless requests are taken."""
        if self._draining or self._state not in ("running", "restarting"):
            raise UnavailableError(f"the engine is {self.status().state}", retry_after=self._retry_after())

    def check(self, requests: Sequence[ScheduledRequest]) -> None:
        """Raise what `add` would raise for `requests`, and add nothing."""
        self.check_open()
        check_sendable([scheduled.request for scheduled in requests])
        self._live_scheduler.check(requests)

    def add(
        self, requests: Sequence[ScheduledRequest], events: asyncio.Queue[EngineEvent] | None = None
    ) -> asyncio.Queue[EngineEvent]:
        """Queue all of `requests`, or none; their events come by `events`, or by the new queue that is returned.

        Each request's last event is Finished or Failed. Raises QueueFullError and UnavailableError, both with
        `retry_after` in seconds, and InvalidRequestError for an id that is in use and what no worker can be sent.
        """
        with reporting_rejects(self._observer):
            self.check_open()
            check_sendable([scheduled.request for scheduled in requests])
            self._live_scheduler.add(requests)
        events = asyncio.Queue() if events is None else events
        for request in requests:
            self._tracked[request.request_id] = _Tracked(request, events)
            self._idle.clear()
        self._observer.on_add([scheduled.request for scheduled in requests])
        self._wakeup.set()
        return events

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests at once with Failed(RequestAbortedError); ids that are not known are ignored."""
        if self._scheduler is None:
            return
        known = self._scheduler.abort(request_ids)
        if (sent := [request_id for request_id, is_sent in known.items() if is_sent]) and self._state == "running":
            self._executor.abort(sent)
        for request_id in known:
            self._end(request_id, RequestAbortedError("the request was aborted"))
        self._wakeup.set()

    def status(self) -> EngineStatus:
        scheduler, state = self._scheduler, self._state
        healthy = state == "running"
        if self._draining and state in ("running", "restarting"):
            state = "draining"
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
        )

    def eta_seconds(self, requests: Sequence[ScheduledRequest]) -> float:
        """Estimated time until the last of `requests` is done, be they here or about to be added."""
        restart = self._load_seconds if self._state == "restarting" else 0.0
        return restart + self._live_scheduler.eta_seconds(requests)

    def holds(self, request_id: str) -> bool:
        """Whether a request of this id has come and not ended."""
        return request_id in self._tracked

    def begin_drain(self) -> None:
        """Take no new work from now on."""
        self._draining = True

    async def drain(self, timeout: float) -> bool:
        """Take no new work; True when all that was here ended within `timeout` seconds."""
        self.begin_drain()
        self._drain_ends = time.monotonic() + timeout
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        return self._idle.is_set()

    async def close(self) -> None:
        """Stop the loop and the workers; what still runs gets Failed(UnavailableError). May be called twice."""
        self._state = "stopped"
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._fail_all(UnavailableError("the engine was stopped", retry_after=self._load_seconds))
        await self._executor.close()

    def kill(self) -> None:
        """Do what `close` does without awaiting anything: for an owner that is gone, or whose loop has ended."""
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
                except WorkerDiedError as error:
                    await self._restart(error)
        except WorkerDiedError as error:
            # Told by whoever owns the engine: see `EngineStatus.failure`.
            failure = (
                f"worker deaths within {RESTART_WINDOW_SECONDS:g} s: {len(self._deaths)}, --max-worker-restarts allows "
                f"{self._config.max_worker_restarts}; the last one: {_first_line(error)}"
            )
            await self._give_up(failure, GenerationError("the device failed too often"))
        except Exception as error:  # a bug of ours: whoever waits must hear of it, whatever it is
            logger.exception("the engine's loop failed")
            await self._give_up(f"the engine's loop failed: {_first_line(error)}", GenerationError("the engine failed"))

    async def _run_steps(self) -> None:
        """Schedule, execute, update, until a worker dies. The next plan is sent before the last one is done."""
        scheduler, executor = self._live_scheduler, self._executor
        result = asyncio.ensure_future(executor.next_result())
        try:
            while True:
                self._wakeup.clear()
                while self._may_send() and (plan := scheduler.schedule()):
                    executor.submit(plan)
                    self._note_submitted(plan)
                await self._wait(result)
                if result.done():
                    self._update(result.result())
                    result = asyncio.ensure_future(executor.next_result())
                elif self._submitted and time.monotonic() >= self._overdue_at:
                    seconds, estimate = time.monotonic() - self._step_began, scheduler.plan_seconds
                    raise WorkerDiedError(f"a step has taken {seconds:.1f} s so far, {estimate:.1f} s were expected")
        finally:
            result.cancel()

    def _may_send(self) -> bool:
        """The device is idle, or about to be."""
        if not self._submitted:
            return True
        return len(self._submitted) < MAX_PLANS_IN_FLIGHT and time.monotonic() >= self._send_at

    async def _wait(self, result: asyncio.Future[StepResult]) -> None:
        """For a result, a call of `add` or `abort`, the time to send the next plan, or a step that is overdue."""
        timeout = None
        if self._submitted:
            now = time.monotonic()
            sends_next = len(self._submitted) == 1 and self._send_at > now
            timeout = (self._send_at if sends_next else max(self._overdue_at, now)) - now
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
        """The oldest submitted plan begins to run now."""
        now = self._step_began = time.monotonic()
        estimate = self._live_scheduler.plan_seconds
        self._send_at = now + (1 - _SEND_AHEAD_SHARE) * estimate - _SEND_AHEAD_SECONDS
        self._overdue_at = now + max(self._stall_seconds, self._stall_factor * estimate)
        for request_id in self._submitted[0].encode:
            if (tracked := self._tracked.get(request_id)) and tracked.started is None:
                tracked.started = now

    def _update(self, result: StepResult) -> None:
        plan = self._submitted.popleft()
        seconds = time.monotonic() - self._step_began
        update = self._live_scheduler.update(result, seconds)
        if self._submitted:
            self._note_begin()
        self._observer.on_step(plan, result, seconds)
        self._count_stages(plan, result)
        for request_id, step in update.steps.items():
            self._publish_step(request_id, step, result.previews.get(request_id))
        for request_id in update.finished:
            self._end(request_id, result.images[request_id])
        self._apply(update)

    def _apply(self, update: Update) -> None:
        """End what failed, forget the timings of what starts again."""
        for request_id, error in update.failed.items():
            if error.kind not in ("invalid", "blocked"):
                # A failure with a kind of its own says all with its message.
                trace = f"\n{error.traceback}" if error.kind == "internal" else ""
                logger.error("request %s failed (%s): %s%s", request_id, error.kind, error.message, trace)
            self._end(request_id, _request_error(error))
        for request_id in update.replayed:
            tracked = self._tracked[request_id]
            tracked.stages.clear()
            tracked.num_steps, tracked.cached_steps = 0, 0.0

    async def _restart(self, error: WorkerDiedError) -> None:
        """Fresh workers, and every request from its seed. Raises WorkerDiedError after too many deaths."""
        self._state = "restarting"
        self._submitted.clear()
        update = self._live_scheduler.reset()
        self._apply(update)
        while True:
            num_deaths = self._count_death()
            logger.error("worker died (%d within ten minutes): %s", num_deaths, error)
            if num_deaths > self._config.max_worker_restarts:
                raise error
            await asyncio.sleep(self._backoff_seconds(num_deaths))
            try:
                # Its answer is not looked at: the scheduler plans, and pixels are made, as the first start chose.
                await self._executor.start()
                break
            except (WorkerDiedError, ConfigError) as failure:
                error = WorkerDiedError(f"the worker does not start again: {failure}")
        self._state = "running"
        self._observer.on_worker_restart(sum(request_id in self._tracked for request_id in update.replayed))

    # Small things -----------------------------------------------------------------------------------------

    @property
    def _live_scheduler(self) -> Scheduler:
        assert self._scheduler is not None, "the engine was not started"
        return self._scheduler

    def _count_death(self) -> int:
        """Note a death now; how many there were lately."""
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - RESTART_WINDOW_SECONDS:
            self._deaths.popleft()
        return len(self._deaths)

    def _backoff_seconds(self, num_deaths: int) -> float:
        """Pause before the next start: 0, 1, 3, 7... times the back-off, and no more than its maximum."""
        doublings = min(num_deaths - 1, 30)  # a float takes no more than 1023 of them
        return min(self._max_restart_backoff_seconds, self._restart_backoff_seconds * (2.0**doublings - 1))

    def _count_stages(self, plan: StepPlan, result: StepResult) -> None:
        for stage, request_ids, seconds in (
            ("text_encode", plan.encode, result.encode_seconds),
            ("denoise", result.advanced, result.denoise_seconds),
            ("vae_decode", plan.decode, result.decode_seconds),
        ):
            for request_id in request_ids:
                if tracked := self._tracked.get(request_id):
                    tracked.stages[stage] = tracked.stages.get(stage, 0.0) + seconds
        for request_id in result.advanced:
            if tracked := self._tracked.get(request_id):
                tracked.num_steps += result.num_made(request_id)
                tracked.cached_steps += result.cached.get(request_id, 0.0)

    def _publish_step(self, request_id: str, step: int, preview: np.ndarray | None) -> None:
        tracked = self._tracked[request_id]
        if step > tracked.last_step:
            tracked.last_step = step
            tracked.events.put_nowait(StepDone(request_id, step))
        if preview is not None:
            tracked.events.put_nowait(Preview(request_id, step, preview))

    def _end(self, request_id: str, outcome: np.ndarray | RequestError) -> None:
        """The last event of a request: its picture, or why there is none."""
        tracked = self._tracked.pop(request_id)
        timings = tracked.timings(time.monotonic())
        if isinstance(outcome, RequestError):
            tracked.events.put_nowait(Failed(request_id, outcome))
            self._observer.on_finish(tracked.request.request, timings, *_outcome_of(outcome))
        else:
            tracked.events.put_nowait(Finished(request_id, outcome, timings))
            self._observer.on_finish(tracked.request.request, timings, "completed", "")
        if not self._tracked:
            self._idle.set()

    async def _give_up(self, failure: str, error: RequestError) -> None:
        self._state = "failed"
        self._failure = failure
        self._fail_all(error)
        await self._executor.close()

    def _fail_all(self, error: RequestError) -> None:
        if self._scheduler is not None:
            self._scheduler.abort(list(self._tracked))
        for request_id in list(self._tracked):
            self._end(request_id, error)

    def _retry_after(self) -> float:
        """Seconds until a successor of this server, which takes no work, has likely loaded."""
        if self._scheduler is None or self._state not in ("running", "restarting"):
            return self._load_seconds
        left = max(0.0, self._drain_ends - time.monotonic())
        return min(self._scheduler.queue_seconds, left) + self._load_seconds


def _outcome_of(error: RequestError) -> tuple[str, str]:
    """(outcome, reason) for `EngineObserver.on_finish`."""
    if isinstance(error, RequestAbortedError):
        return "aborted", str(error)
    if isinstance(error, InvalidRequestError):  # its message is for the client: it may quote the prompt
        return "refused", f"wrong {error.param or 'input'}"
    return "failed", str(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _request_error(error: ItemError) -> RequestError:
    """The tracebacks and paths of a fault stay in the log; the client is told what it or the operator can change."""
    if error.kind == "invalid":
        return InvalidRequestError(error.message, param=error.param)
    if error.kind == "blocked":
        return ModerationBlockedError(error.message)
    if error.kind == "not_finite":
        return GenerationError(error.message)
    if error.kind == "out_of_memory":
        return GenerationError("the device has not enough memory for this request")
    return GenerationError("the device failed on this request")
