"""Bodies of `POST /v1/images/edits`: a form whose pictures are decoded while it arrives, or JSON."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from vllm_omni.entrypoints.openai.disconnect import unless_disconnected
from vllm_omni.entrypoints.openai.requests.body_reader import BodyReader, content_type, validated
from vllm_omni.entrypoints.openai.requests.edit_form import IMAGE_FIELD, FormLimits, refuse_unsupported, set_field
from vllm_omni.entrypoints.openai.requests.input_pictures import PictureReader
from vllm_omni.entrypoints.openai.requests.multipart import MultipartReader, Part
from vllm_omni.entrypoints.openai.requests.upload_budget import UploadReservation
from vllm_omni.entrypoints.openai.schema.images import ImageEditRequest
from vllm_omni.errors import InvalidRequestError


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
        reader = MultipartReader(request.headers["content-type"], FormLimits(self.pictures.info).limit_of)
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
