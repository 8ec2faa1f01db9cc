"""Input pictures of whole pipelines (no torch)."""

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
"""Class -> least and most pictures of a request (16: the limit of OpenAI's API, for models without a limit). Listed are
classes that need no picture, or that take a list as the pictures of one request instead of a batch. Signatures do not
tell: `image` is None by default also in calls that fail without it. All other classes take one picture."""
MAX_REFERENCE_PIXELS = 2048 * 2048
"""Most pixels kept of a picture that is a reference and not changed: pipelines resize it to about 1 million."""


@dataclass(frozen=True)
class WholeImageInput:
    """`ImageInput` of a whole pipeline, which gets the pictures as they were sent."""

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
        """See `ImageInput.output_size`: the size of a picture that is changed, rounded down as in diffusers; otherwise
        the proportions of the last picture at the model's own area."""
        height, width = images[-1].reference.shape[:2]
        multiple = self.size_multiple
        if self.follows_input:
            return max(multiple, height - height % multiple), max(multiple, width - width % multiple)
        scale = math.sqrt(self.area / (height * width)) / multiple
        return max(1, round(height * scale)) * multiple, max(1, round(width * scale)) * multiple
