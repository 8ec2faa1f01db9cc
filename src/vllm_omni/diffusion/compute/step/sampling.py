"""Sampling as pure functions: noise, the schedule's shift, guidance, and the latent layout of 2x2 patches.

Arithmetic and its order follow diffusers, so that the same seed gives the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import HOST, to_device


def draw_noise(shape: Sequence[int], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal noise from the CPU generator: the same on every device."""
    generator = torch.Generator(HOST).manual_seed(seed)
    return to_device(torch.randn(tuple(shape), generator=generator, dtype=dtype), device)


def linear_sigmas(num_steps: int) -> list[float]:
    """Unshifted schedule of flow matching: from 1 down to 1/num_steps."""
    sigmas: list[float] = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
    return sigmas


def resolution_shift(num_tokens: int, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float) -> float:
    """`mu` of the dynamic time shift: linear in the picture's tokens (SD3, arXiv 2403.03206, as in FLUX)."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return num_tokens * slope + (base_shift - slope * base_tokens)


def combine_guidance(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, rescaled token by token to the norm of the conditional velocity.

    positive, negative: [tokens, channels]. A norm that overflows makes the velocity NaN.
    """
    combined = negative + scale * (positive - negative)
    length = torch.norm(combined, dim=-1, keepdim=True)
    ratio: Tensor = torch.norm(positive, dim=-1, keepdim=True) / length
    return combined * _unless_infinite(ratio, length)


def combine_bounded(positive: Tensor, negative: Tensor, scale: float, max_growth: float) -> Tensor:
    """Classifier-free guidance, with the norm over the picture bounded to max_growth times that of `positive`.

    max_growth: 0 sets no bound. A norm that overflows makes the velocity NaN.
    """
    combined = negative + scale * (positive - negative)
    if max_growth == 0:
        return combined
    growth: Tensor = torch.linalg.vector_norm(combined) / torch.linalg.vector_norm(positive)
    return combined * _unless_infinite((max_growth / growth).clamp(max=1), growth)


def _unless_infinite(ratio: Tensor, divisor: Tensor) -> Tensor:
    """`ratio`, and NaN where `divisor` is infinite.

    A ratio of 0 would make a velocity of zero, and noise would pass as a result. The product infinity * 0 is NaN; it
    needs no read from the device.
    """
    return ratio + 0 * divisor


def predict_clean(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Predicted x_0: x_t = (1 - sigma) x_0 + sigma noise and velocity = noise - x_0, so x_0 = x_t - sigma velocity."""
    return latents - sigma * velocity


def pack_latents(latents: Tensor, channels_last: bool = False) -> Tensor:
    """[channels, height, width] -> [height/2 * width/2, channels * 4]: a token is a patch of 2x2.

    channels_last: the order within a token is pixel, channel; otherwise channel, pixel.
    """
    channels, height, width = latents.shape
    patches = latents.view(channels, height // 2, 2, width // 2, 2)
    patches = patches.permute(1, 3, 2, 4, 0) if channels_last else patches.permute(1, 3, 0, 2, 4)
    return patches.reshape(height // 2 * (width // 2), channels * 4)


def unpack_latents(tokens: Tensor, rows: int, columns: int, channels_last: bool = False) -> Tensor:
    """[rows * columns, channels * 4] -> [channels, rows * 2, columns * 2]; the inverse of `pack_latents`."""
    channels = tokens.shape[-1] // 4
    if channels_last:
        patches = tokens.view(rows, columns, 2, 2, channels).permute(4, 0, 2, 1, 3)
    else:
        patches = tokens.view(rows, columns, channels, 2, 2).permute(2, 0, 3, 1, 4)
    return patches.reshape(channels, rows * 2, columns * 2)


def tokens_of_frames(latents: Tensor, grid: tuple[int, int, int], frames: range) -> Tensor:
    """Tokens of some latent frames. latents: [frames * rows * columns, channels]; grid: frames, rows and columns."""
    _, rows, columns = grid
    return latents[frames.start * rows * columns : frames.stop * rows * columns]
