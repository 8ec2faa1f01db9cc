"""Groups of ranks and their exchanges. A group of one rank exchanges nothing, so the same code runs on one device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor


class GroupBrokenError(RuntimeError):
    """An exchange failed because another rank left it. The cause is on that rank."""


class PeerFailedError(Exception):
    """Another rank failed in a common call; that rank reports the reason."""


@contextmanager
def unbroken() -> Iterator[None]:
    """Convert the errors of an exchange to GroupBrokenError."""
    try:
        yield
    except RuntimeError as error:
        raise GroupBrokenError(str(error)) from error


class Group:
    """Ordered ranks of a replica, seen from one. `World.rebuild` replaces the process group behind it.

    Exchanges raise GroupBrokenError.
    """

    def __init__(self, ranks: Sequence[int], rank: int, sent: Counter[str]) -> None:
        """Group that `bind` connects. ranks: of the world; rank: this one; sent: its sent bytes by exchange."""
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(rank)
        """Index of this process within the group."""
        self._process_group: dist.ProcessGroup | None = None
        self._sent = sent

    @classmethod
    def alone(cls) -> Self:
        """Group of one rank."""
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
        """Add the bytes of `x` to those sent by this kind of exchange."""
        self._sent[kind] += x.nbytes

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            self.count("all_reduce", x)
            with unbroken():
                dist.all_reduce(x, group=self.process_group)
        return x

    def all_max(self, x: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        if self.size > 1:
            self.count("all_reduce", x)
            with unbroken():
                dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.process_group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[...] on every rank, in equal shapes -> [size, ...]."""
        if self.size == 1:
            return x[None]
        self.count("all_gather", x)
        out = x.new_empty((self.size, *x.shape))
        with unbroken():
            dist.all_gather(list(out.unbind()), x.contiguous(), group=self.process_group)
        return out

    def all_to_all(
        self, send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], received: Tensor | None = None
    ) -> Tensor:
        """Flat tensor of the parts for rank 0, 1, ... -> the parts from rank 0, 1, ..., of these sizes.

        received: memory for the result, flat; None: allocated.
        """
        if self.size == 1:
            return send
        self.count("all_to_all", send)
        if received is None:
            received = send.new_empty(sum(receive_sizes))
        with unbroken():
            dist.all_to_all_single(received, send, list(receive_sizes), list(send_sizes), group=self.process_group)
        return received

    def agree(self, value: float) -> float:
        """Maximum of the ranks' values; only for a group that exchanges CPU tensors."""
        return float(self.all_max(torch.tensor(value, dtype=torch.float64)))


class DecodeGroup(Group):
    """Ranks that share decodes. They tell each other of failures before they exchange tensors."""

    def __init__(self, ranks: Sequence[int], rank: int, sent: Counter[str]) -> None:
        super().__init__(ranks, rank, sent)
        self.control = Group(ranks, rank, sent)
        """The same ranks, for small tensors on the CPU."""

    def tell(self, *, failed: bool) -> None:
        """Tell the other ranks whether this one failed. They all call this before each exchange of a decode and at its
        end; the decode ends with the first call in which a rank failed.

        Raises PeerFailedError if only other ranks failed.
        """
        if self.control.agree(float(failed)) and not failed:
            raise PeerFailedError("another rank failed")
