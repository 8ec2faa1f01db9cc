"""A stand-in for the exchanges of torch.distributed: one rank of a ring in this process, peers from a list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import ref

import pytest
from torch import Tensor

from vllm_omni.diffusion.compute.distributed import ring as ring_module
from vllm_omni.diffusion.compute.distributed.groups import Group


class FakeExchange:
    """Takes the place of `torch.distributed` in `Ring` and notes what happens in `events`: "post" and "wait".

    The blocks that the rank receives are those of `incoming`, one after another; they are there after the wait.
    """

    def __init__(self, incoming: Sequence[Tensor]) -> None:
        self.events: list[str] = []
        self.sent: list[Tensor] = []
        """Copies of the blocks that the rank sent."""
        self.peers: list[tuple[int | None, int | None]] = []
        """To and from whom each block went."""
        self.outgoing: list[ref[Tensor]] = []
        """The tensors that the device reads while a block is on its way."""
        self._incoming = list(incoming)

    def all_to_all_single(
        self, received: Tensor, send: Tensor, receive_sizes: list[int], send_sizes: list[int], **settings: Any
    ) -> FakeWork:
        assert settings["async_op"], "a post does not wait"
        assert (sum(send_sizes), sum(receive_sizes)) == (send.numel(), received.numel()), "as the backends demand"
        self.events.append("post")
        self.sent.append(send.clone())
        self.outgoing.append(ref(send if send._base is None else send._base))
        self.peers.append((_the_one(send_sizes), _the_one(receive_sizes)))
        return FakeWork(self, received, self._incoming.pop(0))


def _the_one(sizes: Sequence[int]) -> int | None:
    """The only rank with a size above 0, or None without one. Raises ValueError for several."""
    peers = [peer for peer, size in enumerate(sizes) if size]
    if not peers:
        return None
    (peer,) = peers
    return peer


class FakeWork:
    def __init__(self, exchange: FakeExchange, target: Tensor, block: Tensor) -> None:
        self._exchange, self._target, self._block = exchange, target, block

    def wait(self) -> None:
        self._exchange.events.append("wait")
        self._target.copy_(self._block.flatten())


def fake_ring(
    monkeypatch: pytest.MonkeyPatch, incoming: Sequence[Tensor], rank: int, size: int
) -> tuple[Group, FakeExchange]:
    """The group of `rank` in a ring of `size` ranks, whose exchange is a stand-in."""
    exchange = FakeExchange(incoming)
    monkeypatch.setattr(ring_module, "dist", exchange)
    group = Group(range(size), rank, Counter())
    group.bind(object())  # type: ignore[arg-type]  # the stand-in does not look at it
    return group, exchange
