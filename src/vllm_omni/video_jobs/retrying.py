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
    never: type[Exception] | tuple[type[Exception], ...] = (),
) -> Result:
    """Result of `call`, which is repeated after each `error`, with growing pauses, for about `seconds`.

    never: subclasses of `error` that are raised at once. Raises the last error.
    """
    end, pause = time.monotonic() + seconds, FIRST_PAUSE_SECONDS
    while True:
        try:
            return await call()
        except error as failure:
            if isinstance(failure, never) or time.monotonic() + pause > end:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)


async def uninterrupted(call: Coroutine[Any, Any, Result]) -> Result:
    """Result of `call`, which is not cancelled with its caller: a thread, or steps that belong together.

    A caller that is cancelled, however often, waits for the end of `call` first. Then CancelledError is raised.
    """
    task, cancelled = asyncio.create_task(call), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # seen: asyncio does not log it
    raise cancelled
