"""What every attention backend does, and what it says of itself before it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.packing import Offsets


@dataclass(frozen=True)
class Setting:
    """Where attention is to run, and on what."""

    device: torch.device
    capability: tuple[int, int] | None
    """CUDA compute capability of the device; None: it is no GPU."""
    dtype: torch.dtype
    head_dim: int


class AttentionBackend(Protocol):
    """Full (not causal) attention within each sequence of a packed run of tokens.

    q: [query tokens, heads, head_dim]; k, v: [key tokens, heads, head_dim]. Sequence i owns the rows between
    `offsets.values[i]` and `[i + 1]`; queries and keys have the same number of sequences, and any of them may be empty.
    The scale is 1/sqrt(head_dim). The host does not wait for the device.
    """

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        """In one line, what this backend lacks in `setting`; None: it runs there."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        """-> [query tokens, heads, head_dim]; 0 for queries whose sequence has no keys."""
        ...

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[Tensor, Tensor]:
        """-> (as `attend`, log-sum-exp of the scores [query tokens, heads] in float32; -inf without keys)."""
        ...
