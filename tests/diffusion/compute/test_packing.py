"""Offsets and orders of a pack, and what is kept from step to step."""

from __future__ import annotations

import torch

from vllm_omni.diffusion.compute.packing import Hidden, MembershipCache, Pack

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
    assert (pack.num_sequences, pack.num_tokens) == (3, 13)


def test_one_sequence_is_joined_without_a_gather() -> None:
    pack = Pack.build([2], [3], CPU)
    assert pack.joint_order is None
    joint = pack.join(torch.arange(2), torch.arange(2, 5))
    assert joint.tolist() == [0, 1, 2, 3, 4]
    assert [part.tolist() for part in pack.split(joint)] == [[0, 1], [2, 3, 4]]


def test_a_part_of_a_pack_is_the_pack_of_those_sequences() -> None:
    texts, images, parts = [2, 1, 3, 7], [1, 4, 2, 5], 3
    for index in range(parts):
        whole = Pack.build(texts, images, CPU, parts, index)
        part = whole.select([1, 3])
        alone = Pack.build([1, 7], [4, 5], CPU, parts, index)
        assert part.joint_lengths == alone.joint_lengths
        for name in ("text", "image", "joint"):
            assert getattr(part, name).values == getattr(alone, name).values
        for name in ("joint_order", "joint_is_image"):
            assert torch.equal(getattr(part, name), getattr(alone, name))
        # Sequences keep the numbers of the whole, also in a part of a part.
        assert torch.equal(part.image_sequence, torch.tensor([1, 3])[alone.image_sequence])
        assert torch.equal(part.select([1]).text_sequence, torch.full((part.text.lengths[1],), 3))


def test_ranks_know_the_most_tokens_of_any_of_them() -> None:
    """They decide by it, and must decide alike: of the two short sequences the last rank holds nothing."""
    packs = [Pack.build([1, 2, 4], [1, 2, 4], CPU, 3, index) for index in range(3)]
    assert [pack.num_tokens for pack in packs] == [8, 4, 2]
    assert [pack.most_tokens for pack in packs] == [8] * 3
    assert [pack.select([0, 1]).most_tokens for pack in packs] == [4] * 3


def test_sequences_leave_and_come_back() -> None:
    pack = Pack.build([2, 1], [1, 4], CPU)
    hidden = Hidden(torch.arange(3.0)[:, None], torch.arange(5.0)[:, None])
    first, second = pack.sequences(hidden)
    assert (first.text.flatten().tolist(), second.image.flatten().tolist()) == ([0, 1], [1, 2, 3, 4])
    again = Hidden.packed([first, second])
    assert torch.equal(again.text, hidden.text)
    assert torch.equal(again.image, hidden.image)


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


def test_rows_of_the_images_in_joint_order_leave_gaps_for_the_texts() -> None:
    pack = Pack.build([2, 0, 3], [4, 2, 1], torch.device("cpu"))
    assert pack.image_in_joint.ranges == ((2, 6), (6, 8), (11, 12))
    assert pack.image_in_joint.gaps == ((0, 2), (8, 11))
    assert pack.joint.ranges.gaps == ()
