"""Answers of `/v1/images`: OpenAI's response and events, with pictures in base64 or as links."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.responses import Response

from vllm_omni.entrypoints.openai.responses.answers import (
    ResponseOptions,
    encode_all,
    frame_around,
    is_finished_picture,
    json_with_list,
    last_output,
    usage,
)
from vllm_omni.entrypoints.openai.responses.encoding import ImageEncoder, json_around_image
from vllm_omni.entrypoints.openai.schema.images import ImageData, ImagesResponse
from vllm_omni.jobs import OutputStream


@dataclass(frozen=True)
class ImagesAnswer:
    """An `Answer` in the form of OpenAI's image API."""

    encoder: ImageEncoder
    options: ResponseOptions
    store: Callable[[bytes, str], str] | None = None
    """Stores a file of a content type and returns its URL; without it, and in streams, pictures are base64."""

    async def response(self, outputs: OutputStream) -> Response:
        output = await last_output(outputs)
        pictures = [self._item(pixels, seed) for pixels, seed in zip(output.images, output.seeds, strict=True)]
        items, timings = await encode_all(pictures, output.timings)
        fields = ImagesResponse(
            created=int(time.time()),
            usage=usage(output),
            timings=timings,
            safety_identifier=self.options.safety_identifier,
            ignored_fields=list(self.options.ignored_fields),
            data=[],
            **self.options.picture_fields(output.images[0]),
        ).model_dump(exclude={"data"}, exclude_none=True)
        return json_with_list(fields, "data", items)

    async def _item(self, pixels: np.ndarray, seed: int) -> bytes:
        """One entry of `data` as JSON."""
        image_format = self.options.image_format
        if self.store is None:
            return await self.encoder.base64(pixels, image_format, *json_around_image({"seed": seed}))
        data = await self.encoder.file(pixels, image_format)
        url = self.store(data, image_format.content_type)
        return ImageData(url=url, seed=seed).model_dump_json(exclude_none=True).encode()

    async def events(self, outputs: OutputStream) -> AsyncGenerator[bytes, None]:
        """`image_generation.partial_image` for each preview, `image_generation.completed` for each finished picture.

        Edits have `image_edit.*`. `index` (our extension) is the number of the picture. The usage of the first finished
        picture counts the input, so the usages of a stream add up to the usage of a response in one piece.
        """
        num_partial: Counter[int] = Counter()
        num_finished = 0
        fields: dict[str, Any]
        async for output in outputs:
            if output.finished:
                return  # every picture has had its event
            if is_finished_picture(output):
                used = usage(output, has_input=num_finished == 0).model_dump()
                num_finished += 1
                fields = {"usage": used, "timings": output.timings, **self.options.identifier_fields()}
                fields |= {
                    "ignored_fields": self.options.ignored_fields,
                    "seed": output.seeds[0],
                    "index": output.index,
                }
                yield await self._event("completed", output.images[0], fields)
            elif output.images:
                fields = {"partial_image_index": num_partial[output.index], "index": output.index}
                num_partial[output.index] += 1
                yield await self._event("partial_image", output.images[0], fields)

    async def _event(self, name: str, pixels: np.ndarray, fields: Mapping[str, Any]) -> bytes:
        kind = f"{self.options.event}.{name}"
        shared = {"type": kind, "created_at": int(time.time()), **self.options.picture_fields(pixels)}
        (start, end), (before, after) = frame_around(kind), json_around_image({**shared, **fields})
        return await self.encoder.base64(pixels, self.options.image_format, start + before, after + end)
