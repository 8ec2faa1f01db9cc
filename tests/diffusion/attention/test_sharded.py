"""Attention over cut sequences against plain attention, for head and token counts that do not divide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.diffusion.distributed.ranks import run_ranks
from vllm_omni.diffusion.attention import create_attention
from vllm_omni.diffusion.attention.sharded import Merged, PackedAttention
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.diffusion.distributed.mesh import World
from vllm_omni.diffusion.packing import Offsets, Pack, part_of

TEXT, IMAGE = [5, 1, 40, 2, 7], [37, 4, 64, 1, 21]
CPU = torch.device("cpu")


def tensors(heads: int, head_dim: int = 8) -> torch.Tensor:
    """q, k and v [3, tokens, heads, head_dim] of whole sequences, text before image."""
    return torch.randn(3, sum(TEXT) + sum(IMAGE), heads, head_dim, generator=torch.Generator().manual_seed(heads))


def part(x: torch.Tensor, parts: int, index: int) -> torch.Tensor:
    """What one rank holds of [tokens, ...], in joint order."""
    pieces = x.split([n for pair in zip(TEXT, IMAGE) for n in pair])
    return torch.cat([piece[part_of(len(piece), parts, index)] for piece in pieces])


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

    qkv = tensors(heads)
    lengths = [t + i for t, i in zip(TEXT, IMAGE)]
    whole = torch.cat(
        [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in sequence)).transpose(0, 1)
            for sequence in zip(*(x.split(lengths) for x in qkv))
        ]
    )
    num_ranks, hidden_bytes = ulysses * ring, heads * 8 * 4
    for index, (out, sent) in enumerate(results):
        mine = part(whole, num_ranks, index)
        torch.testing.assert_close(torch.from_numpy(out), mine, atol=1e-5, rtol=1e-5)
        if ring == 1:
            # q, k and v there, the output back.
            sent_back = sum(lengths) * 8 * 4 * len(range(heads)[part_of(heads, ulysses, index)])
            assert sent == {"all_to_all": 3 * len(mine) * hidden_bytes + sent_back}
        elif ulysses == 1:
            # k and v of every block but the one that the next rank began with.
            blocks = sum(len(part(whole, num_ranks, i)) for i in range(num_ranks) if i != (index + 1) % num_ranks)
            assert sent == {"p2p": 2 * blocks * hidden_bytes}


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
