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
from typing import Any, Protocol

import numpy as np

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.executor.base import Executor
from vllm_omni.diffusion.plan import ItemError, StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.request import DiffusionRequest
from vllm_omni.diffusion.scheduler import MAX_PLANS_UNDER_WAY, Scheduler, Update
from vllm_omni.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    RequestError,
    UnavailableError,
    WorkerDiedError,
)

logger = logging.getLogger(__name__)

_RESTART_WINDOW_SECONDS = 600.0
_SEND_AHEAD_SHARE = 0.2
"""The next plan is sent when this share of the running one is left (and `_SEND_AHEAD_SECONDS` more): early
enough that the device never waits, late enough that a request that arrives meanwhile is in it."""
_SEND_AHEAD_SECONDS = 0.01
_STALL_SECONDS = 30.0
_STALL_FACTOR = 10.0
"""A step that takes longer than both of these (the second times its estimate) is a sign of a hung device."""


@dataclass(frozen=True)
class StepDone:
    request_id: str
    step: int
    """Denoising steps done."""


@dataclass(frozen=True)
class Preview:
    request_id: str
    step: int
    image: np.ndarray
    """uint8 [height, width, 3]."""


@dataclass(frozen=True)
class Finished:
    request_id: str
    image: np.ndarray
    """uint8 [height, width, 3]."""
    timings: dict[str, float]


@dataclass(frozen=True)
class Failed:
    request_id: str
    error: RequestError


EngineEvent = StepDone | Preview | Finished | Failed


@dataclass(frozen=True)
class EngineStatus:
    state: str
    """starting | running | restarting | draining | stopped | failed"""
    num_running: int
    num_waiting: int
    queue_seconds: float
    healthy: bool
    """Workers live, and the running step is not overdue."""


class EngineObserver(Protocol):
    """Told what happens; metrics hang here."""

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None: ...

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str) -> None:
        """`outcome`: completed | aborted | failed."""

    def on_reject(self, reason: str) -> None:
        """`reason`: queue_full | unavailable."""

    def on_worker_restart(self, num_replayed: int) -> None: ...


class NullObserver:
    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None: ...

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str) -> None: ...

    def on_reject(self, reason: str) -> None: ...

    def on_worker_restart(self, num_replayed: int) -> None: ...


@dataclass
class _Tracked:
    """A request between `add` and its last event."""

    request: DiffusionRequest
    events: asyncio.Queue[EngineEvent]
    started: float | None = None
    """When its first plan began to run."""
    stages: dict[str, float] = field(default_factory=dict)
    """Device seconds by stage of the steps it took part in."""
    computed_steps: int = 0
    last_step: int = 0
    """Last step told: a replay does not tell a step or a preview twice."""

    def timings(self, now: float) -> dict[str, float]:
        arrival = self.request.arrival
        stages = {name: self.stages.get(name, 0.0) for name in ("text_encode", "denoise", "vae_decode")}
        queue = (now if self.started is None else self.started) - arrival
        return {"queue": queue, **stages, "total": now - arrival, "computed_steps": float(self.computed_steps)}


