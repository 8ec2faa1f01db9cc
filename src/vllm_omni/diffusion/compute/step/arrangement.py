"""Order and attention of a membership's tokens, the same at every step and in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.packing import MembershipCache, Pack

MAX_PARTS = 16
"""Parts kept of one pack; which sequences skip together changes from step to step."""


class Arrangement:
    """Positions, rotations and attention of the tokens of some sequences."""

    def __init__(
        self, pack: Pack, rotations: Tensor, attention: PackedAttention, image_rows: Tensor | None = None
    ) -> None:
        """rotations: float32 [tokens, 1, 1, head_dim / 2, 2] in joint order. image_rows: int64 [image tokens], the row
        of modulation of each; None: that of its sequence, which text tokens always have."""
        self.pack = pack
        self.rotations = rotations
        self.attend = attention.over(pack)
        self.has_own_rows = image_rows is not None
        """Whether some image tokens have rows of modulation that are not their sequence's."""
        self.image_rows = pack.image_sequence if image_rows is None else image_rows
        self._attention = attention
        self._parts: MembershipCache[Arrangement] = MembershipCache(MAX_PARTS)

    def select(self, members: tuple[int, ...]) -> Arrangement:
        """Arrangement of some of the sequences, in order; made once."""
        return self._parts.get(members, lambda: self._part(members))

    def _part(self, members: tuple[int, ...]) -> Arrangement:
        def part(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
            by_sequence = rows.split(lengths)
            return torch.cat([by_sequence[i] for i in members])

        rotations = part(self.rotations, self.pack.joint.lengths)
        image_rows = part(self.image_rows, self.pack.image.lengths) if self.has_own_rows else None
        return Arrangement(self.pack.select(members), rotations, self._attention, image_rows)
