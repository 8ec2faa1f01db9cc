"""Calls of stores that may be away for a while, and calls that end although their caller is cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.1, 5.0


async def retrying(
    call: Callable[[], Awaitable[Result]],
    error: type[Exception],
    seconds: float,
    *,
    never: type[Exception] | None = None,
) -> Result:
    """Result of `call`, which is repeated after each `error`, with growing pauses, for about `seconds`.

    never: subclass of `error` that is raised at once. Raises the last error.
    """
    end, pause = time.monotonic() + seconds, FIRST_PAUSE_SECONDS
    while True:
        try:
            return await call()
        except error as failure:
            if (never is not None and isinstance(failure, never)) or time.monotonic() + pause > end:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)


async def uninterrupted(call: Coroutine[Any, Any, Result]) -> Result:
    """Result of `call`, whose thread cannot be stopped: a caller that is cancelled waits for its end first."""
    task = asyncio.create_task(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