class DiffusionEngine:
    """Runs requests on an executor's workers, one step of all of them at a time."""

    def __init__(
        self,
        config: OmniDiffusionConfig,
        executor: Executor,
        observer: EngineObserver | None = None,
        *,
        restart_backoff_seconds: float = 0.5,
    ) -> None:
        self._config = config
        self._executor = executor
        self._observer: EngineObserver = observer or NullObserver()
        self._restart_backoff_seconds = restart_backoff_seconds
        self._state = "starting"
        self._draining = False
        self._load_seconds = 1.0
        self._tracked: dict[str, _Tracked] = {}
        self._submitted: deque[StepPlan] = deque()
        self._step_began = 0.0
        """When the oldest submitted plan began to run, as far as can be seen from here."""
        self._send_at = 0.0
        """When the plan after it is due to be sent."""
        self._deaths: deque[float] = deque()
        self._wakeup = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._scheduler: Scheduler | None = None
        self._task: asyncio.Task[None] | None = None

    # What callers use -------------------------------------------------------------------------------------

    async def start(self) -> WorkerReady:
        """Start the workers and the loop. Raises ConfigError or WorkerDiedError; the engine is then `failed`."""
        assert self._task is None, "an engine starts once"
        try:
            ready = await self._executor.start()
        except BaseException:
            self._state = "failed"
            raise
        self._load_seconds = max(ready.load_seconds, 1.0)
        self._scheduler = Scheduler(self._config, ready)
        self._state = "running"
        self._task = asyncio.create_task(self._run(), name="diffusion-engine")
        return ready

    def add(self, requests: Sequence[DiffusionRequest]) -> asyncio.Queue[EngineEvent]:
        """Queue all of `requests`, or none; their events come by the queue that is returned.

        Each request's last event is Finished or Failed. Raises QueueFullError and UnavailableError, both with
        `retry_after` in seconds, and InvalidRequestError for an id that is in use.
        """
        if self._draining or self._state not in ("running", "restarting"):
            self._observer.on_reject("unavailable")
            raise UnavailableError(f"the engine is {self.status().state}", retry_after=self._retry_after())
        try:
            self._live_scheduler.add(requests)
        except QueueFullError:
            self._observer.on_reject("queue_full")
            raise
        events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        for request in requests:
            self._tracked[request.request_id] = _Tracked(request, events)
            self._idle.clear()
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
        healthy = state == "running" and not self._is_overdue()
        if self._draining and state in ("running", "restarting"):
            state = "draining"
        if scheduler is None:
            return EngineStatus(state, 0, 0, 0.0, healthy)
        return EngineStatus(state, scheduler.num_running, scheduler.num_waiting, scheduler.queue_seconds, healthy)

    def eta_seconds(self, requests: Sequence[DiffusionRequest]) -> float:
        """Estimated time until the last of `requests` is done, be they here or about to be added."""
        return self._live_scheduler.eta_seconds(requests)

    def begin_drain(self) -> None:
        """Take no new work from now on."""
        self._draining = True

    async def drain(self, timeout: float) -> bool:
        """Take no new work; True when all that was here ended within `timeout` seconds."""
        self.begin_drain()
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

    # The loop ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._run_steps()
                except WorkerDiedError as error:
                    await self._restart(error)
        except WorkerDiedError as error:
            logger.error("giving up: %s", error)
            self._give_up(GenerationError("the device failed too often"))
        except Exception:  # a bug of ours: whoever waits must hear of it, whatever it is
            logger.exception("the engine's loop failed")
            self._give_up(GenerationError("the engine failed"))
            await self._executor.close()

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
        finally:
            result.cancel()

    def _may_send(self) -> bool:
        """The device is idle, or about to be."""
        if not self._submitted:
            return True
        return len(self._submitted) < MAX_PLANS_UNDER_WAY and time.monotonic() >= self._send_at

    async def _wait(self, result: asyncio.Future[StepResult]) -> None:
        """For a result, a call of `add` or `abort`, or the time to send the next plan."""
        ahead = self._send_at - time.monotonic()
        timeout = ahead if len(self._submitted) == 1 and ahead > 0 else None
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
        ahead = _SEND_AHEAD_SHARE * self._live_scheduler.plan_seconds + _SEND_AHEAD_SECONDS
        self._send_at = now + self._live_scheduler.plan_seconds - ahead
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
            self._tell_step(request_id, step, result.previews.get(request_id))
        for request_id in update.finished:
            self._end(request_id, result.images[request_id])
        self._apply(update)

    def _apply(self, update: Update) -> None:
        """End what failed, forget the timings of what starts again."""
        for request_id, error in update.failed.items():
            logger.error("request %s failed (%s): %s\n%s", request_id, error.kind, error.message, error.traceback)
            self._end(request_id, _request_error(error))
        for request_id in update.replayed:
            self._tracked[request_id].stages.clear()
            self._tracked[request_id].computed_steps = 0

    async def _restart(self, error: WorkerDiedError) -> None:
        """Fresh workers, and every request from its seed. Raises WorkerDiedError after too many deaths."""
        self._state = "restarting"
        self._submitted.clear()
        self._apply(self._live_scheduler.reset())
        while True:
            num_deaths = self._count_death()
            logger.error("worker died (%d within ten minutes): %s", num_deaths, error)
            if num_deaths > self._config.max_worker_restarts:
                raise error
            # At once the first time, then 1, 3, 7... times the back-off.
            await asyncio.sleep(self._restart_backoff_seconds * (2 ** (num_deaths - 1) - 1))
            try:
                await self._executor.start()
                break
            except (WorkerDiedError, ConfigError) as failure:
                error = WorkerDiedError(f"the worker does not start again: {failure}")
        self._state = "running"
        self._observer.on_worker_restart(len(self._tracked))

    # Small things -----------------------------------------------------------------------------------------

    @property
    def _live_scheduler(self) -> Scheduler:
        assert self._scheduler is not None, "the engine was not started"
        return self._scheduler

    def _count_death(self) -> int:
        """Note a death now; how many there were lately."""
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - _RESTART_WINDOW_SECONDS:
            self._deaths.popleft()
        return len(self._deaths)

    def _count_stages(self, plan: StepPlan, result: StepResult) -> None:
        for stage, request_ids, seconds in (
            ("text_encode", plan.encode, result.encode_seconds),
            ("denoise", result.advanced, result.denoise_seconds),
            ("vae_decode", plan.decode, result.decode_seconds),
        ):
            for request_id in request_ids:
                if tracked := self._tracked.get(request_id):
                    tracked.stages[stage] = tracked.stages.get(stage, 0.0) + seconds
                    tracked.computed_steps += stage == "denoise"

    def _tell_step(self, request_id: str, step: int, preview: np.ndarray | None) -> None:
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
            aborted = isinstance(outcome, RequestAbortedError)
            self._observer.on_finish(tracked.request, timings, "aborted" if aborted else "failed")
        else:
            tracked.events.put_nowait(Finished(request_id, outcome, timings))
            self._observer.on_finish(tracked.request, timings, "completed")
        if not self._tracked:
            self._idle.set()

    def _give_up(self, error: RequestError) -> None:
        self._state = "failed"
        self._fail_all(error)

    def _fail_all(self, error: RequestError) -> None:
        if self._scheduler is not None:
            self._scheduler.abort(list(self._tracked))
        for request_id in list(self._tracked):
            self._end(request_id, error)

    def _is_overdue(self) -> bool:
        if not self._submitted:
            return False
        limit = max(_STALL_SECONDS, _STALL_FACTOR * self._live_scheduler.plan_seconds)
        return time.monotonic() - self._step_began > limit

    def _retry_after(self) -> float:
        """Seconds until a server is likely to take work: when this one has drained, or its successor has loaded."""
        if self._scheduler is not None and self._state in ("running", "restarting"):
            return max(1.0, self._scheduler.queue_seconds)
        return self._load_seconds


def _request_error(error: ItemError) -> RequestError:
    """The tracebacks and paths of a fault stay in the log; only a wrong input is explained to the client."""
    if error.kind == "invalid":
        return InvalidRequestError(error.message)
    if error.kind == "out_of_memory":
        return GenerationError("the device has not enough memory for this request")
    return GenerationError("the device failed on this request")
