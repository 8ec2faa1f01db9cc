"""Executor `uni`: the model runner in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from vllm_omni.diffusion.messages.adapters import AdapterKey, AdapterRead, KeptFiles
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.weights_moved import WeightsMoved
from vllm_omni.diffusion.messages.worker import Runner
from vllm_omni.errors import ConfigError, WorkerDiedError

_STOPPED = "the model runner was stopped"
Output = TypeVar("Output")


class InlineExecutor:
    """Launches plans in one thread and waits for their results in another; `abort` needs neither."""

    def __init__(self, make_runner: Callable[[], Runner]) -> None:
        self._make_runner = make_runner
        self._runner: Runner | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._answers: ThreadPoolExecutor | None = None
        self._in_flight: list[Future[Any]] = []
        self._first: WorkerReady | None = None
        """Measurements of the first start, for restarts."""
        self._results: asyncio.Queue[StepResult | WorkerDiedError] = asyncio.Queue()
        self.on_adapter_read: Callable[[AdapterRead], object] = lambda read: None

    async def start(self) -> WorkerReady:
        """See `Executor.start`. Raises WorkerDiedError also when `close` or `kill` is called meanwhile."""
        await self.close()
        self._results = asyncio.Queue()
        self._runner = self._make_runner()
        self._thread = thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-runner")
        self._answers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        try:
            loop = asyncio.get_running_loop()
            ready = await loop.run_in_executor(thread, self._runner.start, self._first)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise  # the task was cancelled, and not only the future that it awaits
            raise WorkerDiedError(_STOPPED) from None  # `close` was called before the thread began
        except ConfigError:
            raise
        except Exception as error:  # a worker process would have died: the engine restarts the same way
            raise WorkerDiedError(f"the model runner failed to start: {error}") from error
        if self._thread is not thread:
            raise WorkerDiedError(_STOPPED)
        self._first = self._first or ready
        return ready

    def submit(self, plan: StepPlan) -> None:
        assert self._thread is not None, "the executor was not started"
        assert self._answers is not None
        assert self._runner is not None
        launched = self._thread.submit(self._runner.launch, plan)
        waits = self._answers if self._runner.launches_ahead else self._thread
        answered = waits.submit(self._wait_for_result, launched, self._results, asyncio.get_running_loop())
        self._in_flight = [*(part for part in self._in_flight if not part.done()), launched, answered]

    def abort(self, request_ids: Sequence[str]) -> None:
        assert self._runner is not None, "the executor was not started"
        self._runner.abort(request_ids)

    def read_adapter(self, key: AdapterKey, kept: KeptFiles | None = None) -> None:
        runner, loop = self._runner, asyncio.get_running_loop()
        assert runner is not None, "the executor was not started"

        def take(read: AdapterRead) -> None:
            if self._runner is runner:  # not a read of an earlier start
                self.on_adapter_read(read)

        def report(read: AdapterRead) -> None:
            if not loop.is_closed():  # a program may end without close()
                loop.call_soon_threadsafe(take, read)

        runner.read_adapter(key, report, kept)

    def forget_adapters(self, keys: Sequence[AdapterKey]) -> None:
        assert self._runner is not None, "the executor was not started"
        self._runner.forget_adapters(keys)

    async def next_result(self) -> StepResult:
        result = await self._results.get()
        if isinstance(result, WorkerDiedError):
            self._results.put_nowait(result)  # later calls raise it, too
            raise result
        return result

    async def sleep(self) -> WeightsMoved:
        assert self._runner is not None, "the executor was not started"
        return await self._run(self._runner.sleep)

    async def wake_up(self) -> WeightsMoved:
        assert self._runner is not None, "the executor was not started"
        return await self._run(self._runner.wake_up)

    async def stop(self) -> None:
        if self._runner is not None and self._thread is not None:
            with contextlib.suppress(WorkerDiedError):  # it is broken, and not used any more
                await self._run(self._runner.close)
        await self.close()

    async def _run(self, function: Callable[[], Output]) -> Output:
        """Call a method of the runner in its thread. Raises WorkerDiedError where a worker process would have died."""
        assert self._thread is not None
        call = self._thread.submit(function)
        self._in_flight.append(call)
        try:
            return await asyncio.wrap_future(call)
        except Exception as error:
            raise WorkerDiedError(f"the model runner failed: {error}") from error

    async def close(self) -> None:
        self._stop_threads()
        # A running step cannot be stopped, and it must end before the next runner loads. Waiting needs no new thread:
        # a program that never calls close() gets here when no thread can be started any more.
        running = [asyncio.wrap_future(part) for part in self._in_flight if not part.cancelled()]
        await asyncio.gather(*running, return_exceptions=True)
        self.kill()

    def kill(self) -> None:
        self._stop_threads()
        self._thread = self._answers = self._runner = None
        self._in_flight = []

    def _stop_threads(self) -> None:
        for thread in (self._thread, self._answers):
            if thread is not None:
                thread.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _wait_for_result(
        launched: Future[Callable[[], StepResult]],
        results: asyncio.Queue[StepResult | WorkerDiedError],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Put the result of a launched plan, or the failure, into `results`."""
        outcome: StepResult | WorkerDiedError
        try:
            outcome = launched.result()()
        except Exception:  # a worker process would have died: the engine replays the same way
            outcome = WorkerDiedError(f"the model runner failed:\n{traceback.format_exc()}")
        if not loop.is_closed():  # a program may end without close()
            loop.call_soon_threadsafe(results.put_nowait, outcome)
