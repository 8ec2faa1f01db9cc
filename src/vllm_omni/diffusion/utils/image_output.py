"""Function that collects pictures of outputs, under the import path of the public vllm-omni package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from vllm_omni.foreign.module_names import refuse_names
from vllm_omni.outputs import OmniRequestOutput


def extract_images_from_outputs(outputs: OmniRequestOutput | Sequence[OmniRequestOutput] | None) -> list[Image.Image]:
    """Images of the first output that has any; an empty list if none has."""
    listed = [outputs] if isinstance(outputs, OmniRequestOutput) else outputs or ()
    return next((output.images for output in listed if output.images), [])


if not TYPE_CHECKING:  # type checkers know our names alone
    __getattr__ = refuse_names(__name__, {}, "the pictures of an output are output.images")
