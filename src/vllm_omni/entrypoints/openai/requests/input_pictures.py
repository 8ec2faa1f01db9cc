"""Pictures of a request: files, base64 and URLs, decoded to the sizes that the model takes."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.control.request_builder import check_num_images
from vllm_omni.entrypoints.openai.requests.body_reader import UploadReservation, unless_disconnected
from vllm_omni.entrypoints.openai.requests.fetching import MediaFetcher
from vllm_omni.entrypoints.openai.requests.pictures.pool import DecodePool
from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import InputImage, ReaderSizes

MAX_IMAGE_BYTES = 50 * 2**20
_BARE_BASE64 = re.compile(r"[A-Za-z0-9+/]{40}")
"""Beginning of a picture file in base64. A URL does not match: it has a colon earlier."""


@dataclass(frozen=True)
class PictureReader:
    """Decodes the pictures of requests for one model. Decoded pictures go into the request's `UploadReservation`."""

    info: ModelInfo
    decoder: DecodePool
    media: MediaFetcher

    async def read_urls(self, request: Request, urls: Sequence[str], reservation: UploadReservation) -> None:
        """Decode the pictures that a JSON body names: `data:` URLs, links, or base64 alone.

        Stops when the client disconnects; the body must have been read. Raises InvalidRequestError and QueueFullError.
        """
        if urls:
            check_num_images(len(urls), self.info)
            await unless_disconnected(request, self._read_all(urls, reservation))

    async def _read_all(self, urls: Sequence[str], reservation: UploadReservation) -> None:
        for url in urls:  # one after another: at most one fetched file is in memory
            await self.read_url(url, reservation)

    async def read_url(self, url: str, reservation: UploadReservation) -> None:
        """Decode the picture at `url`, which may also be its base64 alone."""
        if _BARE_BASE64.match(url):
            url = f"data:;base64,{url}"
        if url.startswith("data:"):
            await self._keep(self.decoder.data_url(url, self._sizes), reservation)
        else:
            await self.read_file(await self.media.fetch(url, reservation.add), reservation)

    async def read_file(self, data: bytearray, reservation: UploadReservation) -> None:
        """Decode a file whose bytes are in `reservation`; its pixels replace them and may take a thousand times more.

        Raises InvalidRequestError and QueueFullError.
        """
        await self._keep(self.decoder.file(data, self._sizes), reservation, len(data))

    async def _keep(self, decoding: Awaitable[InputImage], reservation: UploadReservation, num_file: int = 0) -> None:
        """Hold a decoded picture in place of the `num_file` bytes of its file; errors name the picture's number."""
        try:
            image = await decoding
        except InvalidRequestError as error:
            number = len(reservation.images) + 1
            raise InvalidRequestError(f"{error} (picture {number} of the request)", param=error.param) from error
        reservation.release(num_file)
        reservation.keep_image(image)

    @property
    def _sizes(self) -> Callable[[int, int], ReaderSizes]:
        assert self.info.image_input is not None, "pictures are refused earlier for a model that takes none"
        return self.info.image_input.sizes
