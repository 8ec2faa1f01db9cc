"""GGUF files with the weights of a tiny model's transformer, in any type, and the same weights expanded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

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


def random_blocks(kind: str, num_blocks: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    """Valid blocks with random numbers: uint8 [blocks, bytes of a block]. scale: standard deviation of the scales."""
    rng = np.random.default_rng(seed)
    num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = rng.integers(0, 256, (num_blocks, num_bytes), dtype=np.uint8)
    for first in HALVES[kind]:
        halves = (rng.normal(size=(num_blocks, 1)) * scale).astype(np.float16)
        blocks[:, first : first + 2] = halves.view(np.uint8)
    return blocks


def stored_as(kind: str, weight: Tensor, seed: int = 0) -> np.ndarray:
    """Rows of a weight in a type: floats, or uint8 [..., bytes of a row].

    The package rounds to the types without K. Those with K get random numbers of about the same size.
    """
    array = weight.detach().float().numpy()
    quant = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return gguf.quantize(array, quant)
    num_blocks = array.size // 256
    trial = random_blocks(kind, num_blocks, 1.0, seed)
    size = gguf.dequantize(trial, quant).std()
    return random_blocks(kind, num_blocks, float(array.std() / size), seed).reshape(*array.shape[:-1], -1)


def save_gguf(
    weights: Mapping[str, Tensor], file: Path, kind_of: Callable[[str, Tensor], str], architecture: str = "tiny"
) -> dict[str, Tensor]:
    """Write a GGUF file, and return its weights as the package expands them, in float32.

    kind_of: function from the name and value of a weight to the name of its type.
    """
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    expanded = {}
    for number, (name, weight) in enumerate(weights.items()):
        quant = gguf.GGMLQuantizationType[kind_of(name, weight)]
        stored = stored_as(quant.name, weight, number)
        writer.add_tensor(name, stored, raw_dtype=quant)
        expanded[name] = torch.from_numpy(gguf.dequantize(stored, quant).astype(np.float32)).view(weight.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expanded
