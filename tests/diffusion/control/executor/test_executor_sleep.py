"""Sleep of both executors with a fake runner: all ranks move their weights, or the workers end and start anew."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from testbed.fakes import FAKE_WEIGHT_BYTES, FakeRunner, fake_image, make_config, make_request
from testbed.patience import GUARD_SECONDS
from tests.diffusion.control.executor.test_executors import both, make
from tests.diffusion.control.executor.workers import closing, group_of, is_alive, name_of
from vllm_omni.diffusion.control.executor import Executor
from vllm_omni.diffusion.control.executor.inline import InlineExecutor
from vllm_omni.diffusion.control.executor.merging import merge_moves
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import StepPlan
from vllm_omni.diffusion.messages.weights_moved import ANOTHER_RANK, WeightsMoved
from vllm_omni.errors import WorkerDiedError


async def draw(executor: Executor) -> np.ndarray:
    executor.submit(StepPlan(0, new_requests=[make_request("a", steps=1, seed=3)], encode=["a"]))
    executor.submit(StepPlan(1, denoise=["a"]))
    for _ in range(2):
        await executor.next_result()
    executor.submit(StepPlan(2, decode=["a"]))
    return (await executor.next_result()).images["a"]


@both
async def test_the_same_workers_wake_up(backend: str) -> None:
    async with closing(make(backend)) as executor:
        await executor.start()
        for _ in range(2):  # the second time, the worker would refuse an id that it still holds
            assert np.array_equal(await draw(executor), fake_image(make_request(seed=3)))
            assert await executor.sleep() == WeightsMoved(FAKE_WEIGHT_BYTES, 0.5)
            assert await executor.wake_up() == WeightsMoved(FAKE_WEIGHT_BYTES, 0.5)


@both
async def test_stopped_workers_are_gone_and_start_again(backend: str) -> None:
    async with closing(make(backend)) as executor:
        ready = await executor.start()
        pids = executor.worker_pids if isinstance(executor, MultiprocExecutor) else []
        threads = threading.active_count()
        await executor.stop()
        assert not any(map(is_alive, pids))
        assert backend == "mp" or threading.active_count() < threads
        await executor.stop()
        assert await executor.start() == ready
        assert np.array_equal(await draw(executor), fake_image(make_request(seed=3)))


async def test_a_runner_in_this_process_frees_its_memory_when_it_is_stopped() -> None:
    closed: list[bool] = []

    class Noting(FakeRunner):
        def close(self) -> None:
            closed.append(threading.current_thread().name.startswith("model-runner"))
            raise RuntimeError("a broken runner must not keep the engine from sleeping")

    async with closing(InlineExecutor(lambda: Noting(make_config()))) as executor:
        await executor.start()
        await executor.stop()
    assert closed == [True]


class Sleepless(FakeRunner):
    def sleep(self) -> WeightsMoved:
        raise RuntimeError("no host memory")


@both
async def test_a_worker_that_fails_to_sleep(backend: str) -> None:
    async with closing(make(backend, Sleepless)) as executor:
        await executor.start()
        with pytest.raises(WorkerDiedError, match="no host memory"):
            await executor.sleep()
        await executor.stop()
        await executor.start()


class HalfAwake(FakeRunner):
    """Runner whose rank 1 lacks memory: rank 0 learns that another one does."""

    def wake_up(self) -> WeightsMoved:
        return WeightsMoved(0, 0.25, failure=ANOTHER_RANK if self.rank_info.rank == 0 else "no room")


async def test_all_ranks_answer_once() -> None:
    config = make_config(parallel=DiffusionParallelConfig(ulysses_degree=2))
    executor: Any = MultiprocExecutor(config, name_of(HalfAwake), silence_seconds=GUARD_SECONDS)
    async with closing(executor):
        await executor.start()
        assert await executor.sleep() == WeightsMoved(2 * FAKE_WEIGHT_BYTES, 0.5)
        for _ in range(2):
            assert await executor.wake_up() == WeightsMoved(0, 0.25, failure="no room")
        group_of(executor).workers[1].kill_at_exit()
        with pytest.raises(WorkerDiedError, match="signal 9"):  # noticed while no plan is in flight
            await executor.next_result()


def test_reports_of_devices_are_merged() -> None:
    merged = merge_moves([WeightsMoved(5, 0.5, 30), WeightsMoved(6, 0.25, 40)])
    assert merged == WeightsMoved(11, 0.5, 40)
