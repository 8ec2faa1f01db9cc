"""What a membership of sequences shares over its steps and layers, and the parts of it that go through blocks alone."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.packing import MembershipCache, Pack

MAX_PARTS = 16
"""Parts kept of one pack; which sequences skip together changes from step to step."""


class Arrangement:
    """Where the tokens of some sequences lie, how they are rotated and how they attend to each other."""

    def __init__(self, pack: Pack, rotations: Tensor, attention: PackedAttention) -> None:
        """rotations: [tokens, ...] in joint order."""
        self.pack = pack
        self.rotations = rotations
        self.attend = attention.over(pack)
        self._attention = attention
        self._parts: MembershipCache[Arrangement] = MembershipCache(MAX_PARTS)

    def select(self, members: tuple[int, ...]) -> Arrangement:
        """The same of some of the sequences, in order; made once."""
        return self._parts.get(members, lambda: self._part(members))

    def _part(self, members: tuple[int, ...]) -> Arrangement:
        by_sequence = self.rotations.split(self.pack.joint.lengths)
        rotations = torch.cat([by_sequence[i] for i in members])
        return Arrangement(self.pack.select(members), rotations, self._attention)
