"""Rules of Wan's image-to-video models for their input pictures (no torch at import)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import InputImage, ReaderSizes, resize_image, resize_pixels

MAX_RATIO = 50
"""Largest ratio of a picture's sides for CLIP, which resizes the shorter side and cuts the centre out later."""


@dataclass(frozen=True)
class WanImageInput:
    """The `ImageInput` of a model whose video begins with the first picture, and may end with a second one."""

    min_images: int
    max_images: int
    area: int
    """Pixels of a frame of the model's default size."""
    size_multiple: int
    clip_side: int | None = None
    """Pixels of the shorter side at which CLIP reads a picture; None: the model has no CLIP."""

    def sizes(self, width: int, height: int) -> ReaderSizes:
        """See `ImageInput.sizes`: the original ones, until the size of the video is known (see `fit`)."""
        if self.clip_side is not None and max(width, height) > MAX_RATIO * min(width, height):
            raise InvalidRequestError(
                f"image takes sides of a ratio up to {MAX_RATIO}, got {width}x{height}", param="image"
            )
        return ReaderSizes((width, height), (width, height))

    def fit(self, image: InputImage, height: int, width: int) -> InputImage:
        """Resize a picture for a video of this size, in pixels: for the VAE as diffusers, for CLIP as its processor."""
        if self.clip_side is None:
            return resize_image(image, height, width)
        rows, columns = image.condition.shape[:2]
        shorter = min(rows, columns)
        clip_size = self.clip_side * rows // shorter, self.clip_side * columns // shorter
        return InputImage.of(
            resize_pixels(image.condition, *clip_size, Image.Resampling.BICUBIC),
            resize_pixels(image.reference, height, width),
        )

    def count_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        """See `ImageInput.count_prompt_tokens`: none, because pictures are no part of the text."""
        return 0

    def output_size(self, images: Sequence[InputImage]) -> tuple[int, int]:
        """See `ImageInput.output_size`: the proportions of the first picture at about the default area, each side
        rounded down as in the examples of diffusers."""
        height, width = images[0].reference.shape[:2]
        return self._side(height / width), self._side(width / height)

    def _side(self, ratio: float) -> int:
        """Side whose ratio to the other one is `ratio`."""
        side = round(math.sqrt(self.area * ratio))
        return max(self.size_multiple, side - side % self.size_multiple)
