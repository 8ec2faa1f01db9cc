"""A step cache runs a transformer's blocks and may reuse what they added to a sequence at an earlier step.

A cache decides for each sequence. Sequences that skip blocks leave the pack for these blocks and return to it behind
them; the others go on as a smaller pack. The stored tensors belong to one guidance branch of one request and are freed
with it. A cache knows no model family, and a model file knows no cache.

PyTorch is imported by the functions that need it: the front end reads the settings in a cache's module without PyTorch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self
from weakref import WeakSet

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_omni.diffusion.compute.distributed.groups import Group
    from vllm_omni.diffusion.compute.packing import Hidden, Pack


class Blocks(Protocol):
    """Blocks of a transformer over the sequences of one step. Only image tokens are read after the last block."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def pack(self) -> Pack: ...

    def run(self, hidden: Hidden, which: range) -> Hidden:
        """Run consecutive blocks."""
        ...

    def signal(self, hidden: Hidden) -> Tensor:
        """[image tokens, D]: modulated image tokens, the input of the first block's attention."""
        ...

    def select(self, members: Sequence[int]) -> Self:
        """The same blocks over some of the sequences, in the order of the pack."""
        ...


@dataclass(frozen=True)
class SlotContent(ABC):
    """Tensors and counters that a cache stores for a sequence. Immutable, because a step that fails is repeated."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All stored tensors; they count in the cache budget, so each must own its memory."""

    def without_tensors(self) -> Self | None:
        """Content to keep where the tensors exceed the cache budget: counters that decisions depend on, if any."""
        return None


@dataclass(eq=False)
class CacheSlot:
    """Storage of a step cache for one guidance branch of one request, on one rank."""

    content: SlotContent | None = None
    """Content after the last step; None if this rank did not compute the branch in that step, or stored nothing."""
    next_content: SlotContent | None = None
    """Content after the current step."""
    skipped: bool = False
    """Whether the current step reuses blocks."""

    def put(self, next_content: SlotContent, skipped: bool) -> None:
        self.next_content, self.skipped = next_content, skipped

    def discard(self) -> None:
        """Drop the content that the current step has put."""
        self.next_content = None

    def settle(self) -> bool:
        """Finish the step; returns whether it reused blocks. A branch computed elsewhere leaves no content."""
        skipped = self.skipped
        self.content, self.next_content, self.skipped = self.next_content, None, False
        return skipped

    def clear(self) -> None:
        """Drop everything, at the end of the request."""
        self.content, self.next_content = None, None

    @property
    def num_bytes(self) -> int:
        contents = [content for content in (self.content, self.next_content) if content is not None]
        return sum({id(x): x.nbytes for content in contents for x in content.tensors}.values())


@dataclass(frozen=True)
class SequenceStep:
    """One step of one sequence, as a cache sees it."""

    slot: CacheSlot | None
    """Slot of the sequence; None: the request does not use the cache."""
    step: int
    """Number of the step, from 0."""
    num_steps: int

    @property
    def content(self) -> SlotContent | None:
        return None if self.slot is None else self.slot.content


class Budget:
    """Limit on the bytes that the sequences of one device hold between two steps.

    It does not bound the peak of a step: a step first stores all its tensors, beside those of the step before, and
    `enforce` then drops what is too much.
    """

    def __init__(self) -> None:
        self.max_bytes = math.inf
        self._slots: WeakSet[CacheSlot] = WeakSet()

    def watch(self, slot: CacheSlot) -> None:
        """Count the slot's tensors from now on, until the slot is freed."""
        self._slots.add(slot)

    @property
    def num_bytes(self) -> int:
        return sum(slot.num_bytes for slot in self._slots)

    def enforce(self, slots: Sequence[CacheSlot]) -> None:
        """Drop the tensors that the current step stores in `slots`, the last slot first, until the budget is kept."""
        excess = self.num_bytes - self.max_bytes
        for slot in reversed(slots):
            if excess <= 0 or slot.next_content is None:
                continue
            kept, num_bytes = slot.next_content, slot.num_bytes
            slot.next_content = kept.without_tensors()
            freed = num_bytes - slot.num_bytes
            excess -= freed
            if not freed:  # tensors of the last step, which may be repeated
                slot.next_content = kept


class StepCache(ABC):
    """Runs the blocks of one model for all requests of a device. A subclass implements `_run_blocks`."""

    def __init__(self, rank_group: Group) -> None:
        """rank_group: the ranks that compute the same sequences; all must take the same decisions."""
        self._rank_group = rank_group
        self.budget = Budget()

    def run(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        """Output of the last block, computed or reused. What does not fit into the budget is not stored."""
        output = self._run_blocks(hidden, blocks, sequences)
        self.budget.enforce([sequence.slot for sequence in sequences if sequence.slot is not None])
        return output

    @abstractmethod
    def _run_blocks(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        """Compute or reuse all blocks; call `_store` for each sequence that has a slot.

        Must not change `hidden` or stored contents. All ranks of the rank group must take the same decisions, also
        where one rank had no memory to store: its content is None or `without_tensors`, and `relative_changes` with a
        missing tensor is infinite on every rank. So no decision may depend on a content or tensor being there.

        `relative_changes` is an exchange: all ranks must call it with pairs of the same sequences. Choose these by
        counters, never by whether a tensor is stored on this rank.
        """

    def _store(self, sequence: SequenceStep, content: SlotContent, skipped: bool) -> None:
        """Store the content after this step. skipped: whether the step reused blocks."""
        assert sequence.slot is not None
        sequence.slot.put(content, skipped)
        self.budget.watch(sequence.slot)


class NoCache(StepCache):
    """Computes every block at every step."""

    def _run_blocks(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        return blocks.run(hidden, range(blocks.num_blocks))


def run_others(blocks: Blocks, hidden: Hidden, reused: Mapping[int, Hidden], which: range) -> Hidden:
    """Outputs of all sequences in the pack's order: those in `reused`, by number, and computed by `which` blocks."""
    if not reused:
        return blocks.run(hidden, which)
    parts = blocks.pack.sequences(hidden)
    others = [i for i in range(len(parts)) if i not in reused]
    outputs = dict(reused)
    if others:
        selected = blocks.select(others)
        computed = selected.run(hidden.packed([parts[i] for i in others]), which)
        outputs |= zip(others, selected.pack.sequences(computed))
    return hidden.packed([outputs[i] for i in range(len(parts))])


def relative_changes(pairs: Sequence[tuple[Tensor, Tensor | None]], rank_group: Group) -> list[float]:
    """mean|now - before| / mean|before| of each pair (now, before), over the tokens of all ranks of the group.

    Infinite if `before` is None on any rank. One exchange and one read from the device for all pairs together.
    """
    import torch

    if not pairs:
        return []
    present, missing = torch.tensor([0.0, 1.0], device=pairs[0][0].device)
    # Without a `before` the sums are not used, so any tensor of the same shape will do.
    nows, befores = [now for now, _ in pairs], [now if before is None else before for now, before in pairs]
    sums = [
        *torch._foreach_norm(differences(nows, befores), 1, dtype=torch.float32),
        *torch._foreach_norm(befores, 1, dtype=torch.float32),
        *(missing if before is None else present for _, before in pairs),
    ]
    change, size, num_missing = rank_group.all_reduce(torch.stack(sums).view(3, -1))
    return torch.where(num_missing > 0, torch.inf, change / size).tolist()


def differences(now: Sequence[Tensor], before: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """now - before of each pair. Every result owns its memory, so dropping one frees its bytes."""
    import torch

    return tuple(torch._foreach_sub(list(now), list(before))) if now else ()
