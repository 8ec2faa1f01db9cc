"""Worker processes of a parent with very many open files, or with no room for another one."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import pytest

from testbed.fakes import FakeRunner, fake_image, make_config, make_ready, make_request, make_scheduled
from testbed.patience import GUARD_SECONDS
from tests.descriptors import descriptors_left, low_descriptors_taken
from tests.diffusion.control.engines import until
from tests.diffusion.control.executor.test_worker_groups import Meeting, assert_all_done, make
from tests.diffusion.control.executor.workers import Endless, closing, group_of, is_alive
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.plan import StepPlan, WorkerReady
from vllm_omni.errors import WorkerDiedError


class Connecting(FakeRunner):
    """Runner whose ranks meet at the store, like real ones."""

    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        from vllm_omni.diffusion.compute.coordination.ranks import connect
        from vllm_omni.diffusion.compute.device.device import Device

        world = connect(self.config.parallel, self.rank_info, Device("cpu"))
        return make_ready(load_seconds=world.mesh.control.agree(float(self.rank_info.rank)))


@pytest.mark.parametrize(
    ("num_ranks", "runner"), [(1, FakeRunner), (2, Meeting), pytest.param(2, Connecting, marks=pytest.mark.thorough)]
)
async def test_workers_of_a_parent_with_very_many_open_files(num_ranks: int, runner: type[FakeRunner]) -> None:
    """A worker inherits the channel and the store's socket under the same descriptor numbers."""
    with low_descriptors_taken():
        async with closing(make(num_ranks, runner)) as executor:
            ready = await executor.start()
            assert num_ranks == 1 or ready.load_seconds == num_ranks - 1
            request = make_request("a", 64, 1)
            executor.submit(StepPlan(0, new_requests=[request], encode=["a"]))
            executor.submit(StepPlan(1, denoise=["a"]))
            executor.submit(StepPlan(2, decode=["a"]))
            assert [(await executor.next_result()).step_id for _ in range(2)] == [0, 1]
            assert np.array_equal((await executor.next_result()).images["a"], fake_image(request))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_left", range(5))
async def test_a_start_without_descriptors_can_be_tried_again(num_ranks: int, num_left: int) -> None:
    before = os.listdir("/proc/self/fd")
    async with closing(make(num_ranks, FakeRunner)) as executor:
        with descriptors_left(num_left), pytest.raises(WorkerDiedError, match=r"^[^\n]*Too many open files[^\n]*$"):
            await executor.start()
        assert len(os.listdir("/proc/self/fd")) == len(before)
        await executor.start()


async def test_a_death_is_told_without_a_descriptor() -> None:
    executor = make(1, Endless)
    async with closing(executor):
        await executor.start()
        (pid,) = executor.worker_pids
        with descriptors_left(0):
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(WorkerDiedError, match="signal 9"):
                await executor.next_result()
            await executor.close()
        assert not is_alive(pid)


async def test_a_worker_that_lives_is_waited_for_and_no_longer() -> None:
    executor = make(1, FakeRunner)
    async with closing(executor):
        await executor.start()
        worker = group_of(executor).workers[0]
        assert not await worker._ended_within(0.02)


async def test_requests_whose_pictures_found_no_descriptor_are_replayed() -> None:
    config = make_config(parallel=DiffusionParallelConfig(), max_worker_restarts=10**6)
    engine = DiffusionEngine(config, make(1, FakeRunner), restart_backoff_seconds=0.001)
    requests = [make_scheduled(f"r{n}", 64, 5, seed=n, arrival=time.monotonic()) for n in range(3)]
    async with asyncio.timeout(GUARD_SECONDS):
        await engine.start()
        try:
            events = engine.add(requests)
            with descriptors_left(0):
                # The first for want of the picture's descriptor, the others for want of one to start with.
                await until(lambda: len(engine._deaths) >= 3)
            await assert_all_done(events, requests)
        finally:
            await engine.close()
