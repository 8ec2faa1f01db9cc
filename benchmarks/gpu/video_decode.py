"""Section `video_decode`: Wan's decode of 81 frames, whole and in the VAE's tiles; and shared by ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.bench import Bench, Size
from benchmarks.gpu.report import Case, Row
from benchmarks.gpu.video_step import FRAMES, SIZES, SMALL
from benchmarks.roofline.measured import card_at_hand
from benchmarks.timing import Spread, measure_long
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup
from vllm_omni.diffusion.compute.families.wan.pipeline import PICTURE_DTYPE
from vllm_omni.diffusion.compute.families.wan.vae import WanDecoder
from vllm_omni.diffusion.compute.weights.loading import load_autoencoder

WHOLE, TILED, CHANNELS_LAST = "whole", "tiled", "whole, channels last"
WAYS = (WHOLE, CHANNELS_LAST, TILED)
"""Ways of a decode: at once, as the server does it; the same in another order of memory; in the VAE's own tiles."""
BUDGET_SECONDS = 4.0
TF32_SHARE = 0.5
"""Rate of a float32 convolution by TF32 units, as a share of the bf16 rate of the data sheet."""
COUNTED = 3
"""Latent frames whose FLOPs are counted: the third and all later ones take the same."""


def section_video_decode(bench: Bench) -> Iterator[Case]:
    """Measure seconds of a decode. Prediction: its convolutions at the data sheet's TF32 rate."""
    for resolution in SIZES:
        size = bench.video(*SIZES[resolution], FRAMES)
        for way in WAYS:
            case = f"{resolution} {FRAMES} frames, {way}"
            yield Case(case, partial(_measure, bench, case, size, way))


@torch.inference_mode()
def _measure(bench: Bench, case: str, size: Size, way: str) -> list[Row]:
    folder = bench.model(SMALL)
    flops = decode_flops(folder, size)
    card = card_at_hand()
    predicted = flops / (TF32_SHARE * card.bf16_flops) if card is not None else None
    seconds = decode_seconds(folder, size, bench.device, way, DecodeGroup.alone(), 0.1 if bench.tiny else None)
    detail = {"TFLOP, whole": flops / 1e12, "TFLOP/s": flops / seconds.median / 1e12, "repeats": seconds.repeats}
    return [Row(case, seconds.median, "s", predicted, (seconds.least, seconds.most), detail=detail)]


def decode_seconds(
    folder: str, size: Size, device: torch.device, way: str, group: DecodeGroup, budget: float | None = None
) -> Spread:
    """Seconds of a decode by the ranks of `group`, which repeat it once.

    way: one of WAYS. budget: of seconds; None: BUDGET_SECONDS.
    """
    vae = load_autoencoder(AutoencoderKLWan, Path(folder) / "vae", device, PICTURE_DTYPE, lambda count: None, "dummy")
    if way == CHANNELS_LAST:
        lay_channels_last(vae.decoder)
    decoder, grid = WanDecoder(vae, way == TILED, group), grid_of(vae, size)
    tokens = torch.randn(math.prod(grid), 4 * vae.config.z_dim, device=device)
    # All ranks repeat equally often.
    most = 1 if group.size > 1 else 3
    return measure_long(lambda: decoder([tokens], [grid]), device, budget=budget or BUDGET_SECONDS, most=most)


def lay_channels_last(module: nn.Module) -> None:
    """Store the weights of convolutions with their channels last; their outputs then have that order too."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.dim() in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.dim()])


def decode_flops(folder: str, size: Size) -> float:
    """FLOPs of the whole decode's convolutions and products, counted without a device."""
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(Path(folder) / "vae"))
        frames, rows, columns = grid_of(vae, size)
        counts = []
        features: list[object] = [None] * vae._cached_conv_counts["decoder"]
        for number in range(min(COUNTED, frames)):
            latents = torch.empty(1, vae.config.z_dim, 1, 2 * rows, 2 * columns)
            with FlopCounterMode(display=False) as counter:
                x = vae.post_quant_conv(latents)
                vae.decoder(x, feat_cache=features, feat_idx=[0], first_chunk=number == 0)
            counts.append(float(counter.get_total_flops()))
    return sum(counts) + counts[-1] * (frames - len(counts))


def grid_of(vae: AutoencoderKLWan, size: Size) -> tuple[int, int, int]:
    """Latent frames, and rows and columns of tokens, of a video."""
    height, width, frames = size
    side = 2 * vae.spatial_compression_ratio
    return 1 + (frames - 1) // vae.config.scale_factor_temporal, height // side, width // side
