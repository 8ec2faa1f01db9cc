"""Groups of ranks and what they say to each other. A group of one says nothing, so the same code runs on one device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class GroupBrokenError(RuntimeError):
    """An exchange ended because another rank left it: that one failed, not this one."""


@contextmanager
def unbroken() -> Iterator[None]:
    """Around an exchange: what the backend raises becomes GroupBrokenError."""
    try:
        yield
    except RuntimeError as error:
        raise GroupBrokenError(str(error)) from error


class Group:
    """Some ranks of the world, in order, seen by one of them.

    The process group behind it may be replaced (see `World.rebuild`), so a Group can be given to constructors and
    kept. `sent` counts the bytes that this rank handed to each kind of exchange. Exchanges raise GroupBrokenError.
    """

    def __init__(self, ranks: Sequence[int], rank: int, sent: Counter[str]) -> None:
        """`ranks`: members, as ranks of the world; `rank`: this process, one of them."""
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(rank)
        """The place of this process within the group."""
        self._process_group: dist.ProcessGroup | None = None
        self._sent = sent

    @classmethod
    def alone(cls) -> Group:
        return cls((0,), 0, Counter())

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def process_group(self) -> dist.ProcessGroup:
        assert self._process_group is not None, "a group of one, or one that is not connected, has no process group"
        return self._process_group

    def bind(self, process_group: dist.ProcessGroup | None) -> None:
        self._process_group = process_group

    def count(self, kind: str, x: Tensor) -> None:
        """Note that `x` is handed to an exchange."""
        self._sent[kind] += x.nbytes

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            self.count("all_reduce", x)
            with unbroken():
                dist.all_reduce(x, group=self.process_group)
        return x

    def all_max(self, x: Tensor) -> Tensor:
        """The largest value over the ranks, in place."""
        if self.size > 1:
            self.count("all_reduce", x)
            with unbroken():
                dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.process_group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] of every rank, all of one shape -> [size, ...]."""
        if self.size == 1:
            return x[None]
        self.count("all_gather", x)
        out = x.new_empty((self.size, *x.shape))
        with unbroken():
            dist.all_gather(list(out.unbind()), x.contiguous(), group=self.process_group)
        return out

    def all_to_all(self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]) -> Tensor:
        """Flat `send`, its parts for rank 0, 1, ... one after another -> the parts from rank 0, 1, ..., flat."""
        if self.size == 1:
            return send
        self.count("all_to_all", send)
        received = send.new_empty(sum(receive_sizes))
        with unbroken():
            dist.all_to_all_single(received, send, list(receive_sizes), list(send_sizes), group=self.process_group)
        return received

    def agree(self, value: float) -> float:
        """The largest of the ranks' values (a group of CPU tensors)."""
        return float(self.all_max(torch.tensor(value, dtype=torch.float64)))
