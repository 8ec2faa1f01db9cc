"""Sleep of an engine: the level that was asked for, the way there and back, and the calls that wait for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal, get_args

from vllm_omni.diffusion.control.executor import Executor
from vllm_omni.errors import ConfigError, InvalidRequestError, RequestError, UnavailableError, WorkerDiedError

logger = logging.getLogger(__name__)

SleepLevel = Literal[1, 2]
"""1: the weights lie in host memory; 2: the workers have ended."""


def check_level(level: object) -> None:
    """Raise InvalidRequestError for anything but a `SleepLevel`."""
    if isinstance(level, bool) or level not in get_args(SleepLevel):
        raise InvalidRequestError(f"level takes 1 or 2, got {level!r}", param="level")


class EngineSleep:
    """State of one engine between awake (level 0) and a `SleepLevel`.

    `fall_asleep` and `wake_up` say what is wanted, and wait; calls run one after another. The engine's loop calls
    `run` when no plan is in flight, which acts.
    """

    def __init__(self) -> None:
        self._wanted = 0
        """Level that was asked for last; 0: awake."""
        self.level = 0
        """Present level."""
        self._failure: RequestError | None = None
        """Reason why the engine sleeps on although it was woken, or why it acts no more."""
        self._has_ended = False
        self._is_acting = False
        """Whether the engine's loop is in `run`."""
        self._turn = asyncio.Lock()
        self._has_changed = asyncio.Event()
        """Set at each change, and replaced by a new one."""

    @property
    def is_on(self) -> bool:
        """Whether the engine sleeps, or is on its way there or back."""
        return bool(self._wanted or self._is_acting)

    async def fall_asleep(self, level: int, check: Callable[[], object], wake_loop: Callable[[], object]) -> int:
        """Sleep at `level`, or at a deeper level if it is reached already. Returns the level.

        check: raises if the engine cannot sleep now. wake_loop: makes the engine's loop look.
        Raises UnavailableError if the engine stops meanwhile.
        """
        async with self._turn:
            check()
            self._wanted = max(self._wanted, level)
            self._note_change()
            wake_loop()
            await self._until(lambda: self.level >= self._wanted)
            return self.level

    async def wake_up(self, check: Callable[[], object]) -> None:
        """Wake up; no effect on an engine that is awake.

        Raises UnavailableError, and the engine sleeps on, if the device lacks memory or no worker starts.
        """
        async with self._turn:
            check()
            self._wanted, self._failure = 0, None
            self._note_change()
            await self._until(lambda: not self._is_acting or self._failure is not None)
            if self._failure is not None:
                raise self._failure

    def end(self, error: RequestError) -> None:
        """Fail the calls that wait: the engine's loop acts no more."""
        self._failure, self._has_ended = error, True
        self._wanted = self.level = 0
        self._note_change()

    async def run(self, executor: Executor) -> None:
        """Sleep until the engine is woken. No plan is in flight, and no request is with the workers."""
        self._is_acting = True
        try:
            while self._wanted or self.level:
                if self._wanted > self.level:
                    await self._fall(executor, self._wanted)
                elif not self._wanted:
                    await self._rise(executor)
                elif self.level == 1:
                    await self._watch(executor)
                else:
                    await self._has_changed.wait()
        finally:
            self._is_acting = False
            self._note_change()

    async def _fall(self, executor: Executor, level: int) -> None:
        start = time.monotonic()
        if level == 1:
            try:
                moved = await executor.sleep()
            except WorkerDiedError as error:
                await self._end_workers(executor, error)
                return
            logger.info(
                "asleep at level 1: %.2f GB of weights left for host memory in %.2f s, %.2f GB stay on a device",
                moved.num_bytes / 1e9,
                moved.seconds,
                moved.device_bytes / 1e9,
            )
        else:
            await executor.stop()
            logger.info("asleep at level 2: the workers ended in %.2f s", time.monotonic() - start)
        self._reach(level)

    async def _rise(self, executor: Executor) -> None:
        start, level = time.monotonic(), self.level
        try:
            if level == 1:
                moved = await executor.wake_up()
                failure, num_bytes = moved.failure, moved.num_bytes
            else:
                failure, num_bytes = "", (await executor.start()).load_bytes
        except (WorkerDiedError, ConfigError) as error:
            await executor.stop()
            failure, level = str(error), 2
        if failure:
            logger.error("the engine does not wake up, and sleeps on at level %d: %s", level, failure)
            reason = failure.partition("\n")[0]
            self._failure = UnavailableError(f"the engine does not wake up, and sleeps on: {reason}", retry_after=1.0)
            self._wanted = level
            self._reach(level)
            return
        logger.info("awake: %.2f GB of weights came back in %.2f s", num_bytes / 1e9, time.monotonic() - start)
        self._reach(0)

    async def _watch(self, executor: Executor) -> None:
        """Wait for a call, or for the death of a worker, whose weights are lost."""
        death = asyncio.ensure_future(executor.next_result())
        change = asyncio.ensure_future(self._has_changed.wait())
        try:
            await asyncio.wait((death, change), return_when=asyncio.FIRST_COMPLETED)
            if death.done():
                death.result()
        except WorkerDiedError as error:
            await self._end_workers(executor, error)
        finally:
            death.cancel()
            change.cancel()
            await asyncio.gather(death, change, return_exceptions=True)

    async def _end_workers(self, executor: Executor, error: WorkerDiedError) -> None:
        """Sleep at level 2 after a worker's death: new workers start when the engine is woken, and none before."""
        logger.error("a worker died asleep, so the engine sleeps at level 2 from now on: %s", error)
        await executor.stop()
        self._wanted = 2 if self._wanted else 0
        self._reach(2)

    def _reach(self, level: int) -> None:
        self.level = level
        self._note_change()

    def _note_change(self) -> None:
        self._has_changed.set()
        self._has_changed = asyncio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not self._has_ended and not condition():
            await self._has_changed.wait()
        if self._has_ended:
            assert self._failure is not None
            raise self._failure
