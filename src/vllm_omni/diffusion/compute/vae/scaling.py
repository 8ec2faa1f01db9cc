"""Scaling of latents by the mean and the standard deviation of each channel, as the configs of video VAEs have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def latents_mean_and_std(vae: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of a diffusers VAE, [1, channels, 1, 1, 1] each, on its device."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(vae.device, dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
