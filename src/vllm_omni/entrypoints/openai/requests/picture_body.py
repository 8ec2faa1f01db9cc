"""Bodies with input pictures: a form whose pictures are decoded while it arrives, or JSON."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

from fastapi import Request

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.request_builder import MAX_PROMPT_CHARACTERS, check_num_images
from vllm_omni.entrypoints.openai.quotes import quote
from vllm_omni.entrypoints.openai.requests.body_reader import (
    Body,
    BodyReader,
    UploadReservation,
    content_type,
    unless_disconnected,
    validated,
)
from vllm_omni.entrypoints.openai.requests.form_adapters import is_adapter_field, join_adapters, set_adapter
from vllm_omni.entrypoints.openai.requests.input_pictures import MAX_IMAGE_BYTES, PictureReader
from vllm_omni.entrypoints.openai.requests.multipart import MultipartReader, Part
from vllm_omni.errors import InvalidRequestError

MAX_FIELD_BYTES = 4 * MAX_PROMPT_CHARACTERS
"""A character takes at most 4 bytes in UTF-8."""
_NESTED_FIELD = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")
_MAX_NAME = 64


@dataclass(frozen=True)
class PictureBody(Generic[Body]):
    """Fields of one route's bodies: those with pictures, and those that no model takes."""

    model: type[Body]
    picture_field: re.Pattern[str]
    """Names of the form's fields with a picture: a file, or text for `url_of`."""
    picture_names: str
    """Names of the fields with pictures, as error messages list them."""
    text_fields: Collection[str]
    """Fields that may also come as files, as `curl -F prompt=@prompt.txt` sends them."""
    refused: Mapping[str, str]
    """Name of a field that no model takes -> the reason, for the error message."""
    urls: Callable[[Body], Sequence[str]]
    """URLs of the pictures that JSON names. Raises InvalidRequestError."""
    url_of: Callable[[Part], str]
    """URL in the text of a picture field of a form, which is ASCII. Raises InvalidRequestError."""

    def refuse(self, names: Collection[str]) -> None:
        """Raise InvalidRequestError if `names`, the fields of a body, contain one that no model takes."""
        for name, reason in self.refused.items():
            if name in names:
                raise InvalidRequestError(f"{name}: {reason}", param=name)


@dataclass(frozen=True)
class PictureBodyReader:
    """Reads bodies, for a model that takes input pictures or refuses them."""

    bodies: BodyReader
    pictures: PictureReader

    async def read(self, kind: PictureBody[Body], request: Request, reservation: UploadReservation) -> Body:
        """The fields of the body; its pictures go into `reservation`.

        Raises InvalidRequestError or RequestValidationError (400), HTTPException (408, 413), QueueFullError (429), and
        RequestAbortedError when the client disconnects.
        """
        media_type = content_type(request)
        if media_type == "multipart/form-data":
            return await self._read_form(kind, request, reservation)
        if media_type == "application/json":
            return await self._read_json(kind, request, reservation)
        raise InvalidRequestError(
            f"the request's content-type takes multipart/form-data and application/json, got {media_type[:64]!r}"
        )

    async def _read_form(self, kind: PictureBody[Body], request: Request, reservation: UploadReservation) -> Body:
        """Read a form and decode its pictures meanwhile: a disconnect is noticed and ends the decoding."""
        files: asyncio.Queue[Part | None] = asyncio.Queue()
        try:
            async with asyncio.TaskGroup() as tasks:
                decoding = tasks.create_task(self._decode_files(kind, files, reservation))
                fields = await self._read_parts(kind, request, reservation, files)
                await unless_disconnected(request, _end_of(decoding))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return validated(lambda: kind.model.model_validate_strings(fields, strict=False))

    async def _read_parts(
        self,
        kind: PictureBody[Body],
        request: Request,
        reservation: UploadReservation,
        files: asyncio.Queue[Part | None],
    ) -> dict[str, Any]:
        """Read the form to its end; return its fields. Pictures go into `files`, followed by None."""
        fields: dict[str, Any] = {}
        reader = MultipartReader(request.headers["content-type"], _limits_of_parts(kind, self.pictures.info))
        async for chunk in self.bodies.chunks(request, reservation):
            for part in reader.feed(chunk):
                if kind.picture_field.fullmatch(part.name):
                    if part.data:
                        check_num_images(1, self.pictures.info)
                    files.put_nowait(part)
                else:
                    _set_field(fields, part, kind.picture_names)
        reader.close()
        join_adapters(fields)
        kind.refuse(fields)
        files.put_nowait(None)
        return fields

    async def _decode_files(
        self, kind: PictureBody[Body], files: asyncio.Queue[Part | None], reservation: UploadReservation
    ) -> None:
        while (part := await files.get()) is not None:
            if part.is_file or not part.data.isascii():  # no picture file is all ASCII
                await self.pictures.read_file(part.data, reservation)
            elif part.data:  # the text that JSON has in this field
                await self.pictures.read_url(kind.url_of(part), reservation)
                reservation.release(len(part.data))

    async def _read_json(self, kind: PictureBody[Body], request: Request, reservation: UploadReservation) -> Body:
        body = await self.bodies.model(request, reservation, kind.model)
        kind.refuse(body.model_fields_set)
        await self.pictures.read_urls(request, kind.urls(body), reservation)
        return body


async def _end_of(task: asyncio.Task[None]) -> None:
    await asyncio.wait((task,))


def _limits_of_parts(kind: PictureBody[Any], info: ModelInfo) -> Callable[[Part], int]:
    """Limit of the parts of one form, asked for each part when its headers are read."""
    num_images = 0

    def limit_of(part: Part) -> int:
        """Most bytes of `part`. Raises InvalidRequestError for too many pictures and for files in other fields."""
        if part.is_file:
            kind.refuse((part.name,))
        if not kind.picture_field.fullmatch(part.name):
            if part.is_file and part.name not in kind.text_fields:
                where = f"in {part.name[:_MAX_NAME]!r}" if part.name else "without a name"
                raise InvalidRequestError(
                    f"files go in {kind.picture_names}, got one {where}", param=part.name[:_MAX_NAME] or None
                )
            return MAX_FIELD_BYTES
        if info.image_input is None and not part.is_file:
            return MAX_FIELD_BYTES  # an empty field is absent, and any other is refused when it is complete
        nonlocal num_images
        num_images += 1
        check_num_images(num_images, info)
        return MAX_IMAGE_BYTES

    return limit_of


def _set_field(fields: dict[str, Any], part: Part, picture_names: str) -> None:
    """Store the value of `part` in `fields`, as a nested object for `name[key]`; adapters as `set_adapter`.

    An empty part is absent, like null in JSON. Raises InvalidRequestError.
    """
    try:
        value = part.data.decode()
    except UnicodeDecodeError as error:
        name, kind = part.name[:_MAX_NAME], f"a file that is none: pictures go in {picture_names}"
        raise InvalidRequestError(
            f"{name} takes text in UTF-8, got {kind if part.is_file else quote(bytes(part.data[:_MAX_NAME]))}",
            param=name or None,
        ) from error
    if is_adapter_field(part.name):
        set_adapter(fields, part.name, value)
        return
    if not value and part.name != "prompt":
        if part.name == "negative_prompt":
            fields[part.name] = value  # has a meaning: guidance needs a negative prompt, which may be empty
        return
    nested = _NESTED_FIELD.fullmatch(part.name)
    if nested and isinstance(inner := fields.setdefault(nested[1], {}), dict):
        inner[nested[2]] = value
    else:
        fields[part.name] = value
