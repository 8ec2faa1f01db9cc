"""Interface of attention backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.packing import Offsets


@dataclass(frozen=True)
class Setting:
    """Device and tensors that a backend is asked to support."""

    device: torch.device
    capability: tuple[int, int] | None
    """CUDA compute capability; None: the device is no GPU."""
    dtype: torch.dtype
    head_dim: int
    """Channels of one attention head."""


class AttentionBackend(Protocol):
    """Full (not causal) attention within each sequence of a pack.

    q: [query tokens, heads, head_dim]; k, v: [key tokens, heads, head_dim]. Sequence i has the rows from
    `offsets.values[i]` to `offsets.values[i + 1]`. Queries and keys have as many sequences; each may be empty.
    The scale is 1/sqrt(head_dim). The host does not wait for the device.
    """

    @classmethod
    def why_not(cls, setting: Setting) -> str | None:
        """Reason in one line why this backend cannot run in `setting`; None: it can."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        """Attention output [query tokens, heads, head_dim]; 0 for queries whose sequence has no keys."""
        ...

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[Tensor, Tensor]:
        """Output of `attend`, and the log-sum-exp of the scores: float32 [query tokens, heads], -inf without keys."""
        ...
