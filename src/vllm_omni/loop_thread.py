"""An event loop in a thread of its own, for callers that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Output = TypeVar("Output")


def run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run `loop` in this thread until it is stopped, then close it."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def result_of(future: Future[Output]) -> Output:
    """Wait for the result of a coroutine on the loop. An interrupt cancels it."""
    try:
        # An interrupt just before a wait does not end the wait, so each wait is short.
        while not wait([future], timeout=1).done:
            pass
        return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C: cancelling closes the streams, which aborts their requests
        raise


def end_loop(
    close: Callable[[], Awaitable[None]], loop: asyncio.AbstractEventLoop, thread: threading.Thread, seconds: float
) -> None:
    """Run `close` on the loop, cancel all other tasks, stop the loop and wait for its thread, `seconds` each."""

    async def close_and_stop() -> None:
        try:
            await close()
            # A cancelled start may still be stopping its workers.
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        finally:
            loop.call_soon(loop.stop)  # later: the loop must still deliver the end of this coroutine

    closing = asyncio.run_coroutine_threadsafe(close_and_stop(), loop)
    if threading.current_thread() is not thread:  # the garbage collector may run on any thread, this one included
        closing.result(timeout=seconds)
        thread.join(timeout=seconds)
