"""Executors and engines that are closed or killed while they start: the start ends, and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from testbed.fakes import FakeExecutor, FakeRunner, make_config
from testbed.patience import GUARD_SECONDS, until
from tests.diffusion.control.executor.workers import EndlessStart, closing, group_of, is_alive, name_of
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.executor import Executor
from vllm_omni.diffusion.control.executor.inline import InlineExecutor
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.control.replicas import Replicas
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.errors import UnavailableError, WorkerDiedError


class LateStart(FakeRunner):
    """A start that waits for the test."""

    has_begun = False

    def __init__(self, gate: threading.Event) -> None:
        super().__init__()
        self._gate = gate

    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        self.has_begun = True
        assert self._gate.wait(GUARD_SECONDS)
        return super().start(first)


def make_mp(index: int = 0, **degrees: int) -> MultiprocExecutor:
    config = make_config(parallel=DiffusionParallelConfig(**degrees))
    return MultiprocExecutor(
        config,
        name_of(EndlessStart),
        replica_index=index,
        silence_seconds=GUARD_SECONDS,
        start_silence_seconds=GUARD_SECONDS,
    )


async def stop(stopped: Any, how: str) -> None:
    """Call `close` or `kill`."""
    if how == "close":
        await stopped.close()
    else:
        stopped.kill()


by_both = pytest.mark.parametrize("how", ["close", "kill"])


@by_both
async def test_processes_that_are_stopped_end_their_start(how: str) -> None:
    executor = make_mp(ulysses_degree=2)
    async with closing(executor):
        starting = asyncio.create_task(executor.start())
        await until(lambda: executor.worker_pids)
        pids = executor.worker_pids
        await stop(executor, how)
        with pytest.raises(WorkerDiedError, match=r"^the workers were stopped$"):
            await starting
        assert not any(map(is_alive, pids))


@by_both
async def test_an_answer_that_nobody_has_taken_is_no_start_of_stopped_workers(how: str) -> None:
    executor = make_mp()
    async with closing(executor):
        starting = asyncio.create_task(executor.start())
        await until(lambda: executor.worker_pids)
        group_of(executor)._outcomes.put_nowait(FakeRunner().start())
        await stop(executor, how)
        with pytest.raises(WorkerDiedError, match=r"^the workers were stopped$"):
            await starting


async def test_a_start_that_was_stopped_leaves_the_next_one_alone() -> None:
    executor = make_mp()
    async with closing(executor):
        first = asyncio.create_task(executor.start())
        await until(lambda: executor.worker_pids)
        executor.kill()
        second = asyncio.create_task(executor.start())
        await until(lambda: executor.worker_pids)
        with pytest.raises(WorkerDiedError, match=r"^the workers were stopped$"):
            await first
        assert all(map(is_alive, executor.worker_pids))
        assert len(executor.worker_pids) == 1
        await executor.close()
        with pytest.raises(WorkerDiedError, match=r"^the workers were stopped$"):
            await second


@by_both
@pytest.mark.parametrize("has_begun", [True, False])
async def test_a_runner_in_this_process_that_is_stopped_is_not_started(how: str, has_begun: bool) -> None:
    gate = threading.Event()
    runner = LateStart(gate)
    executor = InlineExecutor(lambda: runner)
    async with closing(executor):
        starting = asyncio.create_task(executor.start())
        await until(lambda: runner.has_begun if has_begun else executor._thread)
        await stop(executor, how)
        gate.set()
        with pytest.raises(WorkerDiedError, match=r"^the model runner was stopped$"):
            await starting


async def test_a_start_in_this_process_that_is_cancelled_is_cancelled() -> None:
    gate = threading.Event()
    runner = LateStart(gate)
    async with closing(InlineExecutor(lambda: runner)) as executor:
        starting = asyncio.create_task(executor.start())
        await until(lambda: runner.has_begun)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        gate.set()


@by_both
@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_an_engine_that_is_stopped_while_it_starts(num_replicas: int, how: str) -> None:
    config = make_config(parallel=DiffusionParallelConfig(data_parallel_size=num_replicas))
    executors = [make_mp(index, data_parallel_size=num_replicas) for index in range(num_replicas)]
    engine = DiffusionEngine(config, executors[0]) if num_replicas == 1 else Replicas(config, executors.__getitem__)
    starting = asyncio.create_task(engine.start())
    await until(lambda: all(executor.worker_pids for executor in executors))
    pids = [pid for executor in executors for pid in executor.worker_pids]
    await stop(engine, how)
    with pytest.raises(WorkerDiedError, match=r"^the workers were stopped$"):
        await starting
    assert engine.status().state == "stopped"
    await until(lambda: not any(map(is_alive, pids)))


@by_both
@pytest.mark.parametrize("num_replicas", [1, 2])
async def test_an_engine_that_was_stopped_does_not_start(num_replicas: int, how: str) -> None:
    """`AsyncOmni.start` may still check its model when it is closed."""
    executors = [FakeExecutor() for _ in range(num_replicas)]
    config = make_config(parallel=DiffusionParallelConfig(data_parallel_size=num_replicas))
    make: Callable[[int], Executor] = executors.__getitem__
    engine = DiffusionEngine(config, executors[0]) if num_replicas == 1 else Replicas(config, make)
    await stop(engine, how)
    with pytest.raises(UnavailableError, match=r"^the engine was stopped$"):
        await engine.start()
    assert [executor.num_starts for executor in executors] == [0] * num_replicas
