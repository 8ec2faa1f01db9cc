"""Data parallelism: several replicas of the model with the interface of one DiffusionEngine.

A request goes to the replica where it will be done first, and stays there: when that replica's workers die, it is
replayed on the new ones. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from vllm_omni.diffusion.control.admission import check_ids, check_number
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import (
    EngineEvent,
    EngineObserver,
    EngineStatus,
    reporting_rejects,
)
from vllm_omni.diffusion.control.executor import Executor
from vllm_omni.diffusion.control.executor.merging import merge_ready
from vllm_omni.diffusion.control.resident_adapters import ResidentAdapters
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.diffusion.messages.request import DiffusionRequest
from vllm_omni.errors import QueueFullError, RequestAbortedError, RequestError

STATES = ("failed", "starting", "stopped", "draining", "sleeping", "running", "restarting")
"""States by precedence: the first that any replica has is the state of all. A running replica accepts requests while
another restarts; a failed one ends the server; none accepts any while one sleeps."""


class Replicas:
    """`config.parallel.data_parallel_size` engines; `max_num_queued_reqs` bounds the requests of all together."""

    def __init__(
        self,
        config: OmniDiffusionConfig,
        make_executor: Callable[[int], Executor],
        observer: EngineObserver | None = None,
        **engine_settings: float,
    ) -> None:
        """`make_executor`: called with the index of each replica. `engine_settings`: keywords of `DiffusionEngine`."""
        self._max_num_queued_reqs = config.max_num_queued_reqs
        self._observer: EngineObserver = observer or EngineObserver()
        self._engines = [
            DiffusionEngine(config, make_executor(index), self._observer, **engine_settings)
            for index in range(config.parallel.data_parallel_size)
        ]

    async def start(self) -> WorkerReady:
        """Start all replicas at once. When one fails, the others are stopped and its error is raised."""
        starts = [asyncio.create_task(engine.start()) for engine in self._engines]
        try:
            return merge_ready(await asyncio.gather(*starts))
        except BaseException:  # also where the start is cancelled
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.close()
            raise

    def add(self, requests: Sequence[ScheduledRequest]) -> asyncio.Queue[EngineEvent]:
        """Queue all of `requests`, on one or several replicas, or none; see `DiffusionEngine.add`."""
        with reporting_rejects(self._observer):
            self._check(requests)
            parts = self._assign(requests)
            for engine, part in parts.items():
                engine.check(part)
        events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        for engine, part in parts.items():
            engine.add(part, events)
        return events

    def abort(self, request_ids: Sequence[str], error: RequestAbortedError | None = None) -> None:
        """Abort requests; see `DiffusionEngine.abort`."""
        for engine in self._engines:
            engine.abort(request_ids, error)

    def request_checkpoint(self, request_ids: Sequence[str]) -> None:
        for engine in self._engines:
            engine.request_checkpoint(request_ids)

    def status(self) -> EngineStatus:
        """Status of all replicas together. `queue_seconds`: time until the last of them is idle."""
        statuses = [engine.status() for engine in self._engines]
        return EngineStatus(
            state=min((status.state for status in statuses), key=STATES.index),
            num_running=sum(status.num_running for status in statuses),
            num_waiting=sum(status.num_waiting for status in statuses),
            queue_seconds=max(status.queue_seconds for status in statuses),
            healthy=all(status.healthy for status in statuses),
            attention_backends=tuple(sorted({name for status in statuses for name in status.attention_backends})),
            failure=next((status.failure for status in statuses if status.failure), ""),
            sleep_level=max(status.sleep_level for status in statuses),
        )

    def eta_seconds(self, requests: Sequence[ScheduledRequest]) -> float:
        """Estimated time until the last of `requests` is done. They may be in the queue or about to be added."""
        return max((engine.eta_seconds(part) for engine, part in self._assign(requests).items()), default=0.0)

    def work_seconds(self, requests: Sequence[ScheduledRequest]) -> float:
        """Estimated time that `requests` take on one replica when nothing else runs."""
        return self._engines[0].work_seconds(requests)

    async def sleep(self, level: int = 1) -> int:
        """Let all replicas sleep; see `DiffusionEngine.sleep`. Returns the deepest level."""
        return max(await asyncio.gather(*(engine.sleep(level) for engine in self._engines)))

    async def wake_up(self) -> None:
        """Wake all replicas; see `DiffusionEngine.wake_up`. One failure is raised; the other replicas are awake then,
        and requests are refused until a further call has woken all."""
        wakings = [asyncio.create_task(engine.wake_up()) for engine in self._engines]
        try:
            await asyncio.wait(wakings)
        finally:
            for waking in wakings:
                waking.cancel()
            failures = [e for e in await asyncio.gather(*wakings, return_exceptions=True) if e is not None]
        if failures:
            raise failures[0]

    async def load_adapter(self, key: AdapterKey) -> None:
        """Let all ranks of all replicas read an adapter; see `DiffusionEngine.load_adapter`. One failure is raised."""
        loads = [asyncio.create_task(engine.load_adapter(key)) for engine in self._engines]
        try:
            await asyncio.gather(*loads)
        finally:
            for load in loads:
                load.cancel()
            await asyncio.gather(*loads, return_exceptions=True)

    async def wait_for_ends(self, is_meant: Callable[[DiffusionRequest], bool]) -> None:
        """Wait until all requests of now, on any replica, for which `is_meant` holds have ended."""
        await asyncio.gather(*(engine.wait_for_ends(is_meant) for engine in self._engines))

    def forget_adapters(self, is_forgotten: Callable[[AdapterKey], bool]) -> None:
        for engine in self._engines:
            engine.forget_adapters(is_forgotten)

    @property
    def resident_adapters(self) -> list[ResidentAdapters]:
        """Adapters of each replica that has started."""
        return [adapters for engine in self._engines for adapters in engine.resident_adapters]

    def begin_drain(self) -> None:
        for engine in self._engines:
            engine.begin_drain()

    async def drain(self, timeout: float) -> bool:
        """Accept no new requests; return whether all requests ended within `timeout` seconds."""
        return all(await asyncio.gather(*(engine.drain(timeout) for engine in self._engines)))

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def kill(self) -> None:
        """End the workers of all replicas at once, as `DiffusionEngine.kill` does."""
        for engine in self._engines:
            engine.kill()

    def _check(self, requests: Sequence[ScheduledRequest]) -> None:
        """Check the common limits. Raises UnavailableError, InvalidRequestError and QueueFullError."""
        for engine in self._engines:
            engine.check_open()
        ids = [request.request_id for request in requests]
        check_ids(ids, lambda request_id: self._engine_of(request_id) is not None)
        check_number(len(ids), self._max_num_queued_reqs)
        status = self.status()
        num_here = status.num_running + status.num_waiting
        if (surplus := num_here + len(ids) - self._max_num_queued_reqs) > 0:
            raise QueueFullError(
                f"the queue is full ({num_here} requests, {status.queue_seconds:.1f} s of work)",
                retry_after=status.queue_seconds * surplus / num_here,
            )

    def _assign(self, requests: Sequence[ScheduledRequest]) -> dict[DiffusionEngine, list[ScheduledRequest]]:
        """Assign requests to replicas: the one that holds it, or else the one with room that will finish it first."""
        parts: dict[DiffusionEngine, list[ScheduledRequest]] = {}
        for request in requests:
            engine = self._engine_of(request.request_id) or self._first_to_finish(request, parts)
            parts.setdefault(engine, []).append(request)
        return parts

    def _first_to_finish(
        self, request: ScheduledRequest, parts: Mapping[DiffusionEngine, Sequence[ScheduledRequest]]
    ) -> DiffusionEngine:
        """Replica with room that will finish `request` first. `parts`: requests assigned to each and not added."""
        with_it = {engine: [*parts.get(engine, ()), request] for engine in self._engines}
        ranked = sorted(self._engines, key=lambda engine: engine.eta_seconds(with_it[engine]))
        return next((engine for engine in ranked if _has_room(engine, with_it[engine])), ranked[0])

    def _engine_of(self, request_id: str) -> DiffusionEngine | None:
        return next((engine for engine in self._engines if engine.holds(request_id)), None)


def _has_room(engine: DiffusionEngine, requests: Sequence[ScheduledRequest]) -> bool:
    try:
        engine.check(requests)
    except RequestError:
        return False
    return True
