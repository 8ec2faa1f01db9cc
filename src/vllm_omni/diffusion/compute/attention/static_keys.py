"""Attention to keys and values that stay the same from step to step: those of a text, or of a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.attention.base import AttentionBackend
from vllm_omni.diffusion.compute.packing import Offsets


@dataclass(frozen=True)
class StaticKeys:
    """Keys and values of tokens that stay the same from step to step, for every block of a transformer; one sequence.

    Every rank holds all tokens. Captured graphs read these tensors where they are, so nobody changes them in place.
    """

    keys: Tensor
    """[blocks, stored tokens, H / P, d], with H heads over P tensor parallel ranks."""
    values: Tensor
    """The same shape."""
    last_count: int = 1
    """Tokens that the last stored one stands for: padding tokens have equal keys, and equal values."""

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1] + self.last_count - 1

    def of_block(self, block: int, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens in one block: [tokens, heads, d] each."""
        return self._with_all_tokens(self.keys[block][:, heads]), self._with_all_tokens(self.values[block][:, heads])

    def _with_all_tokens(self, stored: Tensor) -> Tensor:
        if self.last_count == 1:
            return stored
        return torch.cat((stored, stored[-1:].expand(self.last_count - 1, -1, -1)))


class StaticAttention:
    """Attention of each sequence's queries to its static keys: one call for each sequence."""

    def __init__(
        self,
        backend: AttentionBackend,
        sequences: Sequence[StaticKeys],
        lengths: Sequence[int],
        heads: slice = slice(None),
    ) -> None:
        """lengths: queries of each sequence. heads: heads of the static keys that the queries have."""
        self._backend = backend
        self._sequences = list(sequences)
        self._lengths = list(lengths)
        self._heads = heads
        device = sequences[0].keys.device
        self._offsets_q = [Offsets.of([n], device) for n in lengths]
        self._offsets_k = [Offsets.of([static.num_tokens], device) for static in sequences]

    def attend(self, q: Tensor, block: int) -> Tensor:
        """[queries, heads, d] in the order of the sequences -> the same shape."""
        outs = [self._backend.attend(*arguments) for arguments in self._calls(q, block)]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def attend_with_lse(self, q: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Output of `attend`, and the log-sum-exp of the scores: float32 [queries, heads]."""
        outs, lses = zip(*(self._backend.attend_with_lse(*arguments) for arguments in self._calls(q, block)))
        return torch.cat(outs), torch.cat(lses)

    def _calls(self, q: Tensor, block: int) -> list[tuple[Tensor, Tensor, Tensor, Offsets, Offsets]]:
        """Arguments of the backend for each sequence."""
        keys, values = zip(*(static.of_block(block, self._heads) for static in self._sequences))
        return list(zip(q.split(self._lengths), keys, values, self._offsets_q, self._offsets_k, strict=True))
