"""Both executors with a fake runner; processes are real and none outlives its test."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from testbed.fakes import FakeRunner, fake_image, make_config, make_ready, make_request
from testbed.patience import GUARD_SECONDS, wait_for
from tests.diffusion.control.executor.workers import (
    ROOT,
    AskedLate,
    BrokenResult,
    BrokenStart,
    BrokenStep,
    Endless,
    ExitsInStart,
    Gated,
    HoldsTheLock,
    WrongConfig,
    closing,
    is_alive,
    name_of,
)
from vllm_omni.diffusion.control.executor import Executor
from vllm_omni.diffusion.control.executor.inline import InlineExecutor
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.errors import ConfigError, WorkerDiedError


def make(backend: str, runner: type[FakeRunner] = FakeRunner) -> Executor:
    if backend == "uni":
        return InlineExecutor(lambda: runner(make_config()))
    return MultiprocExecutor(make_config(), name_of(runner), silence_seconds=GUARD_SECONDS)


both = pytest.mark.parametrize("backend", ["uni", "mp"])


@both
async def test_plans_in_results_out(backend: str) -> None:
    reads: asyncio.Queue[AdapterRead] = asyncio.Queue()
    async with closing(make(backend)) as executor:
        executor.on_adapter_read = reads.put_nowait
        ready = await executor.start()
        assert ready.device == "fake"
        executor.read_adapter(AdapterKey("/ink.safetensors", "stamp"))
        assert await reads.get() == AdapterRead(AdapterKey("/ink.safetensors", "stamp"), 0.25)
        request = make_request("a", (96, 64), 1, seed=9)
        executor.submit(StepPlan(0, new_requests=[request], encode=["a"]))
        executor.submit(StepPlan(1, denoise=["a"], preview=["a"]))
        assert (await executor.next_result()).step_id == 0
        executor.submit(StepPlan(2, decode=["a"]))
        result = await executor.next_result()
        assert (result.advanced, result.num_sequences) == (["a"], 2)
        assert np.array_equal(result.previews["a"], fake_image(request, 1))
        result = await executor.next_result()
        assert np.array_equal(result.images["a"], fake_image(request))
        assert result.images["a"].dtype == np.uint8


@both
async def test_an_abort_overtakes_plans(backend: str) -> None:
    async with closing(make(backend, Gated)) as executor:
        await executor.start()
        executor.submit(StepPlan(0, new_requests=[make_request("a"), make_request("b")], encode=["a", "b"]))
        await executor.next_result()
        executor.submit(StepPlan(1, denoise=["a"]))
        executor.submit(StepPlan(2, denoise=["a", "b"]))
        executor.abort(["b"])
        assert (await executor.next_result()).advanced == ["a"]
        assert (await executor.next_result()).advanced == ["a"]


@both
@pytest.mark.parametrize(
    ("runner", "error", "text"),
    [(BrokenStart, WorkerDiedError, "on fire"), (WrongConfig, ConfigError, "^--dtype float16: not on this device$")],
)
async def test_a_start_that_fails(backend: str, runner: type[FakeRunner], error: type[Exception], text: str) -> None:
    async with closing(make(backend, runner)) as executor:
        with pytest.raises(error, match=text):
            await executor.start()


async def test_a_remote_start_that_fails_brings_its_traceback() -> None:
    async with closing(make("mp", BrokenStart)) as executor:
        with pytest.raises(WorkerDiedError, match=r"(?s)Traceback.*in start.*on fire"):
            await executor.start()
    async with closing(make("mp", ExitsInStart)) as executor:
        with pytest.raises(WorkerDiedError, match="exit code 3"):
            await executor.start()


@both
async def test_a_step_is_launched_while_the_last_one_is_waited_for(backend: str) -> None:
    async with closing(make(backend, AskedLate)) as executor:
        await executor.start()
        executor.submit(StepPlan(0, new_requests=[make_request("a")], encode=["a"]))
        executor.submit(StepPlan(1, denoise=["a"]))
        assert [(await executor.next_result()).step_id for _ in range(2)] == [0, 1]


class NotesThreads(FakeRunner):
    """Notes the threads that launch steps and that wait for them."""

    def __init__(self, launches_ahead: bool) -> None:
        super().__init__()
        self._launches_ahead = launches_ahead
        self.threads: list[str] = []

    @property
    def launches_ahead(self) -> bool:
        return self._launches_ahead

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        done = super().launch(plan)
        self.threads.append(threading.current_thread().name)

        def wait() -> StepResult:
            self.threads.append(threading.current_thread().name)
            return done()

        return wait


@pytest.mark.parametrize("launches_ahead", [False, True])
async def test_a_host_that_computes_waits_in_the_thread_that_computes(launches_ahead: bool) -> None:
    """A runner on the CPU gets one thread: a second one would take time from it."""
    runner = NotesThreads(launches_ahead)
    async with closing(InlineExecutor(lambda: runner)) as executor:
        await executor.start()
        executor.submit(StepPlan(0))
        await executor.next_result()
    assert len(set(runner.threads)) == (2 if launches_ahead else 1)


class Busy(Gated):
    """Runner that records whether a step runs."""

    is_busy = False

    def execute(self, plan: StepPlan) -> StepResult:
        self.is_busy = True
        result = super().execute(plan)
        self.is_busy = False
        return result


async def test_the_step_that_runs_is_over_before_the_next_runner_is_made() -> None:
    """The old step ends before a new runner loads: two models would not fit into the device's memory."""
    runner, was_busy = Busy(make_config()), list[bool]()

    def make_next() -> FakeRunner:
        was_busy.append(runner.is_busy)
        return FakeRunner() if len(was_busy) > 1 else runner

    async with closing(InlineExecutor(make_next)) as executor:
        await executor.start()
        executor.submit(StepPlan(0, new_requests=[make_request("a")], encode=["a"]))
        await executor.next_result()
        executor.submit(StepPlan(1, denoise=["a"]))
        await asyncio.to_thread(wait_for, lambda: runner.is_busy)
        starting = asyncio.create_task(executor.start())
        for _ in range(10):
            await asyncio.sleep(0)
        runner.abort(["a"])
        await starting
    assert was_busy == [False, False]


