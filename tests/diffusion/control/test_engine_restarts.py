"""Deaths of workers: restarts and replays of the engine."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import numpy as np
import pytest

from testbed.fakes import FakeExecutor, FakeRunner, fake_image, make_config, make_ready
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
from vllm_omni.diffusion.control.events import Finished, Preview, StepDone
from vllm_omni.diffusion.messages.plan import StepPlan, WorkerReady
from vllm_omni.errors import (
    ConfigError,
    GenerationError,
    RequestAbortedError,
    UnavailableError,
    WorkerDiedError,
)


@pytest.mark.parametrize("seed", range(20))
async def test_dead_workers_are_replaced_and_everything_is_replayed(seed: int) -> None:
    rng = random.Random(seed)
    executor, observer = FakeExecutor(die_at=set(rng.sample(range(11), 2))), NotedEvents()
    async with running_engine(executor, observer, max_num_seqs=rng.choice([1, 4])) as engine:
        requests = [
            now_request(f"r{n}", rng.choice([64, 128]), rng.choice([2, 5, 9]), seed=n, preview_steps=(1, 2))
            for n in range(6)
        ]
        events = await read_until_done(engine.add(requests), 6)
    assert executor.num_starts == 3
    assert len(observer.restarts) == 2
    for request in requests:
        mine = [event for event in events if event.request_id == request.request_id]
        assert [event.step for event in mine if isinstance(event, StepDone)] == [*range(1, request.num_steps + 1)]
        assert [event.step for event in mine if isinstance(event, Preview)] == [1, 2]
        (finished,) = [event for event in mine if isinstance(event, Finished)]
        assert np.array_equal(finished.image, fake_image(request.request))
        assert finished.timings["computed_steps"] == request.num_steps


async def test_too_many_deaths_fail_everything() -> None:
    executor, observer = FakeExecutor(die_at=range(1000)), NotedEvents()
    async with running_engine(executor, observer, max_worker_restarts=2) as engine:
        events = await read_until_done(engine.add([now_request("a"), now_request("b")]), 2)
        assert failures(events) == {"a": GenerationError, "b": GenerationError}
        assert executor.num_starts == 3
        await until(lambda: executor.closed)
        assert (engine.status().state, engine.status().healthy) == ("failed", False)
        assert engine.status().failure == (
            "worker deaths within 600 s: 3, --max-worker-restarts allows 2; "
            "the last one: the fake worker was told to die"
        )
        assert observer.reasons["b"] == "the device failed too often"
        with pytest.raises(UnavailableError) as unavailable:
            engine.add([now_request("late")])
        assert unavailable.value.retry_after is not None
        assert engine.status().num_waiting == 0


async def test_a_request_that_kills_workers_fails_and_the_others_go_on() -> None:
    class Fragile(FakeExecutor):
        def submit(self, plan: StepPlan) -> None:
            super().submit(plan)
            if "poison" in plan.denoise:
                self.die()

    async with running_engine(Fragile()) as engine:
        events = await read_until_done(engine.add([now_request(id) for id in ("a", "poison", "b")]), 3)
        assert failures(events) == {"poison": GenerationError}
        assert engine.status().state == "running"


async def test_restarts_that_fail_count_as_deaths() -> None:
    errors = {1: WorkerDiedError("still no device"), 2: ConfigError("the folder is gone")}
    executor = FakeExecutor(die_at={0}, start_errors=errors)
    async with running_engine(executor) as engine:
        assert isinstance((await read_until_done(engine.add([now_request()])))[-1], Finished)
    assert executor.num_starts == 4


async def test_batches_are_of_the_size_that_the_first_start_measured() -> None:
    size = now_request().cost.tokens_per_step
    measured = iter([2 * size, 100 * size, 100 * size])
    executor, observer = (
        FakeExecutor(lambda: FakeRunner(ready=make_ready(max_batch_tokens=next(measured)))),
        NotedEvents(),
    )
    async with running_engine(executor, observer) as engine:
        for num_deaths in (0, 1):
            requests = [now_request(f"{num_deaths}-{i}") for i in range(6)]
            await read_until_done(engine.add(requests), len(requests))
            assert max(len(plan.denoise) for plan in executor.runner.plans) == 2
            executor.die()
            await until(lambda n=num_deaths: len(observer.restarts) == n + 1)  # type: ignore[misc]


async def test_a_worker_that_dies_idle_is_replaced() -> None:
    executor, observer = FakeExecutor(), NotedEvents()
    async with running_engine(executor, observer) as engine:
        executor.die()
        await until(lambda: observer.restarts == [0])
        assert isinstance((await read_until_done(engine.add([now_request()])))[-1], Finished)


async def test_restarting_takes_work_and_aborts() -> None:
    gate = asyncio.Event()

    class Slow(FakeExecutor):
        async def start(self) -> Any:
            if self.num_starts:
                await gate.wait()
            return await super().start()

    executor = Slow(die_at={1})
    async with running_engine(executor) as engine:
        old = engine.add([now_request("old"), now_request("gone")])
        await until(lambda: engine.status().state == "restarting")
        assert not engine.status().healthy
        new = engine.add([now_request("new")])
        engine.abort(["gone"])
        gate.set()
        assert isinstance((await read_until_done(new))[-1], Finished)
        events = await read_until_done(old, 2)
        assert failures(events) == {"gone": RequestAbortedError}


async def test_a_replayed_request_waited_until_its_first_run() -> None:
    gate = asyncio.Event()

    class Slow(FakeExecutor):
        async def start(self) -> WorkerReady:
            if self.num_starts:
                await gate.wait()
            return await super().start()

    async with running_engine(Slow(die_at={2})) as engine:
        request = now_request()
        events = engine.add([request])
        await until(lambda: engine.status().state == "restarting")
        died = time.monotonic()
        gate.set()
        finished = (await read_until_done(events))[-1]
        assert isinstance(finished, Finished)
        assert finished.timings["queue"] <= died - request.arrival


async def test_what_had_not_begun_is_no_replay() -> None:
    executor, observer = FakeExecutor(die_at={2}), NotedEvents()
    async with running_engine(executor, observer, max_num_seqs=1) as engine:
        await read_until_done(engine.add([now_request(id) for id in "abc"]), 3)
    assert observer.restarts == [1]


async def test_draining_survives_a_death() -> None:
    async with running_engine(FakeExecutor(die_at={2})) as engine:
        engine.add([now_request("a"), now_request("b")])
        assert await engine.drain(GUARD_SECONDS)
        assert engine.status().state == "draining"


async def test_close_while_restarting() -> None:
    class Stuck(FakeExecutor):
        async def start(self) -> Any:
            if self.num_starts:
                await asyncio.Event().wait()
            return await super().start()

    async with running_engine(Stuck(die_at={0})) as engine:
        events = engine.add([now_request()])
        await until(lambda: engine.status().state == "restarting")
        await engine.close()
        assert failures(iter_nowait(events)) == {"r": UnavailableError}


class HangsInFirstLife(FakeExecutor):
    async def start(self) -> WorkerReady:
        self.hold = self.num_starts == 0
        return await super().start()


async def test_workers_whose_step_is_overdue_are_replaced() -> None:
    executor, observer = HangsInFirstLife(), NotedEvents()
    # Restarts are for ever: a slow machine may make a live step overdue, too.
    engine = DiffusionEngine(
        make_config(max_worker_restarts=10**6), executor, observer, restart_backoff_seconds=0.0, stall_seconds=0.3
    )
    async with asyncio.timeout(GUARD_SECONDS):
        await engine.start()
        requests = [now_request("a", seed=1), now_request("b", seed=2)]
        events = await read_until_done(engine.add(requests), 2)
        await engine.close()
    assert observer.restarts
    pictures = {event.request_id: event.image for event in events if isinstance(event, Finished)}
    assert all(np.array_equal(pictures[request.request_id], fake_image(request.request)) for request in requests)


@pytest.mark.parametrize("settings", [{"stall_seconds": 1e6}, {"stall_seconds": 0.0, "stall_factor": 1e6}])
async def test_a_step_within_either_limit_is_left_alone(settings: dict[str, Any]) -> None:
    """An idle engine has no overdue step."""
    executor = FakeExecutor(hold=True)
    engine = DiffusionEngine(make_config(), executor, **settings)
    async with asyncio.timeout(GUARD_SECONDS):
        await engine.start()
        events = engine.add([now_request(steps=2)])
        for number in range(4):
            await until(lambda n=number: executor.num_plans > n)  # type: ignore[misc]
            await asyncio.sleep(0.01)  # longer than the estimate of the step
            assert engine.status().healthy
            assert executor.num_starts == 1
            executor.release_results()
        await read_until_done(events)
        await engine.close()
