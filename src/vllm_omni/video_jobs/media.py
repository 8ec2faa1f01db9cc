"""Store of media files (videos, pictures, checkpoints) in a folder or a bucket, by fsspec."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import re
import secrets
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from vllm_omni.errors import ConfigError, RequestError, error_line
from vllm_omni.video_jobs.retrying import uninterrupted

T = TypeVar("T")

logger = logging.getLogger(__name__)

PIECE_BYTES = 256 * 1024
"""Bytes that `MediaStore.read` yields at a time."""
_READ_AHEAD_BYTES = 4 * 1024 * 1024
"""Bytes that one request to a bucket reads."""
_NUM_THREADS = 8
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60}}}
"""Options of fsspec's file systems. Seconds: an address that does not answer is reported at start, not much later."""
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
"""Segments of ASCII letters, digits, `_`, `-` and `.`, none of which begins with a dot."""
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota and a limit of file sizes."""


class MediaStoreError(RequestError):
    """The media store cannot be read or written."""

    code = "media_store_failed"


class MediaStoreFullError(MediaStoreError):
    """The media store has no space left."""

    status = 507
    code = "media_store_full"


class MediaNotFoundError(MediaStoreError):
    """The media store has no file with this key."""

    code = "media_not_found"


@dataclass(frozen=True)
class MediaInfo:
    """Size and version of a stored file."""

    size: int
    """Bytes."""
    etag: str
    """Strong entity tag with its quotes, for HTTP's ETag: two files with one tag have the same bytes."""
    modified: float
    """Unix seconds."""


