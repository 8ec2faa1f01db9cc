"""Transfer of blocks around a ring of ranks, which overlaps computing on the held block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from vllm_omni.diffusion.compute.distributed.groups import Group, unbroken


class Ring:
    """One pass of blocks around a group: `post` a block to the next rank, compute, `wait` for the last rank's block.

    One block is in transfer at a time. After a failure, make a new Ring: it does not know the lost blocks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._transfer: _Transfer | None = None

    @property
    def size(self) -> int:
        return self._group.size

    @property
    def rank(self) -> int:
        return self._group.rank

    def post(self, block: Tensor, incoming_shape: Sequence[int]) -> None:
        """Start to send `block`, which must not change until `wait`, and to receive one of `incoming_shape`.

        Raises RuntimeError if a block is in transfer, or in a ring of one rank.
        """
        group = self._group
        if group.size == 1:
            raise RuntimeError("Ring.post: a ring of one rank has nobody to send to")
        if self._transfer is not None:
            raise RuntimeError("Ring.post was called twice: wait() for the block that is on its way first")
        outgoing, incoming = block.contiguous(), block.new_empty(tuple(incoming_shape))
        group.count("p2p", outgoing)
        send_sizes, receive_sizes = [0] * group.size, [0] * group.size
        send_sizes[(group.rank + 1) % group.size] = outgoing.numel()
        receive_sizes[(group.rank - 1) % group.size] = incoming.numel()
        # Not `batch_isend_irecv`: if it raises (in the capture of a CUDA graph, for example), torch leaves its batch
        # open, and later collectives of the group silently do nothing.
        with unbroken():
            work = dist.all_to_all_single(
                incoming.view(-1),
                outgoing.view(-1),
                receive_sizes,
                send_sizes,
                group=group.process_group,
                async_op=True,
            )
        self._transfer = _Transfer(work, outgoing, incoming)

    def wait(self) -> Tensor:
        """Received block. Raises RuntimeError without a `post`, GroupBrokenError if the transfer failed."""
        if self._transfer is None:
            raise RuntimeError("Ring.wait was called without a post()")
        transfer, self._transfer = self._transfer, None
        with unbroken():
            transfer.work.wait()
        return transfer.incoming


@dataclass(frozen=True)
class _Transfer:
    work: dist.Work
    outgoing: Tensor
    """Block that is sent, referenced so that its memory is not reused before the end."""
    incoming: Tensor
