"""Decoded pictures on their way from the device to the result of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vllm_omni.diffusion.messages.request import DiffusionRequest


@dataclass(frozen=True)
class CheckedPicture:
    """A decoded picture on the device."""

    request: DiffusionRequest
    pixels: Tensor
    finite: Tensor
    """Bool [2]: whether all latents of the request, and all pixels, are finite."""


@dataclass(frozen=True)
class DownloadedPicture:
    """A decoded picture on the host: uint8 pixels as in `Picture`, and the flags of its `CheckedPicture`."""

    request: DiffusionRequest
    pixels: np.ndarray
    has_finite_latents: bool
    has_finite_pixels: bool
