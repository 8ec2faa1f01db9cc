"""Offsets and orders of a pack, and what is kept from step to step."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.packing import MembershipCache, Pack

CPU = torch.device("cpu")


def test_text_comes_before_image_in_each_sequence() -> None:
    pack = Pack.build([2, 1, 3], [1, 4, 2], CPU)
    # Token k of sequence i is i * 10 + k, negative for text.
    text = torch.tensor([-1, -2, -11, -21, -22, -23])
    image = torch.tensor([0, 10, 11, 12, 13, 20, 21])

    joint = pack.join(text, image)

    assert joint.tolist() == [-1, -2, 0, -11, 10, 11, 12, 13, -21, -22, -23, 20, 21]
    assert pack.joint_is_image.tolist() == [0, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    back_text, back_image = pack.split(joint)
    assert torch.equal(back_text, text)
    assert torch.equal(back_image, image)


def test_offsets_and_sequence_indices() -> None:
    pack = Pack.build([2, 1, 3], [1, 4, 2], CPU)
    assert pack.text.values == (0, 2, 3, 6)
    assert pack.image.values == (0, 1, 5, 7)
    assert pack.joint.values == (0, 3, 8, 13)
    assert pack.joint.cu_seqlens.tolist() == [0, 3, 8, 13]
    assert pack.joint.cu_seqlens.dtype == torch.int32
    assert pack.joint.lengths == (3, 5, 5)
    assert pack.joint.max_length == 5
    assert pack.text_sequence.tolist() == [0, 0, 1, 2, 2, 2]
    assert pack.image_sequence.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert (pack.num_sequences, pack.num_text_tokens, pack.num_tokens) == (3, 6, 13)


def test_one_sequence_is_joined_without_a_gather() -> None:
    pack = Pack.build([2], [3], CPU)
    assert pack.joint_order is None
    assert pack.join(torch.arange(2), torch.arange(2, 5)).tolist() == [0, 1, 2, 3, 4]


class Member:
    """Equal to itself alone."""


def test_a_membership_is_built_once_and_forgotten_with_its_members() -> None:
    cache: MembershipCache[int] = MembershipCache(capacity=2)
    built: list[str] = []
    a, b, c = Member(), Member(), Member()

    def build(name: str) -> int:
        built.append(name)
        return len(built)

    for _ in range(3):
        assert cache.get((a, b), lambda: build("ab")) == 1
    assert cache.get((b, a), lambda: build("ba")) == 2
    assert cache.get((a, b), lambda: build("ab")) == 1
    assert cache.get((c,), lambda: build("c")) == 3, "the least recently used goes"
    assert cache.get((a, b), lambda: build("ab")) == 1
    assert cache.get((b, a), lambda: build("ba again")) == 4
    assert built == ["ab", "ba", "c", "ba again"]
    cache.forget(a)
    assert len(cache) == 0
