"""Log lines about requests, from an engine with a fake worker."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from testbed.fakes import FakeExecutor, FakeRunner, make_config, make_scheduled
from testbed.patience import GUARD_SECONDS, until
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import EngineObserver, EngineStatus, Failed, Finished, Observers
from vllm_omni.diffusion.control.replicas import Replicas
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import ItemError, StepPlan, StepResult
from vllm_omni.entrypoints.server.activity import ActivityLog

SECRET = "a secret prompt"
TIMES = r"\d+\.\d\d s queued, \d+\.\d\d s running, \d+\.\d\d s in all"


def request(request_id: str, **values: Any) -> ScheduledRequest:
    return make_scheduled(request_id, (96, 64), prompt=SECRET, arrival=time.monotonic(), **values)


@asynccontextmanager
async def running(executor: FakeExecutor, log: ActivityLog | None = None) -> AsyncIterator[DiffusionEngine]:
    log = log or ActivityLog(status_seconds=3600.0)
    engine = DiffusionEngine(make_config(), executor, Observers(EngineObserver(), log))
    log.watch(engine.status)
    async with asyncio.timeout(GUARD_SECONDS):
        await engine.start()
        try:
            yield engine
        finally:
            await engine.close()


async def end_of(events: asyncio.Queue[Any], count: int) -> None:
    while count:
        count -= isinstance(await events.get(), Finished | Failed)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    caplog.set_level(logging.INFO)
    return lambda start: [r.getMessage() for r in caplog.records if r.getMessage().startswith(start)]


async def test_a_line_for_each_request_that_ends(lines: Callable[[str], list[str]]) -> None:
    def errors(request_id: str, phase: str, step: int) -> ItemError | None:
        kind = {"refused": "invalid", "failed": "internal"}.get(request_id) if (phase, step) == ("denoise", 3) else None
        return ItemError(f"{SECRET} is wrong", kind, param="prompt") if kind else None

    def cached(request_id: str, step: int) -> float:
        return 0.5 if step == 2 else 0.0

    async with running(FakeExecutor(lambda: FakeRunner(errors=errors, cached=cached))) as engine:
        await end_of(engine.add([request("done"), request("refused"), request("failed")]), 3)
        await end_of(engine.add([request("video", num_frames=9)]), 1)
    told = {line.split()[1]: line for line in lines("Request ")}
    expected = {
        "done": r"completed: 64x96, 3\.5 of 4 steps computed, 0\.5 cached",
        "refused": r"refused \(wrong prompt\): 64x96, 1\.5 of 4 steps computed, 0\.5 cached",
        "failed": r"failed \(the device failed on this request\): 64x96, 1\.5 of 4 steps computed, 0\.5 cached",
        "video": r"completed: 64x96, 9 frames, 3\.5 of 4 steps computed, 0\.5 cached",
    }
    assert told.keys() == expected.keys()
    for name, pattern in expected.items():
        assert re.fullmatch(f"Request {name} {pattern}; {TIMES}", told[name]), told[name]
        assert SECRET not in told[name]


async def test_aborted_and_cut_off_requests_too(lines: Callable[[str], list[str]]) -> None:
    async with running(FakeExecutor(hold=True)) as engine:
        engine.add([request("left"), request("cut")])
        engine.abort(["left"])
    aborted, cut = lines("Request ")
    assert aborted.startswith(
        "Request left aborted (the request was aborted): 64x96, 0 of 4 steps computed, 0 cached; "
    )
    assert cut.startswith("Request cut failed (the engine was stopped): 64x96, ")


async def test_lines_while_something_runs_and_none_after(lines: Callable[[str], list[str]]) -> None:
    executor, log = FakeExecutor(hold=True), ActivityLog(status_seconds=0.01)
    async with running(executor, log) as engine:
        assert lines("Running") == []
        events = engine.add([request("a"), request("b")])
        await until(lambda: len(lines("Running")) >= 3)
        assert re.fullmatch(r"Running: 2, waiting: 0, 0\.00 steps/s, \d+\.\d s of work left", lines("Running")[-1])
        releasing = asyncio.create_task(release(executor))
        await end_of(events, 2)
        releasing.cancel()
        await until(lambda: log._timer is None)
        number = len(lines("Running"))
        await end_of_idle_seconds()
        assert len(lines("Running")) == number
        engine.add([request("c")])
        await until(lambda: len(lines("Running")) > number)


async def release(executor: FakeExecutor) -> None:
    while True:
        if executor.pending:
            executor.release_results()
        await asyncio.sleep(0)


async def end_of_idle_seconds() -> None:
    """Let five periods of the log's timer pass."""
    await asyncio.sleep(0.05)


async def test_one_line_for_all_replicas(lines: Callable[[str], list[str]]) -> None:
    log = ActivityLog(0.2)
    executors = [FakeExecutor(hold=True), FakeExecutor(hold=True)]
    config = make_config(parallel=DiffusionParallelConfig(data_parallel_size=2))
    replicas = Replicas(config, executors.__getitem__, log)
    log.watch(replicas.status)
    await replicas.start()
    try:
        replicas.add([request(f"r{number}") for number in range(4)])
        await until(lambda: lines("Running"))
        await until(lambda: all(executor.num_plans for executor in executors))  # both have work
        assert lines("Running")[0].startswith("Running: 4, waiting: 0, 0.00 steps/s, ")
    finally:
        await replicas.close()


async def test_steps_per_second_are_those_since_the_last_line(lines: Callable[[str], list[str]]) -> None:
    log = ActivityLog(status_seconds=0.2)
    log.watch(lambda: EngineStatus("running", 2, 3, 12.34, True))
    start = time.monotonic()
    log.on_add([])
    log.on_add([])
    log.on_step(StepPlan(0), StepResult(0, advanced=["a", "b"], made={"b": 3}), 0.1)
    await until(lambda: lines("Running"))
    most, least = 4 / 0.2, 4 / (time.monotonic() - start)
    found = re.fullmatch(r"Running: 2, waiting: 3, (\d+\.\d\d) steps/s, 12\.3 s of work left", lines("Running")[0])
    assert found
    assert least - 0.01 <= float(found[1]) <= most + 0.01
    await until(lambda: len(lines("Running")) > 1)
    assert "0.00 steps/s" in lines("Running")[1]
    log.watch(lambda: EngineStatus("running", 0, 0, 0.0, True))
    await until(lambda: log._timer is None)
