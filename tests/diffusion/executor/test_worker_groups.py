"""Several worker processes as one replica: one answer, one failure, nothing left behind. The runners are fakes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from typing import Any

import numpy as np
import pytest

from tests.diffusion.executor.workers import GUARD_SECONDS, Endless, closing, is_alive, name_of
from tests.fakes import FakeRunner, fake_image, make_config, make_ready, make_request
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.errors import ConfigError, WorkerDiedError

AT_ONCE_SECONDS = 5.0
"""Far less than anything that would have to time out, generous for a machine that is shared."""

SILENCE_SECONDS = 3.0
"""After which a worker of these tests is taken for dead; live ones beat every second."""


class Meeting(FakeRunner):
    """Rank 0 listens on the store's socket and the others come: all of them are up together."""

    def start(self) -> WorkerReady:
        assert (self.place.store_fd is None) == (self.place.rank > 0)
        if self.place.store_fd is None:
            with socket.create_connection(("127.0.0.1", self.place.store_port), GUARD_SECONDS) as peer:
                peer.sendall(bytes([self.place.rank]))
                assert peer.recv(1) == b"!"
        else:
            with socket.socket(fileno=self.place.store_fd) as store:
                peers = [store.accept()[0] for _ in range(self.place.replica_size - 1)]
                assert sorted(peer.recv(1)[0] for peer in peers) == [*range(1, self.place.replica_size)]
                for peer in peers:
                    peer.sendall(b"!")
                    peer.close()
        return make_ready(load_bytes=1, load_seconds=float(self.place.rank))


class DiesInStep(FakeRunner):
    """Rank 1 raises in a step with work, and the others wait in it for ever."""

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.denoise:
            if self.place.rank == 1:
                raise OSError("rank 1 has lost its device")
            Endless.execute(self, plan)
        return super().execute(plan)


class WrongOnOneRank(FakeRunner):
    def start(self) -> WorkerReady:
        if self.place.rank != 2:
            Endless.execute(self, StepPlan(0))
        raise ConfigError("--dtype float16: not on this device")


class DiesAtStart(FakeRunner):
    def start(self) -> WorkerReady:
        if self.place.rank != 2:
            Endless.execute(self, StepPlan(0))
        raise FileNotFoundError("rank 2 has no weights")


class LongStep(FakeRunner):
    """A step takes longer than `SILENCE_SECONDS`."""

    def execute(self, plan: StepPlan) -> StepResult:
        time.sleep(1.5 * SILENCE_SECONDS)
        return super().execute(plan)


def make(num_ranks: int, runner: type[FakeRunner], **settings: Any) -> MultiprocExecutor:
    config = make_config(parallel=DiffusionParallelConfig(ulysses_degree=num_ranks))
    return MultiprocExecutor(config, name_of(runner), **settings)


async def test_all_ranks_answer_as_one() -> None:
    executor = make(3, Meeting)
    async with closing(executor):
        for _ in range(2):  # with fresh processes, and a fresh place to meet
            ready = await executor.start()
            assert (ready.load_bytes, ready.load_seconds) == (3, 2.0)
            requests = [make_request(id, 64, 1, seed=n) for n, id in enumerate("abcde")]
            ids = [request.request_id for request in requests]
            executor.submit(StepPlan(0, new_requests=requests, encode=ids))
            executor.submit(StepPlan(1, denoise=ids, preview=ids))
            assert (await executor.next_result()).step_id == 0
            executor.abort(["e"])
            executor.submit(StepPlan(2, decode=ids))
            result = await executor.next_result()
            assert set(result.advanced) >= set("abcd")
            assert set(result.previews) >= set("abcd")
            result = await executor.next_result()
            assert set(result.images) >= set("abcd")
            for request in requests[:4]:
                assert np.array_equal(result.images[request.request_id], fake_image(request))
            executor.submit(StepPlan(3, release=ids))
            await executor.next_result()


async def begin_a_step(executor: MultiprocExecutor) -> asyncio.Task[StepResult]:
    """Ranks that run a step with work."""
    await executor.start()
    executor.submit(StepPlan(0, new_requests=[make_request("a")], encode=["a"]))
    return asyncio.create_task(executor.next_result())


async def assert_dies_at_once(waiting: asyncio.Task[StepResult], text: str) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match=text):
        await waiting
    assert time.monotonic() - began < AT_ONCE_SECONDS


async def test_a_killed_rank_ends_the_step_of_all() -> None:
    executor = make(3, Endless)
    async with closing(executor):
        waiting = await begin_a_step(executor)
        pids = executor.worker_pids
        os.kill(pids[1], signal.SIGKILL)
        await assert_dies_at_once(waiting, rf"^rank 1 \(pid {pids[1]}\) was killed by signal 9$")
        began = time.monotonic()
        await executor.start()
        assert time.monotonic() - began < AT_ONCE_SECONDS + 10  # with three new interpreters
        assert not any(map(is_alive, pids))
        assert len({*pids, *executor.worker_pids}) == 6


async def test_a_rank_that_raises_brings_its_traceback_while_the_others_hang() -> None:
    executor = make(3, DiesInStep)
    async with closing(executor):
        waiting = await begin_a_step(executor)
        await waiting
        executor.submit(StepPlan(1, denoise=["a"]))
        waiting = asyncio.create_task(executor.next_result())
        text = r"(?s)^rank 1 \(pid \d+\) failed: rank 1 has lost its device\nTraceback.*in execute"
        await assert_dies_at_once(waiting, text)


@pytest.mark.parametrize(
    ("runner", "error", "text"),
    [
        (WrongOnOneRank, ConfigError, "^--dtype float16: not on this device$"),
        (DiesAtStart, WorkerDiedError, r"(?s)^rank 2 \(pid \d+\) failed: rank 2 has no weights\nTraceback"),
    ],
)
async def test_a_start_that_fails_on_one_rank(runner: type[FakeRunner], error: type[Exception], text: str) -> None:
    executor = make(3, runner)
    async with closing(executor):
        with pytest.raises(error, match=text):
            await executor.start()
        assert executor.worker_pids == []


async def test_a_stopped_rank_is_found_by_its_silence() -> None:
    """And replaced without being asked: it would not answer."""
    executor = make(3, Endless, silence_seconds=SILENCE_SECONDS)
    async with closing(executor):
        waiting = await begin_a_step(executor)
        pids = executor.worker_pids
        os.kill(pids[2], signal.SIGSTOP)
        with pytest.raises(WorkerDiedError, match=rf"^rank 2 \(pid {pids[2]}\) has been silent for 3 s$"):
            await waiting
        await executor.start()
        assert not any(map(is_alive, pids))


async def test_a_long_step_is_not_silent() -> None:
    executor = make(2, LongStep, silence_seconds=SILENCE_SECONDS)
    async with closing(executor):
        assert (await (await begin_a_step(executor))).step_id == 0
