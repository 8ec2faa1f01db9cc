"""Attention over sequences whose tokens are sharded over ranks: Ulysses inside, ring outside.

After the rotary embedding, attention does not depend on the order of a sequence's tokens, so a rank may hold any shard
of them. Ulysses (arXiv 2309.14509) converts (tokens of this rank, all heads) to (all tokens, heads of this rank) with
one all-to-all, and back with another. The ring (arXiv 2310.01889) passes keys and values from rank to rank. Numbers of
tokens and heads need not be multiples of the ranks: every rank computes the shard sizes of all ranks, so no size is
exchanged and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.attention.base import AttentionBackend
from vllm_omni.diffusion.compute.attention.static_keys import StaticAttention, StaticKeys
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.ring import Ring
from vllm_omni.diffusion.compute.packing import Offsets, Pack, shard_lengths, shard_slice

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of one pack. q, k, v: [tokens of this rank in joint order, heads, head_dim] each -> the same shape."""
Further = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Attention of the same queries to further keys: q -> output, and log-sum-exp as `AttentionBackend` has it."""


class PackedAttention:
    """Attention for packs, on one rank or several."""

    def __init__(self, backend: AttentionBackend, ulysses: Group, ring: Group) -> None:
        self._backend = backend
        self._ulysses = ulysses
        self._ring = ring

    def over(self, pack: Pack) -> ShardedAttention:
        """Attention for one pack; serves all layers, and all steps of the same membership."""
        return ShardedAttention(self._backend, self._ulysses, self._ring, pack)

    def to_static(self, pack: Pack, sequences: Sequence[StaticKeys]) -> StaticAttention:
        """Attention of this rank's image tokens to static keys. Each rank has all keys, so nothing is exchanged."""
        return StaticAttention(self._backend, sequences, pack.image.lengths)


