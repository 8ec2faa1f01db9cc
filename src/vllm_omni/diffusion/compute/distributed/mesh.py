"""Where a rank stands: one coordinate an axis, and the groups that it belongs to.

Axes of one replica from the outermost: cfg, ring, ulysses, tensor (neighbours in a tensor group are neighbours on the
machine). Replicas (the data axis) do not talk to each other at all.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from vllm_omni.diffusion.compute.device.transfers import is_host
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.data import DiffusionParallelConfig

COLLECTIVE_TIMEOUT = timedelta(seconds=120)
"""Nobody waits longer for another rank. A dead rank is noticed long before: its connections close."""


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank."""

    world: Group
    """All ranks of the replica."""
    control: Group
    """The same ranks, for small tensors on the CPU whatever the device."""
    gather: Group
    """The ranks of the same tensor coordinate: together they hold the tokens of all sequences."""
    sequence: Group
    """The ranks that share a sequence's tokens, ring outside, ulysses inside."""
    rank_group: Group
    """The ranks that compute the same sequences: those of `sequence`, and of each the ones that share its layers."""
    ulysses: Group
    ring: Group
    tensor: Group
    vae: Group
    """Ranks that share one VAE decode."""
    text_encoder: Group
    """Ranks that share the text encoder."""
    cfg_index: int = 0
    """Which of the rank groups that a placement names."""
    cfg_size: int = 1

    @classmethod
    def single(cls) -> Mesh:
        """Of a replica of one rank."""
        one = Group.alone()
        return cls(one, one, one, one, one, one, one, one, one, one)


def rank_groups(parallel: DiffusionParallelConfig) -> dict[str, list[list[int]]]:
    """Every group of a replica by its kind; each kind divides the ranks among its groups."""
    c, r, u, t = (
        parallel.cfg_parallel_size,
        parallel.ring_degree,
        parallel.ulysses_degree,
        parallel.tensor_parallel_size,
    )
    ranks = torch.arange(c * r * u * t).view(c, r, u, t)
    size = ranks.numel()
    return {
        "world": [ranks.flatten().tolist()],
        "control": [ranks.flatten().tolist()],
        "gather": ranks.flatten(0, 2).T.tolist(),
        "sequence": ranks.flatten(1, 2).transpose(1, 2).flatten(0, 1).tolist(),
        "rank_group": ranks.view(c, -1).tolist(),
        "ulysses": ranks.transpose(2, 3).reshape(-1, u).tolist(),
        "ring": ranks.movedim(1, 3).reshape(-1, r).tolist(),
        "tensor": ranks.reshape(-1, t).tolist(),
        "vae": ranks.view(size // parallel.vae_patch_parallel_size, -1).tolist(),
        "text_encoder": ranks.view(size // parallel.text_encoder_tp_size, -1).tolist(),
    }


class World:
    """The process groups of one rank of a replica, and their replacement after one broke."""

    def __init__(self, parallel: DiffusionParallelConfig, rank: int, device: torch.device, store: Store) -> None:
        """Connects; every rank of the replica must do so. `store`: where they meet."""
        self.rank = rank
        self.size = parallel.replica_size
        self.sent: Counter[str] = Counter()
        """Bytes handed to each kind of exchange by this rank."""
        self._device = device
        self._store = store
        self._epoch = 0
        self._rank_groups = rank_groups(parallel)
        mine = {
            kind: Group(next(ranks for ranks in groups if rank in ranks), rank, self.sent)
            for kind, groups in self._rank_groups.items()
        }
        self.mesh = Mesh(
            **mine,
            cfg_index=rank // (self.size // parallel.cfg_parallel_size),
            cfg_size=parallel.cfg_parallel_size,
        )
        self._connect()

    def _connect(self) -> None:
        on_gpu = not is_host(self._device)
        settings: dict[str, Any] = {"device_id": self._device} if on_gpu else {}
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=PrefixStore(f"epoch-{self._epoch}", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=COLLECTIVE_TIMEOUT,
            **settings,
        )
        made: dict[tuple[tuple[int, ...], str], dist.ProcessGroup] = {}
        for kind, groups in self._rank_groups.items():
            backend = "gloo" if kind == "control" or not on_gpu else "nccl"
            for ranks in groups:
                key = (tuple(ranks), backend)
                if len(ranks) > 1 and key not in made:
                    # Every rank makes every group, in the same order.
                    made[key] = dist.new_group(ranks, backend=backend, timeout=COLLECTIVE_TIMEOUT)
            group: Group = getattr(self.mesh, kind)
            group.bind(made.get((group.ranks, backend)))

    @property
    def can_rebuild(self) -> bool:
        """Whether a rank that leaves frees the others: sockets do, NCCL's kernels wait on."""
        return is_host(self._device)

    def leave(self) -> None:
        """Break every connection: whoever waits for this rank gets an error at once."""
        for kind in self._rank_groups:
            getattr(self.mesh, kind).bind(None)
        if dist.is_initialized():
            dist.destroy_process_group()

    def rebuild(self) -> None:
        """New process groups behind the same Groups; every rank must come."""
        self.leave()
        self._epoch += 1
        self._connect()
