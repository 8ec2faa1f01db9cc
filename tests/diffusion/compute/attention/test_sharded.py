"""Attention over sharded sequences against plain attention, for numbers of heads and tokens that do not divide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.diffusion.compute.distributed.exchange import fake_ring
from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sdpa import SdpaAttention
from vllm_omni.diffusion.compute.attention.sharded import Merged, PackedAttention
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.packing import Offsets, Pack, shard_slice
from vllm_omni.diffusion.data import DiffusionParallelConfig

TEXT, IMAGE = [5, 1, 40, 2, 7], [37, 4, 64, 1, 21]
CPU = torch.device("cpu")


def tensors(heads: int, head_dim: int = 8) -> torch.Tensor:
    """q, k and v [3, tokens, heads, head_dim] of whole sequences, text before image."""
    return torch.randn(3, sum(TEXT) + sum(IMAGE), heads, head_dim, generator=torch.Generator().manual_seed(heads))


def part(x: torch.Tensor, parts: int, index: int) -> torch.Tensor:
    """Shard of one rank of `x` [tokens, ...], in joint order."""
    pieces = x.split([n for pair in zip(TEXT, IMAGE) for n in pair])
    return torch.cat([piece[shard_slice(len(piece), parts, index)] for piece in pieces])


def whole_attention(qkv: torch.Tensor) -> torch.Tensor:
    """Plain attention of each whole sequence, [tokens, heads, head_dim]."""
    lengths = [t + i for t, i in zip(TEXT, IMAGE)]
    return torch.cat(
        [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sequence)).transpose(0, 1)
            for sequence in zip(*(x.split(lengths) for x in qkv))
        ]
    )


def attend_to_my_part(world: World, heads: int) -> tuple[np.ndarray, dict[str, int]]:
    mesh = world.mesh
    parts, index = mesh.sequence.size, mesh.sequence.rank
    pack = Pack.build(TEXT, IMAGE, CPU, parts, index)
    attend = PackedAttention(create_attention(), mesh.ulysses, mesh.ring).over(pack)
    world.sent.clear()
    out = attend(*(part(x, parts, index) for x in tensors(heads)))
    return out.numpy(), dict(world.sent)


@pytest.mark.parametrize(
    ("ulysses", "ring", "heads"),
    [(2, 1, 3), (3, 1, 5), (1, 2, 3), (1, 3, 5), (2, 2, 5), (4, 1, 6), (2, 3, 3), (4, 2, 5), (3, 2, 24), (1, 8, 1)],
)
def test_cut_sequences_attend_as_whole_ones(ulysses: int, ring: int, heads: int) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=ulysses, ring_degree=ring)
    results = run_ranks(attend_to_my_part, parallel, heads)

    whole = whole_attention(tensors(heads))
    num_ranks, hidden_bytes = ulysses * ring, heads * 8 * 4
    for index, (out, sent) in enumerate(results):
        mine = part(whole, num_ranks, index)
        torch.testing.assert_close(torch.from_numpy(out), mine, atol=1e-5, rtol=1e-5)
        if ring == 1:
            # q, k and v there, the output back.
            sent_back = len(whole) * 8 * 4 * len(range(heads)[shard_slice(heads, ulysses, index)])
            assert sent == {"all_to_all": 3 * len(mine) * hidden_bytes + sent_back}
        elif ulysses == 1:
            # k and v of every block but the one that the next rank began with.
            blocks = sum(len(part(whole, num_ranks, i)) for i in range(num_ranks) if i != (index + 1) % num_ranks)
            assert sent == {"p2p": 2 * blocks * hidden_bytes}


class NotedAttention(SdpaAttention):
    """Notes its calls among the events of a ring; raises in those whose numbers are in `fails_at`."""

    def __init__(self, events: list[str], fails_at: tuple[int, ...] = ()) -> None:
        self._events = events
        self._fails_at = fails_at
        self._num_calls = 0

    def attend_with_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets_q: Offsets, offsets_k: Offsets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._events.append("attend")
        self._num_calls += 1
        if self._num_calls in self._fails_at:
            raise torch.OutOfMemoryError("no room")
        return super().attend_with_lse(q, k, v, offsets_q, offsets_k)


def blocks_that_come(qkv: torch.Tensor, rank: int, size: int) -> list[torch.Tensor]:
    """Keys and values of the ranks before `rank`, the nearest first."""
    ranks = [(rank - step) % size for step in range(1, size)]
    return [torch.stack([part(x, size, index) for x in qkv[1:]]) for index in ranks]


def test_blocks_travel_while_the_rank_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    rank, size, qkv = 1, 3, tensors(2)
    group, exchange = fake_ring(monkeypatch, blocks_that_come(qkv, rank, size), rank, size)
    attention = PackedAttention(NotedAttention(exchange.events), Group.alone(), group)
    out = attention.over(Pack.build(TEXT, IMAGE, CPU, size, rank))(*(part(x, size, rank) for x in qkv))
    turn = ["post", "attend", "wait"]
    assert exchange.events == [*turn, *turn, "attend"]
    torch.testing.assert_close(out, part(whole_attention(qkv), size, rank), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("call", [1, 2])
def test_a_call_that_fails_with_a_block_on_its_way_can_be_repeated(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """A capture that runs out of memory repeats the call: nothing has been sent, and the group is the same."""
    rank, size, qkv = 0, 3, tensors(2)
    blocks = blocks_that_come(qkv, rank, size)
    group, _ = fake_ring(monkeypatch, [*blocks[:call], *blocks], rank, size)
    attend = PackedAttention(NotedAttention([], (call,)), Group.alone(), group).over(
        Pack.build(TEXT, IMAGE, CPU, size, rank)
    )
    mine = [part(x, size, rank) for x in qkv]
    with pytest.raises(torch.OutOfMemoryError):
        attend(*mine)
    torch.testing.assert_close(attend(*mine), part(whole_attention(qkv), size, rank), atol=1e-5, rtol=1e-5)


def test_blocks_merge_to_the_whole_whatever_they_hold() -> None:
    """Also where a sequence has no key in the first blocks."""
    backend = create_attention()
    q, k, v = torch.randn(3, 9, 2, 8).unbind()
    whole = Offsets.of([4, 5], CPU)
    blocks = [([0, 2], [0, 0]), ([0, 3], [0, 2]), ([4, 0], [0, 4])]
    merged = Merged()
    starts = [0, 4]
    for lengths, firsts in blocks:
        rows = torch.cat([torch.arange(s + f, s + f + n) for s, f, n in zip(starts, firsts, lengths)])
        merged.add(*backend.attend_with_lse(q, k[rows], v[rows], whole, Offsets.of(lengths, CPU)))
    torch.testing.assert_close(merged.out, backend.attend(q, k, v, whole, whole), atol=1e-5, rtol=1e-5)
