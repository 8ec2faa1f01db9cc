"""Sinusoidal embedding of timesteps, as in DDPM and DiT."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_WAVES = 256
"""Channels of the embedding, in most models."""


def timestep_waves(timesteps: Tensor, scale: float = 1.0, num_waves: int = NUM_WAVES) -> Tensor:
    """Embed timesteps: [n] -> float32 [n, num_waves], cosines then sines at frequencies from 1 down to nearly 1/10000.

    scale: factor of the angles. num_waves: an even number.
    """
    half = num_waves // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = scale * (timesteps.float()[:, None] * frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
