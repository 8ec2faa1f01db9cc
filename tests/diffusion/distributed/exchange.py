"""A stand-in for torch.distributed's point-to-point messages: one rank of a ring in this process, peers from a list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ref

import pytest
from torch import Tensor

from vllm_omni.diffusion.distributed import ring as ring_module
from vllm_omni.diffusion.distributed.groups import Group


class Operation(NamedTuple):
    act: Callable[..., None]
    tensor: Tensor
    peer: int
    group: Any


class FakeExchange:
    """Takes the place of `torch.distributed` in `Ring` and notes what happens in `events`: "post" and "wait".

    The blocks that the rank receives are those of `incoming`, one after another; they are there after the wait.
    """

    P2POp = Operation

    def __init__(self, incoming: Sequence[Tensor]) -> None:
        self.events: list[str] = []
        self.sent: list[Tensor] = []
        """Copies of the blocks that the rank sent."""
        self.peers: list[tuple[int, int]] = []
        """To and from whom each block went."""
        self.outgoing: list[ref[Tensor]] = []
        """The tensors that the device reads while a block is on its way."""
        self._incoming = list(incoming)

    def isend(self) -> None:
        raise AssertionError("an operation of batch_isend_irecv only")

    def irecv(self) -> None:
        raise AssertionError("an operation of batch_isend_irecv only")

    def batch_isend_irecv(self, operations: Sequence[Operation]) -> list[FakeWork]:
        send, receive = operations
        assert (send.act, receive.act) == (self.isend, self.irecv)
        assert send.tensor.is_contiguous(), "as the backends demand"
        self.events.append("post")
        self.sent.append(send.tensor.clone())
        self.outgoing.append(ref(send.tensor))
        self.peers.append((send.peer, receive.peer))
        return [FakeWork(self, receive.tensor, self._incoming.pop(0))]


class FakeWork:
    def __init__(self, exchange: FakeExchange, target: Tensor, block: Tensor) -> None:
        self._exchange, self._target, self._block = exchange, target, block

    def wait(self) -> None:
        self._exchange.events.append("wait")
        self._target.copy_(self._block)


def fake_ring(
    monkeypatch: pytest.MonkeyPatch, incoming: Sequence[Tensor], rank: int, size: int
) -> tuple[Group, FakeExchange]:
    """The group of `rank` in a ring of `size` ranks, whose exchange is a stand-in."""
    exchange = FakeExchange(incoming)
    monkeypatch.setattr(ring_module, "dist", exchange)
    group = Group(range(size), rank, Counter())
    group.bind(object())  # type: ignore[arg-type]  # the stand-in does not look at it
    return group, exchange
