"""Triton kernels of the operations in `reference`: one pass over the tokens each, sums in float32.

A program computes one token. Intermediate results that PyTorch would write to memory (normed tokens, a row of
modulation for each token, concatenated streams) stay on the chip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_omni.diffusion.compute.layers import rounding
from vllm_omni.diffusion.compute.layers.kernels.activations import gelu_by_tanh
from vllm_omni.diffusion.compute.layers.kernels.group_norm import group_norm
from vllm_omni.diffusion.compute.layers.kernels.low_rank import grouped_changes
from vllm_omni.diffusion.compute.layers.kernels.reference import Projected, TorchKernels
from vllm_omni.diffusion.compute.layers.low_rank import AdaptedLayer, LayerChange
from vllm_omni.diffusion.compute.layers.rounding import FLOAT8, LARGEST, Float8Rows, Rows

MAX_FLOAT16 = tl.constexpr(65504.0)
LARGEST_FLOAT8 = tl.constexpr(LARGEST)
LEAST_SCALE = tl.constexpr(rounding.LEAST_SCALE)


class TritonKernels(TorchKernels):
    """Operations by fused kernels."""

    picks_rows = True
    normalizes_channels_last = True

    def layer_changes(self, layers: Sequence[AdaptedLayer], device: torch.device) -> list[LayerChange]:
        return grouped_changes(layers, device)

    def norm_modulate(
        self, x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, eps: float, float8: bool = False
    ) -> Rows:
        x = x.contiguous()
        out, scales = _results(x, len(x), float8)
        if len(x):
            _norm_modulate[(len(x),)](
                x, shift, scale, rows, out, scales, x.shape[1], shift.stride(0), scale.stride(0), eps,
                HAS_ROWS=rows is not None, IS_FLOAT8=float8, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8,
            )  # fmt: skip
        return _rows(out, scales, x)

    def gated_add(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor,
        rows: Tensor | None,
        bias: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        out = torch.empty_like(x)
        if len(x):
            _gated_add[(len(x),)](
                x, y, gate, rows, bias, positions, out, x.shape[1], gate.stride(0),
                HAS_ROWS=rows is not None, HAS_BIAS=bias is not None, HAS_POSITIONS=positions is not None,
                IS_FLOAT16=out.dtype == torch.float16, BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8,
            )  # fmt: skip
        return out

    def gelu(self, x: Tensor, bias: Tensor | None, float8: bool = False) -> Rows:
        x = x.contiguous()
        out, scales = _results(x, len(x), float8)
        if len(x):
            _gelu[(len(x),)](
                x, bias, out, scales, x.shape[1], HAS_BIAS=bias is not None, IS_FLOAT8=float8,
                BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=16,
            )  # fmt: skip
        return _rows(out, scales, x)

    def round_rows(self, x: Tensor, positions: Tensor | None = None) -> Float8Rows:
        x = x.contiguous()
        num_rows = len(x) if positions is None else len(positions)
        out, scales = _results(x, num_rows, float8=True)
        if num_rows:
            _round_rows[(num_rows,)](
                x, positions, out, scales, x.shape[1], HAS_POSITIONS=positions is not None,
                BLOCK=triton.next_power_of_2(x.shape[1]), num_warps=8,
            )  # fmt: skip
        return Float8Rows(out, scales, x.dtype)

    def heads(
        self, streams: Sequence[Projected], order: Tensor | None, stream: Tensor | None, rotations: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, last = streams[0], streams[-1]
        num_tokens, half = len(rotations), rotations.shape[-2]
        num_heads = first.qkv.shape[1] // (6 * half)
        out = first.qkv.new_empty((3, num_tokens, num_heads, 2 * half))
        if num_tokens:
            _heads[(num_tokens, 3)](
                first.qkv.contiguous(), first.weight, first.bias, last.qkv.contiguous(), last.weight, last.bias, order,
                rotations.contiguous(), out, len(first.qkv), num_heads, half, eps,
                HAS_ORDER=order is not None, HAS_BIAS=first.bias is not None, HEADS=triton.next_power_of_2(num_heads),
                HALF=triton.next_power_of_2(half),
            )  # fmt: skip
        q, k, v = out.unbind()
        return q, k, v

    def wide_heads(
        self, projected: Projected, rotations: Tensor, eps: float, squares: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv, weight, bias = projected.qkv.contiguous(), projected.weight, projected.bias
        half, width = rotations.shape[-2], qkv.shape[1] // 3
        q, k = (
            _wide_norm_rows(qkv, weight, bias, eps, squares, rotations.contiguous(), half, 2)
            .unflatten(2, (-1, 2 * half))
            .unbind()
        )
        v = qkv[:, 2 * width :] if bias is None else qkv[:, 2 * width :] + bias[2 * width :]
        return q, k, v.unflatten(1, q.shape[1:])

    def wide_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, squares: Tensor | None = None
    ) -> Tensor:
        return _wide_norm_rows(x.contiguous(), weight, bias, eps, squares, None, 1, 1)[0]

    def group_norm(
        self, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = False
    ) -> Tensor:
        return group_norm(x, num_groups, weight, bias, eps, silu)


def _results(x: Tensor, num_rows: int, float8: bool) -> tuple[Tensor, Tensor]:
    """Empty outputs of a kernel: rows as wide as those of x, and one scale for each row in float8 (otherwise none)."""
    out = x.new_empty((num_rows, x.shape[1]), dtype=FLOAT8 if float8 else x.dtype)
    return out, x.new_empty((num_rows if float8 else 0, 1), dtype=torch.float32)


def _rows(out: Tensor, scales: Tensor, x: Tensor) -> Rows:
    """Outputs of a kernel as the result of an operation on x."""
    return Float8Rows(out, scales, x.dtype) if out.dtype == FLOAT8 else out


def _wide_norm_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, squares: Tensor | None, rotations: Tensor | None,
    half: int, parts: int,
) -> Tensor:  # fmt: skip
    """The first `parts` parts of the rows of x, normed and rotated: [tokens, ...] -> [parts, tokens, width].

    weight: [parts * width]; squares: float32, one for each token and part. The other arguments: see `_wide_norm`.
    """
    width = weight.shape[0] // parts
    out = x.new_empty((parts, len(x), width))
    if len(x):
        _wide_norm[(len(x), parts)](
            x, weight, bias, squares, rotations, out, x.shape[1], width, eps,
            HAS_BIAS=bias is not None, HAS_SQUARES=squares is not None, HAS_ROTATIONS=rotations is not None,
            HALF=half, PAIRS=triton.next_power_of_2(width) // 2, num_warps=8,
        )  # fmt: skip
    return out


@triton.jit
def _store(out_ptr, scales_ptr, row, x, columns, width, inside, IS_FLOAT8: tl.constexpr):
    """Store row `row` of the result; in float8, rounded as by `quantize`. x: float32, 0 where not `inside`."""
    if IS_FLOAT8:
        scale = tl.maximum(tl.max(tl.abs(x)) / LARGEST_FLOAT8, LEAST_SCALE)
        tl.store(scales_ptr + row, scale)
        x = tl.clamp(x / scale, -LARGEST_FLOAT8, LARGEST_FLOAT8, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + row * width + columns, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_modulate(
    x_ptr, shift_ptr, scale_ptr, rows_ptr, out_ptr, scales_ptr, width, shift_stride, scale_stride, eps,
    HAS_ROWS: tl.constexpr, IS_FLOAT8: tl.constexpr, BLOCK: tl.constexpr,
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
    _store(out_ptr, scales_ptr, token, normed * scale + shift, columns, width, inside, IS_FLOAT8)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])  # a view, whose first element may be at any offset
def _gated_add(
    x_ptr, y_ptr, gate_ptr, rows_ptr, bias_ptr, positions_ptr, out_ptr, width, gate_stride,
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POSITIONS: tl.constexpr, IS_FLOAT16: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(rows_ptr + token) if HAS_ROWS else 0
    position = tl.load(positions_ptr + token) if HAS_POSITIONS else token
    x = tl.load(x_ptr + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + position * width + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    total = x + gate * y
    if IS_FLOAT16:
        total = tl.clamp(total, -MAX_FLOAT16, MAX_FLOAT16, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + token * width + columns, total, mask=inside)


@triton.jit
def _gelu(
    x_ptr, bias_ptr, out_ptr, scales_ptr, width, HAS_BIAS: tl.constexpr, IS_FLOAT8: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    _store(out_ptr, scales_ptr, token, gelu_by_tanh(x), columns, width, inside, IS_FLOAT8)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _round_rows(x_ptr, positions_ptr, out_ptr, scales_ptr, width, HAS_POSITIONS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    position = tl.load(positions_ptr + row) if HAS_POSITIONS else row
    x = tl.load(x_ptr + position * width + columns, mask=inside, other=0.0).to(tl.float32)
    _store(out_ptr, scales_ptr, row, x, columns, width, inside, True)


@triton.jit(do_not_specialize=["num_first"])  # differs from prompt to prompt: a request would wait for each compilation
def _heads(
    first_ptr, first_weight_ptr, first_bias_ptr, last_ptr, last_weight_ptr, last_bias_ptr, order_ptr, rotations_ptr,
    out_ptr, num_first, num_heads, half, eps,
    HAS_ORDER: tl.constexpr, HAS_BIAS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Program (token, part): all heads of its queries (part 0), keys (1) or values (2)."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    width = num_heads * half * 2
    source = tl.load(order_ptr + token) if HAS_ORDER else token
    if source < num_first:
        from_ptr = first_ptr + source * 3 * width + part * width
        weight_ptr = first_weight_ptr + part * half * 2
        if HAS_BIAS:
            bias_ptr = first_bias_ptr + part * width
    else:
        from_ptr = last_ptr + (source - num_first) * 3 * width + part * width
        weight_ptr = last_weight_ptr + part * half * 2
        if HAS_BIAS:
            bias_ptr = last_bias_ptr + part * width
    heads = tl.arange(0, HEADS)[:, None]
    channels = tl.arange(0, 2 * HALF)[None, :]
    inside = (heads < num_heads) & (channels < half * 2)
    offsets = heads * half * 2 + channels
    x = tl.load(from_ptr + offsets, mask=inside, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offsets, mask=inside, other=0.0)
        x = (x.to(tl.float32) + bias.to(tl.float32)).to(x.dtype)
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
    tl.store(to_ptr + offsets, x, mask=inside)


@triton.jit
def _wide_norm(
    x_ptr, weight_ptr, bias_ptr, squares_ptr, rotations_ptr, out_ptr, stride, width, eps,
    HAS_BIAS: tl.constexpr, HAS_SQUARES: tl.constexpr, HAS_ROTATIONS: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Program (token, part): RMSNorm over all heads of one part of a row, and rotation of its pairs of channels."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = tl.arange(0, 2 * PAIRS)
    inside = columns < width
    x = tl.load(x_ptr + token * stride + part * width + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + part * width + columns, mask=inside, other=0.0)
        wide = (wide + bias.to(tl.float32)).to(x.dtype).to(tl.float32)
    square = tl.sum(wide * wide) / width
    if HAS_SQUARES:
        square = tl.load(squares_ptr + token * tl.num_programs(1) + part)
    weight = tl.load(weight_ptr + part * width + columns, mask=inside, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(square + eps) * weight
    if HAS_ROTATIONS:
        real, imaginary = tl.split(tl.reshape(normed, (PAIRS, 2)))
        # Cosines and sines are read as they lie, neighbours at once, and split on the chip; all heads have the same.
        turns = tl.load(rotations_ptr + token * 2 * HALF + columns % (2 * HALF))
        cosine, sine = tl.split(tl.reshape(turns, (PAIRS, 2)))
        turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        normed = tl.reshape(turned, (2 * PAIRS,))
    tl.store(out_ptr + (part * tl.num_programs(0) + token) * width + columns, normed, mask=inside)
