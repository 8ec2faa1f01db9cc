"""Random weights (`--load-format dummy`), to measure a model without its checkpoint.

A weight depends on its name in the checkpoint, its full shape, its dtype and the kind of device. So every run has the
same weights, and the shards of all ranks are parts of the same weight.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

STD = 0.02


def dummy_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random normal weight with standard deviation 0.02 and mean 0; for the scale of a norm, mean 1."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
    noise = torch.empty(shape, dtype=dtype, device=device)
    noise.normal_(std=STD, generator=torch.Generator(device).manual_seed(seed))
    is_vector = max(shape, default=1) == noise.numel()
    return noise.add_(1.0) if is_vector and name.endswith((".weight", ".gamma")) else noise
