"""Messages to several processes in their order, of which those with large arrays are encoded in a thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from vllm_omni.processes.channel import AsyncChannel, encode_frame, queue_on_all, send_to_all

LARGE_BYTES = 2**22
"""Bytes of arrays from which on a message is encoded in a thread: their copy takes about 1 ms for each MiB."""


class Outbox:
    """Sends messages on several channels, which all get the same ones. Construct it on the event loop that uses it."""

    def __init__(self, channels: Sequence[AsyncChannel[Any]]) -> None:
        self._channels = tuple(channels)
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[object, int]] = deque()
        """Messages behind one that is being encoded, each with the bytes of its arrays."""
        self._is_encoding = False

    def send(self, message: object, num_bytes: int = 0) -> None:
        """Send a message whose arrays have about `num_bytes`. Returns at once and raises nothing, as `send_to_all`."""
        self._waiting.append((message, num_bytes))
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and not self._is_encoding:
            message, num_bytes = self._waiting.popleft()
            if num_bytes < LARGE_BYTES:
                send_to_all(self._channels, message)
                continue
            self._is_encoding = True
            self._loop.run_in_executor(None, encode_frame, message).add_done_callback(self._note_encoded)

    def _note_encoded(self, encoding: asyncio.Future[tuple[bytes, int | None]]) -> None:
        """Queue the frame; channels that were closed meanwhile drop it."""
        self._is_encoding = False
        if (error := encoding.exception()) is None:
            queue_on_all(self._channels, *encoding.result())
        else:
            for channel in self._channels:
                channel.note_unsent(error)
        self._go_on()
