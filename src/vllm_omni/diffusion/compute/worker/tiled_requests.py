"""Requests whose pictures the VAE decodes in tiles because the whole does not fit the memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from vllm_omni.diffusion.compute.step.pipeline import Picture
from vllm_omni.diffusion.messages.plan import StepResult
from vllm_omni.diffusion.messages.request import DiffusionRequest

logger = logging.getLogger(__name__)


class TiledRequests:
    """Running requests of which a picture was decoded in tiles; each is logged and reported once."""

    def __init__(self) -> None:
        self._ids: set[str] = set()

    def note(self, pictures: Iterable[tuple[DiffusionRequest, Picture]], result: StepResult) -> None:
        """Log requests with a picture in tiles, and add them to `result`, unless they are known."""
        for request, picture in pictures:
            if picture.is_tiled and request.request_id not in self._ids:
                self._ids.add(request.request_id)
                result.tiled.append(request.request_id)
                logger.info(
                    "request %s: %dx%d is decoded in tiles: the whole does not fit the memory",
                    request.request_id,
                    request.width,
                    request.height,
                )

    def forget(self, request_id: str) -> None:
        self._ids.discard(request_id)
