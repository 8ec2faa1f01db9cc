"""Pictures kept for `response_format=url`: in memory, so that nothing outlives the server, however it ends."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

_MAX_SWEEP_SECONDS = 60.0


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    content_type: str
    expires_at: float
    """On the store's clock."""


class FileStore:
    """Files under names that cannot be guessed.

    A file goes after `ttl_seconds`, or earlier when all together exceed `max_bytes` (oldest first; the newest
    always stays).
    """

    def __init__(self, ttl_seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._clock = clock
        self._files: dict[str, StoredFile] = {}  # oldest first
        self._num_bytes = 0

    def put(self, data: bytes, content_type: str) -> str:
        """Store `data`; its id, which ends in the file type's suffix."""
        file_id = f"{secrets.token_urlsafe(24)}.{content_type.partition('/')[2]}"
        self._files[file_id] = StoredFile(data, content_type, self._clock() + self._ttl_seconds)
        self._num_bytes += len(data)
        self.sweep()
        return file_id

    def get(self, file_id: str) -> StoredFile | None:
        """None for what is unknown or expired."""
        self.sweep()
        return self._files.get(file_id)

    def sweep(self) -> None:
        """Remove what has expired or no longer fits."""
        now = self._clock()
        while self._files:
            file_id, oldest = next(iter(self._files.items()))
            too_much = self._num_bytes > self._max_bytes and len(self._files) > 1
            if oldest.expires_at > now and not too_much:
                return
            del self._files[file_id]
            self._num_bytes -= len(oldest.data)

    async def sweep_forever(self) -> None:
        """Sweep now and then, so that an idle server keeps nothing beyond its time."""
        while True:
            await asyncio.sleep(min(self._ttl_seconds, _MAX_SWEEP_SECONDS))
            self.sweep()
