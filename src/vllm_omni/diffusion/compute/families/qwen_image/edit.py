"""Input pictures of Qwen-Image-Edit, as in diffusers' QwenImageEditPipeline (one picture) and
QwenImageEditPlusPipeline (several). No torch at import."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_omni.errors import InvalidRequestError
from vllm_omni.inputs.images import InputImage, ReaderSizes

EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where "
    "appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""Template around pictures and prompt; the model was trained with it."""
NUM_EDIT_TEMPLATE_TOKENS = 64
"""Tokens of the template before the pictures, whose hidden states are dropped."""
IMAGE_TOKEN = "<|image_pad|>"
MAX_IMAGES = 16
"""Most pictures of Edit-Plus: the limit of OpenAI's API; the model itself has none."""
CONDITION_AREA = 384 * 384
"""Pixels of a picture in the text encoder of Edit-Plus."""
SIDE_MULTIPLE = 32
MAX_RATIO = 200
"""Largest ratio of a picture's sides: the limit of the text encoder's image processor."""


@dataclass(frozen=True)
class EditInput:
    """The `ImageInput` of a Qwen-Image-Edit model."""

    processor_path: Path
    count_text_tokens: Callable[[str], int]
    """Number of tokens of a prompt, with the end of the template."""
    area: int
    """Approximate pixels of a picture in the VAE: those of the model's default size."""
    is_plus: bool
    """Whether the model takes several pictures, Picture 1, 2, ... in the prompt; its text encoder sees fewer pixels."""

    @property
    def min_images(self) -> int:
        return 1

    @property
    def max_images(self) -> int:
        return MAX_IMAGES if self.is_plus else 1

    def sizes(self, width: int, height: int) -> ReaderSizes:
        """See `ImageInput.sizes`."""
        if max(width, height) > MAX_RATIO * min(width, height):
            raise InvalidRequestError(
                f"image takes sides of a ratio up to {MAX_RATIO}, got {width}x{height}", param="image"
            )
        reference = _scaled(width, height, self.area)
        return ReaderSizes(_scaled(width, height, CONDITION_AREA) if self.is_plus else reference, reference)

    def count_prompt_tokens(self, images: Sequence[InputImage]) -> int:
        """See `ImageInput.count_prompt_tokens`."""
        counts = [math.prod(self.vision_grid(image)) for image in images]
        return self.count_text_tokens(self.written(counts, "")) - self.count_text_tokens("")

    def output_size(self, images: Sequence[InputImage]) -> tuple[int, int]:
        """See `ImageInput.output_size`: the size of the last picture, as in diffusers."""
        height, width = images[-1].reference.shape[:2]
        return height, width

    def written(self, image_tokens: Sequence[int], prompt: str) -> str:
        """Text for the template: pictures of `image_tokens` tokens each, then the prompt."""
        pictures = [f"<|vision_start|>{IMAGE_TOKEN * count}<|vision_end|>" for count in image_tokens]
        if self.is_plus:
            pictures = [f"Picture {number}: {picture}" for number, picture in enumerate(pictures, 1)]
        return "".join([*pictures, prompt])

    @cached_property
    def processor(self) -> Any:
        """transformers' image processor of the text encoder, in the implementation without torchvision."""
        # Imported here: transformers imports torch, and `--help` and validation must not.
        from transformers import Qwen2VLImageProcessorPil

        return Qwen2VLImageProcessorPil.from_pretrained(self.processor_path)

    def vision_grid(self, image: InputImage) -> tuple[int, int]:
        """Rows and columns of a picture's tokens in the text encoder."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        processor = self.processor
        side = processor.patch_size * processor.merge_size
        least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
        height, width = smart_resize(*image.condition.shape[:2], side, least, most)
        return height // side, width // side


def _scaled(width: int, height: int, area: int) -> tuple[int, int]:
    """(width, height) with the proportions of these sides and about `area` pixels."""
    ratio = width / height
    scaled_width = math.sqrt(area * ratio)
    return _rounded(scaled_width), _rounded(scaled_width / ratio)


def _rounded(side: float) -> int:
    return max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE)