class ShardedAttention:
    """Attention of one pack over several ranks.

    T: tokens of this rank; S: tokens of all ranks of its Ulysses group; H: all heads; h: heads of this rank.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        ulysses: Group,
        ring: Group,
        pack: Pack,
        make_ring: Callable[[Group], Ring] = Ring,
    ) -> None:
        """make_ring: constructor of the Ring of one call."""
        self._backend = backend
        self._ulysses = ulysses
        self._ring = ring
        self._make_ring = make_ring
        device = pack.text_sequence.device
        # Rank `u` of a Ulysses group and `r` of a ring holds shard r * ulysses + u of every sequence.
        shards = [pack.joint_lengths[r * ulysses.size : (r + 1) * ulysses.size] for r in range(ring.size)]
        mine = shards[ring.rank]
        self._tokens = [sum(lengths) for lengths in mine]
        """Tokens of each rank of the Ulysses group."""
        self._by_rank = _Runs(list(chain.from_iterable(mine)), len(mine[0]))
        self._by_sequence = _Runs(list(chain.from_iterable(zip(*mine))), len(mine))
        self._offsets = [Offsets.of([sum(column) for column in zip(*shard)], device) for shard in shards]
        """Offsets of the sequences in the S tokens of each rank of the ring."""

    def to_prefix(self, sequences: Sequence[StaticKeys]) -> StaticAttention:
        """Attention to a prefix of each sequence, for `further`: of the S tokens and h heads that this rank attends."""
        heads = shard_slice(sequences[0].keys.shape[2], self._ulysses.size, self._ulysses.rank)
        return StaticAttention(self._backend, sequences, self._offsets[self._ring.rank].lengths, heads)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, further: Further | None = None) -> Tensor:
        """[T, H, d] each -> [T, H, d]. further: attention [S, h, d] to keys beside those of the pack."""
        if self._ulysses.size == 1:
            return self._attend(q, k, v, further=further)
        heads = shard_lengths(q.shape[1], self._ulysses.size)
        attended = self._attend(*self._scatter_heads((q, k, v), heads), further=further)
        return self._gather_heads(attended, heads)

    def _scatter_heads(self, qkv: Sequence[Tensor], heads: Sequence[int]) -> tuple[Tensor, ...]:
        """All-to-all: [T, H, d] each -> [S, h, d] each, sequence after sequence."""
        num_tokens, _, head_dim = qkv[0].shape
        mine, width = heads[self._ulysses.rank], 3 * head_dim
        sizes = [num_tokens * width * h for h in heads]
        send = qkv[0].new_empty(sum(sizes))
        for part, h, *shares in zip(send.split(sizes), heads, *(x.split(list(heads), dim=1) for x in qkv)):
            torch.stack(shares, dim=1, out=part.view(num_tokens, 3, h, head_dim))
        received = self._ulysses.all_to_all(send, sizes, [tokens * width * mine for tokens in self._tokens])
        return self._by_rank.transposed(received.view(-1, 3, mine, head_dim)).unbind(1)

    def _gather_heads(self, out: Tensor, heads: Sequence[int]) -> Tensor:
        """All-to-all, the inverse of `_scatter_heads`: [S, h, d] -> [T, H, d]."""
        _, mine, width = out.shape
        num_tokens = self._tokens[self._ulysses.rank]
        sizes = [num_tokens * h * width for h in heads]
        send = self._by_sequence.transposed(out).flatten()
        received = self._ulysses.all_to_all(send, [tokens * mine * width for tokens in self._tokens], sizes)
        parts = received.split(sizes)
        return torch.cat([part.view(num_tokens, h, width) for part, h in zip(parts, heads)], dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, further: Further | None) -> Tensor:
        """[S, h, d] each -> [S, h, d]: this rank's queries attend to the keys of all ranks of the ring."""
        group, offsets = self._ring, self._offsets
        mine = offsets[group.rank]
        if group.size == 1 and further is None:
            return self._backend.attend(q, k, v, mine, mine)
        merged = Merged()
        if further is not None:
            merged.add(*further(q))
        if group.size == 1:
            merged.add(*self._backend.attend_with_lse(q, k, v, mine, mine))
            return merged.out.to(q.dtype)
        # A new Ring for each call: a call that fails (out of memory, in the capture of a CUDA graph) may leave a block
        # in transfer, and is repeated.
        ring = self._make_ring(group)
        kv = torch.stack((k, v))
        for step in range(ring.size):
            held = offsets[(ring.rank - step) % ring.size]
            if step + 1 < ring.size:  # the transfer overlaps the attention to the held block
                coming = offsets[(ring.rank - step - 1) % ring.size]
                ring.post(kv, (2, coming.values[-1], *k.shape[1:]))
            merged.add(*self._backend.attend_with_lse(q, kv[0], kv[1], mine, held))
            if step + 1 < ring.size:
                kv = ring.wait()
        return merged.out.to(q.dtype)


class Merged:
    """Attention to several blocks of keys, merged from the output and log-sum-exp of each block, in float32."""

    out: Tensor
    """float32 [tokens, heads, head_dim]; set by the first `add`."""
    _lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Merge one block. out: [tokens, heads, head_dim], finite; lse: float32 [tokens, heads].

        `lse` is -inf where the block has no key of the token's sequence.
        """
        if self._lse is None:
            self.out, self._lse = out.float(), lse
            return
        # share = exp(lse) / (exp(lse) + exp(self._lse)); NaN from -inf - -inf: no keys so far.
        share = (lse - self._lse).sigmoid().nan_to_num_(nan=0.0)
        self.out = torch.lerp(self.out, out.float(), share[..., None])
        self._lse = torch.logaddexp(self._lse, lse)


@dataclass(frozen=True)
class _Runs:
    """Order of rows: by rank, then by sequence, or the reverse. A run has the rows of one sequence on one rank."""

    lengths: list[int]
    """Rows of each run, in this order."""
    inner: int
    """Runs of one rank, or of one sequence: the inner loop of the order."""

    def transposed(self, x: Tensor) -> Tensor:
        """Rows in the other order; `x` itself if there is one sequence or one rank."""
        if self.inner == 1 or self.inner == len(self.lengths):
            return x
        pieces = x.split(self.lengths)
        return torch.cat([piece for i in range(self.inner) for piece in pieces[i :: self.inner]])
