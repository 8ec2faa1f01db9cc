"""Sleep of the engine: no step runs, nothing that was accepted is lost, and every call has a defined end."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from testbed.fakes import FakeExecutor, FakeRunner, fake_image, make_config, make_scheduled
from testbed.patience import GUARD_SECONDS
from tests.diffusion.control.engines import (
    NotedEvents,
    failures,
    iter_nowait,
    now_request,
    read_until_done,
    running_engine,
    until,
)
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import EngineEvent, Finished, StepDone
from vllm_omni.diffusion.control.replicas import Replicas
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, KeptFiles
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.diffusion.messages.weights_moved import WeightsMoved
from vllm_omni.errors import (
    GenerationError,
    InvalidRequestError,
    RequestAbortedError,
    UnavailableError,
    WorkerDiedError,
)

LEVELS = (1, 2)


class Gated(FakeExecutor):
    """Executor whose ways to sleep and back, and restarts, wait for a gate."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.gate = asyncio.Event()
        self.has_begun_sleep = False

    async def start(self) -> WorkerReady:
        if self.num_starts:
            await self.gate.wait()
        return await super().start()

    async def sleep(self) -> WeightsMoved:
        self.has_begun_sleep = True
        await self.gate.wait()
        return await super().sleep()

    async def wake_up(self) -> WeightsMoved:
        await self.gate.wait()
        return await super().wake_up()


def pictures(events: list[EngineEvent]) -> dict[str, np.ndarray]:
    return {event.request_id: event.image for event in events if isinstance(event, Finished)}


@pytest.mark.parametrize("level", LEVELS)
async def test_requests_are_checked_out_and_replayed(level: int) -> None:
    executor, observer = FakeExecutor(hold=True), NotedEvents()
    async with running_engine(executor, observer) as engine:
        requests = [now_request("a", seed=1), now_request("b", seed=2)]
        events = engine.add(requests)
        await until(lambda: bool(executor.pending))
        executor.release_results(1)
        await until(lambda: executor.num_plans >= 2)
        sleep = asyncio.create_task(engine.sleep(level))
        await until(lambda: engine.status().state == "sleeping")
        while not sleep.done():  # plans in flight end; no other one begins
            executor.release_results(len(executor.pending))
            await asyncio.sleep(0)
        num_plans = executor.num_plans
        assert await sleep == level
        assert executor.runner.is_asleep == (level == 1)
        assert executor.num_stops == (level == 2)
        status = engine.status()
        assert (status.state, status.healthy, status.sleep_level) == ("sleeping", True, level)
        assert (status.num_running, status.num_waiting) == (0, 2)
        executor.hold = False
        for _ in range(20):
            await asyncio.sleep(0)
        assert executor.num_plans == num_plans
        await engine.wake_up()
        assert engine.status().state == "running"
        done = await read_until_done(events, 2)
    assert observer.restarts == []
    assert executor.num_starts == level
    made = pictures(done)
    for request in requests:
        assert np.array_equal(made[request.request_id], fake_image(request.request))
        steps = [e.step for e in done if isinstance(e, StepDone) and e.request_id == request.request_id]
        assert steps == [*range(1, request.num_steps + 1)]


async def test_calls_are_refused_asleep_and_repeated_calls_have_no_effect() -> None:
    async with running_engine(observer := FakeExecutor(), noted := NotedEvents()) as engine:
        await engine.wake_up()
        assert engine.status().state == "running"
        for wrong in (0, 3, True, "1", None):
            with pytest.raises(InvalidRequestError, match="level takes 1 or 2"):
                await engine.sleep(wrong)  # type: ignore[arg-type]
        assert [await engine.sleep(1), await engine.sleep(1)] == [1, 1]
        with pytest.raises(UnavailableError, match="the engine is sleeping") as refusal:
            engine.add([now_request()])
        assert refusal.value.retry_after is not None
        assert noted.rejects == ["unavailable"]
        assert await engine.sleep(2) == 2
        assert await engine.sleep(1) == 2, "asleep at a deeper level"
        await asyncio.gather(engine.wake_up(), engine.wake_up())
        assert isinstance((await read_until_done(engine.add([now_request()])))[-1], Finished)
    assert observer.num_starts == 2


