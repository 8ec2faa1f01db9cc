"""Runners that misbehave, for worker processes of tests, and how such processes are watched."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from testbed.fakes import FakeRunner
from testbed.patience import GUARD_SECONDS
from vllm_omni.diffusion.control.executor import Executor
from vllm_omni.diffusion.control.executor.multiproc import MultiprocExecutor, WorkerGroup
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import StepPlan, StepResult, WorkerReady
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import ConfigError

ROOT = Path(__file__).parents[4]
AnyExecutor = TypeVar("AnyExecutor", bound=Executor)


class BrokenStart(FakeRunner):
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        raise RuntimeError("the weights are on fire")


class WrongConfig(FakeRunner):
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        raise ConfigError("--dtype float16: not on this device")


class ExitsInStart(FakeRunner):
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        os._exit(3)


class BrokenStep(FakeRunner):
    def execute(self, plan: StepPlan) -> StepResult:
        raise RuntimeError("the device is gone")


class BrokenResult(FakeRunner):
    """Runner whose device fails: the error is raised when the result is awaited."""

    launches_ahead = True

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        super().launch(plan)

        def wait() -> StepResult:
            raise RuntimeError("the device is gone")

        return wait


class AskedLate(FakeRunner):
    """Runner whose first step ends only after the second was launched."""

    launches_ahead = True

    def __init__(self, config: OmniDiffusionConfig, rank_info: RankInfo | None = None) -> None:
        super().__init__(config, rank_info)
        self._launched = [threading.Event(), threading.Event()]

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        done = super().launch(plan)
        self._launched[plan.step_id].set()

        def wait() -> StepResult:
            assert self._launched[1].wait(GUARD_SECONDS)
            return done()

        return wait


class Gated(FakeRunner):
    """Runner whose denoising steps run until their request is aborted."""

    def __init__(self, config: OmniDiffusionConfig, rank_info: RankInfo | None = None) -> None:
        super().__init__(config, rank_info)
        self._aborted_any = threading.Event()

    def abort(self, request_ids: Any) -> None:
        super().abort(request_ids)
        self._aborted_any.set()

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.denoise:
            assert self._aborted_any.wait(GUARD_SECONDS)
        return super().execute(plan)


class Chatty(FakeRunner):
    """Runner that writes more log lines, prints and progress bars than fit into a pipe."""

    def execute(self, plan: StepPlan) -> StepResult:
        logger = logging.getLogger("vllm_omni.chatty")
        for number in range(500):
            logger.info("a line of the log: %d", number)
            logger.debug("a line for those who ask for it: %d", number)
            print("a line of the output", number)
        for _ in tqdm(range(500), mininterval=0):
            pass
        with contextlib.suppress(OSError):
            os.write(2, b"x" * 100_000 + b"\n")  # as C++ libraries do
        print("the last line")
        return super().execute(plan)


def hang() -> NoReturn:
    """Wait until the process is killed; its other threads run on."""
    threading.Event().wait()
    raise AssertionError


def hang_with_the_lock() -> NoReturn:
    """Wait until the process is killed; no other thread of it runs meanwhile."""
    ctypes.PyDLL(None).pause()  # a PyDLL keeps the interpreter's lock
    raise AssertionError


class Endless(FakeRunner):
    """Runner with a step that never ends; other threads run on."""

    def execute(self, plan: StepPlan) -> StepResult:
        hang()


class EndlessStart(FakeRunner):
    def start(self, first: WorkerReady | None = None) -> WorkerReady:
        hang()


class HoldsTheLock(FakeRunner):
    """Runner with a step that never ends and holds the interpreter lock."""

    def execute(self, plan: StepPlan) -> StepResult:
        hang_with_the_lock()


def name_of(runner: type[FakeRunner]) -> str:
    return f"{runner.__module__}:{runner.__name__}"


@asynccontextmanager
async def closing(executor: AnyExecutor) -> AsyncIterator[AnyExecutor]:
    async with asyncio.timeout(GUARD_SECONDS):
        try:
            yield executor
        finally:
            await executor.close()
            if isinstance(executor, MultiprocExecutor):
                assert executor.worker_pids == []


def group_of(executor: MultiprocExecutor) -> WorkerGroup:
    """The workers of a started executor: private, but the order of their failures shows nowhere else."""
    assert executor._group is not None
    return executor._group


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
