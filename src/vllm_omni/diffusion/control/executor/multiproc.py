"""Executor `mp`: the workers of one replica, one process per rank, all on this machine."""

from __future__ import annotations

import asyncio
import atexit
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from vllm_omni.diffusion.compute.worker.main import DEFAULT_RUNNER
from vllm_omni.diffusion.control.executor.launch import LaunchedReplica, interpreter_launcher
from vllm_omni.diffusion.control.executor.merging import merge_moves, merge_reads, merge_ready, merge_results
from vllm_omni.diffusion.control.executor.process import WorkerProcess
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.weights_moved import WeightsMoved
from vllm_omni.diffusion.messages.worker import (
    Abort,
    Done,
    Execute,
    ForgetAdapters,
    FromWorker,
    HasMoved,
    HasReadAdapter,
    ReadAdapter,
    Ready,
    Sleep,
    Start,
    ToWorker,
    WakeUp,
)
from vllm_omni.errors import WorkerDiedError
from vllm_omni.processes.outbox import Outbox

SILENCE_SECONDS = 10.0
"""Silence after which a worker counts as dead: a live one sends a heartbeat every second."""
START_SILENCE_SECONDS = 120.0
"""Silence limit before a worker is ready: imports and reading of weights may block its interpreter."""
_CHECKS_PER_SILENCE = 10
"""Checks for silent workers within the shorter limit."""


