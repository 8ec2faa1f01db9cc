"""Order and attention of a membership's tokens, the same at every step and in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.attention.static_keys import StaticAttention, StaticKeys
from vllm_omni.diffusion.compute.packing import MembershipCache, Pack

MAX_PARTS = 16
"""Parts kept of one pack; which sequences skip together changes from step to step."""


class Arrangement:
    """Positions, rotations and attention of the tokens of some sequences."""

    def __init__(
        self,
        pack: Pack,
        rotations: Tensor,
        attention: PackedAttention,
        image_rows: Tensor | None = None,
        static_keys: Mapping[str, Sequence[StaticKeys]] | None = None,
    ) -> None:
        """rotations: float32 [tokens, 1, 1, head_dim / 2, 2] in joint order. image_rows: int64 [image tokens], the row
        of modulation of each; None: that of its sequence, which text tokens always have. static_keys: by name, those of
        each sequence."""
        self.pack = pack
        self.rotations = rotations
        self.attend = attention.over(pack)
        self.has_own_rows = image_rows is not None
        """Whether some image tokens have rows of modulation that are not their sequence's."""
        self.image_rows = pack.image_sequence if image_rows is None else image_rows
        self.static_keys = static_keys or {}
        self._attention = attention
        self._static: dict[str, StaticAttention] = {}
        """By name, made at the first use."""
        self._parts: MembershipCache[Arrangement] = MembershipCache(MAX_PARTS)

    def attend_static(self, q: Tensor, block: int, name: str) -> Tensor:
        """Cross-attention of the image tokens to their sequence's static keys.

        q: [S, H / P, d], the image tokens of this rank; block: number of the block -> the same shape.
        """
        if name not in self._static:
            self._static[name] = self._attention.to_static(self.pack, self.static_keys[name])
        return self._static[name].attend(q, block)

    def attend_with_prefix(self, q: Tensor, k: Tensor, v: Tensor, block: int, name: str) -> Tensor:
        """`attend`, with the static keys as keys of a prefix of each sequence.

        q, k, v: [tokens of this rank in joint order, H / P, d] each -> the same shape.
        """
        if name not in self._static:
            self._static[name] = self.attend.to_prefix(self.static_keys[name])
        return self.attend(q, k, v, further=partial(self._static[name].attend_with_lse, block=block))

    def select(self, members: tuple[int, ...]) -> Arrangement:
        """Arrangement of some of the sequences, in order; made once."""
        return self._parts.get(members, lambda: self._part(members))

    def _part(self, members: tuple[int, ...]) -> Arrangement:
        def part(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
            by_sequence = rows.split(lengths)
            return torch.cat([by_sequence[i] for i in members])

        rotations = part(self.rotations, self.pack.joint.lengths)
        image_rows = part(self.image_rows, self.pack.image.lengths) if self.has_own_rows else None
        static_keys = {name: [keys[i] for i in members] for name, keys in self.static_keys.items()}
        return Arrangement(self.pack.select(members), rotations, self._attention, image_rows, static_keys)
