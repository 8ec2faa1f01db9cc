"""Request bodies as they arrive, bounded in time and in memory, and work that ends when its client disconnects.

JSON is parsed and validated in a thread: a hostile body takes time there and not on the event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from vllm_omni.errors import InvalidRequestError, QueueFullError, RequestAbortedError
from vllm_omni.inputs.images import InputImage

MAX_UPLOAD_BYTES = 2 * 2**30
"""Room for a queue of 256 edits with a few pictures of a million pixels each, or for 20 pictures of 33 million."""
MIN_BYTES_PER_SECOND = 16 * 2**10
"""Minimum rate over `silence_seconds`. It is low, because links have short interruptions."""
MIN_LASTING_BYTES_PER_SECOND = 64 * 2**10
"""Minimum rate over `LONG_FACTOR * silence_seconds`: half of 1 Mbit/s, at which 50 MB take seven minutes."""
LONG_FACTOR = 10
MAX_JSON_BYTES = 32 * 2**20
"""Most bytes of a JSON body with pictures: it is parsed in one piece. Larger pictures come as multipart/form-data."""
MAX_JSON_ITEMS = 2**17
"""Most commas and brackets: the parser holds the interpreter lock, and its objects are many times as large as text."""
Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


class UploadReservation(AbstractContextManager["UploadReservation"]):
    """Bytes of the upload budget that one request holds, and its pictures; leaving the context releases the bytes.

    Nothing else may refer to the pictures, so that `replace_images` frees the memory of the old ones.
    """

    def __init__(self, budget: UploadBudget) -> None:
        self._budget = budget
        self.num_bytes = 0
        self.images: tuple[InputImage, ...] = ()

    def add(self, num_bytes: int) -> None:
        """Hold `num_bytes` more. Raises QueueFullError if the budget of all requests has no room for them."""
        if self._budget.num_bytes + num_bytes > self._budget.max_bytes:
            raise QueueFullError("the pictures of other requests leave no room for this one's", retry_after=1.0)
        self.num_bytes += num_bytes
        self._budget.num_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self._budget.num_bytes -= num_bytes

    def keep_image(self, image: InputImage) -> None:
        """Hold one more picture. Raises QueueFullError."""
        self.add(image.num_bytes)
        self.images += (image,)

    def replace_images(self, images: Iterable[InputImage]) -> None:
        """Hold `images` instead of the pictures so far. Raises QueueFullError."""
        self.release(sum(image.num_bytes for image in self.images))
        self.images = ()
        for image in images:
            self.keep_image(image)

    def transfer(self) -> UploadReservation:
        """Transfer the bytes to a new reservation, which the caller must leave."""
        other = UploadReservation(self._budget)
        other.num_bytes, self.num_bytes = self.num_bytes, 0
        return other

    def __exit__(self, *_: object) -> None:
        self.release(self.num_bytes)


@dataclass(eq=False)
class UploadBudget:
    """Bytes that the uploads of all requests hold together, at most `max_bytes`."""

    max_bytes: int = MAX_UPLOAD_BYTES
    num_bytes: int = 0

    def reserve(self) -> UploadReservation:
        return UploadReservation(self)


class UploadRate:
    """Two allowances of waiting time: one of `silence_seconds`, one of `LONG_FACTOR` times as much.

    Waiting uses up both allowances, and bytes refill them at their minimum rates, never above their first value. So a
    sender above both rates may go on for ever, and a fast beginning does not allow a long pause later.
    """

    def __init__(self, silence_seconds: float) -> None:
        self._rates = (MIN_BYTES_PER_SECOND, MIN_LASTING_BYTES_PER_SECOND)
        self._most = (silence_seconds, LONG_FACTOR * silence_seconds)
        self._left: tuple[float, ...] = self._most

    @property
    def seconds_left(self) -> float:
        """Seconds within which the next bytes must arrive."""
        return min(self._left)

    def count(self, num_bytes: int, seconds: float) -> None:
        """Count `num_bytes` that arrived after a wait of `seconds`."""
        self._left = tuple(
            min(most, left + num_bytes / rate - seconds)
            for most, left, rate in zip(self._most, self._left, self._rates, strict=True)
        )

    def __str__(self) -> str:
        (short, lasting), (rate, lasting_rate) = self._most, self._rates
        return f"{rate} bytes a second for {short:g} seconds, or than {lasting_rate} for {lasting:g}"


@dataclass(frozen=True)
class BodyReader:
    """Reads bodies. The only place that limits the bytes and items of JSON."""

    silence_seconds: float
    """Longest pause of an upload in seconds; see `UploadRate`."""

    async def chunks(self, request: Request, reservation: UploadReservation) -> AsyncIterator[bytes]:
        """Chunks of the body; the bytes of each are added to `reservation`.

        Raises HTTPException (408) for a sender that is too slow, RequestAbortedError for one that disconnects, and
        QueueFullError when the upload budget is used up.
        """
        stream, clock = aiter(request.stream()), asyncio.get_running_loop().time
        rate = UploadRate(self.silence_seconds)
        try:
            while True:
                asked = clock()
                async with asyncio.timeout(rate.seconds_left):
                    chunk = await anext(stream)
                rate.count(len(chunk), clock() - asked)
                reservation.add(len(chunk))
                yield chunk
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            # The rest of the body would be parsed as the beginning of another request.
            headers = {"connection": "close"}
            raise HTTPException(408, f"The request's body came with less than {rate}.", headers) from error
        except ClientDisconnect as error:
            raise RequestAbortedError("the client closed the connection") from error

    async def json(
        self,
        request: Request,
        reservation: UploadReservation,
        convert: Callable[[Any], Result],
        max_bytes: int | None = None,
    ) -> Result:
        """Result of `convert` for a JSON body; parsing and `convert` run in a thread.

        max_bytes: limit of the route, for bodies without pictures; None: MAX_JSON_BYTES alone.
        Raises what `convert` and `chunks` raise; InvalidRequestError for another content type, RequestValidationError
        for invalid JSON, HTTPException (413) for a body that is too large.
        """
        kind = content_type(request)
        if kind != "application/json":
            raise InvalidRequestError(f"the request's content-type takes application/json, got {kind[:64]!r}")
        declared = request.headers.get("content-length", "")
        _check_size(int(declared) if declared.isdecimal() else 0, max_bytes)
        data, num_items = bytearray(), 0
        async for chunk in self.chunks(request, reservation):
            _check_size(len(data) + len(chunk), max_bytes)
            data += chunk
            num_items += sum(map(chunk.count, (b",", b"[", b"{")))  # those inside strings too; base64 has none of them
            if num_items > MAX_JSON_ITEMS:
                raise HTTPException(413, f"A JSON body has at most {MAX_JSON_ITEMS} commas and brackets.")
        return await asyncio.to_thread(lambda: convert(_parsed(data)))

    async def model(
        self, request: Request, reservation: UploadReservation, model: type[Body], max_bytes: int | None = None
    ) -> Body:
        """A JSON body as a validated `model`. Raises as `json`."""
        return await self.json(
            request, reservation, lambda value: validated(lambda: model.model_validate(value)), max_bytes
        )


def content_type(request: Request) -> str:
    """The media type of the body in lower case, without parameters; empty if the request has none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def validated(validate: Callable[[], Body]) -> Body:
    """`validate()`. Raises RequestValidationError with the first error only: an error response names one field.

    The models bound their lists and objects before they look into them, so no body makes many errors.
    """
    try:
        return validate()
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False, include_context=False)[0]) from error


def _check_size(num_bytes: int, max_bytes: int | None) -> None:
    """Raise HTTPException (413) if a body of `num_bytes` is too large."""
    if max_bytes is not None and num_bytes > max_bytes:
        raise HTTPException(413, f"The request body is larger than {max_bytes} bytes.")
    if num_bytes > MAX_JSON_BYTES:
        raise HTTPException(
            413,
            f"A JSON body has at most {MAX_JSON_BYTES} bytes; larger pictures go as multipart/form-data to "
            "/v1/images/edits.",
        )


def _parsed(data: bytearray) -> Any:
    """Parse JSON. Raises RequestValidationError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise _invalid({"type": "json_invalid", "loc": (), "msg": "", "input": {}, "ctx": {"error": reason}}) from error


def _invalid(error: Mapping[str, Any]) -> RequestValidationError:
    """The exception that FastAPI raises for bodies that it reads itself."""
    return RequestValidationError([{**error, "loc": ("body", *error["loc"])}])


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. If the client disconnects first, cancel `work` and raise RequestAbortedError.

    The body of the request must have been read.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestAbortedError("the client closed the connection")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
