"""Mesh of a replica: one axis for each kind of parallelism, and the groups of each rank.

Axes from the outermost: cfg, ring, ulysses, tensor, so ranks of a tensor group have neighbouring devices. Replicas (the
data axis) exchange nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from vllm_omni.diffusion.compute.device.transfers import is_host
from vllm_omni.diffusion.compute.distributed.groups import DecodeGroup, Group
from vllm_omni.diffusion.data import DiffusionParallelConfig

COLLECTIVE_TIMEOUT = timedelta(seconds=120)
"""Longest wait for another rank. A dead rank is noticed long before, because its connections close."""


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank."""

    world: Group
    """All ranks of the replica."""
    control: Group
    """All ranks of the replica, for small tensors on the CPU."""
    gather: Group
    """Ranks with the same tensor coordinate: together they hold the tokens of all sequences."""
    sequence: Group
    """Ranks that share the tokens of a sequence, ring outside, ulysses inside."""
    rank_group: Group
    """Ranks that compute the same sequences: the product of `sequence` and `tensor`."""
    ulysses: Group
    ring: Group
    tensor: Group
    vae: DecodeGroup
    """Ranks that share one VAE decode."""
    text_encoder: Group
    """Ranks that share the text encoder."""
    weights: Group = field(default_factory=Group.alone)
    """Ranks that keep a part of each block: those of `sequence`, with `--weight-sharding`; else the rank alone."""
    cfg_index: int = 0
    """Number of this rank's rank group in a placement."""
    cfg_size: int = 1
    """Number of rank groups."""

    @classmethod
    def single(cls) -> Mesh:
        """Mesh of a replica of one rank."""
        one = Group.alone()
        return cls(one, one, one, one, one, one, one, one, DecodeGroup.alone(), one)

    @classmethod
    def unconnected(
        cls,
        parallel: DiffusionParallelConfig,
        rank: int,
        sent: Counter[str] | None = None,
        shards_weights: bool = False,
    ) -> Mesh:
        """Mesh of one rank, whose groups exchange nothing until they are bound. sent: see `Group`. shards_weights: see
        `weights`."""
        sent = Counter() if sent is None else sent
        mine: dict[str, Any] = {}
        for kind, groups in rank_groups(parallel, shards_weights).items():
            group_class = DecodeGroup if kind == "vae" else Group
            mine[kind] = group_class(next(ranks for ranks in groups if rank in ranks), rank, sent)
        cfg_size = parallel.cfg_parallel_size
        return cls(**mine, cfg_index=rank // (parallel.replica_size // cfg_size), cfg_size=cfg_size)


def rank_groups(parallel: DiffusionParallelConfig, shards_weights: bool = False) -> dict[str, list[list[int]]]:
    """Ranks of all groups of a replica by kind (a field of Mesh); the groups of a kind are disjoint and complete."""
    c, r = parallel.cfg_parallel_size, parallel.ring_degree
    u, t = parallel.ulysses_degree, parallel.tensor_parallel_size
    ranks = torch.arange(c * r * u * t).view(c, r, u, t)
    size = ranks.numel()
    sequence = ranks.flatten(1, 2).transpose(1, 2).flatten(0, 1).tolist()
    return {
        "world": [ranks.flatten().tolist()],
        "control": [ranks.flatten().tolist()],
        "gather": ranks.flatten(0, 2).T.tolist(),
        "sequence": sequence,
        "rank_group": ranks.view(c, -1).tolist(),
        "ulysses": ranks.transpose(2, 3).reshape(-1, u).tolist(),
        "ring": ranks.movedim(1, 3).reshape(-1, r).tolist(),
        "tensor": ranks.reshape(-1, t).tolist(),
        "vae": ranks.view(size // parallel.vae_patch_parallel_size, -1).tolist(),
        "text_encoder": ranks.view(size // parallel.text_encoder_tp_size, -1).tolist(),
        "weights": sequence if shards_weights else [[rank] for rank in range(size)],
    }


class World:
    """Process groups of one rank of a replica; they can be replaced after an exchange broke."""

    def __init__(
        self,
        parallel: DiffusionParallelConfig,
        rank: int,
        device: torch.device,
        store: Store,
        shards_weights: bool = False,
    ) -> None:
        """Connect to the other ranks; every rank of the replica must do so. store: where the ranks find each other.
        shards_weights: see `Mesh.weights`."""
        self.rank = rank
        self.size = parallel.replica_size
        self.sent: Counter[str] = Counter()
        """Kind of exchange -> bytes that this rank has sent."""
        self._device = device
        self._store = store
        self._epoch = 0
        self._rank_groups = rank_groups(parallel, shards_weights)
        self.mesh = Mesh.unconnected(parallel, rank, self.sent, shards_weights)
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
        # Weights are gathered beside other exchanges of the same ranks, which would wait for them in one group.
        made: dict[tuple[tuple[int, ...], str, bool], dist.ProcessGroup] = {}

        def connect(group: Group, kind: str, backend: str) -> None:
            for ranks in self._rank_groups[kind]:
                key = (tuple(ranks), backend, kind == "weights")
                if len(ranks) > 1 and key not in made:
                    # torch requires that every rank makes every group in the same order.
                    made[key] = dist.new_group(ranks, backend=backend, timeout=COLLECTIVE_TIMEOUT)
            group.bind(made.get((group.ranks, backend, kind == "weights")))

        for kind in self._rank_groups:
            connect(getattr(self.mesh, kind), kind, "gloo" if kind == "control" or not on_gpu else "nccl")
        connect(self.mesh.vae.control, "vae", "gloo")

    @property
    def can_rebuild(self) -> bool:
        """Whether the other ranks get an error when a rank leaves: with sockets, yes; NCCL's kernels keep waiting."""
        return is_host(self._device)

    def leave(self) -> None:
        """Close all connections; ranks that wait for this rank get an error at once."""
        for kind in self._rank_groups:
            getattr(self.mesh, kind).bind(None)
        self.mesh.vae.control.bind(None)
        if dist.is_initialized():
            dist.destroy_process_group()

    def rebuild(self) -> None:
        """Connect again, with new process groups behind the same Groups; every rank must do so."""
        self.leave()
        self._epoch += 1
        self._connect()
