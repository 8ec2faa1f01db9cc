"""Blocks that travel round a ring of ranks while the ranks compute on the block that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from vllm_omni.diffusion.distributed.groups import Group, unbroken


class Ring:
    """One journey of blocks round a group: `post` a block to the next rank, compute, then `wait` for the block of the
    rank before. One block at a time.

    A journey that fails is given up with its Ring; the next one is a new Ring and knows nothing of lost blocks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._under_way: _UnderWay | None = None

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
        group = self._group
        if group.size == 1:
            raise RuntimeError("Ring.post: a ring of one rank has nobody to send to")
        if self._under_way is not None:
            raise RuntimeError("Ring.post was called twice: wait() for the block that is on its way first")
        outgoing, incoming = block.contiguous(), block.new_empty(tuple(incoming_shape))
        group.count("p2p", outgoing)
        # An empty block is not sent: both ends know the shapes.
        jobs = [
            dist.P2POp(act, x, group.ranks[(group.rank + distance) % group.size], group.process_group)
            for act, x, distance in ((dist.isend, outgoing, 1), (dist.irecv, incoming, -1))
            if x.numel()
        ]
        with unbroken():
            works = dist.batch_isend_irecv(jobs) if jobs else []
        self._under_way = _UnderWay(works, outgoing, incoming)

    def wait(self) -> Tensor:
        """The block that has arrived. Raises RuntimeError without a `post`, GroupBrokenError when it is lost."""
        if self._under_way is None:
            raise RuntimeError("Ring.wait was called without a post()")
        under_way, self._under_way = self._under_way, None
        with unbroken():
            for work in under_way.works:
                work.wait()
        return under_way.incoming


@dataclass(frozen=True)
class _UnderWay:
    works: list[dist.Work]
    outgoing: Tensor
    """Kept: it is being read."""
    incoming: Tensor
