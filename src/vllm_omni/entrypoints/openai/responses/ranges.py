"""Conditional and range requests for a file: full, partial, not modified, or not satisfiable (RFC 9110)."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

_RANGE = re.compile(r"bytes *= *([0-9]*) *- *([0-9]*) *", re.ASCII | re.IGNORECASE)
_MAX_DIGITS = 18
"""Digits of the largest position that is read as a number; Python refuses to convert very long ones."""


@dataclass(frozen=True)
class RangedFile:
    """A file that can be read from any position."""

    size: int
    etag: str
    """Strong entity tag, with its quotation marks."""
    content_type: str
    read: Callable[[int, int], AsyncGenerator[bytes, None]]
    """Bytes from a first position up to a second one, which is excluded."""


def respond(file: RangedFile, request: Request, headers: dict[str, str]) -> Response:
    """Response to a GET or HEAD of `file`; `headers` are added to it.

    One range is served. Several ranges, and a range that is not understood, get the whole file, as the RFC allows.
    Raises HTTPException (416) for a range that begins behind the end.
    """
    headers = {**headers, "etag": file.etag, "accept-ranges": "bytes"}
    if _lists(request.headers.get("if-none-match"), file.etag):
        return Response(status_code=304, headers=headers)
    start, end, status = 0, file.size, 200
    if request.method == "GET" and (asked := _asked_range(request, file)) is not None:
        start, end = asked
        status = 206
        headers["content-range"] = f"bytes {start}-{end - 1}/{file.size}"
    headers["content-length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=file.content_type)
    return _FileResponse(file.read(start, end), status, headers, file.content_type)


def _asked_range(request: Request, file: RangedFile) -> tuple[int, int] | None:
    """First position and the end (excluded) of the range that is to be served; None: the whole file."""
    matched = _RANGE.fullmatch(request.headers.get("range", ""))
    if matched is None or not (matched[1] or matched[2]):
        return None
    if request.headers.get("if-range", file.etag).strip() != file.etag:
        return None  # another version, or a date, which this server does not compare
    first, last = (_position(text) for text in matched.groups())
    if first is None:
        assert last is not None
        start, end = max(0, file.size - last), file.size
    else:
        start, end = first, file.size if last is None else min(last + 1, file.size)
        if last is not None and last < first:
            return None  # no valid range
    if start >= file.size or start >= end:
        raise HTTPException(
            416,
            f"range takes positions in a file of {file.size} bytes, got {request.headers['range'][:64]!r}",
            {"content-range": f"bytes */{file.size}"},
        )
    return start, end


def _position(text: str) -> int | None:
    return None if not text else int(text) if len(text.lstrip("0")) <= _MAX_DIGITS else 10**_MAX_DIGITS


def _lists(header: str | None, etag: str) -> bool:
    """Whether an If-None-Match header has `etag`, compared weakly, or `*`."""
    if header is None:
        return False
    tags = [tag.strip() for tag in header.split(",")]
    return "*" in tags or etag.removeprefix("W/") in [tag.removeprefix("W/") for tag in tags]


class _FileResponse(StreamingResponse):
    """Sends the pieces of a file. The file is closed however the response ends."""

    def __init__(
        self, pieces: AsyncGenerator[bytes, None], status: int, headers: dict[str, str], content_type: str
    ) -> None:
        super().__init__(_closing(pieces), status, headers, content_type)


async def _closing(pieces: AsyncGenerator[bytes, Any]) -> AsyncIterator[bytes]:
    async with aclosing(pieces):
        async for piece in pieces:
            yield piece