class WorkerGroup:
    """The workers of one replica, from their launch to the first failure of any of them."""

    def __init__(
        self,
        silence_seconds: float,
        start_silence_seconds: float,
        on_adapter_read: Callable[[AdapterRead], object] = lambda read: None,
    ) -> None:
        self._silence_seconds = silence_seconds
        self._start_silence_seconds = start_silence_seconds
        self._on_adapter_read = on_adapter_read
        self._reads: dict[AdapterKey, list[AdapterRead]] = {}
        """Reads of adapters that some ranks have reported."""
        self.workers: list[WorkerProcess] = []
        self._outbox: Outbox | None = None
        """Messages to the workers; None before `adopt`."""
        self._outcomes: asyncio.Queue[WorkerReady | StepResult | WeightsMoved | Exception] = asyncio.Queue()
        self._has_failed = False
        self.readies: dict[int, WorkerReady] = {}
        """Measurements of the ranks that are ready."""
        self._results: list[deque[StepResult]] = []
        """By rank: results that wait for the same step's results of other ranks."""
        self._moves: dict[int, WeightsMoved] = {}
        """By rank: reports of moves of weights, until all ranks have reported."""
        self._silences: list[float] = []
        """By rank: seconds since its last message, counted by `_watch`."""
        self._tasks: list[asyncio.Task[None]] = []

    def adopt(
        self, replica: LaunchedReplica, config: OmniDiffusionConfig, first_readies: Mapping[int, WorkerReady]
    ) -> None:
        """Send `Start` to all processes, and watch them. first_readies: by rank, see `Runner.start`."""
        rank_infos = replica.rank_infos
        self.workers = [WorkerProcess(launched) for launched in replica.take()]
        for worker, rank_info in zip(self.workers, rank_infos, strict=True):
            worker.send(Start(config, rank_info, first_readies.get(rank_info.rank)))
        self._outbox = WorkerProcess.outbox(self.workers)
        size = len(self.workers)
        self._results = [deque() for _ in self.workers]
        self._silences = [0.0] * size
        self._tasks = [asyncio.create_task(self._listen(rank)) for rank in range(size)]
        self._tasks.append(asyncio.create_task(self._watch()))

    def send(self, message: ToWorker) -> None:
        """Send a message to all ranks. A plan with a checkpoint is encoded in a thread, and later messages wait."""
        assert self._outbox is not None, "`adopt` comes first"
        self._outbox.send(message, message.plan.num_array_bytes if isinstance(message, Execute) else 0)

    async def next_outcome(self) -> WorkerReady | StepResult | WeightsMoved:
        """Merged `Ready` of all ranks, then the merged answer to each plan, `Sleep` and `WakeUp`.

        Raises the failure that ended the group.
        """
        outcome = await self._outcomes.get()
        if isinstance(outcome, Exception):
            self._outcomes.put_nowait(outcome)  # later calls raise it, too
            raise outcome
        return outcome

    async def kill(self) -> None:
        """Kill all workers and wait until they have ended."""
        self._stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self.workers))

    def kill_at_once(self) -> None:
        """Kill all workers without awaiting anything."""
        if self._tasks and not self._tasks[0].get_loop().is_closed():
            self._stop()
            for task in self._tasks:
                task.cancel()
        for worker in self.workers:
            worker.kill_at_exit()
            worker.close_channel()

    def _stop(self) -> None:
        """Make the stop the only outcome: callers that wait in `next_outcome` must wake up, and the listeners end."""
        self._has_failed = True
        while not self._outcomes.empty():
            self._outcomes.get_nowait()
        self._outcomes.put_nowait(WorkerDiedError("the workers were stopped"))

    async def _listen(self, rank: int) -> None:
        """Take messages of one rank until it fails."""
        worker = self.workers[rank]
        try:
            while True:
                self._take(rank, await worker.receive())
        except EOFError:
            # Noted before waiting for the exit code: other ranks fail because of this one and are not the cause.
            if self._note_failure():
                self._outcomes.put_nowait(WorkerDiedError(f"{worker} {await worker.how_it_ended()}"))
        except Exception as error:  # `Died`, or a bug of ours: a caller that waits must get it
            if self._note_failure():
                self._outcomes.put_nowait(error)

    def _take(self, rank: int, message: FromWorker) -> None:
        self._silences[rank] = 0.0
        if isinstance(message, Ready):
            self.readies[rank] = message.ready
            if len(self.readies) == len(self.workers):
                self._outcomes.put_nowait(merge_ready([self.readies[r] for r in range(len(self.workers))]))
        elif isinstance(message, Done):
            self._results[rank].append(message.result)
            if all(self._results):
                self._outcomes.put_nowait(merge_results([results.popleft() for results in self._results]))
        elif isinstance(message, HasMoved):
            self._moves[rank] = message.report
            if len(self._moves) == len(self.workers):
                self._outcomes.put_nowait(merge_moves(list(self._moves.values())))
                self._moves = {}
        elif isinstance(message, HasReadAdapter):
            reads = self._reads.setdefault(message.report.key, [])
            reads.append(message.report)
            if len(reads) == len(self.workers):
                self._on_adapter_read(merge_reads(self._reads.pop(message.report.key)))

    async def _watch(self) -> None:
        """Fail the group when a worker is silent for too long.

        Counts checks instead of reading the clock: while this process was blocked itself, heartbeats queued up, so that
        time counts as one check only.
        """
        seconds = self._silence_seconds / _CHECKS_PER_SILENCE
        while True:
            await asyncio.sleep(seconds)
            for rank, worker in enumerate(self.workers):
                self._silences[rank] += seconds
                limit = self._silence_seconds if rank in self.readies else self._start_silence_seconds
                if self._silences[rank] >= limit and self._note_failure():
                    self._outcomes.put_nowait(WorkerDiedError(f"{worker} has been silent for {limit:g} s"))

    def _note_failure(self) -> bool:
        """Note a failure; return whether it is the group's first. Later failures are its consequences."""
        first, self._has_failed = not self._has_failed, True
        return first


