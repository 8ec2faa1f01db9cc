"""Data parallelism: replicas on fake workers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from testbed.fakes import FakeExecutor, FakeRunner, fake_image, make_config, make_ready
from testbed.patience import GUARD_SECONDS
from tests.diffusion.control.engines import NotedEvents, failures, now_request, read_until_done, until
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import Checkpointed, Finished, StepDone
from vllm_omni.diffusion.control.replicas import Replicas
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.checkpoint import Checkpoint
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
    UnavailableError,
    WorkerDiedError,
)


def make_replicas(executors: list[FakeExecutor], observer: NotedEvents | None = None, **settings: Any) -> Replicas:
    config = make_config(parallel=DiffusionParallelConfig(data_parallel_size=len(executors)), **settings)
    return Replicas(config, executors.__getitem__, observer, restart_backoff_seconds=0.001)


@asynccontextmanager
async def running(
    executors: list[FakeExecutor], observer: NotedEvents | None = None, **settings: Any
) -> AsyncIterator[Replicas]:
    replicas = make_replicas(executors, observer, **settings)
    async with asyncio.timeout(GUARD_SECONDS):
        await replicas.start()
        try:
            yield replicas
        finally:
            await replicas.close()


def engines_of(replicas: Replicas) -> list[DiffusionEngine]:
    """The engine of each replica: private, but which of them holds a request shows nowhere else."""
    return replicas._engines


def ids_on(executor: FakeExecutor) -> set[str]:
    """Ids of the requests that the replica's worker got."""
    plans = [*executor.runner.plans, *executor.pending]
    return {request.request_id for plan in plans for request in plan.new_requests}


class RestartsLate(FakeExecutor):
    """Executor whose restart waits for `gate`."""

    def __init__(self, gate: asyncio.Event, **settings: Any) -> None:
        super().__init__(**settings)
        self._gate = gate

    async def start(self) -> WorkerReady:
        if self.num_starts:
            await self._gate.wait()
        return await super().start()


async def test_pictures_of_one_call_spread_and_share_a_queue() -> None:
    executors, observer = [FakeExecutor() for _ in range(3)], NotedEvents()
    async with running(executors, observer) as replicas:
        requests = [now_request(f"r{n}", 64, 5, seed=n) for n in range(7)]
        events = await read_until_done(replicas.add(requests), 7)
    pictures = {event.request_id: event.image for event in events if isinstance(event, Finished)}
    assert all(np.array_equal(pictures[request.request_id], fake_image(request.request)) for request in requests)
    assert sorted(len(ids_on(executor)) for executor in executors) == [2, 2, 3]
    assert sorted(observer.outcomes) == [(f"r{n}", "completed") for n in range(7)]


async def test_a_request_goes_where_it_is_done_first() -> None:
    executors = [FakeExecutor(hold=True), FakeExecutor(hold=True)]
    async with running(executors, scheduling_policy="fcfs") as replicas:
        for number, (request_id, steps, home) in enumerate(
            [("long", 50, 0), ("a", 4, 1), ("b", 4, 1), ("c", 4, 1), ("huge", 100, 1), ("d", 4, 0)]
        ):
            replicas.add([now_request(request_id, 64, steps)])
            held = [engine.holds(request_id) for engine in engines_of(replicas)]
            assert held == [home == 0, home == 1], request_id
            assert replicas.status().num_waiting + replicas.status().num_running == number + 1
        queues = [engine.status().queue_seconds for engine in engines_of(replicas)]
        assert replicas.status().queue_seconds == max(queues) > min(queues) > 0
        new = now_request("e")
        assert replicas.eta_seconds([new]) == min(engine.eta_seconds([new]) for engine in engines_of(replicas))
        there = now_request("huge", 64, 100)
        assert replicas.eta_seconds([there, new]) == engines_of(replicas)[1].eta_seconds([there])
        assert replicas.eta_seconds([]) == 0


