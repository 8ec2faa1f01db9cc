"""Several worker processes as one replica: one answer, one failure, nothing left behind. The runners are fakes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from testbed.fakes import FakeRunner, fake_image, make_config, make_ready, make_request, make_scheduled
from testbed.patience import GUARD_SECONDS, until
from tests.diffusion.control.executor.workers import (
    Endless,
    EndlessStart,
    Gated,
    closing,
    group_of,
    hang,
    hang_with_the_lock,
    is_alive,
    name_of,
)
from vllm_omni.diffusion.control.engine import DiffusionEngine
from vllm_omni.diffusion.control.events import EngineEvent, Failed, Finished
from vllm_omni.diffusion.control.executor.launch import Launched, LaunchedReplica, interpreter_launcher
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor, WorkerGroup
from vllm_omni.diffusion.control.executor.process import WorkerProcess
from vllm_omni.diffusion.control.replicas import Replicas
from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles
from vllm_omni.diffusion.messages.item_error import ItemError
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.worker import Abort, Done, Execute, Heartbeat, Ready, Start, ToWorker
from vllm_omni.errors import ConfigError, WorkerDiedError
from vllm_omni.processes import channel

SILENCE_SECONDS = 3.0
"""Time after which a worker of these tests is taken for dead. Live ones beat every second, but a slow machine may hold
them up for longer: no test relies on the silence of one worker alone."""


class Meeting(FakeRunner):
    """Rank 0 listens on the store's socket and the others come: all of them are up together."""

    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        assert (self.rank_info.store_fd is None) == (self.rank_info.rank > 0)
        if self.rank_info.store_fd is None:
            with socket.create_connection(("127.0.0.1", self.rank_info.store_port), GUARD_SECONDS) as peer:
                peer.sendall(bytes([self.rank_info.rank]))
                assert peer.recv(1) == b"!"
        else:
            with socket.socket(fileno=self.rank_info.store_fd) as store:
                peers = [store.accept()[0] for _ in range(self.rank_info.replica_size - 1)]
                assert sorted(peer.recv(1)[0] for peer in peers) == [*range(1, self.rank_info.replica_size)]
                for peer in peers:
                    peer.sendall(b"!")
                    peer.close()
        return make_ready(load_bytes=1, load_seconds=float(self.rank_info.rank))

    def read_adapter(
        self, key: AdapterKey, report: Callable[[AdapterRead], object], kept: KeptFiles | None = None
    ) -> None:
        """Rank 1 takes no file with this name; ranks need different times."""
        fails = self.rank_info.rank == 1 and key.file == "/bad.safetensors"
        error = ItemError("rank 1 cannot read it", "invalid", param="lora_request") if fails else None
        report(AdapterRead(key, float(self.rank_info.rank), 10 * self.rank_info.rank, error))


class DiesInStep(FakeRunner):
    """Runner of which rank 1 raises in a step; the other ranks wait in it for ever."""

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.denoise:
            if self.rank_info.rank == 1:
                raise OSError("rank 1 has lost its device")
            hang()
        return super().execute(plan)


class ClosesChannel(FakeRunner):
    """Runner of which rank 1 closes all its descriptors and lives on."""

    def execute(self, plan: StepPlan) -> StepResult:
        if self.rank_info.rank == 1:
            os.closerange(3, 1000)
        hang()


class WrongOnOneRank(FakeRunner):
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        if self.rank_info.rank != 2:
            hang()
        raise ConfigError("--dtype float16: not on this device")


class DiesAtStart(FakeRunner):
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        if self.rank_info.rank != 2:
            hang()
        raise FileNotFoundError("rank 2 has no weights")


class LongStart(FakeRunner):
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        time.sleep(0.5)
        return super().start(first)


class HoldsTheLockAtStart(FakeRunner):
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        hang_with_the_lock()


class HangsOnce(FakeRunner):
    """The last rank hangs in a step with work; a file of its first life's says that it did."""

    def execute(self, plan: StepPlan) -> StepResult:
        marker = Path(self.config.model)
        if plan.denoise and self.rank_info.rank == self.rank_info.replica_size - 1 and not marker.exists():
            marker.touch()
            hang()
        return super().execute(plan)


