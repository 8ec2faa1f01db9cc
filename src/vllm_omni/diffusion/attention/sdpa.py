"""PyTorch's scaled_dot_product_attention: one call for each run of neighbouring sequences of equal length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_omni.diffusion.packing import Offsets


class SdpaAttention:
    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets) -> Tensor:
        outs = [
            F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1)
            for batch in _batches(q, k, v, offsets_q, offsets_k)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def attend_with_lse(
        self, q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for batch in _batches(q, k, v, offsets_q, offsets_k):
            out, lse = _attend_with_lse(*batch)
            outs.append(out.transpose(1, 2).flatten(0, 1))
            lses.append(lse.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs), torch.cat(lses)


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, heads, length, head_dim] each -> the same of q, and float32 [batch, heads, length].

    Public SDPA returns no log-sum-exp. On the CPU its flash kernel does; elsewhere the scores are formed here: right on
    every device, not fast.
    """
    if k.shape[2] == 0 or q.shape[2] == 0:  # of a short text a rank may hold nothing
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse
    scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def _batches(
    q: Tensor, k: Tensor, v: Tensor, offsets_q: Offsets, offsets_k: Offsets
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Views [batch, heads, length, head_dim] of q, k and v, a batch being a run of equal lengths."""
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
