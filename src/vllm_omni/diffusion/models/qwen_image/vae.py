"""From latents to pixels, with diffusers' VAE cut down to what a single frame needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn

from vllm_omni.diffusion.sampling import unpack_latents

MAX_BATCH_PIXELS = 2**20
"""Pixels decoded as one batch; larger batches gain nothing and cost memory."""


class FrameConv(nn.Module):
    """A causal 3D convolution of one frame: the frames before it are zero, so only the last time slice counts."""

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        super().__init__()
        left, _, top, *_ = conv._padding
        self.padding = (top, left)
        self.weight = nn.Parameter(conv.weight[:, :, -1].contiguous(), requires_grad=False)
        self.bias = conv.bias

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        """x: [pictures, channels, 1, height, width]."""
        assert x.shape[2] == 1
        assert cache_x is None
        return F.conv2d(x[:, :, 0], self.weight, self.bias, padding=self.padding)[:, :, None]


class FrameDecoder(nn.Module):
    """The VAE's decoder for pictures; it keeps no features for a next frame."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        for parent in list(decoder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, QwenImageCausalConv3d):
                    setattr(parent, name, FrameConv(child))

    def forward(self, x: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
        pixels: Tensor = self.decoder(x)
        return pixels


class PictureDecoder:
    """Decodes token latents with a Qwen-Image VAE; rounding follows diffusers' VaeImageProcessor.

    one_at_a_time: never batch pictures (less memory).
    """

    def __init__(self, vae: AutoencoderKLQwenImage, one_at_a_time: bool, tiled: bool) -> None:
        vae.encoder = nn.Identity()  # frees its weights
        vae.decoder = FrameDecoder(vae.decoder)
        self._vae = vae
        self._one_at_a_time = one_at_a_time
        if tiled:
            vae.enable_tiling()
        self._scale = 2 ** len(vae.temperal_downsample)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(vae.device, vae.dtype)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        self._mean, self._inverse_std = mean, 1.0 / std

    def __call__(self, latents: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """latents: [rows * columns, channels * 4] and (rows, columns) of each picture -> uint8 [height, width, 3]."""
        pictures = []
        for grid, run in groupby(zip(latents, grids), key=lambda item: item[1]):
            pending = [unpack_latents(tokens, *grid)[:, None] for tokens, _ in run]
            size = self._batch_size(grid)
            for start in range(0, len(pending), size):
                pictures += self._decode(torch.stack(pending[start : start + size]))
        return pictures

    def _batch_size(self, grid: tuple[int, int]) -> int:
        pixels = grid[0] * grid[1] * (2 * self._scale) ** 2
        return 1 if self._one_at_a_time else max(1, MAX_BATCH_PIXELS // pixels)

    def _decode(self, latents: Tensor) -> list[np.ndarray]:
        """latents: [pictures, channels, 1, height / 8, width / 8]."""
        latents = latents.to(self._vae.dtype) / self._inverse_std + self._mean
        pixels = self._vae.decode(latents, return_dict=False)[0][:, :, 0]
        pixels = (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
        return list((pixels * 255).round().to(torch.uint8).cpu().numpy())
