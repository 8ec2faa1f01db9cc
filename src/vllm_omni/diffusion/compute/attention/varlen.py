"""Base of backends whose kernels take sequences of any lengths in one call, with their offsets on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.packing import Offsets


class VarlenAttention(ABC):
    """An `AttentionBackend` by a variable-length kernel.

    Kernels differ in their output for a sequence without keys, so this class writes it.
    """

    @abstractmethod
    def attend_packed(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        """Output in the shape of q, for at least one query and one key."""

    @abstractmethod
    def attend_packed_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[Tensor, Tensor]:
        """Output in the shape of q, and the log-sum-exp in the kernels' layout: float32 [heads, query tokens]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        if len(q) == 0 or len(k) == 0:
            return torch.zeros_like(q)
        out = self.attend_packed(q, k, v, offsets_q, offsets_k)
        for rows in _without_keys(offsets_q, offsets_k):
            out[rows].zero_()
        return out

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[Tensor, Tensor]:
        if len(q) == 0 or len(k) == 0:
            return torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        out, lse = self.attend_packed_with_lse(q, k, v, offsets_q, offsets_k)
        assert lse.shape == (q.shape[1], len(q)), f"log-sum-exp of {q.shape[1]} heads, {len(q)} tokens: {lse.shape}"
        lse = lse.T
        for rows in _without_keys(offsets_q, offsets_k):
            out[rows].zero_()
            lse[rows].fill_(-torch.inf)
        return out, lse


def _without_keys(offsets_q: Offsets, offsets_k: Offsets) -> Iterator[slice]:
    """Rows of each sequence that has queries and no keys."""
    for i, (len_q, len_k) in enumerate(zip(offsets_q.lengths, offsets_k.lengths)):
        if len_q and not len_k:
            yield slice(offsets_q.values[i], offsets_q.values[i + 1])