async def test_shared_weights_have_no_place_on_one_host() -> None:
    async with running_engine(weight_sharding=True, parallel=DiffusionParallelConfig(ulysses_degree=2)) as engine:
        with pytest.raises(InvalidRequestError, match="with --weight-sharding, level takes 2, got 1"):
            await engine.sleep(1)
        assert await engine.sleep(2) == 2
        await engine.wake_up()
        assert isinstance((await read_until_done(engine.add([now_request()])))[-1], Finished)


async def test_wake_up_waits_for_the_sleep_before_it() -> None:
    executor = Gated()
    async with running_engine(executor) as engine:
        sleep = asyncio.create_task(engine.sleep(1))
        await until(lambda: engine.status().state == "sleeping")
        wake = asyncio.create_task(engine.wake_up())
        await asyncio.sleep(0)
        assert not sleep.done()
        assert not wake.done()
        executor.gate.set()
        assert await sleep == 1
        await wake
        assert engine.status().state == "running"
        assert not executor.runner.is_asleep


async def test_a_call_that_is_cancelled_leaves_a_defined_state() -> None:
    executor = Gated()
    async with running_engine(executor) as engine:
        sleep = asyncio.create_task(engine.sleep(1))
        await until(lambda: engine.status().state == "sleeping")
        sleep.cancel()
        wake = asyncio.create_task(engine.wake_up())
        await asyncio.sleep(0)
        executor.gate.set()
        await wake
        assert engine.status().state == "running"
        assert isinstance((await read_until_done(engine.add([now_request()])))[-1], Finished)


@pytest.mark.parametrize("level", LEVELS)
async def test_an_engine_that_cannot_wake_sleeps_on(level: int, caplog: pytest.LogCaptureFixture) -> None:
    failing: dict[str, Any] = (
        {"wake_failures": ["no room"]} if level == 1 else {"start_errors": {1: WorkerDiedError("no room\nhere")}}
    )
    executor, observer = FakeExecutor(**failing), NotedEvents()
    async with running_engine(executor, observer) as engine:
        await engine.sleep(level)
        with pytest.raises(UnavailableError, match=r"does not wake up, and sleeps on: no room$"):
            await engine.wake_up()
        status = engine.status()
        assert (status.state, status.healthy, status.sleep_level) == ("sleeping", True, level)
        await engine.wake_up()
        assert engine.status().state == "running"
    assert observer.restarts == []
    assert [r.levelname for r in caplog.records if "does not wake up" in r.getMessage()] == ["ERROR"]


async def test_a_worker_that_dies_asleep_is_replaced_when_the_engine_wakes() -> None:
    executor, observer = FakeExecutor(), NotedEvents()
    async with running_engine(executor, observer, max_worker_restarts=0) as engine:
        await engine.sleep(1)
        executor.die()
        await until(lambda: engine.status().sleep_level == 2)
        assert (engine.status().state, engine.status().healthy) == ("sleeping", True)
        assert executor.num_starts == 1
        await engine.wake_up()
        assert isinstance((await read_until_done(engine.add([now_request()])))[-1], Finished)
    assert (executor.num_starts, observer.restarts) == (2, [])


async def test_a_worker_that_dies_on_its_way_to_sleep() -> None:
    executor = Gated()
    async with running_engine(executor, max_worker_restarts=0) as engine:
        sleep = asyncio.create_task(engine.sleep(1))
        await until(lambda: executor.has_begun_sleep)
        executor.die()
        executor.gate.set()
        assert await sleep == 2
        await engine.wake_up()
        assert isinstance((await read_until_done(engine.add([now_request()])))[-1], Finished)


