"""Base of backends whose kernels take a batch of equally long sequences: one call for neighbours of equal length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.packing import Offsets

Batch = tuple[Tensor, Tensor, Tensor]
"""q, k and v: [batch, heads, length, head_dim] each, not empty."""


class DenseAttention(ABC):
    """An `AttentionBackend` by a kernel for batches."""

    @abstractmethod
    def attend_batch(self, batch: Batch) -> Tensor:
        """Attention output, in the shape of q."""

    @abstractmethod
    def attend_batch_with_lse(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Output in the shape of q, and the log-sum-exp: float32 [batch, heads, length]."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        outs = [
            torch.zeros_like(batch[0]) if _is_empty(batch) else self.attend_batch(batch)
            for batch in _batches(q, k, v, offsets_q, offsets_k)
        ]
        return _in_order(outs)

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[Tensor, Tensor]:
        batches = _batches(q, k, v, offsets_q, offsets_k)
        pairs = [_nothing(batch[0]) if _is_empty(batch) else self.attend_batch_with_lse(batch) for batch in batches]
        return _in_order([out for out, _ in pairs]), _in_order([lse for _, lse in pairs])


def _is_empty(batch: Batch) -> bool:
    q, k, _ = batch
    return q.shape[2] == 0 or k.shape[2] == 0


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp without keys: a rank may hold no token of a short text."""
    return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)


def _in_order(parts: list[Tensor]) -> Tensor:
    """Join batches [batch, heads, length, ...] to [tokens, heads, ...]."""
    rows = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _batches(q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Iterator[Batch]:
    """Views of q, k and v: one batch for each run of neighbours of equal length."""
    assert len(offsets_q.values) == len(offsets_k.values)
    start_q = start_k = 0
    for (len_q, len_k), run in groupby(zip(offsets_q.lengths, offsets_k.lengths)):
        batch = len(list(run))
        end_q, end_k = start_q + batch * len_q, start_k + batch * len_k
        yield (
            q[start_q:end_q].unflatten(0, (batch, len_q)).transpose(1, 2),
            k[start_k:end_k].unflatten(0, (batch, len_k)).transpose(1, 2),
            v[start_k:end_k].unflatten(0, (batch, len_k)).transpose(1, 2),
        )
        start_q, start_k = end_q, end_k
