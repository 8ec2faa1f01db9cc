"""The bodies of requests: fields, and pictures that are decoded as they arrive."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from vllm_omni.diffusion.catalog.registry import ImageInput, ModelInfo
from vllm_omni.diffusion.control.request_builder import MAX_PROMPT_CHARACTERS, check_num_images
from vllm_omni.entrypoints.openai.disconnect import unless_disconnected
from vllm_omni.entrypoints.openai.quotes import quote
from vllm_omni.entrypoints.openai.requests.chat_messages import UserMessage, last_user_message
from vllm_omni.entrypoints.openai.requests.fetching import MediaFetcher
from vllm_omni.entrypoints.openai.requests.json_body import Body, parse_json, validated
from vllm_omni.entrypoints.openai.requests.multipart import MultipartReader, Part
from vllm_omni.entrypoints.openai.requests.pictures.pool import DecodePool
from vllm_omni.entrypoints.openai.requests.upload_budget import UploadBudget, UploadReservation
from vllm_omni.entrypoints.openai.requests.upload_rate import UploadRate
from vllm_omni.entrypoints.openai.schema.chat import ChatCompletionRequest, with_extra_body
from vllm_omni.entrypoints.openai.schema.images import ImageEditRequest
from vllm_omni.errors import InvalidRequestError, RequestAbortedError
from vllm_omni.inputs.data import OmniPrompt

MAX_IMAGE_BYTES = 50 * 2**20
MAX_FIELD_BYTES = 4 * MAX_PROMPT_CHARACTERS
"""A character is at most so many bytes long."""
MAX_JSON_BYTES = 32 * 2**20
"""A JSON body is parsed in one go: larger pictures come as multipart/form-data."""
MAX_JSON_ITEMS = 2**17
"""Whatever reads JSON holds the interpreter lock until it is done, and objects take many times their text."""
_IMAGE_FIELD = re.compile(r"image(\[\d{0,3}\])?")
_NESTED_FIELD = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")
_UNSUPPORTED = ("mask", "markup")
_TEXT_FIELDS = ImageEditRequest.model_fields.keys() - {"images", *_UNSUPPORTED}
"""Fields of a form that may come as files too, as `curl -F prompt=@prompt.txt` sends them."""
_MAX_NAME = 64
_BARE_BASE64 = re.compile(r"[A-Za-z0-9+/]{40}")
"""Beginning of a picture file's base64: no URL, because that has a colon earlier."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class UploadReader:
    """Reads what one model is asked for. Edits are for a model that takes input pictures."""

    info: ModelInfo
    decoder: DecodePool
    budget: UploadBudget
    media: MediaFetcher
    silence_seconds: float
    """See `ServerSettings.upload_silence_seconds`."""

    async def read(self, request: Request, reservation: UploadReservation) -> ImageEditRequest:
        """The pictures go to `reservation`.

        Raises InvalidRequestError or RequestValidationError (400), HTTPException (408, 413), QueueFullError (429).
        """
        kind = _content_type(request)
        if kind == "multipart/form-data":
            return await self._read_form(request, reservation)
        if kind == "application/json":
            return await self._read_json_edit(request, reservation)
        raise InvalidRequestError(
            f"the request's content-type takes multipart/form-data and application/json, got {kind[:64]!r}"
        )

    async def _read_form(self, request: Request, reservation: UploadReservation) -> ImageEditRequest:
        """Pictures are decoded while the rest is read: so a client that leaves is noticed, and its decode ended."""
        fields: dict[str, Any] = {}
        files: asyncio.Queue[Part | None] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as tasks:
                decoding = tasks.create_task(self._decode_files(files, reservation))
                await self._read_parts(request, reservation, fields, files)
                await unless_disconnected(request, _end_of(decoding))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return validated(lambda: ImageEditRequest.model_validate_strings(fields, strict=False))

    async def _read_parts(
        self,
        request: Request,
        reservation: UploadReservation,
        fields: dict[str, Any],
        files: asyncio.Queue[Part | None],
    ) -> None:
        """Read the form to its end; its pictures go to `files`, and None after the last one."""
        reader = MultipartReader(request.headers["content-type"], _FormLimits(self.info).limit_of)
        async for chunk in self._chunks(request):
            reservation.add(len(chunk))
            for part in reader.feed(chunk):
                if _IMAGE_FIELD.fullmatch(part.name):
                    files.put_nowait(part)
                else:
                    _set_field(fields, part)
        reader.close()
        _refuse_unsupported(fields)
        files.put_nowait(None)

    async def _decode_files(self, files: asyncio.Queue[Part | None], reservation: UploadReservation) -> None:
        while (part := await files.get()) is not None:
            await self._read_image_part(part, reservation)

    async def _read_json_edit(self, request: Request, reservation: UploadReservation) -> ImageEditRequest:
        parsed = await self.read_json(request, reservation, ImageEditRequest)
        _refuse_unsupported(parsed.model_fields_set)
        if parsed.images and parsed.image:
            raise InvalidRequestError("image and images are two names of the same: give one of them", param="image")
        urls = parsed.image or [image["image_url"] for image in parsed.images or ()]
        if urls:
            await unless_disconnected(request, self._read_urls(urls, reservation))
        return parsed

    async def fitted(self, fit: Callable[[], OmniPrompt], reservation: UploadReservation) -> OmniPrompt:
        """`fit()` in a thread for pictures; those of its prompt are held instead. Raises what it raises, and
        QueueFullError."""
        prompt = await self.decoder.run(fit)
        reservation.replace_images(prompt.images)
        return prompt

    async def read_chat(
        self,
        request: Request,
        reservation: UploadReservation,
        is_answered_empty: Callable[[Sequence[Mapping[str, Any]]], bool],
    ) -> tuple[ChatCompletionRequest, str | None]:
        """The body and the text of its last user message, whose pictures go to `reservation`. Raises as `read` does.

        None instead of the text where `is_answered_empty(messages)`.
        """
        body, turn = await self._json(request, reservation, lambda sent: _read_chat(sent, is_answered_empty))
        if turn is None:
            return body, None
        turn.check_images(self.info)
        await unless_disconnected(request, self._read_urls(turn.urls, reservation))
        return body, turn.text

    async def read_json(self, request: Request, reservation: UploadReservation, model: type[Body]) -> Body:
        """A body without pictures to decode. Raises as `read` does."""
        return await self._json(request, reservation, lambda sent: validated(lambda: model.model_validate(sent)))

    async def _json(self, request: Request, reservation: UploadReservation, read: Callable[[Any], Result]) -> Result:
        """`read` of what the body says, in the thread that parses it. Raises what it raises."""
        kind = _content_type(request)
        if kind != "application/json":
            raise InvalidRequestError(f"the request's content-type takes application/json, got {kind[:64]!r}")
        data, num_items = bytearray(), 0
        async for chunk in self._chunks(request):
            reservation.add(len(chunk))
            data += chunk
            num_items += sum(map(chunk.count, (b",", b"[", b"{")))  # at least; base64 has none of them
            if len(data) > MAX_JSON_BYTES:
                raise HTTPException(
                    413,
                    f"A JSON body has at most {MAX_JSON_BYTES} bytes; larger pictures go as multipart/form-data "
                    "to /v1/images/edits.",
                )
            if num_items > MAX_JSON_ITEMS:
                raise HTTPException(413, f"A JSON body has at most {MAX_JSON_ITEMS} commas and brackets.")
        return await asyncio.to_thread(lambda: read(parse_json(data)))

    async def _chunks(self, request: Request) -> AsyncIterator[bytes]:
        """Raises HTTPException (408) where the next one does not come or bytes trickle, and RequestAbortedError."""
        stream, clock = aiter(request.stream()), asyncio.get_running_loop().time
        rate = UploadRate(self.silence_seconds)
        try:
            while True:
                asked = clock()
                async with asyncio.timeout(rate.seconds_left):
                    chunk = await anext(stream)
                rate.count(len(chunk), clock() - asked)
                yield chunk
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            # Whatever still comes would be read as the beginning of another request.
            headers = {"connection": "close"}
            raise HTTPException(408, f"The request's body came with less than {rate}.", headers) from error
        except ClientDisconnect as error:
            raise RequestAbortedError("the client closed the connection") from error

    async def _read_urls(self, urls: Sequence[str], reservation: UploadReservation) -> None:
        """One after the other: what is fetched is held one picture at a time."""
        check_num_images(len(urls), self.info)
        for url in urls:
            await self._read_url(url, reservation)

    async def _read_url(self, url: str, reservation: UploadReservation) -> None:
        """`url`: of a picture, or its base64 alone."""
        if _BARE_BASE64.match(url):
            url = f"data:;base64,{url}"
        if url.startswith("data:"):
            with _naming_picture(reservation):
                image = await self.decoder.data_url(url, self._image_input.sizes)
            reservation.keep_image(image)
        else:
            await self._decode(await self.media.fetch(url, reservation.add), reservation)

    async def _read_image_part(self, part: Part, reservation: UploadReservation) -> None:
        """A file, or a field with the text that JSON has in `image`. No picture's file is ASCII."""
        if part.is_file or not part.data.isascii():
            await self._decode(part.data, reservation)
        elif part.data:
            await self._read_url(part.data.decode("ascii"), reservation)
            reservation.release(len(part.data))

    async def _decode(self, data: bytearray, reservation: UploadReservation) -> None:
        """Instead of its file, pixels are held from now on: these may be a thousand times as much."""
        with _naming_picture(reservation):
            image = await self.decoder.file(data, self._image_input.sizes)
        reservation.release(len(data))
        reservation.keep_image(image)

    @property
    def _image_input(self) -> ImageInput:
        assert self.info.image_input is not None, "a model that edits no pictures reads no uploads"
        return self.info.image_input