async def test_sleep_waits_for_a_restart() -> None:
    executor, observer = Gated(die_at={1}), NotedEvents()
    async with running_engine(executor, observer) as engine:
        events = engine.add([now_request()])
        await until(lambda: engine.status().state == "restarting")
        sleep = asyncio.create_task(engine.sleep(1))
        await until(lambda: engine.status().state == "sleeping")
        assert not engine.status().healthy
        assert not sleep.done()
        executor.gate.set()
        assert await sleep == 1
        assert engine.status().healthy
        await engine.wake_up()
        assert isinstance((await read_until_done(events))[-1], Finished)
    assert observer.restarts == [1]


async def test_sleepers_learn_that_the_engine_fails() -> None:
    async with running_engine(executor := Gated(die_at={1}), max_worker_restarts=0) as engine:
        executor.gate.set()
        events = engine.add([now_request()])
        await until(lambda: executor.num_plans >= 2)
        with pytest.raises((UnavailableError, GenerationError)):
            await engine.sleep(1)
        assert failures(await read_until_done(events)) == {"r": GenerationError}
        assert engine.status().state == "failed"
        with pytest.raises(UnavailableError, match="failed"):
            await engine.wake_up()


async def test_sleep_before_the_start_and_while_draining_is_refused() -> None:
    engine = DiffusionEngine(make_config(), FakeExecutor())
    for call in (engine.sleep, engine.wake_up):
        with pytest.raises(UnavailableError, match="starting"):
            await call()
    async with running_engine() as engine:
        engine.begin_drain()
        for call in (engine.sleep, engine.wake_up):
            with pytest.raises(UnavailableError, match="draining"):
                await call()


@pytest.mark.parametrize("level", LEVELS)
async def test_a_drain_asleep_ends_at_once(level: int) -> None:
    executor = FakeExecutor(hold=True)
    async with running_engine(executor) as engine:
        events = engine.add([now_request()])
        await until(lambda: bool(executor.pending))
        sleep = asyncio.create_task(engine.sleep(level))
        await asyncio.sleep(0)
        executor.hold = False
        executor.release_results(len(executor.pending))
        await sleep
        assert await engine.drain(GUARD_SECONDS)
        assert failures(iter_nowait(events)) == {"r": UnavailableError}


async def test_close_ends_a_sleep_and_the_calls_that_wait() -> None:
    executor = Gated()
    async with running_engine(executor) as engine:
        sleep = asyncio.create_task(engine.sleep(1))
        await until(lambda: engine.status().state == "sleeping")
        wake = asyncio.create_task(engine.wake_up())
        await engine.close()
        ends = await asyncio.gather(sleep, wake, return_exceptions=True)
        assert [type(end) for end in ends] == [UnavailableError, UnavailableError]
        assert engine.status().state == "stopped"


async def test_log_lines_have_bytes_and_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_engine() as engine:
        await engine.sleep(1)
        await engine.wake_up()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("asleep at level 1: 1.00 GB of weights left for host memory in 0.50 s")
    assert lines[1].startswith("awake: 1.00 GB of weights came back in ")


def two_replicas(*executors: FakeExecutor) -> Replicas:
    config = make_config(parallel=DiffusionParallelConfig(data_parallel_size=2))
    return Replicas(config, executors.__getitem__, restart_backoff_seconds=0.001)


async def test_all_replicas_sleep() -> None:
    executors = FakeExecutor(), FakeExecutor(wake_failures=["no room"])
    replicas = two_replicas(*executors)
    async with asyncio.timeout(GUARD_SECONDS):
        await replicas.start()
        requests = [now_request(f"r{n}", seed=n) for n in range(6)]
        events = replicas.add(requests)
        assert await replicas.sleep(1) == 1
        assert all(executor.runner.is_asleep for executor in executors)
        assert (replicas.status().state, replicas.status().sleep_level) == ("sleeping", 1)
        with pytest.raises(UnavailableError, match="no room"):
            await replicas.wake_up()
        assert [executor.runner.is_asleep for executor in executors] == [False, True]
        assert replicas.status().state == "sleeping"
        with pytest.raises(UnavailableError, match="sleeping"):
            replicas.add([now_request("late")])
        await replicas.wake_up()
        made = pictures(await read_until_done(events, 6))
        assert all(np.array_equal(made[r.request_id], fake_image(r.request)) for r in requests)
        await replicas.close()


