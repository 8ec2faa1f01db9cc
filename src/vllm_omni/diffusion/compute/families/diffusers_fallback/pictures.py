"""How pipelines of diffusers take input pictures (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_omni.inputs.images import InputImage, ReaderSizes

NUM_REFERENCES = {
    "DreamLiteMobilePipeline": (0, 1),
    "DreamLitePipeline": (0, 1),
    "Flux2KleinKVPipeline": (0, 4),
    "Flux2KleinPipeline": (0, 4),
    "Flux2Pipeline": (0, 10),
    "FluxKontextPipeline": (0, 1),
    "GlmImagePipeline": (0, 16),
    "QwenImage21Pipeline": (0, 16),
    "ZImageOmniPipeline": (0, 16),
}
"""Least and most pictures (16: as many as OpenAI's API takes, where the model names no bound) of classes that need
none, or for which a list is one request's pictures and not a batch. Signatures say neither: `image` is None by default
also where a call without it fails. All other classes take one."""
MAX_REFERENCE_PIXELS = 2048 * 2048
"""More of a picture that is looked at, and not changed, no pipeline makes use of: they bring it to 1 million or so."""


@dataclass(frozen=True)
class WholeImageInput:
    """The `ImageInput` of a pipeline that is called whole: it sees the pictures as they were sent."""

    min_images: int
    max_images: int
    follows_input: bool
    """See `WholePipeline.follows_input`."""
    size_multiple: int
    area: int
    """Pixels of the model's own size."""

    def sizes(self, width: int, height: int) -> ReaderSizes:
        """See `ImageInput.sizes`."""
        if not self.follows_input and width * height > MAX_REFERENCE_PIXELS:
            scale = math.sqrt(MAX_REFERENCE_PIXELS / (width * height))
            width, height = max(1, int(width * scale)), max(1, int(height * scale))
        return ReaderSizes((width, height), (width, height))

    def count_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        """See `ImageInput.count_prompt_tokens`."""
        return 0

    def output_size(self, images: Sequence[InputImage]) -> tuple[int, int]:
        """That of the picture that is changed, rounded down as diffusers does; or else the model's own area in the
        proportions of the last picture."""
        height, width = images[-1].reference.shape[:2]
        multiple = self.size_multiple
        if self.follows_input:
            return max(multiple, height - height % multiple), max(multiple, width - width % multiple)
        scale = math.sqrt(self.area / (height * width)) / multiple
        return max(1, round(height * scale)) * multiple, max(1, round(width * scale)) * multiple
