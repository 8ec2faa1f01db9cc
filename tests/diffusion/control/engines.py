"""An engine on a fake worker, an observer that notes events, and waits for events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from testbed.fakes import FakeExecutor, make_config, make_scheduled
from testbed.patience import GUARD_SECONDS
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import EngineEvent, EngineObserver, Failed, Finished
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest


class NotedEvents(EngineObserver):
    """Notes what the engine tells its observer."""

    def __init__(self) -> None:
        self.steps: list[tuple[StepPlan, StepResult]] = []
        self.added: list[str] = []
        self.outcomes: list[tuple[str, str]] = []
        self.reasons: dict[str, str] = {}
        self.rejects: list[str] = []
        self.restarts: list[int] = []

    def on_add(self, requests: Sequence[DiffusionRequest]) -> None:
        self.added += [request.request_id for request in requests]

    def on_step(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        assert plan.step_id == result.step_id
        assert seconds >= 0
        self.steps.append((plan, result))

    def on_finish(self, request: DiffusionRequest, timings: dict[str, float], outcome: str, reason: str) -> None:
        assert timings.keys() - {"vae_tiling"} == {
            "queue",
            "text_encode",
            "denoise",
            "vae_decode",
            "total",
            "computed_steps",
            "cached_steps",
        }
        self.outcomes.append((request.request_id, outcome))
        self.reasons[request.request_id] = reason

    def on_reject(self, reason: str) -> None:
        self.rejects.append(reason)

    def on_worker_restart(self, num_replayed: int) -> None:
        self.restarts.append(num_replayed)


@asynccontextmanager
async def running_engine(
    executor: FakeExecutor | None = None, observer: NotedEvents | None = None, **settings: Any
) -> AsyncIterator[DiffusionEngine]:
    engine = DiffusionEngine(
        make_config(**settings), executor or FakeExecutor(), observer, restart_backoff_seconds=0.001
    )
    async with asyncio.timeout(GUARD_SECONDS):
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()


def now_request(request_id: str = "r", size: Any = 64, steps: int = 4, **values: Any) -> ScheduledRequest:
    return make_scheduled(request_id, size, steps, arrival=time.monotonic(), **values)


async def read_until_done(events: asyncio.Queue[EngineEvent], count: int = 1) -> list[EngineEvent]:
    """All events until `count` requests ended."""
    seen: list[EngineEvent] = []
    while sum(isinstance(event, Finished | Failed) for event in seen) < count:
        seen.append(await asyncio.wait_for(events.get(), GUARD_SECONDS))
    assert events.empty()
    return seen


async def until(condition: Callable[[], bool]) -> None:
    """Let the engine work until `condition` holds."""
    async with asyncio.timeout(GUARD_SECONDS):
        while not condition():  # noqa: ASYNC110  (the conditions are of fakes that have no events)
            await asyncio.sleep(0)


def failures(events: Iterable[EngineEvent]) -> dict[str, type]:
    return {event.request_id: type(event.error) for event in events if isinstance(event, Failed)}


def iter_nowait(events: asyncio.Queue[EngineEvent]) -> list[EngineEvent]:
    return [events.get_nowait() for _ in range(events.qsize())]
