"""Checks of a whole pipeline's output: NaN or infinite values, and pictures that its safety checker replaced."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_omni.diffusion.compute.step.finite import is_finite

PROCESSORS = ("image_processor", "video_processor")
"""Components that turn decoded pixels into pictures, and NaN into black."""
BLOCKED_FIELDS = ("nsfw_content_detected", "nsfw_detected", "watermark_detected")
"""Fields of a pipeline's output: for each picture, whether the safety checker found something and made it black."""


class FiniteCheck:
    """Checks the latents after each step and the pixels before they are rounded, without changing them."""

    def __init__(self, pipeline: Any) -> None:
        """pipeline: a copy that belongs to one call. Its processors are replaced by copies that report their input."""
        self._latents: Tensor | None = None
        """Latents after the last step."""
        self._pixels: list[Tensor] = []
        """Bool []: for each call of a processor, whether its input was finite."""
        self._has_invalid_cast = False
        for name in PROCESSORS:
            if (processor := getattr(pipeline, name, None)) is not None:
                setattr(pipeline, name, self._telling(processor))

    def see_latents(self, latents: Any) -> None:
        """Note the latents after a step."""
        self._has_invalid_cast = False  # NaN from the scheduler's arithmetic shows in the latents
        if isinstance(latents, Tensor):
            self._latents = latents

    def numpy_errors(self) -> np.errstate:
        """Context that notes when numpy rounds NaN to bytes in this thread, for pipelines without a processor."""

        def note(kind: str, flag: int) -> None:
            self._has_invalid_cast = True

        return np.errstate(invalid="call", call=note)

    def is_finite(self) -> bool:
        """Whether all checked values were finite. Waits for the device."""
        latents = [] if self._latents is None else [is_finite(self._latents)]
        has_invalid_cast = self._has_invalid_cast and not self._pixels
        return not has_invalid_cast and all(map(bool, [*latents, *self._pixels]))

    def _telling(self, processor: Any) -> Any:
        telling = copy.copy(processor)

        def postprocess(image: Any, *rest: Any, **settings: Any) -> Any:
            if isinstance(image, Tensor):
                self._pixels.append(is_finite(image))
            return processor.postprocess(image, *rest, **settings)

        telling.postprocess = postprocess
        return telling


def is_blocked(output: Any) -> bool:
    """Whether the pipeline's safety checker replaced a picture of its `output`."""
    found = [getattr(output, name, None) for name in BLOCKED_FIELDS]
    return any(np.any(torch.as_tensor(flags).numpy()) for flags in found if flags is not None)
