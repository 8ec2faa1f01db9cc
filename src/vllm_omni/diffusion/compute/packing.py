"""Packs: the tokens of all sequences of a step in flat tensors, without padding.

A sequence is one guidance branch of one request: its text tokens and its image tokens. Text tokens of all sequences are
one tensor, image tokens another, both in the order of the sequences. Attention reads them in joint order: the text of a
sequence, then its image, then the next sequence.

If several ranks share a sequence, each holds a shard of its text and a shard of its image, and packs its shards in the
same way. Lengths are arbitrary; a rank may hold no token of a short text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import to_device


def shard_lengths(length: int, parts: int) -> list[int]:
    """Lengths of the shards of `length` rows over `parts` ranks; they differ by at most one."""
    return [length // parts + (i < length % parts) for i in range(parts)]


def shard_slice(length: int, parts: int, index: int) -> slice:
    """Rows of shard `index` of `parts`."""
    short, longer = divmod(length, parts)
    start = index * short + min(index, longer)
    return slice(start, start + short + (index < longer))


class TokenRanges(NamedTuple):
    """Rows of each sequence in a flat tensor, which may hold other rows too."""

    ranges: tuple[tuple[int, int], ...]
    """First row and end of the rows of each sequence, in order."""
    num_rows: int
    """Rows of the tensor."""

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Rows that belong to no sequence."""
        starts, stops = zip(*self.ranges)
        return tuple((a, b) for a, b in zip((0, *stops), (*starts, self.num_rows)) if a < b)


