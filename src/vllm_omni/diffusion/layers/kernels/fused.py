"""The kernels of `reference` in Triton: one pass over the tokens each, sums in float32.

A program computes one token. What PyTorch would write between two operations (the normed tokens, a row of modulation
for each token, the streams one after another) never leaves the chip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_omni.diffusion.layers.kernels.reference import Projected

MAX_FLOAT16 = tl.constexpr(65504.0)


class TritonKernels:
    """See `TorchKernels` for what each computes."""

    def norm_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        if len(x):
            _norm_modulate[(len(x),)](
                x, shift, scale, rows, out, x.shape[1], shift.stride(0), scale.stride(0), eps,
                HAS_ROWS=rows is not None, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8,
            )  # fmt: skip
        return out

    def gated_add(self, x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        out = torch.empty_like(x)
        if len(x):
            _gated_add[(len(x),)](
                x, y, gate, rows, out, x.shape[1], gate.stride(0), HAS_ROWS=rows is not None,
                IS_FLOAT16=out.dtype == torch.float16, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8,
            )  # fmt: skip
        return out

    def heads(
        self, streams: Sequence[Projected], order: Tensor | None, stream: Tensor | None, rotations: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, last = streams[0], streams[-1]
        num_tokens, half = len(rotations), rotations.shape[-2]
        num_heads = first.qkv.shape[1] // (6 * half)
        out = first.qkv.new_empty((3, num_tokens, num_heads, 2 * half))
        if num_tokens:
            _heads[(num_tokens, 3)](
                first.qkv.contiguous(), first.weight, last.qkv.contiguous(), last.weight, order,
                rotations.contiguous(), out, len(first.qkv), num_heads, half, eps,
                HAS_ORDER=order is not None, HEADS=triton.next_power_of_2(num_heads),
                HALF=triton.next_power_of_2(half),
            )  # fmt: skip
        q, k, v = out.unbind()
        return q, k, v


@triton.jit
def _norm_modulate(
    x_ptr, shift_ptr, scale_ptr, rows_ptr, out_ptr, width, shift_stride, scale_stride, eps,
    HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    centered = tl.where(inside, x - tl.sum(x) / width, 0.0)
    normed = centered * tl.rsqrt(tl.sum(centered * centered) / width + eps)
    row = tl.load(rows_ptr + token) if HAS_ROWS else 0
    shift = tl.load(shift_ptr + row * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, normed * scale + shift, mask=inside)


@triton.jit
def _gated_add(
    x_ptr, y_ptr, gate_ptr, rows_ptr, out_ptr, width, gate_stride,
    HAS_ROWS: tl.constexpr, IS_FLOAT16: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(rows_ptr + token) if HAS_ROWS else 0
    x = tl.load(x_ptr + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    total = x + gate * y
    if IS_FLOAT16:
        total = tl.clamp(total, -MAX_FLOAT16, MAX_FLOAT16, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + token * width + columns, total, mask=inside)


@triton.jit(do_not_specialize=["num_first"])  # which differs from prompt to prompt: somebody waits for a compilation
def _heads(
    first_ptr, first_weight_ptr, last_ptr, last_weight_ptr, order_ptr, rotations_ptr, out_ptr,
    num_first, num_heads, half, eps, HAS_ORDER: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (token, part): all heads of its queries (part 0), keys (1) or values (2)."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    width = num_heads * half * 2
    source = tl.load(order_ptr + token) if HAS_ORDER else token
    if source < num_first:
        from_ptr = first_ptr + source * 3 * width + part * width
        weight_ptr = first_weight_ptr + part * half * 2
    else:
        from_ptr = last_ptr + (source - num_first) * 3 * width + part * width
        weight_ptr = last_weight_ptr + part * half * 2
    heads = tl.arange(0, HEADS)[:, None]
    channels = tl.arange(0, 2 * HALF)[None, :]
    inside = (heads < num_heads) & (channels < half * 2)
    places = heads * half * 2 + channels
    x = tl.load(from_ptr + places, mask=inside, other=0.0)
    to_ptr = out_ptr + (part * tl.num_programs(0) + token) * width
    if part < 2:
        wide = x.to(tl.float32)
        norm = tl.rsqrt(tl.sum(wide * wide, axis=1)[:, None] / (2 * half) + eps)
        weight = tl.load(weight_ptr + channels, mask=channels < half * 2, other=0.0).to(tl.float32)
        real, imaginary = tl.split(tl.reshape(wide * norm * weight, (HEADS, HALF, 2)))
        pairs = tl.arange(0, HALF)[None, :]
        turn = rotations_ptr + token * half * 2 + pairs * 2
        cosine = tl.load(turn, mask=pairs < half, other=0.0)
        sine = tl.load(turn + 1, mask=pairs < half, other=0.0)
        turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        x = tl.reshape(turned, (HEADS, 2 * HALF)).to(x.dtype)
    tl.store(to_ptr + places, x, mask=inside)