@both
@pytest.mark.parametrize("runner", [BrokenStep, BrokenResult])
async def test_a_runner_that_raises_is_a_dead_worker(backend: str, runner: type[FakeRunner]) -> None:
    async with closing(make(backend, runner)) as executor:
        await executor.start()
        executor.submit(StepPlan(0))
        for _ in range(2):
            with pytest.raises(WorkerDiedError):
                await executor.next_result()


@both
async def test_start_again(backend: str) -> None:
    async with closing(make(backend)) as executor:
        for _ in range(2):
            await executor.start()
            executor.submit(StepPlan(7))
            assert (await executor.next_result()).step_id == 7
        await executor.close()
        await executor.close()


class Remembers(FakeRunner):
    """Runner whose measurements depend on its rank at the first start, and on `first` later."""

    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        own = 1000 * (1 + self.rank_info.device_index)
        if first is None:
            return make_ready(load_bytes=own, attention_backend="cudnn")
        assert first.load_bytes == own, "a start is told of the first one of its rank"
        return replace(first, load_bytes=first.load_bytes + 1)


async def test_every_later_start_is_told_of_the_first_one_of_its_rank() -> None:
    pair = make_config(parallel=DiffusionParallelConfig(ring_degree=2))
    second_replica = MultiprocExecutor(pair, name_of(Remembers), replica_index=1)
    for executor, first, later in ((make("uni", Remembers), 1000, 1001), (second_replica, 7000, 7002)):
        async with closing(executor):
            assert (await executor.start()).load_bytes == first
            for _ in range(2):
                ready = await executor.start()
                assert (ready.load_bytes, ready.attention_backend) == (later, "cudnn")


async def test_a_killed_worker_is_noticed_and_replaced() -> None:
    """The death is noticed by the closed channel, because the silence limit is too long for a test."""
    executor = MultiprocExecutor(make_config(), name_of(Endless), silence_seconds=GUARD_SECONDS)
    async with closing(executor):
        await executor.start()
        (pid,) = executor.worker_pids
        executor.submit(StepPlan(0))
        waiting = asyncio.create_task(executor.next_result())
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="signal 9"):
            await waiting
        executor.submit(StepPlan(1))  # into the void, until it is started again
        await executor.start()
        assert executor.worker_pids != [pid]
        assert not is_alive(pid)