def make(num_ranks: int, runner: type[FakeRunner], **settings: Any) -> MultiprocExecutor:
    """Executor without a silence limit, unless `settings` have one."""
    config = make_config(parallel=DiffusionParallelConfig(ulysses_degree=num_ranks))
    limits = {"silence_seconds": GUARD_SECONDS, "start_silence_seconds": GUARD_SECONDS}
    return MultiprocExecutor(config, name_of(runner), **{**limits, **settings})


async def start_patiently(start: Callable[[], Awaitable[WorkerReady]]) -> None:
    """Start, and start again where a slow machine has held up the beats of a live worker."""
    while True:
        try:
            await start()
        except WorkerDiedError as error:
            if "has been silent" not in str(error):
                raise
        else:
            return


async def test_all_ranks_answer_as_one() -> None:
    executor = make(3, Meeting)
    reads: asyncio.Queue[AdapterRead] = asyncio.Queue()
    executor.on_adapter_read = reads.put_nowait
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
            for name in ("good", "bad"):
                executor.read_adapter(key := AdapterKey(f"/{name}.safetensors"))
                read = await reads.get()
                assert (read.key, read.seconds, read.num_bytes) == (key, 2.0, 20)
                assert (read.error is not None) == (name == "bad"), "all ranks have it, or it is refused"
                executor.forget_adapters([key])


async def begin_a_step(executor: MultiprocExecutor) -> asyncio.Task[StepResult]:
    """Executor whose ranks are running a step."""
    await executor.start()
    executor.submit(StepPlan(0, new_requests=[make_request("a")], encode=["a"]))
    return asyncio.create_task(executor.next_result())


async def assert_dies_at_once(waiting: asyncio.Task[StepResult], text: str) -> None:
    """Wait for the end of a group that has no silence limit."""
    with pytest.raises(WorkerDiedError, match=text):
        await waiting


async def test_a_killed_rank_ends_the_step_of_all() -> None:
    executor = make(3, Endless)
    async with closing(executor):
        waiting = await begin_a_step(executor)
        pids = executor.worker_pids
        os.kill(pids[1], signal.SIGKILL)
        await assert_dies_at_once(waiting, rf"^rank 1 \(pid {pids[1]}\) was killed by signal 9$")
        listeners = group_of(executor)._tasks[: len(pids)]
        os.kill(pids[2], signal.SIGKILL)
        await asyncio.wait([listeners[2]])
        for _ in range(3):
            with pytest.raises(WorkerDiedError, match=r"^rank 1 "):  # later failures follow from this one
                await executor.next_result()
        await executor.start()
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


async def test_a_rank_that_cannot_be_started_leaves_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks are killed with a rank that died: they would wait for it for ever."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        if len(started) == 2:
            raise OSError("no memory for one more")
        started.append(Popen(*args, **kwargs))
        return started[-1]

    Popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    executor = make(3, Endless)
    async with closing(executor):
        with pytest.raises(WorkerDiedError, match=r"^rank 2 cannot be started: no memory for one more$"):
            await executor.start()
        assert len(started) == 2
        assert not any(is_alive(process.pid) for process in started)


