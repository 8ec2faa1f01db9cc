"""Files of `response_format=url`, kept in memory: none outlives the server, however the server ends."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

FILE_ROUTE = "image_file"
"""Name of the route that serves stored files."""
_MAX_SWEEP_SECONDS = 60.0


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    content_type: str
    expires_at: float
    """Time at which the file is removed, in seconds on the clock of the store."""


class FileStore:
    """Files under names that cannot be guessed.

    A file is removed after `ttl_seconds`. When all files together exceed `max_bytes`, the oldest go first; the newest
    always stays.
    """

    def __init__(self, ttl_seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._clock = clock
        self._files: dict[str, StoredFile] = {}  # oldest first
        self._num_bytes = 0

    def put(self, data: bytes, content_type: str) -> str:
        """Store `data`; return its id, which ends in the suffix of the file type."""
        file_id = f"{secrets.token_urlsafe(24)}.{content_type.partition('/')[2]}"
        self._files[file_id] = StoredFile(data, content_type, self._clock() + self._ttl_seconds)
        self._num_bytes += len(data)
        self.sweep()
        return file_id

    def get(self, file_id: str) -> StoredFile | None:
        """The file, or None if the id is unknown or the file has expired."""
        self.sweep()
        return self._files.get(file_id)

    def sweep(self) -> None:
        """Remove files that have expired or no longer fit."""
        now = self._clock()
        while self._files:
            file_id, oldest = next(iter(self._files.items()))
            too_much = self._num_bytes > self._max_bytes and len(self._files) > 1
            if oldest.expires_at > now and not too_much:
                return
            del self._files[file_id]
            self._num_bytes -= len(oldest.data)

    async def sweep_forever(self) -> None:
        """Sweep at regular times, so that an idle server removes expired files too."""
        while True:
            await asyncio.sleep(min(self._ttl_seconds, _MAX_SWEEP_SECONDS))
            self.sweep()
