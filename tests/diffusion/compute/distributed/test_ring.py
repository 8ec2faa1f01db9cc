"""Promises of `Ring` beside the right blocks: `post` does not wait, and a block that is being sent is kept."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.diffusion.compute.distributed.exchange import fake_ring
from vllm_omni.diffusion.compute.distributed.ring import Ring


def test_a_post_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    block, coming = torch.zeros(2), torch.ones(3)
    group, exchange = fake_ring(monkeypatch, [coming], rank=2, size=4)
    ring = Ring(group)
    ring.post(block, (3,))
    assert exchange.events == ["post"]
    assert torch.equal(ring.wait(), coming)
    assert exchange.events == ["post", "wait"]
    assert exchange.peers == [(3, 1)], "to the next rank, from the one before"


def test_what_is_sent_is_kept_until_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device reads it while other tensors are made, and may be given its memory once nobody holds it."""
    group, exchange = fake_ring(monkeypatch, [torch.zeros(1)], rank=0, size=2)
    ring = Ring(group)
    ring.post(torch.arange(6.0).view(2, 3).T, (1,))
    gc.collect()
    (outgoing,) = exchange.outgoing
    assert outgoing() is not None
    ring.wait()
    gc.collect()
    assert outgoing() is None
    assert torch.equal(exchange.sent[0], torch.arange(6.0).view(2, 3).T.flatten())


def test_an_empty_block_has_no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks may have more: all of them exchange."""
    group, exchange = fake_ring(monkeypatch, [torch.zeros(0, 2)], rank=0, size=2)
    ring = Ring(group)
    ring.post(torch.zeros(0, 2), (0, 2))
    assert ring.wait().shape == (0, 2)
    assert exchange.peers == [(None, None)]
