"""Which part of which sequence this rank computes, and how the velocities come together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import to_device
from vllm_omni.diffusion.compute.distributed.mesh import Mesh
from vllm_omni.diffusion.compute.packing import shard_slice


class Sharding:
    """One membership of sequences, dealt to the rank groups of a replica and cut over the ranks of a group.

    Latents are replicated and activations are sharded: a rank takes its parts of the latents, and after the forward
    every rank gets every sequence's whole velocity. A sequence's image tokens may be its target's and, after them,
    those of reference pictures: all are cut, the target's alone have velocities.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        groups: Sequence[int],
        mesh: Mesh,
        device: torch.device,
        targets: Sequence[int] | None = None,
    ) -> None:
        """lengths: image tokens of each sequence; groups: the rank group that computes it; targets: how many of the
        image tokens, the first ones, have a velocity (None: all)."""
        targets = lengths if targets is None else targets
        assert len(lengths) == len(groups) == len(targets)
        self.mine = [i for i, group in enumerate(groups) if group == mesh.cfg_index]
        """The sequences that this rank's group computes."""
        self.parts = mesh.sequence.size
        self.index = mesh.sequence.rank
        self._targets = list(targets)
        self._gather = mesh.gather
        if mesh.gather.size > 1:
            rows, self._rows = _gathered_rows(lengths, targets, groups, mesh.cfg_size, self.parts)
            self._order = to_device(rows, device)

    def part(self, tokens: Tensor) -> Tensor:
        """The rows of one sequence (or of its text) that this rank holds."""
        return tokens[shard_slice(len(tokens), self.parts, self.index)]

    def gather(self, velocities: Tensor) -> list[Tensor]:
        """[target tokens of this rank, channels] -> [target tokens, channels] of every sequence, whole."""
        if self._gather.size > 1:
            # Rows differ from rank to rank; a velocity is small, so the shorter ones are filled up.
            padded = velocities.new_zeros((self._rows, velocities.shape[-1]))
            padded[: len(velocities)] = velocities
            velocities = self._gather.all_gather(padded).flatten(0, 1).index_select(0, self._order)
        return list(velocities.split(self._targets))


def _gathered_rows(
    lengths: Sequence[int], targets: Sequence[int], groups: Sequence[int], num_groups: int, parts: int
) -> tuple[Tensor, int]:
    """Where each row of all sequences lies once all ranks' rows are gathered, and the rows that each rank sends.

    Rank `group * parts + part` holds that part of its group's sequences one after another, of each the target's rows.
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