class MediaStore:
    """Files under keys such as `video_1/inputs/0.png`, in a folder, a bucket, or (for tests) in memory.

    Methods run in threads. They raise ValueError for a key that is none, MediaStoreFullError when no space is left, and
    MediaStoreError when the store cannot be reached or permits no access. S3's address and credentials come from the
    variables and files that all AWS libraries read, such as AWS_ENDPOINT_URL_S3 and AWS_ACCESS_KEY_ID.
    """

    def __init__(self, file_system: Any, root: str, url: str) -> None:
        self._files, self._root, self._url = file_system, root.rstrip("/"), url
        self._is_folder = file_system.protocol[0] == "file"
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="omni-media")

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the store of a folder's path, `file://PATH`, `s3://BUCKET/PREFIX` or `memory://PREFIX`.

        Creates the folder; connects to nothing. Raises ConfigError.
        """
        import fsspec

        name = f"--media-store {_without_secrets(url)!r:.200}"
        scheme, separator, rest = url.partition("://")
        scheme = scheme if separator else "file"
        if scheme not in ("file", "s3", "memory") or "::" in url or not url:
            raise ConfigError(f"{name}: takes a folder or s3://BUCKET/PREFIX")
        if scheme == "s3" and not _BUCKET.fullmatch(rest.partition("/")[0]):
            raise ConfigError(f"{name} has no bucket: s3://BUCKET/PREFIX")
        try:
            # Other servers write to the store too: listings and instances that fsspec keeps would be out of date.
            files, root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, skip_instance_cache=True, **_OPTIONS.get(scheme, {})
            )
        except ImportError:
            raise ConfigError(f"{name} needs the package s3fs: pip install 'vllm-omni[s3]'") from None
        if scheme == "file":
            try:
                os.makedirs(root, mode=0o700, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"{name} cannot be created: {error.strerror}") from None
            if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
                raise ConfigError(f"{name} cannot be read and written by this user")
        return cls(files, root, _without_secrets(url))

    def check_access(self) -> None:
        """Write, read and delete a small file. Blocks. Raises ConfigError, which names --media-store and the reason."""
        folder = self._path(f"access-{secrets.token_hex(8)}")
        try:
            self._put(f"{folder}/file", b"access")
            self._files.cat_file(f"{folder}/file")
            self._delete_tree(folder)
        except Exception as error:
            raise ConfigError(f"--media-store {self._url}: {error_line(error)}") from error

    async def put(self, key: str, content: bytes | Path) -> None:
        """Store bytes or a copy of a file. A file of this key is replaced once the new one is whole.

        A caller that is cancelled waits until the file is written: nothing is written after `put` has ended.
        """
        # A caller that is cancelled and deletes the job next must not be overtaken by this file.
        await uninterrupted(self._run(self._put, self._path(key), content, key=key))

    async def get(self, key: str) -> bytes:
        """The whole file. Raises MediaNotFoundError."""
        data: bytes = await self._run(self._files.cat_file, self._path(key), key=key)
        return data

    async def info(self, key: str) -> MediaInfo:
        """Size, entity tag and time of a file. Raises MediaNotFoundError."""
        return await self._run(self._info, self._path(key), key=key)

    async def read(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """Bytes from `start` up to `end` (exclusive; None: the file's end), in pieces of 256 KiB.

        Raises MediaNotFoundError at the first piece.
        """
        file = await self._run(self._open, self._path(key), start, key=key)
        try:
            left = float("inf") if end is None else end - start
            while left > 0:
                piece: bytes = await self._run(file.read, int(min(PIECE_BYTES, left)), key=key)
                if not piece:
                    break
                left -= len(piece)
                yield piece
        finally:
            try:
                self._threads.submit(file.close)  # in a thread, because it waits for a read that was given up
            except RuntimeError:  # the threads have ended, and all reads with them
                file.close()

    async def delete_tree(self, prefix: str) -> None:
        """Remove all files whose key begins with `prefix` and a slash, if there are any."""
        with contextlib.suppress(MediaNotFoundError):
            await self._run(self._delete_tree, self._path(prefix), key=prefix)

    async def delete(self, key: str) -> None:
        """Remove one file, if it is there."""
        with contextlib.suppress(MediaNotFoundError):
            await self._run(self._files.rm_file, self._path(key), key=key)

    async def close(self) -> None:
        """Wait for what runs, and end the threads."""
        await asyncio.to_thread(self._threads.shutdown)

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a media key has segments of letters, digits, _, - and ., got {key!r:.100}")
        return f"{self._root}/{key}"

    def _put(self, path: str, content: bytes | Path) -> None:
        if self._is_folder:
            _write_to_folder(path, content)
        elif isinstance(content, bytes):
            self._files.pipe_file(path, content)
        else:
            self._files.put_file(os.fspath(content), path)

    def _info(self, path: str) -> MediaInfo:
        info = self._files.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        modified = self._files.modified(path).timestamp()
        # A key's file is written once, so that its time tells versions apart.
        version = hashlib.sha256(f"{path} {info['size']} {modified}".encode()).hexdigest()[:32]
        return MediaInfo(info["size"], info.get("ETag") or f'"{version}"', modified)

    def _open(self, path: str, start: int) -> Any:
        file = self._files.open(path, "rb", block_size=_READ_AHEAD_BYTES)
        file.seek(start)
        return file

    def _delete_tree(self, path: str) -> None:
        if not self._is_folder:
            self._files.rm(path, recursive=True)
            return
        while os.path.lexists(path):
            with contextlib.suppress(FileNotFoundError):  # another sweep removes the same files
                self._files.rm(path, recursive=True)

    async def _run(self, function: Callable[..., T], *args: Any, key: str) -> T:
        """Call a blocking function in a thread, with its errors translated."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        except Exception as error:
            # Where a file is written, what is missing is the bucket.
            if isinstance(error, FileNotFoundError | IsADirectoryError) and function != self._put:
                raise MediaNotFoundError(f"the media store has no file {key}") from None
            # Clients may see the message. Names of folders and buckets are for the log.
            logger.warning("--media-store %s: %s failed: %s", self._url, key, error_line(error))
            if isinstance(error, OSError) and error.errno in _FULL:
                raise MediaStoreFullError("the server's media store is full") from error
            raise MediaStoreError("the server's media store failed; the server's log has the reason") from error


def _write_to_folder(path: str, content: bytes | Path) -> None:
    """Write under a temporary name in the same folder, then rename: a reader sees a whole file or none."""
    folder, name = os.path.split(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    part = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                with open(content, "rb") as source:
                    while piece := source.read(1 << 20):
                        file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def _sync_folder(path: str) -> None:
    """Make a rename in a folder outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_secrets(url: str) -> str:
    """`url` without a user and password before its host."""
    return re.sub(r"://[^/@]*@", "://", url)
