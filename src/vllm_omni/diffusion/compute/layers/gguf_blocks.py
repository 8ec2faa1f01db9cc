"""Expansion of GGUF's blocks to numbers, in PyTorch.

Nothing here waits for the device or copies from the host, so that steps can be captured as CUDA graphs. Layouts of the
blocks: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.gguf_header import GgufType

CHUNK_NUMBERS = 2**24
"""Numbers that are expanded at a time, so that intermediate results stay small beside an expanded layer."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Decoded(NamedTuple):
    """Numbers of blocks: `scale * codes + offset`."""

    codes: Tensor
    """int8 or uint8 [blocks, groups, numbers of a group]."""
    scale: Tensor
    """float32 [blocks, groups, 1]."""
    offset: Tensor | None = None
    """float32 [blocks, groups, 1]; None: 0."""


def expand_blocks(kind: GgufType, blocks: Tensor, out: Tensor) -> None:
    """Write the numbers of rows of blocks to `out`, computed in float32.

    blocks: uint8 [rows, bytes of a row]; out: [rows, numbers of a row], any floating-point dtype.
    """
    rows_at_once = max(1, CHUNK_NUMBERS // max(1, out.shape[1]))
    for part, target in zip(blocks.split(rows_at_once), out.split(rows_at_once), strict=True):
        if kind.name in FLOATS:
            target.copy_(part.view(FLOATS[kind.name]))
            continue
        decoded = DECODERS[kind.name](part.reshape(-1, kind.block_bytes))
        # In place where the target allows it: the last operation also rounds to its dtype.
        place = target.view(decoded.codes.shape)
        if decoded.offset is None:
            torch.mul(decoded.codes, decoded.scale, out=place)
        else:
            torch.add(decoded.codes * decoded.scale, decoded.offset, out=place)


def _half(blocks: Tensor, first: int) -> Tensor:
    """Float16 that begins at this byte of each block: float32 [blocks, 1]."""
    return blocks[:, first : first + 2].view(torch.float16).float()


def _fields(values: Tensor, width: int) -> Tensor:
    """Bit fields of bytes, from the lowest: uint8 [..., n] -> uint8 [..., 8 / width, n]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=values.device)
    fields: Tensor = (values[..., None, :] >> shifts[:, None]) & (2**width - 1)
    return fields


def _nibbles(values: Tensor) -> Tensor:
    """16 bytes as 32 numbers, those of the low halves first: uint8 [blocks, 16] -> uint8 [blocks, 32]."""
    return _fields(values, 4).flatten(1)


def _fifth_bits(values: Tensor) -> Tensor:
    """Bits of 4 bytes in order, each as 16 or 0: uint8 [blocks, 4] -> uint8 [blocks, 32]."""
    return _fields(values, 1).transpose(1, 2).flatten(1) << 4


def _signed(codes: Tensor, zero: int) -> Tensor:
    """Codes less the code of zero: uint8 -> int8."""
    return codes.view(torch.int8) - zero


def _q4_0(blocks: Tensor) -> Decoded:
    return Decoded(_signed(_nibbles(blocks[:, 2:]), 8)[:, None], _half(blocks, 0)[..., None])


def _q4_1(blocks: Tensor) -> Decoded:
    return Decoded(_nibbles(blocks[:, 4:])[:, None], _half(blocks, 0)[..., None], _half(blocks, 2)[..., None])


def _q5_0(blocks: Tensor) -> Decoded:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return Decoded(_signed(codes, 16)[:, None], _half(blocks, 0)[..., None])


def _q5_1(blocks: Tensor) -> Decoded:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return Decoded(codes[:, None], _half(blocks, 0)[..., None], _half(blocks, 2)[..., None])


def _q8_0(blocks: Tensor) -> Decoded:
    return Decoded(blocks[:, 2:].view(torch.int8)[:, None], _half(blocks, 0)[..., None])


def _q2_k(blocks: Tensor) -> Decoded:
    scales, codes = blocks[:, :16], _fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16)
    scale, offset = _half(blocks, 80) * (scales & 15), _half(blocks, 82) * (scales >> 4)
    return Decoded(codes, scale[..., None], -offset[..., None])


def _q3_k(blocks: Tensor) -> Decoded:
    high = _fields(blocks[:, :32], 1).reshape(-1, 16, 16)
    low = _fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16)
    stored = blocks[:, 96:108]
    scales = _fields(stored[:, :8], 4).flatten(1) | (_fields(stored[:, 8:], 2).flatten(1) << 4)
    scale = _half(blocks, 108) * _signed(scales, 32)
    return Decoded(_signed(low | (high << 2), 4), scale[..., None])


def _six_bits(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of 8 groups, 6 bits each: uint8 [blocks, 12] -> uint8 [blocks, 8], twice."""
    scales, offsets, rest = stored.split(4, dim=1)
    return (
        torch.cat((scales & 63, (rest & 15) | ((scales >> 2) & 48)), dim=1),
        torch.cat((offsets & 63, (rest >> 4) | ((offsets >> 2) & 48)), dim=1),
    )


def _q4_k(blocks: Tensor) -> Decoded:
    scales, offsets = _six_bits(blocks[:, 4:16])
    codes = _fields(blocks[:, 16:].unflatten(1, (4, 32)), 4).flatten(1, 2)
    return Decoded(codes, (_half(blocks, 0) * scales)[..., None], -(_half(blocks, 2) * offsets)[..., None])


def _q5_k(blocks: Tensor) -> Decoded:
    scales, offsets = _six_bits(blocks[:, 4:16])
    low = _fields(blocks[:, 48:].unflatten(1, (4, 32)), 4).flatten(1, 2)
    codes = low | (_fields(blocks[:, 16:48], 1) << 4)
    return Decoded(codes, (_half(blocks, 0) * scales)[..., None], -(_half(blocks, 2) * offsets)[..., None])


def _q6_k(blocks: Tensor) -> Decoded:
    low = _fields(blocks[:, :128].unflatten(1, (2, 64)), 4).reshape(-1, 16, 16)
    high = _fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return Decoded(_signed(low | (high << 4), 32), scale[..., None])


DECODERS: dict[str, Callable[[Tensor], Decoded]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""Name of a type -> function from blocks, uint8 [blocks, bytes of a block], to their numbers."""