async def test_a_plan_is_encoded_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint from which a request is resumed has many megabytes."""
    encoded: list[object] = []
    encode = channel.encode_frame

    def noted(message: object) -> tuple[bytes, int | None]:
        encoded.append(message)
        return encode(message)

    monkeypatch.setattr(channel, "encode_frame", noted)
    pairs = [socket.socketpair() for _ in range(3)]
    ends = [channel.BlockingChannel[ToWorker](theirs, ToWorker) for _, theirs in pairs]
    group = WorkerGroup(GUARD_SECONDS, GUARD_SECONDS)
    group.workers = [WorkerProcess(Launched(f"rank {n}", Mock(), ours)) for n, (ours, _) in enumerate(pairs)]
    group._outbox = WorkerProcess.outbox(group.workers)
    group.send(Abort(["a"]))
    assert encoded == [Abort(["a"])]
    assert [end.receive(GUARD_SECONDS) for end in ends] == [Abort(["a"])] * 3
    for worker, end in zip(group.workers, ends):
        worker.close_channel()
        end.close()


async def test_a_rank_that_closes_its_channel_is_dead_to_us() -> None:
    executor = make(3, ClosesChannel)
    async with closing(executor):
        waiting = await begin_a_step(executor)
        await assert_dies_at_once(waiting, r"^rank 1 \(pid \d+\) (closed its channel|ended with exit code 0)$")


async def test_a_stopped_rank_is_found_by_its_silence() -> None:
    """A silent worker is killed and replaced; it is not asked to stop."""
    executor = make(3, Endless, silence_seconds=SILENCE_SECONDS)
    async with closing(executor):
        await start_patiently(executor.start)
        pids = executor.worker_pids
        for pid in pids:  # all of them: which is silent first is a matter of the machine's speed
            os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerDiedError, match=r"^rank [012] \(pid \d+\) has been silent for 3 s$"):
            await executor.next_result()
        await start_patiently(executor.start)
        assert not any(map(is_alive, pids))


async def test_the_rank_that_is_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test makes the checks; before each, ranks 0 and 1 send a heartbeat."""
    group = WorkerGroup(silence_seconds=1.0, start_silence_seconds=2.0)
    group.workers = ["rank 0", "rank 1", "rank 2"]  # type: ignore[list-item]
    group._silences = [0.0] * 3
    group.readies = dict.fromkeys(range(3), make_ready())
    num_looks = 0

    async def look(seconds: float) -> None:
        nonlocal num_looks
        num_looks += 1
        if num_looks > 30:
            raise asyncio.CancelledError
        for rank in range(2):
            group._take(rank, Heartbeat())

    with monkeypatch.context() as patched:
        patched.setattr("vllm_omni.diffusion.control.executor.multiproc.asyncio.sleep", look)
        with pytest.raises(asyncio.CancelledError):
            await group._watch()
    assert group._outcomes.qsize() == 1
    with pytest.raises(WorkerDiedError, match=r"^rank 2 has been silent for 1 s$"):
        await group.next_outcome()


async def test_a_start_may_be_silent_for_longer_than_a_step() -> None:
    """Imports and reading of weights may block the interpreter, so that it sends no heartbeats."""
    executor = make(1, LongStart, silence_seconds=0.1)
    async with closing(executor):
        await executor.start()


async def test_a_start_that_hangs_is_found_by_its_silence() -> None:
    executor = make(2, HoldsTheLockAtStart, silence_seconds=SILENCE_SECONDS, start_silence_seconds=SILENCE_SECONDS)
    async with closing(executor):
        with pytest.raises(WorkerDiedError, match=r"^rank [01] \(pid \d+\) has been silent for 3 s$"):
            await executor.start()


async def test_a_worker_beats_while_it_loads() -> None:
    replica = LaunchedReplica(make_config(), 0, interpreter_launcher(name_of(EndlessStart)))
    (worker,) = [WorkerProcess(launched) for launched in replica.take()]
    async with asyncio.timeout(GUARD_SECONDS):
        try:
            worker.send(Start(make_config(), replica.rank_infos[0]))
            assert [await worker.receive() for _ in range(2)] == [Heartbeat(), Heartbeat()]
        finally:
            await worker.kill()


async def test_a_worker_beats_in_a_long_step() -> None:
    """Heartbeats come during a step; it lasts until the test has counted them."""
    replica = LaunchedReplica(make_config(), 0, interpreter_launcher(name_of(Gated)))
    (worker,) = [WorkerProcess(launched) for launched in replica.take()]
    async with asyncio.timeout(GUARD_SECONDS):
        try:
            worker.send(Start(make_config(), replica.rank_infos[0]))
            while not isinstance(await worker.receive(), Ready):
                pass
            worker.send(Execute(StepPlan(0, new_requests=[make_request("a")], encode=["a"])))
            worker.send(Execute(StepPlan(1, denoise=["a"])))
            while not isinstance(message := await worker.receive(), Done):
                pass
            assert message.result.step_id == 0
            assert [await worker.receive() for _ in range(2)] == [Heartbeat(), Heartbeat()]
            worker.send(Abort(["a"]))
            while not isinstance(message := await worker.receive(), Done):
                pass
            assert message.result.step_id == 1
        finally:
            await worker.kill()


