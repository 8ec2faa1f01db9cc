"""Bodies of `POST /v1/images/edits`: a form whose pictures are decoded while it arrives, or JSON."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.request_builder import MAX_PROMPT_CHARACTERS, check_num_images
from vllm_omni.entrypoints.openai.quotes import quote
from vllm_omni.entrypoints.openai.requests.body_reader import (
    BodyReader,
    UploadReservation,
    content_type,
    unless_disconnected,
    validated,
)
from vllm_omni.entrypoints.openai.requests.input_pictures import MAX_IMAGE_BYTES, PictureReader
from vllm_omni.entrypoints.openai.requests.multipart import MultipartReader, Part
from vllm_omni.entrypoints.openai.schema.images import ImageEditRequest
from vllm_omni.errors import InvalidRequestError

MAX_FIELD_BYTES = 4 * MAX_PROMPT_CHARACTERS
"""A character takes at most 4 bytes in UTF-8."""
IMAGE_FIELD = re.compile(r"image(\[\d{0,3}\])?")
_NESTED_FIELD = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")
_UNSUPPORTED = ("mask", "markup")
_TEXT_FIELDS = ImageEditRequest.model_fields.keys() - {"images", *_UNSUPPORTED}
"""Fields that may also come as files, as `curl -F prompt=@prompt.txt` sends them."""
_MAX_NAME = 64


@dataclass(frozen=True)
class EditReader:
    """Reads edits, for a model that takes input pictures."""

    bodies: BodyReader
    pictures: PictureReader

    async def read(self, request: Request, reservation: UploadReservation) -> ImageEditRequest:
        """The fields of the body; its pictures go into `reservation`.

        Raises InvalidRequestError or RequestValidationError (400), HTTPException (408, 413), QueueFullError (429), and
        RequestAbortedError when the client disconnects.
        """
        kind = content_type(request)
        if kind == "multipart/form-data":
            return await self._read_form(request, reservation)
        if kind == "application/json":
            return await self._read_json(request, reservation)
        raise InvalidRequestError(
            f"the request's content-type takes multipart/form-data and application/json, got {kind[:64]!r}"
        )

    async def _read_form(self, request: Request, reservation: UploadReservation) -> ImageEditRequest:
        """Read a form and decode its pictures meanwhile: a disconnect is noticed and ends the decoding."""
        files: asyncio.Queue[Part | None] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as tasks:
                decoding = tasks.create_task(self._decode_files(files, reservation))
                fields = await self._read_parts(request, reservation, files)
                await unless_disconnected(request, _end_of(decoding))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return validated(lambda: ImageEditRequest.model_validate_strings(fields, strict=False))

    async def _read_parts(
        self, request: Request, reservation: UploadReservation, files: asyncio.Queue[Part | None]
    ) -> dict[str, Any]:
        """Read the form to its end; return its fields. Pictures go into `files`, followed by None."""
        fields: dict[str, Any] = {}
        reader = MultipartReader(request.headers["content-type"], limits_of_parts(self.pictures.info))
        async for chunk in self.bodies.chunks(request, reservation):
            for part in reader.feed(chunk):
                if IMAGE_FIELD.fullmatch(part.name):
                    files.put_nowait(part)
                else:
                    set_field(fields, part)
        reader.close()
        refuse_unsupported(fields)
        files.put_nowait(None)
        return fields

    async def _decode_files(self, files: asyncio.Queue[Part | None], reservation: UploadReservation) -> None:
        while (part := await files.get()) is not None:
            if part.is_file or not part.data.isascii():  # no picture file is all ASCII
                await self.pictures.read_file(part.data, reservation)
            elif part.data:  # the text that JSON has in `image`
                await self.pictures.read_url(part.data.decode("ascii"), reservation)
                reservation.release(len(part.data))

    async def _read_json(self, request: Request, reservation: UploadReservation) -> ImageEditRequest:
        body = await self.bodies.model(request, reservation, ImageEditRequest)
        refuse_unsupported(body.model_fields_set)
        if body.images and body.image:
            raise InvalidRequestError("image and images are two names of the same: give one of them", param="image")
        urls = body.image or [image["image_url"] for image in body.images or ()]
        await self.pictures.read_urls(request, urls, reservation)
        return body


async def _end_of(task: asyncio.Task[None]) -> None:
    await asyncio.wait((task,))


def limits_of_parts(info: ModelInfo) -> Callable[[Part], int]:
    """Limit of the parts of one form, asked for each part when its headers are read."""
    num_images = 0

    def limit_of(part: Part) -> int:
        """Most bytes of `part`. Raises InvalidRequestError for too many pictures and for files in other fields."""
        if part.is_file and part.name in _UNSUPPORTED:
            raise _unsupported(part.name)
        if not IMAGE_FIELD.fullmatch(part.name):
            if part.is_file and part.name not in _TEXT_FIELDS:
                where = f"in {part.name[:_MAX_NAME]!r}" if part.name else "without a name"
                raise InvalidRequestError(
                    f"files go in image or image[], got one {where}", param=part.name[:_MAX_NAME] or None
                )
            return MAX_FIELD_BYTES
        nonlocal num_images
        num_images += 1
        check_num_images(num_images, info)
        return MAX_IMAGE_BYTES

    return limit_of


def set_field(fields: dict[str, Any], part: Part) -> None:
    """Store the value of `part` in `fields`, as a nested object for `name[key]` and for `lora` as JSON.

    An empty part is absent, like null in JSON. Raises InvalidRequestError.
    """
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
            fields[part.name] = value  # has a meaning: guidance needs a negative prompt, which may be empty
        return
    nested = _NESTED_FIELD.fullmatch(part.name)
    if part.name == "lora":
        fields[part.name] = _lora_fields(value)
    elif nested and isinstance(inner := fields.setdefault(nested[1], {}), dict):
        inner[nested[2]] = value
    else:
        fields[part.name] = value


def refuse_unsupported(names: Collection[str]) -> None:
    """Raise InvalidRequestError if `names`, the fields of a body, contain one that no model takes."""
    for name in _UNSUPPORTED:
        if name in names:
            raise _unsupported(name)


def _lora_fields(text: str) -> Any:
    """Value of `lora` in JSON: an object, or a list. Numbers stay text, as in `lora[key]`."""
    try:
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict | list):
        raise InvalidRequestError(
            f'lora takes a JSON object such as {{"name": "ink", "scale": 0.8}}, or a list of them, got {quote(text)}',
            param="lora",
        )
    return value


def _unsupported(name: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}: no model here takes one; say in the prompt what to change", param=name)