async def test_the_queue_is_bounded_for_all_together_and_refuses_all_or_nothing() -> None:
    executors, observer = [FakeExecutor(hold=True), FakeExecutor(hold=True)], NotedEvents()
    async with running(executors, observer, max_num_queued_reqs=5) as replicas:
        with pytest.raises(InvalidRequestError, match=r"6 pictures at once .* \(5\)"):
            replicas.add([now_request(f"x{n}") for n in range(6)])
        events = replicas.add([now_request(f"a{n}") for n in range(4)])
        with pytest.raises(QueueFullError) as full:
            replicas.add([now_request("b0"), now_request("b1")])
        assert full.value.retry_after == pytest.approx(replicas.status().queue_seconds / 4)
        with pytest.raises(QueueFullError) as full:
            replicas.add([now_request(f"b{n}") for n in range(3)])
        assert full.value.retry_after == pytest.approx(replicas.status().queue_seconds * 2 / 4)
        assert observer.rejects == ["queue_full"] * 2
        for taken in ([now_request("a3")], [now_request("c"), now_request("c")]):
            with pytest.raises(InvalidRequestError, match="is in use"):
                replicas.add(taken)
        status = replicas.status()
        assert status.num_waiting + status.num_running == 4
        replicas.add([now_request("b0")])
        replicas.abort(["a0", "a1", "a2", "a3", "b0", "unknown"])
        assert set(failures(await read_until_done(events, 4)).values()) == {RequestAbortedError}
        status = replicas.status()
        assert status.num_waiting + status.num_running == 0


async def test_a_replica_without_room_is_passed_over() -> None:
    """A replica with a full queue would finish a short request first, but cannot accept it."""
    ready = make_ready(seconds_per_unit=1.0)
    executors = [FakeExecutor(lambda: FakeRunner(ready=ready), hold=True) for _ in range(2)]
    async with running(executors, max_queue_seconds=70_000.0) as replicas:
        full, other = engines_of(replicas)
        replicas.add([now_request("long", 256, 100)])
        assert full.holds("long")
        assert full.status().queue_seconds < 70_000.0
        for n in range(3):
            other.add([now_request(f"o{n}", 64, 80)])
        short = now_request("short", 64, 90)
        assert full.eta_seconds([short]) < other.eta_seconds([short])
        with pytest.raises(QueueFullError):
            full.check([short])
        replicas.add([short])
        assert other.holds("short")


async def test_one_dies_and_its_requests_only_wait() -> None:
    gate, observer = asyncio.Event(), NotedEvents()

    executors = [FakeExecutor(), RestartsLate(gate, die_at={2})]
    async with running(executors, observer) as replicas:
        requests = [now_request(f"r{n}", 64, 6, seed=n) for n in range(6)]
        events = replicas.add(requests)
        await until(lambda: len(observer.outcomes) == 3 and not replicas.status().healthy)
        status = replicas.status()
        assert (status.state, status.num_running + status.num_waiting) == ("running", 3)
        # Requests that arrive meanwhile go to the replica that works.
        other = await read_until_done(replicas.add([now_request("new")]))
        assert isinstance(other[-1], Finished)
        gate.set()
        await until(lambda: len(observer.outcomes) == 7)
        pictures = {
            e.request_id: e.image
            for e in [events.get_nowait() for _ in range(events.qsize())]
            if isinstance(e, Finished)
        }
        assert all(np.array_equal(pictures[request.request_id], fake_image(request.request)) for request in requests)
        assert observer.restarts == [3]
        assert replicas.status().healthy
        assert [executor.num_starts for executor in executors] == [1, 2]


async def test_a_busy_replica_is_better_than_one_that_loads() -> None:
    executors = [FakeExecutor(hold=True), RestartsLate(asyncio.Event())]
    async with running(executors) as replicas:
        busy, loading = engines_of(replicas)
        executors[1].die()
        await until(lambda: loading.status().state == "restarting")
        for name in ("a", "b", "c"):
            replicas.add([now_request(name)])
            assert busy.holds(name)


async def test_one_that_gives_up_fails_them_all() -> None:
    executors = [FakeExecutor(), FakeExecutor(die_at=range(1000))]
    async with running(executors, max_worker_restarts=1) as replicas:
        events = await read_until_done(replicas.add([now_request(f"r{n}") for n in range(4)]), 4)
        assert list(failures(events).values()) == [GenerationError] * 2
        assert (replicas.status().state, replicas.status().healthy) == ("failed", False)
        assert replicas.status().failure.startswith("worker deaths within 600 s: 2, --max-worker-restarts allows 1; ")


