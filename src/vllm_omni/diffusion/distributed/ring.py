"""Blocks that travel round a ring of ranks while the ranks compute on the block that they hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from vllm_omni.diffusion.distributed.groups import Group


class Ring:
    """`post` a block to the next rank, compute, then `wait` for the block of the rank before. One at a time."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._jobs: list[dist.Work] = []
        self._sent: Tensor | None = None
        self._incoming: Tensor | None = None

    @property
    def size(self) -> int:
        return self._group.size

    @property
    def rank(self) -> int:
        return self._group.rank

    def post(self, block: Tensor, incoming_shape: Sequence[int]) -> None:
        """Start to send `block`, which must stay as it is until `wait`, and to receive one of `incoming_shape`.

        Raises RuntimeError when a block is on its way already, or when there is nobody to send to.
        """
        if self._incoming is not None:
            raise RuntimeError("Ring.post was called twice: wait() for the block that is on its way first")
        if self.size == 1:
            raise RuntimeError("Ring.post: a ring of one rank has nobody to send to")
        group = self._group
        following = group.ranks[(group.rank + 1) % group.size]
        previous = group.ranks[(group.rank - 1) % group.size]
        self._sent, self._incoming = block.contiguous(), block.new_empty(tuple(incoming_shape))
        group.count("p2p", self._sent)
        jobs = []
        # An empty block is not sent: both ends know the shapes.
        if self._sent.numel():
            jobs.append(dist.P2POp(dist.isend, self._sent, following, group.process_group))
        if self._incoming.numel():
            jobs.append(dist.P2POp(dist.irecv, self._incoming, previous, group.process_group))
        self._jobs = dist.batch_isend_irecv(jobs) if jobs else []

    def wait(self) -> Tensor:
        """The block that has arrived. Raises RuntimeError when none was posted for."""
        if self._incoming is None:
            raise RuntimeError("Ring.wait was called without a post()")
        for job in self._jobs:
            job.wait()
        block, self._jobs, self._sent, self._incoming = self._incoming, [], None, None
        return block

    def abandon(self) -> None:
        """Forget a block on its way, after its group was broken."""
        self._jobs, self._sent, self._incoming = [], None, None
