"""What every attention backend does."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vllm_omni.diffusion.packing import Offsets


class AttentionBackend(Protocol):
    """Full (not causal) attention within each sequence of a packed run of tokens.

    q: [query tokens, heads, head_dim]; k, v: [key tokens, heads, head_dim]. Sequence i owns the rows between
    `offsets.values[i]` and `[i + 1]`; queries and keys have the same number of sequences. The scale is
    1/sqrt(head_dim).
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        """-> [query tokens, heads, head_dim]."""
        ...

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[Tensor, Tensor]:
        """-> (as `attend`, log-sum-exp of the scores [query tokens, heads] in float32)."""
        ...
