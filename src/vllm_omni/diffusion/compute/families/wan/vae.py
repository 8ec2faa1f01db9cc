"""Wan's VAE, diffusers' AutoencoderKLWan: decodes a video piece by piece, and encodes input pictures.

The VAE is causal in time: the first latent frame becomes one video frame, each further one becomes four. They depend on
earlier latent frames by the features that the decoder's convolutions keep of these. diffusers keeps the features in the
module during one call of `decode`. Here they belong to the request, so decodes of several videos can take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.step.finite import is_finite, keep_infinite_pixels_visible
from vllm_omni.diffusion.compute.step.pipeline import DecoderFeatures, Grid, Picture
from vllm_omni.diffusion.compute.step.sampling import unpack_latents
from vllm_omni.diffusion.compute.vae.latent_decoder import to_bytes
from vllm_omni.diffusion.compute.vae.scaling import latents_mean_and_std
from vllm_omni.diffusion.compute.vae.shared_decode import SharedDecoder
from vllm_omni.diffusion.compute.vae.tiles import Tile, Tiling

ONE_TILE = Tiling(sys.maxsize, sys.maxsize, sys.maxsize, sys.maxsize)


class WanDecoder:
    """Decodes token latents. With `tiled` or several ranks, pixels equal those of diffusers' tiling on one rank."""

    def __init__(self, vae: AutoencoderKLWan, tiled: bool, group: DecodeGroup) -> None:
        """group: ranks that share each decode; all of them call with the same latents."""
        keep_infinite_pixels_visible(vae.decoder)
        if tiled:
            vae.enable_tiling()
        self._vae = vae
        self._patch_size: int = vae.config.patch_size or 1
        scale: int = vae.spatial_compression_ratio
        tiling = Tiling.of_samples(vae, scale) if vae.use_tiling or group.size > 1 else ONE_TILE
        self._shared = SharedDecoder(vae, tiling, scale // self._patch_size, group)
        self._num_features = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self._mean, std = latents_mean_and_std(vae, vae.dtype)
        self._inverse_std = 1.0 / std

    def __call__(self, latents: Sequence[Tensor], grids: Sequence[Grid]) -> list[Picture]:
        """Whole pictures, uint8 [height, width, 3], and whole videos, uint8 [frames, height, width, 3].

        latents: [frames * rows * columns, channels * 4]; grids: (latent frames, rows, columns), pictures have 1 frame.
        The first rank of the group gets the pictures, the others get [].
        """
        made = []
        for tokens, grid in zip(latents, grids, strict=True):
            if (video := self.decode_next(tokens, grid, {})) is not None:
                made.append(video._replace(pixels=video.pixels[0]) if grid[0] == 1 else video)
        return made

    def decode_next(self, latents: Tensor, grid: Grid, features: DecoderFeatures) -> Picture | None:
        """Video frames of the next latent frames of a video, uint8 [frames, height, width, 3].

        latents, grid: of these latent frames alone. features: those of this video on this rank, which the call updates;
        empty before the first latent frame. The first rank of the group gets the frames, the others get None.
        """
        frames = latents.to(self._vae.dtype).chunk(grid[0])
        scaled = torch.stack([unpack_latents(tokens, *grid[1:]) for tokens in frames], dim=1)[None]
        scaled = scaled / self._inverse_std + self._mean
        for pixels in self._shared([scaled], partial(self._decode_tile, features)):
            if self._patch_size > 1:
                pixels = unpatchify(pixels, self._patch_size)
            return Picture(to_bytes(pixels[0].movedim(0, -1)), is_finite(pixels))
        return None

    def _decode_tile(self, features: DecoderFeatures, latents: Tensor, tile: Tile) -> Tensor:
        """Pixels [1, colours, frames, height, width] of the next latent frames [1, channels, n, height, width]."""
        is_first = tile not in features
        kept = features.setdefault(tile, [None] * self._num_features)
        decoded = []
        for latent_frame in latents.split(1, dim=2):
            x = self._vae.post_quant_conv(latent_frame)
            decoded.append(self._vae.decoder(x, feat_cache=kept, feat_idx=[0], first_chunk=is_first))
            is_first = False
        return torch.cat(decoded, dim=2)


class WanEncoder:
    """Makes latents of the input pictures of a video: the mode of the VAE's distribution, normalized."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae = vae
        self._mean, std = latents_mean_and_std(vae, torch.float32)
        self._inverse_std = 1.0 / std

    def __call__(self, first: np.ndarray, num_frames: int, last: np.ndarray | None = None) -> Tensor:
        """Latents of a video whose frames are zero (grey) except for the first one, and the last one if it is given.

        first, last: uint8 [height, width, 3]. num_frames: 1 for the picture alone, else at least 2 if `last` is given.
        Returns float32 [channels, latent frames, height / scale, width / scale].
        """
        height, width, _ = first.shape
        pictures = {0: first} if last is None else {0: first, num_frames - 1: last}
        assert len(pictures) <= num_frames
        video = torch.zeros((1, 3, num_frames, height, width), dtype=self._vae.dtype, device=self._vae.device)
        for index, pixels in pictures.items():
            values = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 * 2 - 1
            video[0, :, index] = to_device(values.to(self._vae.dtype), self._vae.device)
        mode: Tensor = self._vae.encode(video).latent_dist.mode()
        return ((mode.float() - self._mean) * self._inverse_std)[0]
