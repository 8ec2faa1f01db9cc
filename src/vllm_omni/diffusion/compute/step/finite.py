"""Checks for NaN and infinite values. They run on the device, and the host does not wait for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def is_finite(values: Tensor) -> Tensor:
    """Bool []: whether no value is NaN or infinite; True for an empty tensor.

    One reduction: the largest magnitude, which is NaN if any value is.
    """
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    largest: Tensor = torch.linalg.vector_norm(values, math.inf)
    return largest.isfinite()


def each_is_finite(batch: Tensor) -> Tensor:
    """Bool [batch]: `is_finite` for each item of the first dim."""
    largest: Tensor = torch.linalg.vector_norm(batch.flatten(1), math.inf, dim=1)
    return largest.isfinite()


def keep_infinite_pixels_visible(decoder: nn.Module) -> None:
    """Make a VAE's decoder return NaN for infinite pixels, and leave finite ones.

    Some VAEs clamp the decoder's output, and infinity would become white.
    """
    decoder.register_forward_hook(_infinite_as_nan)


def _infinite_as_nan(decoder: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.where(output.isfinite(), output, math.nan)
    return output
