"""Between latents and pixels, with diffusers' VAE cut down to what a single frame needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn

from vllm_omni.diffusion.distributed.groups import Group
from vllm_omni.diffusion.models.qwen_image.shared_decode import SharedDecoder
from vllm_omni.diffusion.sampling import pack_latents, unpack_latents

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


class FrameCoder(nn.Module):
    """The VAE's encoder or decoder for pictures; it keeps no features for a next frame."""

    def __init__(self, coder: nn.Module) -> None:
        super().__init__()
        self.coder = coder
        for parent in list(coder.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, QwenImageCausalConv3d):
                    setattr(parent, name, FrameConv(child))

    def forward(self, x: Tensor, feat_cache: object = None, feat_idx: object = None) -> Tensor:
        out: Tensor = self.coder(x)
        return out


class PictureEncoder:
    """Makes the token latents of pictures: the mode of what the VAE says, scaled as the transformer knows latents."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        vae.encoder = FrameCoder(vae.encoder)
        self._vae = vae
        self._mean, self._std = _scaling(vae)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """uint8 [height, width, 3], sides multiples of a token's -> [rows * columns, channels * 4]."""
        values = torch.from_numpy(pixels).permute(2, 0, 1)[None, :, None].float() / 255 * 2 - 1
        distribution = self._vae.encode(values.to(self._vae.device, self._vae.dtype)).latent_dist
        scaled = (distribution.mode() - self._mean) / self._std
        return pack_latents(scaled[0, :, 0])


class PictureDecoder:
    """Decodes token latents with a Qwen-Image VAE; rounding follows diffusers' VaeImageProcessor.

    one_at_a_time: never hold more than one picture (less memory). group: its ranks share each call, which makes the
    pictures of one rank with `tiled`.
    """

    def __init__(self, vae: AutoencoderKLQwenImage, one_at_a_time: bool, tiled: bool, group: Group) -> None:
        vae.decoder = FrameCoder(vae.decoder)
        self._vae = vae
        self._one_at_a_time = one_at_a_time
        if tiled:
            vae.enable_tiling()
        self._shared = SharedDecoder(vae, group) if group.size > 1 else None
        self._scale = 2 ** len(vae.temperal_downsample)
        self._mean, std = _scaling(vae)
        self._inverse_std = 1.0 / std

    def __call__(self, latents: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """latents: [rows * columns, channels * 4] and (rows, columns) of each picture -> uint8 [height, width, 3].

        All ranks of the group must call with the same latents; the pictures come on its first rank, [] on the others.
        """
        unpacked = [unpack_latents(tokens, *grid)[None, :, None] for tokens, grid in zip(latents, grids, strict=True)]
        scaled = [x.to(self._vae.dtype) / self._inverse_std + self._mean for x in unpacked]
        if self._shared is None:
            return [picture for batch in self._batches(scaled) for picture in self._decode(batch)]
        calls = [[x] for x in scaled] if self._one_at_a_time else [scaled]
        return [picture for call in calls for pixels in self._shared(call) for picture in _to_uint8(pixels)]

    def _batches(self, latents: Sequence[Tensor]) -> Iterator[Tensor]:
        """Neighbours of one size together: [pictures, channels, 1, height / 8, width / 8]."""
        for (height, width), run in groupby(latents, key=lambda x: x.shape[-2:]):
            most = 1 if self._one_at_a_time else max(1, MAX_BATCH_PIXELS // (height * width * self._scale**2))
            yield from torch.cat(list(run)).split(most)

    def _decode(self, latents: Tensor) -> list[np.ndarray]:
        return _to_uint8(self._vae.decode(latents, return_dict=False)[0])


def _scaling(vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """Mean and deviation of latents, [1, channels, 1, 1, 1]."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(vae.device, vae.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _to_uint8(pixels: Tensor) -> list[np.ndarray]:
    """[pictures, 3, 1, height, width] in [-1, 1] -> [height, width, 3] each."""
    pixels = (pixels[:, :, 0] * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    return list((pixels * 255).round().to(torch.uint8).cpu().numpy())
