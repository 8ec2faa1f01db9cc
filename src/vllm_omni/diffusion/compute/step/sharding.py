"""Shards of the sequences that this rank computes, and the exchange of velocities after the forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.packing import shard_slice


class Sharding:
    """Shards of one membership: rank groups compute different sequences, ranks of a group share each sequence.

    Latents are replicated and activations are sharded: a rank takes its shards of the latents, and after the forward
    every rank gets the whole velocity of every sequence. The first image tokens of a sequence, its targets, have
    velocities; further ones (reference pictures) are sharded too and have none.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        groups: Sequence[int],
        mesh: Mesh,
        device: torch.device,
        targets: Sequence[int] | None = None,
    ) -> None:
        """lengths: image tokens of each sequence. groups: number of the rank group that computes it. targets: number of
        its image tokens, the first ones, that have a velocity; None: all."""
        targets = lengths if targets is None else targets
        assert len(lengths) == len(groups) == len(targets)
        self.mine = [i for i, group in enumerate(groups) if group == mesh.cfg_index]
        """Indices of the sequences that this rank's group computes."""
        self.parts = mesh.sequence.size
        self.index = mesh.sequence.rank
        self._targets = list(targets)
        self._gather = mesh.gather
        if mesh.gather.size > 1:
            rows, self._rows = _gathered_rows(lengths, targets, groups, mesh.cfg_size, self.parts)
            self._order = to_device(rows, device)

    def part(self, tokens: Tensor) -> Tensor:
        """Shard of this rank. tokens: [tokens, ...] of one sequence, or of its text or image."""
        return tokens[shard_slice(len(tokens), self.parts, self.index)]

    def gather(self, velocities: Tensor) -> list[Tensor]:
        """[target tokens of this rank, channels] -> whole velocities [target tokens, channels], one a sequence."""
        if self._gather.size > 1:
            # Ranks hold different numbers of rows; a velocity is small, so the shorter ones are padded.
            padded = velocities.new_zeros((self._rows, velocities.shape[-1]))
            padded[: len(velocities)] = velocities
            velocities = self._gather.all_gather(padded).flatten(0, 1).index_select(0, self._order)
        return list(velocities.split(self._targets))


def _gathered_rows(
    lengths: Sequence[int], targets: Sequence[int], groups: Sequence[int], num_groups: int, parts: int
) -> tuple[Tensor, int]:
    """Index of each target row of all sequences in the gathered rows of all ranks; and the rows that each rank sends.

    Rank `group * parts + part` holds part `part` of the target rows of its group's sequences, sequence by sequence.
    """
    filled = [[0] * parts for _ in range(num_groups)]
    places: list[tuple[int, int, int]] = []  # rank, first row, rows
    for length, target, group in zip(lengths, targets, groups):
        for part in range(parts):
            held = shard_slice(length, parts, part)
            rows = max(0, min(held.stop, target) - held.start)
            places.append((group * parts + part, filled[group][part], rows))
            filled[group][part] += rows
    most = max(max(group) for group in filled)
    order = [torch.arange(rank * most + first, rank * most + first + rows) for rank, first, rows in places]
    return torch.cat(order), most
