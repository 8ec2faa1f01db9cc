"""`uni`: the model runner in a thread of this process."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from vllm_omni.diffusion.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.worker.contract import Runner
from vllm_omni.errors import ConfigError, WorkerDiedError


class InlineExecutor:
    """Runs plans one after another in one thread; `abort` reaches the runner while a plan runs."""

    def __init__(self, make_runner: Callable[[], Runner]) -> None:
        self._make_runner = make_runner
        self._runner: Runner | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: list[Future[None]] = []
        self._results: asyncio.Queue[StepResult | WorkerDiedError] = asyncio.Queue()

    async def start(self) -> WorkerReady:
        await self.close()
        self._results = asyncio.Queue()
        self._runner = self._make_runner()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-runner")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._runner.start)
        except ConfigError:
            raise
        except Exception as error:  # as in `_execute`
            raise WorkerDiedError(f"the model runner failed to start: {error}") from error

    def submit(self, plan: StepPlan) -> None:
        assert self._thread is not None, "the executor was not started"
        assert self._runner is not None
        loop = asyncio.get_running_loop()
        self._under_way = [step for step in self._under_way if not step.done()]
        self._under_way.append(self._thread.submit(self._execute, self._runner, plan, self._results, loop))

    def abort(self, request_ids: Sequence[str]) -> None:
        assert self._runner is not None, "the executor was not started"
        self._runner.abort(request_ids)

    async def next_result(self) -> StepResult:
        result = await self._results.get()
        if isinstance(result, WorkerDiedError):
            self._results.put_nowait(result)  # dead for whoever asks again, too
            raise result
        return result

    async def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            # The step that runs cannot be stopped; it must be over before the next runner loads. No waiting in a
            # thread: a program that never calls close() gets here when threads can no longer be started.
            if running := [asyncio.wrap_future(step) for step in self._under_way if not step.cancelled()]:
                await asyncio.wait(running)
        self._thread = self._runner = None
        self._under_way = []

    @staticmethod
    def _execute(
        runner: Runner,
        plan: StepPlan,
        results: asyncio.Queue[StepResult | WorkerDiedError],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        outcome: StepResult | WorkerDiedError
        try:
            outcome = runner.execute(plan)
        except Exception:  # a worker process would have died of it: the engine replays the same way
            outcome = WorkerDiedError(f"the model runner failed:\n{traceback.format_exc()}")
        if not loop.is_closed():  # a script may end without close()
            loop.call_soon_threadsafe(results.put_nowait, outcome)