@pytest.mark.parametrize("seed", range(3))
async def test_random_events_lose_nothing(seed: int) -> None:
    """200 calls of sleep, wake up, submit and abort: each accepted request ends once, with its own picture."""
    rng = random.Random(seed)
    executor = FakeExecutor(wake_failures=["no room"] * 3)
    accepted: dict[str, ScheduledRequest] = {}
    aborted: set[str] = set()
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    calls: list[asyncio.Task[Any]] = []
    async with running_engine(executor, max_num_queued_reqs=1000) as engine:
        for number in range(200):
            event = rng.choice(("sleep", "wake", "wake", "submit", "submit", "submit", "abort", "cancel"))
            if event == "sleep":
                calls.append(asyncio.create_task(engine.sleep(rng.choice(LEVELS))))
            elif event == "wake":
                calls.append(asyncio.create_task(engine.wake_up()))
            elif event == "submit":
                request = make_scheduled(f"r{number}", 64, rng.randint(1, 4), seed=number)
                try:
                    engine.add([request], events)
                except UnavailableError:
                    assert engine.status().state == "sleeping"
                else:
                    accepted[request.request_id] = request
            elif event == "abort" and accepted:
                request_id = rng.choice(list(accepted))
                if engine.holds(request_id):
                    aborted.add(request_id)
                engine.abort([request_id])
            elif event == "cancel" and calls:
                calls[-1].cancel()
            for _ in range(rng.choice((0, 1, 5, 20))):
                await asyncio.sleep(0)
        ends = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(end) for end in ends} <= {int, type(None), UnavailableError, asyncio.CancelledError}
        await engine.wake_up()
        done = await read_until_done(events, len(accepted)) if accepted else []
        made = pictures(done)
        assert failures(done) == dict.fromkeys(aborted, RequestAbortedError)
        assert made.keys() == accepted.keys() - aborted
        assert all(np.array_equal(made[i], fake_image(accepted[i].request)) for i in made)
    assert isinstance(executor.runner, FakeRunner)
    assert len(made) > 10


INK = AdapterKey("/ink.safetensors", "stamp")


class SlowReads(FakeExecutor):
    """Executor whose reads of adapters end when they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[AdapterKey] = []
        self.forgotten: list[AdapterKey] = []

    def read_adapter(self, key: AdapterKey, kept: KeptFiles | None = None) -> None:
        self.reads.append(key)

    def forget_adapters(self, keys: Sequence[AdapterKey]) -> None:
        self.forgotten += keys
        super().forget_adapters(keys)

    def end_read(self, key: AdapterKey) -> None:
        super().read_adapter(key)


@pytest.mark.parametrize("level", LEVELS)
async def test_a_load_of_an_adapter_lives_through_a_sleep(level: int) -> None:
    async with running_engine(executor := SlowReads()) as engine:
        load = asyncio.create_task(engine.load_adapter(INK))
        await until(lambda: executor.reads == [INK])
        await engine.sleep(level)
        with pytest.raises(UnavailableError, match="sleeping"):
            await engine.load_adapter(INK)
        await engine.wake_up()
        await until(lambda: executor.reads == [INK, INK])
        executor.end_read(INK)
        await load
        (resident,) = engine.resident_adapters
        assert resident.state(INK) == "host"
        assert resident.refusal([INK]) is None


async def test_a_read_that_ends_after_the_sleep_leaves_nothing_behind() -> None:
    async with running_engine(executor := SlowReads()) as engine:
        load = asyncio.create_task(engine.load_adapter(INK))
        await until(lambda: executor.reads == [INK])
        load.cancel()
        await engine.sleep(1)
        await engine.wake_up()
        executor.end_read(INK)
        await until(lambda: executor.forgotten == [INK])
        assert executor.runner.on_host == set()