async def test_signals_are_the_parents_business() -> None:
    executor = MultiprocExecutor(make_config(), name_of(FakeRunner))
    async with closing(executor):
        await executor.start()
        (pid,) = executor.worker_pids
        assert os.getsid(pid) == pid  # a terminal's Ctrl-C does not reach it
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        executor.submit(StepPlan(3))
        assert (await executor.next_result()).step_id == 3


async def test_close_ends_a_worker_in_the_middle_of_a_step() -> None:
    executor = MultiprocExecutor(make_config(), name_of(Endless))
    async with closing(executor):
        await executor.start()
        (pid,) = executor.worker_pids
        executor.submit(StepPlan(0))
        await executor.close()
        assert not is_alive(pid)


async def test_close_ends_a_worker_that_does_not_listen() -> None:
    executor = MultiprocExecutor(make_config(), name_of(FakeRunner))
    async with closing(executor):
        await executor.start()
        (pid,) = executor.worker_pids
        os.kill(pid, signal.SIGSTOP)
        await executor.close()
        assert not is_alive(pid)


SCRIPT = """
import asyncio, sys, threading, time
from testbed.fakes import make_config
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady

async def main():
    executor = MultiprocExecutor(make_config(parallel=DiffusionParallelConfig(4)), {runner!r})
    await executor.start()
    executor.submit(StepPlan(0))
    print(*executor.worker_pids, flush=True)
    return executor

loop = asyncio.new_event_loop()
executor = loop.run_until_complete(main())
{ending}
"""
ENDINGS = {
    "returns": "",
    "raises": "raise SystemExit(0)",
    "waits": "sys.stdin.read()",
    "forks and goes on": textwrap.dedent(
        """
        import atexit, os
        if (pid := os.fork()) == 0:
            atexit._run_exitfuncs()  # as at the child's exit
            os._exit(0)
        os.waitpid(pid, 0)
        executor.submit(StepPlan(1))
        for _ in range(2):
            print(loop.run_until_complete(executor.next_result()).step_id, flush=True)
        """
    ),
    "forks": "import os\nif os.fork() == 0:\n    sys.stdin.read(1); os._exit(0)\nsys.stdin.read()",
}


@pytest.fixture
def script() -> Iterator[Callable[[str, type[FakeRunner]], subprocess.Popen[str]]]:
    """A plain program that starts four workers and prints their pids, then ends in one of ENDINGS."""
    processes: list[subprocess.Popen[str]] = []

    def run(ending: str, runner: type[FakeRunner]) -> subprocess.Popen[str]:
        source = SCRIPT.format(runner=name_of(runner), ending=ENDINGS[ending])
        process = subprocess.Popen(
            [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_a_child_that_the_program_forks_leaves_its_workers_alone(script: Any) -> None:
    output, _ = script("forks and goes on", FakeRunner).communicate()
    assert output.splitlines()[1:] == ["0", "1"], "the steps that the workers have done"


@pytest.mark.parametrize(("ending", "runner"), [("raises", FakeRunner), ("returns", Endless)])
def test_a_program_that_never_closes_ends_and_leaves_nothing(script: Any, ending: str, runner: Any) -> None:
    process = script(ending, runner)
    output, _ = process.communicate()
    assert process.returncode == 0
    assert len(output.split()) == 4
    wait_for(lambda: not any(is_alive(int(pid)) for pid in output.split()))


@pytest.mark.parametrize("runner", [Endless, HoldsTheLock])
@pytest.mark.parametrize("ending", ["waits", "forks"])
def test_workers_end_with_their_parent(script: Any, ending: str, runner: Any) -> None:
    """Killed, the parent can ask for nothing; forked, a child of its holds the sockets open.

    One of the workers is stopped, too.
    """
    process = script(ending, runner)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert [is_alive(pid) for pid in pids] == [True] * 4
    os.kill(pids[0], signal.SIGSTOP)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_alive, pids)))