@pytest.mark.parametrize("seed", range(10))
async def test_random_deaths_lose_nothing(seed: int) -> None:
    rng = random.Random(seed)
    executors = [FakeExecutor(die_at=set(rng.sample(range(8), 1))) for _ in range(3)]
    async with running(executors) as replicas:
        requests = [now_request(f"r{n}", rng.choice([64, 128]), rng.choice([2, 9]), seed=n) for n in range(9)]
        events = await read_until_done(replicas.add(requests), 9)
    pictures = {event.request_id: event.image for event in events if isinstance(event, Finished)}
    assert all(np.array_equal(pictures[request.request_id], fake_image(request.request)) for request in requests)


@pytest.mark.parametrize("error", [ConfigError("--dtype float16: no"), WorkerDiedError("no device")])
async def test_a_start_that_fails_stops_the_others(error: Exception) -> None:
    class Slow(FakeExecutor):
        async def start(self) -> WorkerReady:
            await asyncio.Event().wait()
            raise AssertionError

    executors = [FakeExecutor(), FakeExecutor(start_errors={0: error}), Slow()]
    replicas = make_replicas(executors)
    with pytest.raises(type(error), match=str(error)):
        await asyncio.wait_for(replicas.start(), GUARD_SECONDS)
    assert [executor.closed for executor in executors] == [True] * 3
    with pytest.raises(UnavailableError):
        replicas.add([now_request()])


async def test_ready_is_said_for_all() -> None:
    readies = [
        make_ready(load_bytes=n, load_seconds=n, attention_backend=name) for n, name in ((1, "sdpa"), (2, "cudnn"))
    ]
    executors = [FakeExecutor(partial(FakeRunner, ready=ready)) for ready in readies]
    replicas = make_replicas(executors)
    assert replicas.status().state == "starting"
    with pytest.raises(UnavailableError):
        replicas.add([now_request()])
    ready = await replicas.start()
    assert (ready.load_bytes, ready.load_seconds) == (3, 2)
    assert (replicas.status().state, replicas.status().healthy) == ("running", True)
    assert replicas.status().attention_backends == ("cudnn", "sdpa")
    await replicas.close()


async def test_all_begin_to_drain_at_once() -> None:
    async with running([FakeExecutor(), FakeExecutor()]) as replicas:
        replicas.begin_drain()
        assert [engine.status().state for engine in engines_of(replicas)] == ["draining"] * 2
        with pytest.raises(UnavailableError):
            replicas.add([now_request()])


async def test_drain_waits_for_all() -> None:
    executors, observer = [FakeExecutor(), FakeExecutor()], NotedEvents()
    async with running(executors, observer) as replicas:
        replicas.add([now_request("a", steps=30), now_request("b", steps=3)])
        assert await replicas.drain(GUARD_SECONDS)
        assert sorted(observer.outcomes) == [("a", "completed"), ("b", "completed")]
        assert replicas.status().state == "draining"
        with pytest.raises(UnavailableError):
            replicas.add([now_request("c")])
        assert observer.rejects == ["unavailable"]
        await replicas.close()
        await replicas.close()
        assert replicas.status().state == "stopped"


async def test_each_replica_gives_the_checkpoints_of_its_requests_and_resumes_from_them() -> None:
    executors = [FakeExecutor(step_seconds=0.001), FakeExecutor(step_seconds=0.001)]
    requests = {i: now_request(i, steps=30, seed=seed) for seed, i in enumerate("ab")}
    newest: dict[str, Checkpoint] = {}
    async with running(executors) as replicas:
        events = replicas.add(list(requests.values()))
        while len(newest) < 2:
            event = await events.get()
            if isinstance(event, StepDone) and event.step == 3:
                replicas.request_checkpoint([event.request_id, "unknown"])
            if isinstance(event, Checkpointed):
                assert event.checkpoint is not None
                newest[event.request_id] = event.checkpoint
        assert [len(ids_on(executor)) for executor in executors] == [1, 1]
        replicas.abort(list(requests))
    async with running([FakeExecutor(), FakeExecutor()]) as replicas:
        resumed = [replace(request, resume=newest[i]) for i, request in requests.items()]
        seen = await read_until_done(replicas.add(resumed), 2)
    for event in seen:
        if isinstance(event, StepDone):
            assert event.step > newest[event.request_id].step
        if isinstance(event, Finished):
            assert np.array_equal(event.image, fake_image(requests[event.request_id].request))
