"""Decoded pictures on their way from the device to the result of a step."""

from __future__ import annotations

from collections.abc import Mapping
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


def take(pictures: Mapping[str, DownloadedPicture], made: dict[str, np.ndarray]) -> dict[str, DiffusionRequest]:
    """Put finished pictures or frames into `made`. Returns the requests with values that are not finite."""
    failed = {}
    for request_id, picture in pictures.items():
        if picture.has_finite_latents and picture.has_finite_pixels:
            made[request_id] = picture.pixels
        else:
            failed[request_id] = picture.request
    return failed


def take_previews(
    pictures: Mapping[str, DownloadedPicture], made: dict[str, np.ndarray]
) -> dict[str, DiffusionRequest]:
    """Put previews into `made`. Returns the requests with latents that are not finite, and that will stay so.

    If only the pixels are not finite, the prediction was outside the VAE's range: its preview is skipped.
    """
    failed = {}
    for request_id, picture in pictures.items():
        if not picture.has_finite_latents:
            failed[request_id] = picture.request
        elif picture.has_finite_pixels:
            made[request_id] = picture.pixels
    return failed
