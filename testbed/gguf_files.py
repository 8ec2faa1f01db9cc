"""GGUF files with random weights of a tiny model's transformer, in any type, and the same weights expanded."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vllm_omni.diffusion.catalog.gguf_header import TYPES

ALIGNMENT = 32
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Type -> first bytes of the float16 numbers in its blocks; any bytes are valid elsewhere."""
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NUMBERS = {kind.name: number for number, kind in TYPES.items()}
KINDS = {kind.name: kind for kind in TYPES.values()}
Expand = Callable[[str, np.ndarray], Tensor]
"""Function from the name of a type and uint8 [blocks, bytes of a block] to float32 [blocks, numbers of a block]."""


def random_blocks(kind: str, num_blocks: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Valid blocks with random numbers: uint8 [blocks, bytes of a block]. scale: standard deviation of the scales."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_blocks, KINDS[kind].block_bytes), dtype=np.uint8)
    for first in HALVES[kind]:
        halves = (rng.normal(size=(num_blocks, 1)) * scale).astype(np.float16)
        blocks[:, first : first + 2] = halves.view(np.uint8)
    return blocks


def expand_by_package(kind: str, blocks: np.ndarray) -> Tensor:
    """Numbers of blocks as the gguf package computes them."""
    import gguf  # machines with GPUs may lack it

    floats = {"F32": np.float32, "F16": np.float16}
    stored = blocks.view(floats[kind]) if kind in floats else blocks
    return torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[kind]).astype(np.float32))


def _stored(kind: str, weight: Tensor, seed: int, expand: Expand) -> np.ndarray:
    """Blocks in place of a weight: of the same numbers for floats, else random ones of about the same size."""
    if kind in FLOATS:
        numbers = weight.detach().to(FLOATS[kind]).contiguous().flatten()
        return numbers.view(torch.uint8).numpy().reshape(-1, KINDS[kind].block_bytes)
    num_blocks = weight.numel() // KINDS[kind].block_numbers
    size = float(expand(kind, random_blocks(kind, num_blocks, 1.0, seed)).std())
    return random_blocks(kind, num_blocks, float(weight.detach().std()) / size, seed)


def save_gguf(
    weights: Mapping[str, Tensor],
    file: Path,
    kind_of: Callable[[str, Tensor], str],
    expand: Expand = expand_by_package,
) -> dict[str, Tensor]:
    """Write a GGUF file, and return its weights expanded, in float32.

    kind_of: function from the name and value of a weight to the name of its type.
    """
    header = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(weights), 0))
    data = bytearray()
    expanded = {}
    for seed, (name, weight) in enumerate(weights.items()):
        kind = kind_of(name, weight)
        stored = _stored(kind, weight, seed, expand)
        dims = weight.shape[::-1]
        header += struct.pack("<Q", len(name.encode())) + name.encode()
        header += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, NUMBERS[kind], len(data))
        data += _aligned(stored.tobytes())
        expanded[name] = expand(kind, stored).view(weight.shape)
    file.write_bytes(_aligned(bytes(header)) + data)
    return expanded


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def mixed_types(name: str, weight: Tensor) -> str:
    """Types side by side, as in published files: other ones for queries and values, floats for small weights."""
    columns = weight.shape[-1]
    if weight.dim() != 2 or min(weight.shape) == 1 or columns % 32:
        return "F16" if weight.dim() > 1 and min(weight.shape) > 1 else "F32"
    by_32, by_256 = ("Q8_0", "Q4_0", "Q5_1", "Q4_1", "Q5_0"), ("Q4_K", "Q6_K", "Q5_K", "Q2_K", "Q3_K")
    choices = by_32 if columns % 256 else by_256
    return (*choices, "BF16")[sum(name.encode()) % 6]