class _FormLimits:
    """How large the parts of a form may be, as they come."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._num_images = 0

    def limit_of(self, part: Part) -> int:
        """Raises InvalidRequestError for one picture too many and for parts that no model takes."""
        if part.is_file and part.name in _UNSUPPORTED:
            raise _unsupported(part.name)
        if not _IMAGE_FIELD.fullmatch(part.name):
            if part.is_file and part.name not in _TEXT_FIELDS:
                where = f"in {part.name[:_MAX_NAME]!r}" if part.name else "without a name"
                raise InvalidRequestError(
                    f"files go in image or image[], got one {where}", param=part.name[:_MAX_NAME] or None
                )
            return MAX_FIELD_BYTES
        self._num_images += 1
        check_num_images(self._num_images, self._info)
        return MAX_IMAGE_BYTES


@contextmanager
def _naming_picture(reservation: UploadReservation) -> Iterator[None]:
    """Errors say which picture of the request is wrong."""
    try:
        yield
    except InvalidRequestError as error:
        number = len(reservation.images) + 1
        raise InvalidRequestError(f"{error} (picture {number} of the request)", param=error.param) from error


async def _end_of(task: asyncio.Task[None]) -> None:
    await asyncio.wait((task,))


def _read_chat(
    sent: Any, is_answered_empty: Callable[[Sequence[Mapping[str, Any]]], bool]
) -> tuple[ChatCompletionRequest, UserMessage | None]:
    body = validated(lambda: ChatCompletionRequest.model_validate(with_extra_body(sent)))
    return body, None if is_answered_empty(body.messages) else last_user_message(body.messages)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _set_field(fields: dict[str, Any], part: Part) -> None:
    """`name`, or nested objects as clients write them: `name[key]`, or `lora` as JSON. What is empty is absent, as null
    is in JSON."""
    try:
        value = part.data.decode()
    except UnicodeDecodeError as error:
        name, kind = part.name[:_MAX_NAME], "a file that is none: pictures go in image or image[]"
        raise InvalidRequestError(
            f"{name} takes text in UTF-8, got {kind if part.is_file else quote(bytes(part.data[:_MAX_NAME]))}",
            param=name or None,
        ) from error
    if not value and part.name != "prompt":
        if part.name == "negative_prompt":
            fields[part.name] = value  # says something: guidance needs one, and an empty one will do
        return
    nested = _NESTED_FIELD.fullmatch(part.name)
    if part.name == "lora":
        fields[part.name] = _lora_fields(value)
    elif nested and isinstance(inner := fields.setdefault(nested[1], {}), dict):
        inner[nested[2]] = value
    else:
        fields[part.name] = value


def _lora_fields(text: str) -> dict[str, Any]:
    """As `lora[key]` gives them, numbers as text."""
    try:
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f'lora takes a JSON object such as {{"name": "ink", "scale": 0.8}}, got {quote(text)}', param="lora"
        )
    return {key: inner for key, inner in value.items() if inner is not None}


def _refuse_unsupported(names: Collection[str]) -> None:
    """Raises InvalidRequestError where the fields `names` of a body have one that no model takes."""
    for name in _UNSUPPORTED:
        if name in names:
            raise _unsupported(name)


def _unsupported(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: no model here takes one; say in the prompt what to change", param=name)
