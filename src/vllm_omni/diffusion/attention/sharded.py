"""Attention over sequences whose tokens are cut over ranks: Ulysses inside, ring outside.

Attention within a sequence does not depend on the order of its tokens once they are rotated, so ranks may hold any
part of them. Ulysses (arXiv 2309.14509) turns (my tokens, all heads) into (all tokens, my heads) and back, each with
one all-to-all; the ring (arXiv 2310.01889) lets keys and values travel past the queries. Neither tokens nor heads need
to divide: every rank knows every rank's share, so no shape is exchanged and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_omni.diffusion.attention.base import AttentionBackend
from vllm_omni.diffusion.distributed.groups import Group
from vllm_omni.diffusion.distributed.ring import Ring
from vllm_omni.diffusion.packing import Offsets, Pack, cut
from vllm_omni.diffusion.transfers import to_device

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v: [tokens of this rank in joint order, heads, head_dim] each -> the same shape."""


class PackedAttention:
    """Attention for packs; `over` prepares what a membership of sequences shares over its steps and layers."""

    def __init__(self, backend: AttentionBackend, ulysses: Group, ring: Group) -> None:
        self._backend = backend
        self._ulysses = ulysses
        self._ring = Ring(ring)

    def over(self, pack: Pack) -> Attend:
        if self._ulysses.size * self._ring.size > 1:
            return ShardedAttention(self._backend, self._ulysses, self._ring, pack)
        backend, offsets = self._backend, pack.joint
        return lambda q, k, v: backend.attend(q, k, v, offsets, offsets)


class ShardedAttention:
    """The exchange of one pack. T: tokens of this rank; S: those of all ranks of its Ulysses group; H, h: heads."""

    def __init__(self, backend: AttentionBackend, ulysses: Group, ring: Ring, pack: Pack) -> None:
        self._backend = backend
        self._ulysses = ulysses
        self._ring = ring
        device = pack.text_sequence.device
        # The rank that is `u` in its Ulysses group and `r` in its ring holds part r * ulysses + u of every sequence.
        shards = [pack.joint_lengths[r * ulysses.size : (r + 1) * ulysses.size] for r in range(ring.size)]
        self._tokens = [sum(lengths) for lengths in shards[ring.rank]]
        """Tokens of each rank of the Ulysses group."""
        self._offsets = [Offsets.of([sum(column) for column in zip(*shard)], device) for shard in shards]
        """By rank of the ring: where each sequence begins in its S tokens."""
        order = _sequence_order(shards[ring.rank])
        self._order, self._inverse = to_device(order, device), to_device(order.argsort(), device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = cut(q.shape[1], self._ulysses.size)
        qkv = torch.stack((q, k, v), dim=1)
        if self._ulysses.size == 1:
            return self._attend(qkv)
        return self._gather_heads(self._attend(self._scatter_heads(qkv, heads)), heads)

    def _scatter_heads(self, qkv: Tensor, heads: Sequence[int]) -> Tensor:
        """[T, 3, H, d] -> [S, 3, h, d] in sequence order."""
        mine, width = heads[self._ulysses.rank], 3 * qkv.shape[-1]
        send = torch.cat([part.flatten() for part in qkv.split(list(heads), dim=2)])
        received = self._ulysses.all_to_all(
            send, [len(qkv) * width * h for h in heads], [tokens * width * mine for tokens in self._tokens]
        )
        return received.view(-1, 3, mine, qkv.shape[-1]).index_select(0, self._order)

    def _gather_heads(self, out: Tensor, heads: Sequence[int]) -> Tensor:
        """The way back: [S, h, d] in sequence order -> [T, H, d]."""
        _, mine, width = out.shape
        num_tokens = self._tokens[self._ulysses.rank]
        sizes = [num_tokens * h * width for h in heads]
        received = self._ulysses.all_to_all(
            out.index_select(0, self._inverse).flatten(), [tokens * mine * width for tokens in self._tokens], sizes
        )
        parts = received.split(sizes)
        return torch.cat([part.view(num_tokens, h, width) for part, h in zip(parts, heads)], dim=1)

    def _attend(self, qkv: Tensor) -> Tensor:
        """[S, 3, h, d] -> [S, h, d]: my queries over the keys and values of the whole ring."""
        ring, offsets = self._ring, self._offsets
        q, kv = qkv[:, 0], qkv[:, 1:]
        mine = offsets[ring.rank]
        if ring.size == 1:
            return self._backend.attend(q, kv[:, 0], kv[:, 1], mine, mine)
        merged = Merged(q)
        for step in range(ring.size):
            held = offsets[(ring.rank - step) % ring.size]
            if step + 1 < ring.size:  # on its way while this rank computes on the block that it holds
                coming = offsets[(ring.rank - step - 1) % ring.size]
                ring.post(kv, (coming.values[-1], *kv.shape[1:]))
            merged.add(*self._backend.attend_with_lse(q, kv[:, 0], kv[:, 1], mine, held))
            if step + 1 < ring.size:
                kv = ring.wait()
        return merged.out.to(q.dtype)


class Merged:
    """Attention over several blocks of keys, from the attention over each and its log-sum-exp, in float32."""

    def __init__(self, q: Tensor) -> None:
        """q: [tokens, heads, head_dim]."""
        self.out = torch.zeros_like(q, dtype=torch.float32)
        self._lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)

    def add(self, out: Tensor, lse: Tensor) -> None:
        """out: as q; lse: float32 [tokens, heads], -inf where the block has no key of the token's sequence."""
        total = torch.logaddexp(self._lse, lse)
        # exp(-inf - -inf): no key seen so far, nothing to weigh.
        before, now = ((x - total).exp().nan_to_num_(nan=0.0)[..., None] for x in (self._lse, lse))
        self.out = before * self.out + now * out
        self._lse = total


def _sequence_order(lengths: Sequence[Sequence[int]]) -> Tensor:
    """int64 [tokens]: rows that lie rank after rank, each rank's by sequence, in the order sequence after sequence.

    lengths: by rank, the tokens of each sequence.
    """
    owner = torch.cat([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    return owner.argsort(stable=True)
