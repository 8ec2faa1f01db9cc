"""Process and event loop that an engine is bound to; calls from elsewhere are refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from typing import Any, Protocol

from vllm_omni.errors import UnavailableError


class Killable(Protocol):
    def kill(self) -> None:
        """End the engine at once. Called on its loop, or while the loop does not run."""


class EngineOwner:
    """Process and event loop of an engine: its tasks run on one loop, its threads and sockets belong to one process."""

    def __init__(self) -> None:
        self._pid: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def bind(self, owner: object, engine: Killable) -> None:
        """Bind the engine to this process and the running loop; it is killed when `owner` is garbage collected.

        Raises UnavailableError at a second call.
        """
        if self._loop is not None:
            raise UnavailableError("this AsyncOmni was started before: make another one")
        self._pid, self._loop = os.getpid(), asyncio.get_running_loop()
        self._finalizer = weakref.finalize(owner, _kill, engine, self._loop, self._pid)

    @property
    def is_bound(self) -> bool:
        return self._loop is not None

    @property
    def is_fork(self) -> bool:
        """Whether this process is a fork of the one that started the engine."""
        return self._pid is not None and self._pid != os.getpid()

    @property
    def is_on_own_loop(self) -> bool:
        """Whether the caller runs on the engine's own loop."""
        return self._loop is not None and not self.is_fork and self._loop is _running_loop()

    def check_process(self) -> None:
        """Raise UnavailableError in a fork, where nothing runs the engine and a call would wait for ever."""
        if self.is_fork:
            raise UnavailableError(
                f"an Omni or AsyncOmni works in the process that started it ({self._pid}), not in its forks "
                f"(this is {os.getpid()}): make one in each process"
            )

    def check_loop(self) -> None:
        """Raise UnavailableError when the engine has started and the caller does not run on its loop."""
        self.check_process()
        if self.is_bound and not self.is_on_own_loop:
            place = "outside any loop" if _running_loop() is None else "on another loop"
            raise UnavailableError(
                f"an AsyncOmni works on the event loop that ran its start(), and was called {place}: "
                "start and use it in one asyncio.run(), or use Omni"
            )

    def kill(self) -> None:
        """Kill the engine, from any thread. In a fork nothing happens."""
        if self._finalizer is not None:
            self._finalizer()

    def release(self) -> None:
        """Stop watching the owner: the caller ends the engine itself."""
        if self._finalizer is not None:
            self._finalizer.detach()


def _kill(engine: Killable, loop: asyncio.AbstractEventLoop, pid: int) -> None:
    if os.getpid() != pid:  # a fork owns neither the loop nor the workers
        return
    if loop.is_running():  # possibly on another thread
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(engine.kill)
            return
    engine.kill()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
