"""Interfaces of the decoders of packed families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from vllm_omni.diffusion.compute.step.pipeline import DecoderFeatures, Grid, Picture


class Decoder(Protocol):
    """Makes pixels of token latents."""

    def __call__(self, latents: Sequence[Tensor], grids: Sequence[Grid]) -> list[Picture]:
        """Pixels uint8 [height, width, 3] of pictures and [frames, height, width, 3] of videos.

        latents: [tokens, channels] of each picture or video; grids: its latent frames, rows and columns.
        """
        ...


@runtime_checkable
class VideoDecoder(Decoder, Protocol):
    """Decoder that also makes the frames of a video piece by piece; a family that makes videos has one."""

    def decode_next(self, latents: Tensor, grid: Grid, frames: range, features: DecoderFeatures) -> Picture | None:
        """Pixels uint8 [frames, height, width, 3] of the next latent frames of a video.

        latents, grid: of the whole video; frames: numbers of the latent frames to decode. features: those that this
        decoder keeps of earlier latent frames of the video, which the call updates; empty before the first one. The
        first of the ranks that share the decode gets the pixels, the others get None.
        """
        ...
