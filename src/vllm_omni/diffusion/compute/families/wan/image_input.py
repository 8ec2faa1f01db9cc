"""Rules of Wan's image-to-video models for their input pictures (no torch at import)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_omni.inputs.images import InputImage, ReaderSizes


@dataclass(frozen=True)
class WanImageInput:
    """The `ImageInput` of a model whose video begins with the first picture, and may end with a second one."""

    min_images: int
    max_images: int
    area: int
    """Pixels of a frame of the model's default size."""
    size_multiple: int

    def sizes(self, width: int, height: int) -> ReaderSizes:
        """See `ImageInput.sizes`. The pipeline reads the original pixels: CLIP resizes them in its own way, and the VAE
        gets them at the size of the video."""
        return ReaderSizes((width, height), (width, height))

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
