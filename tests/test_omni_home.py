"""`Omni` and `AsyncOmni` outside their process and event loop: forks, second loops, objects that are dropped."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from testbed.fakes import FakeExecutor, FakeRunner
from testbed.patience import GUARD_SECONDS, wait_for
from tests.diffusion.control.executor.workers import ROOT, is_alive
from vllm_omni import AsyncOmni, Omni
from vllm_omni.diffusion.control.executor.inline import InlineExecutor
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError, UnavailableError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

SMALL = OmniDiffusionSamplingParams(height=32, width=48, num_inference_steps=3, seed=5)

FORKS = """
import multiprocessing, os, sys
from unittest.mock import patch
from vllm_omni import Omni
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor
from vllm_omni.errors import UnavailableError

def draw():
    try:
        print(len(omni.generate("red apple")[0].images), flush=True)
    except UnavailableError as error:
        print(error, flush=True)

with patch("vllm_omni.omni.make_executor", lambda config, info: MultiprocExecutor(config, "testbed.fakes:FakeRunner")):
    omni = Omni(model="demo", progress_bar=False)
print(os.getpid(), flush=True)
child = os.fork()
if child == 0:
    draw()
    omni.close()
    draw()
    sys.exit(7)  # through all exit handlers and finalizers
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
draw()
process = multiprocessing.get_context("fork").Process(target=draw)
process.start()
process.join()
print(process.exitcode, flush=True)
draw()
"""


@pytest.fixture
def importable_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let other processes import the tests' modules."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


@pytest.mark.thorough
@pytest.mark.usefixtures("importable_tests")
def test_a_forked_process_is_refused_and_leaves_the_engine_to_its_parent() -> None:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", FORKS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    pid, twice, again, code, parents, processs, processs_code, parents_at_last = done.stdout.splitlines()
    for refusal in (twice, again, processs):
        assert f"the process that started it ({pid}), not in its forks" in refusal
    assert (code, parents, processs_code, parents_at_last) == ("7", "1", "0", "1")


@contextmanager
def executors(make: Callable[..., Any]) -> Iterator[list[Any]]:
    """Executors that `make` has made for engines, in place of those that the config names."""
    made: list[Any] = []

    def make_executor(config: Any, info: Any, replica_index: int = 0) -> Any:
        made.append(make(config))
        return made[-1]

    with patch("vllm_omni.omni.make_executor", make_executor):
        yield made


async def last_of(stream: Any) -> Any:
    return [output async for output in stream][-1]


async def started(omni: AsyncOmni) -> None:
    await omni.start()
    assert (await asyncio.wait_for(last_of(omni.generate("x", SMALL)), GUARD_SECONDS)).finished


def test_a_second_event_loop_is_refused() -> None:
    with executors(lambda config: FakeExecutor()) as made:
        omni = AsyncOmni(model="demo")

    async def begin() -> Any:
        await started(omni)
        return omni.generate("x", SMALL)

    stream = asyncio.run(begin())

    async def call(method: Callable[..., Any], *arguments: Any) -> None:
        result = method(*arguments)
        if asyncio.iscoroutine(result):
            await result

    calls: list[tuple[Any, ...]] = [(omni.generate, "x", SMALL), (omni.abort, "r"), (omni.drain, 1.0)]
    for method, *arguments in (*calls, (stream.__anext__,), (stream.aclose,)):
        with pytest.raises(
            UnavailableError, match=r"its start\(\), and was called on another loop: start and use it in"
        ):
            asyncio.run(call(method, *arguments))
    with pytest.raises(UnavailableError, match="was called outside any loop: "):
        omni.generate("x", SMALL)
    with pytest.raises(UnavailableError, match="was started before"):
        asyncio.run(omni.start())
    assert not made[0].closed
    asyncio.run(omni.close())  # this is what a user can still do
    assert made[0].closed


async def test_closing_from_another_loop_ends_what_runs() -> None:
    with executors(lambda config: FakeExecutor(hold=True)) as made:
        omni = AsyncOmni(model="demo")
    await omni.start()
    stream = omni.generate("x", SMALL)
    thread = threading.Thread(target=lambda: asyncio.run(omni.close()))
    thread.start()
    with pytest.raises(UnavailableError, match="was stopped"):
        await asyncio.wait_for(last_of(stream), GUARD_SECONDS)
    thread.join()
    assert made[0].closed


async def test_a_fork_of_an_asyncio_program_is_refused_and_closes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with executors(lambda config: FakeExecutor()) as made:
        omni = AsyncOmni(model="demo")
    await omni.start()
    stream, parent = omni.generate("x", SMALL), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    refusal = rf"the process that started it \({parent}\), not in its forks"
    for call in (lambda: omni.generate("x", SMALL), lambda: omni.abort("r")):
        with pytest.raises(UnavailableError, match=refusal):
            call()
    for awaitable in (omni.drain(1.0), stream.__anext__(), stream.aclose()):
        with pytest.raises(UnavailableError, match=refusal):
            await awaitable
    await omni.close()
    assert not made[0].closed
    monkeypatch.undo()
    assert (await asyncio.wait_for(last_of(stream), GUARD_SECONDS)).finished
    await omni.close()
    assert made[0].closed


async def test_before_the_start_the_message_says_how() -> None:
    with executors(lambda config: FakeExecutor()):
        omni = AsyncOmni(model="demo")
    with pytest.raises(UnavailableError, match=r"has not started: call `await start\(\)`, or use `async with`"):
        omni.generate("x", SMALL)
    await omni.close()


async def test_async_with_starts_and_closes() -> None:
    with executors(lambda config: FakeExecutor()) as made:
        async with AsyncOmni(model="demo") as omni:
            assert (await asyncio.wait_for(last_of(omni.generate("x", SMALL)), GUARD_SECONDS)).finished
            assert not made[0].closed
    assert made[0].closed


async def test_async_with_closes_what_does_not_start() -> None:
    with executors(lambda config: FakeExecutor(start_errors={0: ConfigError("no such device")})) as made:
        omni = AsyncOmni(model="demo")
    with pytest.raises(ConfigError, match="no such device"):
        async with omni:
            raise AssertionError("the block must not run")
    assert made[0].closed


def exists(pid: int) -> bool:
    """Whether there is such a process, be it one that has ended and was not reaped."""
    return Path(f"/proc/{pid}").exists()


def worker_executor(config: Any) -> MultiprocExecutor:
    return MultiprocExecutor(config, "testbed.fakes:FakeRunner")


@pytest.mark.usefixtures("importable_tests")
async def test_workers_of_a_dropped_engine_end_while_its_loop_runs(caplog: pytest.LogCaptureFixture) -> None:
    with executors(worker_executor) as made:
        omni = AsyncOmni(model="demo")
    await started(omni)
    pids = made[0].worker_pids
    assert all(map(is_alive, pids))
    del omni
    gc.collect()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), GUARD_SECONDS)
    assert not any(map(exists, pids))
    assert caplog.text == ""


@pytest.mark.usefixtures("importable_tests")
@pytest.mark.parametrize("drops_inside", [True, False])
def test_workers_of_a_dropped_engine_end_when_its_loop_does_or_has(
    drops_inside: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with executors(worker_executor) as made:
        omnis = [AsyncOmni(model="demo")]

    async def run() -> list[int]:
        await started(omnis[0])
        pids: list[int] = made[0].worker_pids
        if drops_inside:
            omnis.clear()
        return pids

    pids = asyncio.run(run())
    omnis.clear()
    gc.collect()  # warnings of what was forgotten are errors here
    assert not any(map(exists, pids))
    assert caplog.text == ""


async def test_threads_of_a_dropped_engine_end() -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith(("model-runner", "answers"))]

    assert threads() == []
    with executors(lambda config: InlineExecutor(FakeRunner)):
        omni = AsyncOmni(model="demo")
    await started(omni)
    assert threads() != []
    del omni
    gc.collect()
    await asyncio.sleep(0)
    await asyncio.to_thread(wait_for, lambda: threads() == [])


async def test_all_replicas_of_a_dropped_engine_end() -> None:
    with executors(lambda config: FakeExecutor()) as made:
        omni = AsyncOmni(model="demo", parallel_config=DiffusionParallelConfig(data_parallel_size=2))
    await started(omni)
    del omni
    gc.collect()
    await asyncio.sleep(0)
    assert [executor.closed for executor in made] == [True, True]


def test_an_omni_that_is_collected_on_its_own_loop_ends() -> None:
    with executors(lambda config: FakeExecutor()) as made:
        omni: Any = Omni(model="demo", progress_bar=False)
    loop, (thread,) = omni._loop, [thread for thread in threading.enumerate() if thread.name == "omni-loop"]
    omni.itself = omni  # so that the garbage collector finds it, on whatever thread it runs
    gc.disable()
    try:
        del omni
        loop.call_soon_threadsafe(gc.collect)
        thread.join(GUARD_SECONDS)
    finally:
        gc.enable()
    assert not thread.is_alive()
    assert made[0].closed
    assert loop.is_closed()


async def test_an_engine_lives_as_long_as_somebody_reads_of_it() -> None:
    with executors(lambda config: FakeExecutor()) as made:
        omni = AsyncOmni(model="demo")
    await omni.start()
    stream = omni.generate("x", SMALL)
    del omni
    gc.collect()
    assert (await asyncio.wait_for(last_of(stream), GUARD_SECONDS)).finished
    assert not made[0].closed
    del stream
    gc.collect()
    await asyncio.sleep(0)
    assert made[0].closed