@pytest.mark.parametrize(
    ("num_ranks", "number"),
    [
        (1, signal.SIGKILL),
        (3, signal.SIGKILL),
        pytest.param(3, signal.SIGSTOP, marks=pytest.mark.thorough),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.thorough),
    ],
)
async def test_the_engine_replays_when_a_worker_is_killed_or_stopped(num_ranks: int, number: int) -> None:
    executor = make(num_ranks, FakeRunner, silence_seconds=SILENCE_SECONDS)
    requests = [make_scheduled(f"r{n}", 64, 200, seed=n, arrival=time.monotonic()) for n in range(3)]
    # Restarts are for ever: a slow machine may make a live worker silent, too.
    engine = DiffusionEngine(make_config(max_worker_restarts=10**6), executor, restart_backoff_seconds=0.001)
    async with asyncio.timeout(GUARD_SECONDS):
        await start_patiently(engine.start)
        try:
            events = engine.add(requests)
            await events.get()
            await until(lambda: executor.worker_pids)
            old = executor.worker_pids
            os.kill(old[-1], number)
            await assert_all_done(events, requests)
            assert engine.status().healthy
            assert set(executor.worker_pids).isdisjoint(old)
            assert not any(map(is_alive, old))
        finally:
            await engine.close()


async def test_the_engine_replaces_workers_that_hang(tmp_path: Path) -> None:
    """Ranks that hang send heartbeats: the overdue step ends them."""
    parallel = DiffusionParallelConfig(ulysses_degree=3)
    # Restarts are for ever: a slow machine may make a live step overdue, too.
    config = make_config(model=str(tmp_path / "hung"), parallel=parallel, max_worker_restarts=10**6)
    executor = MultiprocExecutor(config, name_of(HangsOnce), silence_seconds=GUARD_SECONDS)
    requests = [make_scheduled(f"r{n}", 64, 3, seed=n, arrival=time.monotonic()) for n in range(3)]
    engine = DiffusionEngine(config, executor, restart_backoff_seconds=0.001, stall_seconds=1.0, stall_factor=0.0)
    async with asyncio.timeout(GUARD_SECONDS):
        await engine.start()
        try:
            old = executor.worker_pids
            await assert_all_done(engine.add(requests), requests)
            assert set(executor.worker_pids).isdisjoint(old)
            assert not any(map(is_alive, old))
        finally:
            await engine.close()


async def test_two_replicas_of_two_share_the_work_and_one_dies() -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=2, data_parallel_size=2)
    executors = [
        MultiprocExecutor(
            make_config(parallel=parallel), name_of(Meeting), replica_index=index, silence_seconds=GUARD_SECONDS
        )
        for index in range(2)
    ]
    requests = [make_scheduled(f"r{n}", 64, 200, seed=n, arrival=time.monotonic()) for n in range(6)]
    replicas = Replicas(make_config(parallel=parallel), executors.__getitem__, restart_backoff_seconds=0.001)
    async with asyncio.timeout(GUARD_SECONDS):
        await replicas.start()
        try:
            events = replicas.add(requests)
            await events.get()
            untouched, old = executors[0].worker_pids, executors[1].worker_pids
            os.kill(old[0], signal.SIGKILL)
            await assert_all_done(events, requests)
            assert executors[0].worker_pids == untouched
            assert set(executors[1].worker_pids).isdisjoint(old)
        finally:
            await replicas.close()


async def assert_all_done(events: asyncio.Queue[EngineEvent], requests: list[ScheduledRequest]) -> None:
    pictures: dict[str, np.ndarray] = {}
    while len(pictures) < len(requests):
        event = await events.get()
        assert not isinstance(event, Failed), event
        if isinstance(event, Finished):
            pictures[event.request_id] = event.image
    assert all(np.array_equal(pictures[request.request_id], fake_image(request.request)) for request in requests)