@dataclass(frozen=True)
class Offsets:
    """Token offsets of the sequences in a flat tensor; the last value is the number of tokens."""

    values: tuple[int, ...]
    """N + 1 integers; the first is 0."""
    cu_seqlens: Tensor
    """`values` as int32 [N + 1] on the device, for variable-length kernels."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Offsets:
        values = (0, *accumulate(lengths))
        return cls(values, to_device(torch.tensor(values, dtype=torch.int32), device))

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise(self.values))

    @cached_property
    def ranges(self) -> TokenRanges:
        return TokenRanges(tuple(pairwise(self.values)), self.values[-1])

    @property
    def max_length(self) -> int:
        return max(self.lengths)


@dataclass(frozen=True)
class Hidden:
    """Hidden states between the blocks of a transformer: text [text tokens, D] and image [image tokens, D]."""

    text: Tensor
    image: Tensor

    @classmethod
    def packed(cls, parts: Sequence[Hidden]) -> Hidden:
        """Concatenate sequences; the inverse of `Pack.sequences`."""
        return cls(torch.cat([part.text for part in parts]), torch.cat([part.image for part in parts]))


@dataclass(frozen=True)
class Pack:
    """Offsets and indices of the sequences of a step. They depend on the lengths alone and serve several steps."""

    text: Offsets
    image: Offsets
    joint: Offsets
    text_sequence: Tensor
    """int64 [text tokens]: number of each text token's sequence, in the whole pack (see `select`)."""
    image_sequence: Tensor
    """int64 [image tokens]: number of each image token's sequence, in the whole pack."""
    joint_order: Tensor | None
    """int64 [tokens]: row j of the joint order is row `joint_order[j]` of [all text, all image]; None for one sequence,
    where both orders are the same."""
    joint_is_image: Tensor
    """int64 [tokens], in joint order: 1 for image tokens, 0 for text tokens."""
    joint_lengths: tuple[tuple[int, ...], ...]
    """For each rank that shares the sequences: its number of tokens of each sequence."""
    numbers: tuple[int, ...]
    """Number of each sequence in the whole pack."""

    @classmethod
    def build(
        cls,
        text_lengths: Sequence[int],
        image_lengths: Sequence[int],
        device: torch.device,
        parts: int = 1,
        index: int = 0,
    ) -> Pack:
        """Pack of sequences with these lengths, each sharded over `parts` ranks; this rank holds shard `index`."""
        assert len(text_lengths) == len(image_lengths) > 0
        whole = zip([shard_lengths(n, parts) for n in text_lengths], [shard_lengths(n, parts) for n in image_lengths])
        joint_lengths = tuple(zip(*([t + i for t, i in zip(*cuts)] for cuts in whole)))
        return cls._of(
            [shard_lengths(n, parts)[index] for n in text_lengths],
            [shard_lengths(n, parts)[index] for n in image_lengths],
            joint_lengths,
            range(len(text_lengths)),
            device,
        )

    @classmethod
    def _of(
        cls,
        text_lengths: Sequence[int],
        image_lengths: Sequence[int],
        joint_lengths: tuple[tuple[int, ...], ...],
        numbers: Sequence[int],
        device: torch.device,
    ) -> Pack:
        """Pack from the lengths of this rank's shards and the numbers of the sequences in the whole pack."""
        num_text = sum(text_lengths)
        text, image = (Offsets.of(lengths, device) for lengths in (text_lengths, image_lengths))
        order = list(
            chain.from_iterable(
                chain(
                    range(text.values[i], text.values[i + 1]),
                    range(num_text + image.values[i], num_text + image.values[i + 1]),
                )
                for i in range(len(text_lengths))
            )
        )
        joint_order = torch.tensor(order, dtype=torch.int64)
        is_ordered = len(text_lengths) == 1
        return cls(
            text=text,
            image=image,
            joint=Offsets.of([t + i for t, i in zip(text_lengths, image_lengths)], device),
            text_sequence=_sequence_of(text_lengths, numbers, device),
            image_sequence=_sequence_of(image_lengths, numbers, device),
            joint_order=None if is_ordered else to_device(joint_order, device),
            joint_is_image=to_device((joint_order >= num_text).long(), device),
            joint_lengths=joint_lengths,
            numbers=tuple(numbers),
        )

    def select(self, members: Sequence[int]) -> Pack:
        """Pack of some of the sequences, in order.

        `text_sequence` and `image_sequence` keep the numbers of the whole pack, so its rows of modulation serve the
        selected sequences too.
        """
        return Pack._of(
            [self.text.lengths[i] for i in members],
            [self.image.lengths[i] for i in members],
            tuple(tuple(lengths[i] for i in members) for lengths in self.joint_lengths),
            [self.numbers[i] for i in members],
            self.text_sequence.device,
        )

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor] | None:
        """Positions of the text and the image tokens in joint order: int64 [text tokens], [image tokens].

        None for one sequence, where the joint order is [text, image].
        """
        if self.joint_order is None:
            return None
        text, image = self.joint_order.argsort().split([self.text.values[-1], self.image.values[-1]])
        return text, image

    @cached_property
    def image_in_joint(self) -> TokenRanges:
        """Rows of the image tokens in joint order, where those of a sequence follow its text."""
        starts = (a + length for a, length in zip(self.joint.values, self.text.lengths))
        return TokenRanges(tuple(zip(starts, self.joint.values[1:])), self.num_tokens)

    @property
    def num_sequences(self) -> int:
        return len(self.text.values) - 1

    @property
    def num_tokens(self) -> int:
        return self.joint.values[-1]

    @property
    def most_tokens(self) -> int:
        """Tokens of the rank that holds most, among the ranks that share the sequences; the same on all of them."""
        return max(sum(lengths) for lengths in self.joint_lengths)

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """[text tokens, ...] and [image tokens, ...] -> [tokens, ...] in joint order."""
        return torch.cat(list(chain.from_iterable(zip(text.split(self.text.lengths), image.split(self.image.lengths)))))

    def split(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `join`; views where there is one sequence."""
        parts = joint.split(list(chain.from_iterable(zip(self.text.lengths, self.image.lengths))))
        if self.num_sequences == 1:
            return parts[0], parts[1]
        return torch.cat(parts[::2]), torch.cat(parts[1::2])

    def sequences(self, hidden: Hidden) -> list[Hidden]:
        """Views of each sequence."""
        texts, images = hidden.text.split(self.text.lengths), hidden.image.split(self.image.lengths)
        return [Hidden(text, image) for text, image in zip(texts, images)]


def _sequence_of(lengths: Sequence[int], numbers: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.repeat_interleave(torch.tensor(list(numbers)), torch.tensor(lengths)), device)


Built = TypeVar("Built")


class MembershipCache(Generic[Built]):
    """Values built for the last few memberships; a step with the same members builds nothing.

    Several are kept because the scheduler may alternate between memberships. The members are part of the key and are
    compared by identity, so a new member is never taken for a former one.
    """

    def __init__(self, capacity: int = 4) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[tuple[object, ...], Built] = OrderedDict()

    def get(self, key: tuple[object, ...], build: Callable[[], Built]) -> Built:
        """Value of the membership `key`, built if it is new."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        entry = self._entries[key] = build()
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return entry

    def forget(self, member: object) -> None:
        """Drop all entries with this member."""
        for key in [key for key in self._entries if member in key]:
            del self._entries[key]

    def drop(self, is_dropped: Callable[[Built], bool]) -> None:
        """Drop these values."""
        for key in [key for key, value in self._entries.items() if is_dropped(value)]:
            del self._entries[key]

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
