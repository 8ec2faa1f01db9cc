"""End streams of events when the server drains, so that their clients listen to another server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from vllm_omni.errors import UnavailableError

Event = TypeVar("Event")


class Drain:
    """Whether the server drains, for whoever must not begin anything any more, and for streams under way."""

    def __init__(self) -> None:
        self.has_begun = False
        self._waits: set[asyncio.Timeout] = set()
        """Streams that wait for their next event."""

    def begin(self) -> None:
        """End all streams, and refuse further ones."""
        self.has_begun = True
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time())

    def check(self) -> None:
        """Raise UnavailableError if the server drains."""
        if self.has_begun:
            raise UnavailableError("the server is draining", retry_after=1.0)

    async def stream(self, events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
        """`events` until they end, or until the server drains: then UnavailableError is raised."""
        async with aclosing(events):
            while True:
                self.check()
                wait = asyncio.timeout(None)
                try:
                    async with wait:
                        self._waits.add(wait)
                        event = await anext(events)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    if not wait.expired():
                        raise
                    continue  # the check above says why
                finally:
                    self._waits.discard(wait)
                yield event
