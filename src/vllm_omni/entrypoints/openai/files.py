"""Pictures kept for `response_format=url`: a bounded folder of files that expire."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_MAX_SWEEP_SECONDS = 60.0


@dataclass(frozen=True)
class StoredFile:
    path: Path
    content_type: str
    num_bytes: int
    expires_at: float
    """On the store's clock."""


class FileStore:
    """Files under names that cannot be guessed, in a folder of its own that `close` removes.

    A file goes after `ttl_seconds`, or earlier when all together exceed `max_bytes` (oldest first; the newest
    always stays).
    """

    def __init__(self, ttl_seconds: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._clock = clock
        self._files: dict[str, StoredFile] = {}  # oldest first
        self._num_bytes = 0
        self.folder: Path | None = None
        """Made when the first file comes."""

    async def put(self, data: bytes, content_type: str) -> str:
        """Store `data`; its id, which ends in the file type's suffix."""
        file_id = f"{secrets.token_urlsafe(24)}.{content_type.partition('/')[2]}"
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="vllm-omni-media-"))
        path = self.folder / file_id
        # Known before it is written: a client that leaves meanwhile must not leave a file that nobody removes.
        self._files[file_id] = StoredFile(path, content_type, len(data), self._clock() + self._ttl_seconds)
        self._num_bytes += len(data)
        self.sweep()
        await asyncio.to_thread(path.write_bytes, data)
        return file_id

    async def get(self, file_id: str) -> tuple[bytes, str] | None:
        """Content and content type; None for what is unknown or expired."""
        self.sweep()
        if (file := self._files.get(file_id)) is None:
            return None
        try:
            return await asyncio.to_thread(file.path.read_bytes), file.content_type
        except FileNotFoundError:  # swept while the thread was starting
            return None

    def sweep(self) -> None:
        """Remove what has expired or no longer fits."""
        now = self._clock()
        while self._files:
            file_id, oldest = next(iter(self._files.items()))
            too_much = self._num_bytes > self._max_bytes and len(self._files) > 1
            if oldest.expires_at > now and not too_much:
                return
            del self._files[file_id]
            self._num_bytes -= oldest.num_bytes
            oldest.path.unlink(missing_ok=True)

    async def sweep_forever(self) -> None:
        """Sweep now and then, so that an idle server keeps nothing beyond its time."""
        while True:
            await asyncio.sleep(min(self._ttl_seconds, _MAX_SWEEP_SECONDS))
            self.sweep()

    def close(self) -> None:
        self._files.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
