"""Random weights in place of a checkpoint's (`--load-format dummy`): for measuring a model whose weights are not there.

A weight depends on its name in the checkpoint, its whole shape, its dtype and the kind of device. So runs repeat, ranks
agree on what all of them hold, and shares of a weight are cut from the same whole.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

STD = 0.02


def dummy_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal, of deviation 0.02 around 0, or around 1 for the scales of norms."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
    noise = torch.empty(shape, dtype=dtype, device=device)
    noise.normal_(std=STD, generator=torch.Generator(device).manual_seed(seed))
    is_vector = max(shape, default=1) == noise.numel()
    return noise.add_(1.0) if is_vector and name.endswith((".weight", ".gamma")) else noise
