"""GroupNorm and SiLU in channels-last memory, in Triton: three kernels, two reads and one write of the picture.

Every program reads whole rows of [pixels, channels]. Means and sums of squared deviations of blocks are combined as in
Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983). Their order depends on the size of the
picture alone, so the values do not change with the batch or from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Values that a program holds at once."""
MAX_BLOCKS = 2048
"""Most blocks of pixels of a sample: several for each multiprocessor of any GPU, and few to combine."""
COMBINED = 2048
"""Statistics of blocks that the program of a group reads at once."""


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """GroupNorm as documented in `TorchKernels.group_norm`."""
    rows = x.flatten(2).transpose(1, 2).contiguous()  # [N, pixels, channels]: a view of channels-last memory
    num_samples, num_pixels, width = rows.shape
    out = torch.empty_like(rows)
    if rows.numel():
        block = triton.next_power_of_2(width)
        tile = max(1, TILE // block)
        num_tiles = triton.cdiv(num_pixels, tile)
        tiles_per_block = triton.cdiv(num_tiles, MAX_BLOCKS)
        num_blocks = triton.cdiv(num_tiles, tiles_per_block)
        means, deviations = rows.new_empty((2, num_samples, num_blocks, width), dtype=torch.float32)
        moments = rows.new_empty((num_samples, num_groups, 2), dtype=torch.float32)
        _block_statistics[(num_samples * num_blocks,)](
            rows, means, deviations, num_pixels, num_blocks, tiles_per_block, width,
            TILE=tile, BLOCK=block, num_warps=8,
        )  # fmt: skip
        _combine[(num_samples * num_groups,)](
            means, deviations, moments, num_pixels, num_blocks, tiles_per_block * tile, width, num_groups, eps,
            BLOCK=COMBINED, num_warps=8,
        )  # fmt: skip
        _apply[(num_samples * num_tiles,)](
            rows, moments, weight, bias, out, num_pixels, num_tiles, width, num_groups,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, SILU=silu, TILE=tile, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out.transpose(1, 2).view(x.shape)


# Sizes of a picture are not specialized: a request would wait for the compilation of each size.


@triton.jit(do_not_specialize=["num_pixels", "num_blocks", "tiles_per_block"])
def _block_statistics(
    x_ptr, means_ptr, deviations_ptr, num_pixels, num_blocks, tiles_per_block, width,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (sample, block of pixels): mean and sum of squared deviations of each channel."""
    sample = tl.program_id(0) // num_blocks
    first = (tl.program_id(0) % num_blocks) * tiles_per_block * TILE
    pixels = tl.arange(0, TILE)[:, None]
    channels = tl.arange(0, BLOCK)[None, :]
    x_ptr += (sample.to(tl.int64) * num_pixels + first) * width
    mean = tl.zeros((TILE, BLOCK), tl.float32)
    deviation = tl.zeros((TILE, BLOCK), tl.float32)
    for i in range(tiles_per_block):  # Welford's update for each element of a tile alone: no synchronisation
        inside = (first + i * TILE + pixels < num_pixels) & (channels < width)
        x = tl.load(x_ptr + i * TILE * width + pixels * width + channels, mask=inside, other=0.0).to(tl.float32)
        change = tl.where(inside, x - mean, 0.0)
        mean += change * (1.0 / (i + 1))
        deviation += change * (x - mean)
    left = num_pixels - first - pixels
    count = tl.minimum(tl.maximum((left + TILE - 1) // TILE, 0), tiles_per_block).to(tl.float32)
    total = tl.sum(count, axis=0)[None, :]
    center = tl.sum(mean * count, axis=0)[None, :] / total
    center += tl.sum((mean - center) * count, axis=0)[None, :] / total  # corrects the rounding of the first sum
    deviation = tl.sum(deviation + (mean - center) * (mean - center) * count, axis=0)[None, :]
    offsets = tl.program_id(0).to(tl.int64) * width + channels
    tl.store(means_ptr + offsets, center, mask=channels < width)
    tl.store(deviations_ptr + offsets, deviation, mask=channels < width)


@triton.jit(do_not_specialize=["num_pixels", "num_blocks", "block_pixels"])
def _combine(
    means_ptr, deviations_ptr, moments_ptr, num_pixels, num_blocks, block_pixels, width, num_groups, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (sample, group): mean and 1 / sqrt(variance + eps)."""
    sample = tl.program_id(0) // num_groups
    group = tl.program_id(0) % num_groups
    group_width = width // num_groups
    num_parts = num_blocks * group_width
    offset = sample.to(tl.int64) * num_blocks * width + group * group_width
    total = num_pixels.to(tl.float32) * group_width
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_parts, BLOCK):
        part = start + lanes
        block = part // group_width
        count = tl.minimum(num_pixels - block * block_pixels, block_pixels).to(tl.float32)
        source = offset + block * width + part % group_width
        sums += tl.load(means_ptr + source, mask=part < num_parts, other=0.0) * count
    mean = tl.sum(sums) / total
    rests = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_parts, BLOCK):
        part = start + lanes
        block = part // group_width
        count = tl.minimum(num_pixels - block * block_pixels, block_pixels).to(tl.float32)
        source = offset + block * width + part % group_width
        rest = tl.load(means_ptr + source, mask=part < num_parts, other=mean) - mean
        rests += rest * count
        squares += tl.load(deviations_ptr + source, mask=part < num_parts, other=0.0) + rest * rest * count
    rest = tl.sum(rests) / total  # corrects the rounding of the first sum
    variance = tl.sum(squares) / total - rest * rest
    moments_ptr += tl.program_id(0) * 2
    tl.store(moments_ptr, mean + rest)
    tl.store(moments_ptr + 1, 1.0 / tl.sqrt(variance + eps))


@triton.jit(do_not_specialize=["num_pixels", "num_tiles"])
def _apply(
    x_ptr, moments_ptr, weight_ptr, bias_ptr, out_ptr, num_pixels, num_tiles, width, num_groups,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (sample, tile of pixels): normalise, scale, and apply SiLU."""
    sample = tl.program_id(0) // num_tiles
    first = (tl.program_id(0) % num_tiles) * TILE
    pixels = tl.arange(0, TILE)[:, None]
    channels = tl.arange(0, BLOCK)[None, :]
    has_channel = channels < width
    inside = (first + pixels < num_pixels) & has_channel
    offset = (sample.to(tl.int64) * num_pixels + first) * width
    offsets = pixels * width + channels
    x = tl.load(x_ptr + offset + offsets, mask=inside, other=0.0).to(tl.float32)
    moments_ptr += (sample * num_groups + channels // (width // num_groups)) * 2
    scale = tl.load(moments_ptr + 1, mask=has_channel, other=0.0)
    if HAS_WEIGHT:
        scale *= tl.load(weight_ptr + channels, mask=has_channel, other=0.0).to(tl.float32)
    x = (x - tl.load(moments_ptr, mask=has_channel, other=0.0)) * scale
    if HAS_BIAS:
        x += tl.load(bias_ptr + channels, mask=has_channel, other=0.0).to(tl.float32)
    if SILU:
        x /= 1 + tl.exp(-x)
    tl.store(out_ptr + offset + offsets, x, mask=inside)
