"""Decode of the latents of several pictures: in batches of one size, or in tiles that ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.failures import is_out_of_memory
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.step.finite import each_is_finite
from vllm_omni.diffusion.compute.step.pipeline import Picture
from vllm_omni.diffusion.compute.vae.shared_decode import DecodeTile, SharedDecoder
from vllm_omni.diffusion.compute.vae.tile_choice import TileChoice, tiling_on
from vllm_omni.diffusion.compute.vae.tiles import Tiling

MAX_BATCH_PIXELS = 2**20
"""Larger batches gain nothing and cost memory."""


class LatentDecoder:
    """Decoder of scaled latents with a VAE of diffusers; pixels are rounded as in its VaeImageProcessor.

    one_at_a_time: decode each picture by itself (less memory). group: ranks that share each call; the pictures equal
    those of one rank with the VAE's tiling enabled. A rank alone makes smaller batches where memory is short, and
    enables the tiling for a picture that does not fit whole.
    """

    def __init__(
        self,
        vae: Any,
        decode_tile: Callable[[Tensor], Tensor],
        tiling: Tiling,
        scale: int,
        one_at_a_time: bool,
        group: DecodeGroup,
        max_batch_pixels: int = MAX_BATCH_PIXELS,
        choice: TileChoice | None = None,
    ) -> None:
        """vae: a `TiledVae` with diffusers' `decode`; decode_tile: converts the latents of a tile to pixels.

        tiling, scale: see `SharedDecoder`. max_batch_pixels: most pixels of a batch of several pictures. choice: of
        tiles by memory; None: tiles only where a decode has run out of memory.
        """
        self._vae = vae
        self._tiling = tiling
        self._scale = scale
        self._choice = choice or TileChoice()
        self._one_at_a_time = one_at_a_time
        self._max_batch_pixels = max_batch_pixels
        self._decode_tile: DecodeTile = lambda latents, tile: decode_tile(latents)
        self._shared = SharedDecoder(vae, tiling, scale, group) if group.size > 1 else None

    def __call__(self, latents: Sequence[Tensor]) -> list[Picture]:
        """Decode [1, channels, ..., height / scale, width / scale] of each picture to uint8 [height, width, 3].

        All ranks of the group call this with the same latents; the first returns the pictures, the others [].
        """
        if self._shared is None:
            return [picture for batch in self._batches(latents) for picture in self._decode(batch)]
        calls = [[x] for x in latents] if self._one_at_a_time else [latents]
        return [
            picture
            for call in calls
            for pixels in self._shared(call, self._decode_tile)
            for picture in to_pictures(pixels)
        ]

    def _batches(self, latents: Sequence[Tensor]) -> Iterator[Tensor]:
        """Batches of consecutive latents of one size."""
        for (height, width), run in groupby(latents, key=lambda x: x.shape[-2:]):
            limit = 1 if self._one_at_a_time else max(1, self._max_batch_pixels // (height * width * self._scale**2))
            left = torch.cat(list(run))
            while len(left):
                most = max(1, min(limit, self._most_whole(left)))
                yield left[:most]
                left = left[most:]

    def _decode(self, latents: Tensor) -> list[Picture]:
        """Decode a batch whole where it fits; one that runs out of memory picture by picture, a single one in tiles."""
        if self._can_tile(latents) and not self._most_whole(latents):
            return self._decode_tiled(latents)
        try:
            return to_pictures(self._vae.decode(latents, return_dict=False)[0])
        except Exception as error:
            if not is_out_of_memory(error) or (len(latents) == 1 and not self._can_tile(latents)):
                raise
        # Outside of the handler, because the traceback holds the tensors of the failed attempt.
        self._choice.release()
        if len(latents) > 1:
            return [picture for one in latents.split(1) for picture in self._decode(one)]
        return self._decode_tiled(latents)

    def _decode_tiled(self, latents: Tensor) -> list[Picture]:
        with tiling_on(self._vae):
            pixels = [self._vae.decode(one, return_dict=False)[0] for one in latents.split(1)]
        return [picture._replace(is_tiled=True) for one in pixels for picture in to_pictures(one)]

    def _can_tile(self, latents: Tensor) -> bool:
        """Whether tiles would need less memory: the tiling is off, and a picture is larger than a tile."""
        height, width = latents.shape[-2:]
        return not self._vae.use_tiling and (height > self._tiling.height or width > self._tiling.width)

    def _most_whole(self, latents: Tensor) -> int:
        height, width = latents.shape[-2:]
        return self._choice.most_whole(height * self._scale, width * self._scale)


def to_pictures(pixels: Tensor) -> list[Picture]:
    """Convert [pictures, 3, (1,) height, width] in [-1, 1] to uint8 [height, width, 3] for each picture."""
    pixels = pixels.reshape(len(pixels), 3, *pixels.shape[-2:])
    finite = each_is_finite(pixels)
    return [Picture(*picture) for picture in zip(to_bytes(pixels.permute(0, 2, 3, 1)), finite, strict=True)]


def to_bytes(pixels: Tensor) -> Tensor:
    """Round pixels in [-1, 1] to uint8 of the same shape, contiguous; values outside are clamped."""
    scaled = (pixels * 0.5 + 0.5).clamp(0, 1).float()
    return (scaled * 255).round().to(torch.uint8).contiguous()
