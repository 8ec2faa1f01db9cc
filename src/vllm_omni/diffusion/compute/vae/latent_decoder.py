"""From the latents of many pictures to pixels: batches of one size, or tiles that ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.step.finite import each_is_finite
from vllm_omni.diffusion.compute.step.pipeline import Picture
from vllm_omni.diffusion.compute.vae.shared_decode import SharedDecoder
from vllm_omni.diffusion.compute.vae.tiles import Tiling

MAX_BATCH_PIXELS = 2**20
"""Pixels decoded as one batch; larger batches gain nothing and cost memory."""


class LatentDecoder:
    """Decodes scaled latents with one of diffusers' VAEs; rounding follows its VaeImageProcessor.

    one_at_a_time: never hold more than one picture (less memory). group: its ranks share each call, which makes the
    pictures that one rank makes with the VAE's tiling enabled.
    """

    def __init__(
        self,
        vae: Any,
        decode_tile: Callable[[Tensor], Tensor],
        tiling: Tiling,
        scale: int,
        one_at_a_time: bool,
        group: Group,
    ) -> None:
        """vae: a `TiledVae` with diffusers' `decode`; decode_tile, tiling, scale: see `SharedDecoder`."""
        self._vae = vae
        self._scale = scale
        self._one_at_a_time = one_at_a_time
        self._shared = SharedDecoder(vae, decode_tile, tiling, scale, group) if group.size > 1 else None

    def __call__(self, latents: Sequence[Tensor]) -> list[Picture]:
        """latents: [1, channels, ..., height / scale, width / scale] of each picture -> uint8 [height, width, 3].

        All ranks of the group must call with the same latents; the pictures come on its first rank, [] on the others.
        """
        if self._shared is None:
            return [picture for batch in self._batches(latents) for picture in self._decode(batch)]
        calls = [[x] for x in latents] if self._one_at_a_time else [latents]
        return [picture for call in calls for pixels in self._shared(call) for picture in to_pictures(pixels)]

    def _batches(self, latents: Sequence[Tensor]) -> Iterator[Tensor]:
        """Neighbours of one size together."""
        for (height, width), run in groupby(latents, key=lambda x: x.shape[-2:]):
            most = 1 if self._one_at_a_time else max(1, MAX_BATCH_PIXELS // (height * width * self._scale**2))
            yield from torch.cat(list(run)).split(most)

    def _decode(self, latents: Tensor) -> list[Picture]:
        return to_pictures(self._vae.decode(latents, return_dict=False)[0])


def to_pictures(pixels: Tensor) -> list[Picture]:
    """[pictures, 3, ..., height, width] in [-1, 1], with nothing or 1 in between -> uint8 [height, width, 3] each."""
    pixels = pixels.reshape(len(pixels), 3, *pixels.shape[-2:])
    finite = each_is_finite(pixels)
    pixels = (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    rounded = (pixels * 255).round().to(torch.uint8).contiguous()
    return [Picture(*picture) for picture in zip(rounded, finite, strict=True)]