class MultiprocExecutor:
    """Starts, restarts and ends the worker processes of one replica."""

    def __init__(
        self,
        config: OmniDiffusionConfig,
        runner_name: str = DEFAULT_RUNNER,
        *,
        replica_index: int = 0,
        launched: LaunchedReplica | None = None,
        silence_seconds: float = SILENCE_SECONDS,
        start_silence_seconds: float = START_SILENCE_SECONDS,
    ) -> None:
        """runner_name: "module:function"; called in each worker with the config and its RankInfo, returns its Runner.

        launched: processes that run already, for the first start.
        silence_seconds: silence after which a worker counts as dead; start_silence_seconds: before it is ready.
        """
        self._config = config
        self._runner_name = runner_name
        self._replica_index = replica_index
        self._launched = launched
        self._silence_seconds = silence_seconds
        self._start_silence_seconds = start_silence_seconds
        self._group: WorkerGroup | None = None
        self._first_readies: Mapping[int, WorkerReady] = {}
        """By rank: measurements of the first start, for restarts."""
        self._has_started = False
        self.on_adapter_read: Callable[[AdapterRead], object] = lambda read: None

    @property
    def worker_pids(self) -> list[int]:
        """Process ids by rank; empty when no workers run."""
        return [worker.pid for worker in self._group.workers] if self._group else []

    async def start(self) -> WorkerReady:
        """See `Executor.start`. Raises WorkerDiedError also when `close` or `kill` is called meanwhile."""
        await self._kill_workers()
        if not self._has_started:
            # For programs that never call close(). Registered once, not at every start: exit handlers run in reverse
            # order, and one that closes this executor must run before this one.
            atexit.register(self._kill_at_exit)
            self._has_started = True
        self._group = group = WorkerGroup(self._silence_seconds, self._start_silence_seconds, self.on_adapter_read)
        try:
            replica, self._launched = self._launched, None
            if replica is None:
                replica = LaunchedReplica(self._config, self._replica_index, interpreter_launcher(self._runner_name))
            group.adopt(replica, self._config, self._first_readies)
            ready = await group.next_outcome()
        except BaseException:  # also where the start is cancelled
            if self._group is group:  # not the group of a later start, after a close during this one
                await self._kill_workers()
            raise
        assert isinstance(ready, WorkerReady), "workers get no plan before all of them are ready"
        self._first_readies = self._first_readies or group.readies
        return ready

    def submit(self, plan: StepPlan) -> None:
        if self._group:
            self._group.send(Execute(plan))

    def abort(self, request_ids: Sequence[str]) -> None:
        if self._group:
            self._group.send(Abort(list(request_ids)))

    def read_adapter(self, key: AdapterKey, kept: KeptFiles | None = None) -> None:
        if self._group:
            self._group.send(ReadAdapter(key, kept))

    def forget_adapters(self, keys: Sequence[AdapterKey]) -> None:
        if self._group:
            self._group.send(ForgetAdapters(list(keys)))

    async def next_result(self) -> StepResult:
        assert self._group is not None, "the executor was not started"
        result = await self._group.next_outcome()
        assert isinstance(result, StepResult)
        return result

    async def sleep(self) -> WeightsMoved:
        return await self._move(Sleep())

    async def wake_up(self) -> WeightsMoved:
        return await self._move(WakeUp())

    async def _move(self, message: Sleep | WakeUp) -> WeightsMoved:
        assert self._group is not None, "the executor was not started"
        self._group.send(message)
        moved = await self._group.next_outcome()
        assert isinstance(moved, WeightsMoved), "no plan is in flight"
        return moved

    async def stop(self) -> None:
        await self._kill_workers()

    async def close(self) -> None:
        await self._kill_workers()
        if self._launched is not None:
            self._launched.close()
        atexit.unregister(self._kill_at_exit)
        self._has_started = False

    def kill(self) -> None:
        if group := self._group:
            self._group = None
            group.kill_at_once()
        if self._launched is not None:
            self._launched.close()
        atexit.unregister(self._kill_at_exit)

    async def _kill_workers(self) -> None:
        if group := self._group:
            self._group = None
            await group.kill()

    def _kill_at_exit(self) -> None:
        """Kill the workers; in a fork of the program nothing happens, because a process kills only its own children."""
        if self._group:
            for worker in self._group.workers:
                worker.kill_at_exit()
