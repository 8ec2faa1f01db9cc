"""Parts of a membership are built once, however many different ones take turns."""

from __future__ import annotations

from itertools import combinations

import torch

from vllm_omni.diffusion.compute.attention import create_attention
from vllm_omni.diffusion.compute.attention.sharded import PackedAttention
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.packing import Pack
from vllm_omni.diffusion.compute.step.arrangement import Arrangement


def test_parts_that_take_turns_are_kept() -> None:
    pack = Pack.build([1, 2, 3, 1], [4, 2, 1, 3], torch.device("cpu"))
    attention = PackedAttention(create_attention(), Group.alone(), Group.alone())
    rotations = torch.arange(pack.num_tokens)
    arrangement = Arrangement(pack, rotations, attention)
    choices = [members for size in (1, 2, 3) for members in combinations(range(4), size)]
    parts = [arrangement.select(members) for members in choices]
    assert all(arrangement.select(members) is part for members, part in zip(choices, parts))
    for members, part in zip(choices, parts):
        assert part.pack.numbers == members
        assert part.rotations.tolist() == torch.cat([rotations.split(pack.joint.lengths)[i] for i in members]).tolist()
