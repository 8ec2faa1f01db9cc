"""A worker process and its channel, as the parent holds them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import time
from collections.abc import Sequence

from vllm_omni.diffusion.control.executor.launch import Launched
from vllm_omni.diffusion.messages.worker import Died, FromWorker, ToWorker
from vllm_omni.errors import ConfigError, WorkerDiedError
from vllm_omni.processes.channel import AsyncChannel, ChannelBrokenError
from vllm_omni.processes.outbox import Outbox

logger = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 1.0
"""Time for a process with a closed channel to end, so that the error can name its exit code."""
_KILL_SECONDS = 5.0
"""Time to wait for the end of a killed process: a device driver may hold it."""
_POLL_SECONDS = 0.01
"""Pause between two looks at a process that should end."""


class WorkerProcess:
    """One worker process and the channel to it. Constructed on a running event loop."""

    def __init__(self, launched: Launched) -> None:
        self._name = launched.name
        self._process = launched.process
        self._channel: AsyncChannel[FromWorker] = AsyncChannel(launched.channel, FromWorker)

    def __str__(self) -> str:
        return f"{self._name} (pid {self.pid})"

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToWorker) -> None:
        self._channel.send(message)

    @staticmethod
    def outbox(workers: Sequence[WorkerProcess]) -> Outbox:
        """Outbox of messages for all of `workers`, each of which is encoded once."""
        return Outbox([worker._channel for worker in workers])

    async def receive(self) -> FromWorker:
        """Next message of the worker.

        Raises EOFError when the worker has closed the channel (see `how_it_ended`), WorkerDiedError when it reports its
        failure or when a message was lost, ConfigError when it reports a wrong setting.
        """
        try:
            message = await self._channel.receive()
        except ChannelBrokenError as error:
            raise WorkerDiedError(f"the channel to {self} broke: {error}") from error
        if not isinstance(message, Died):
            return message
        if message.is_config_error:
            raise ConfigError(message.message)
        raise WorkerDiedError(f"{self} failed: {message.message}\n{message.traceback}")

    async def how_it_ended(self) -> str:
        """Describe the end of a worker whose channel is closed."""
        if not await self._ended_within(_LAST_WORDS_SECONDS):
            return "closed its channel"
        code = self._process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    async def kill(self) -> None:
        """Kill the process and reap it. A worker has nothing to save."""
        self._process.kill()
        self._channel.close()
        if await self._ended_within(_KILL_SECONDS):
            self._process.wait()
        else:
            logger.error("%s was killed but has not ended", self)

    def kill_at_exit(self) -> None:
        """Kill the process and reap it without an event loop."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)

    def close_channel(self) -> None:
        self._channel.close()

    async def _ended_within(self, seconds: float) -> bool:
        """Whether the process ends in time. Polls: there may be no thread or descriptor left to wait with."""
        end = time.monotonic() + seconds
        while self._process.poll() is None:
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        return True
