"""Blocks that travel round a ring of ranks while the ranks compute on the block that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from vllm_omni.diffusion.compute.distributed.groups import Group, unbroken


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
        send_sizes, receive_sizes = [0] * group.size, [0] * group.size
        send_sizes[(group.rank + 1) % group.size] = outgoing.numel()
        receive_sizes[(group.rank - 1) % group.size] = incoming.numel()
        # The same two messages as `batch_isend_irecv`. If one of those raises (in a CUDA graph capture, say), torch
        # leaves their batch open, and later collectives of the group do nothing, without an error.
        with unbroken():
            work = dist.all_to_all_single(
                incoming.view(-1),
                outgoing.view(-1),
                receive_sizes,
                send_sizes,
                group=group.process_group,
                async_op=True,
            )
        self._under_way = _UnderWay(work, outgoing, incoming)

    def wait(self) -> Tensor:
        """The block that has arrived. Raises RuntimeError without a `post`, GroupBrokenError when it is lost."""
        if self._under_way is None:
            raise RuntimeError("Ring.wait was called without a post()")
        under_way, self._under_way = self._under_way, None
        with unbroken():
            under_way.work.wait()
        return under_way.incoming


@dataclass(frozen=True)
class _UnderWay:
    work: dist.Work
    outgoing: Tensor
    """Kept: it is being read."""
    incoming: Tensor
