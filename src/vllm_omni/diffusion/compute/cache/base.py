"""What a step cache is: it runs a transformer's blocks, and may reuse what they did to a sequence at an earlier step.

A cache decides sequence by sequence. Those that skip blocks leave the pack for these and come back behind them; the
others go on as a smaller pack. What is kept belongs to a guidance branch of a request and dies with it. A cache knows
no model family, and a model file knows no cache.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self
from weakref import WeakSet

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.packing import Hidden, Pack


class Blocks(Protocol):
    """The blocks of a transformer over the sequences of one step. Behind the last one only image tokens matter."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def pack(self) -> Pack: ...

    def run(self, hidden: Hidden, which: range) -> Hidden:
        """Some consecutive blocks."""
        ...

    def signal(self, hidden: Hidden) -> Tensor:
        """[image tokens, D]: what the first block computes on, the image tokens after its modulation."""
        ...

    def select(self, members: Sequence[int]) -> Self:
        """The same blocks over some of the sequences, in order."""
        ...


@dataclass(frozen=True)
class Kept(ABC):
    """What a cache keeps of a sequence; never changed, so that a step that fails can be repeated."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that counts in the budget."""


@dataclass(eq=False)
class CacheSlot:
    """The place for one guidance branch of one request, on each rank."""

    kept: Kept | None = None
    """As of the last step; None where this rank did not compute the branch then."""
    coming: Kept | None = None
    """As of the step under way."""
    skipped: bool = False
    """Whether the step under way reuses blocks."""

    def put(self, coming: Kept, skipped: bool) -> None:
        self.coming, self.skipped = coming, skipped

    def settle(self) -> bool:
        """The step is done; whether it reused blocks. A branch that another rank group computed leaves nothing here."""
        skipped = self.skipped
        self.kept, self.coming, self.skipped = self.coming, None, False
        return skipped

    @property
    def num_bytes(self) -> int:
        tensors = {id(x): x.nbytes for kept in (self.kept, self.coming) if kept is not None for x in kept.tensors}
        return sum(tensors.values())


@dataclass(frozen=True)
class SequenceStep:
    """One sequence of a step, as a cache sees it."""

    slot: CacheSlot | None
    """None: its request takes no part in caching."""
    step: int
    num_steps: int

    @property
    def kept(self) -> Kept | None:
        return None if self.slot is None else self.slot.kept


class Budget:
    """The memory for what caches keep on this device."""

    def __init__(self) -> None:
        self.max_bytes = math.inf
        self._slots: WeakSet[CacheSlot] = WeakSet()

    def watch(self, slot: CacheSlot) -> None:
        self._slots.add(slot)

    @property
    def num_bytes(self) -> int:
        return sum(slot.num_bytes for slot in self._slots)


class StepCache(ABC):
    def __init__(self, rank_group: Group) -> None:
        """rank_group: the ranks that compute the same sequences, and so must decide alike."""
        self._rank_group = rank_group
        self.budget = Budget()

    @abstractmethod
    def run(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        """All blocks, or what stands for them."""

    def _keep(self, sequence: SequenceStep, kept: Kept, skipped: bool) -> None:
        assert sequence.slot is not None
        sequence.slot.put(kept, skipped)
        self.budget.watch(sequence.slot)


class NoCache(StepCache):
    """Every block at every step."""

    def run(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        return blocks.run(hidden, range(blocks.num_blocks))


def run_others(blocks: Blocks, hidden: Hidden, reused: Mapping[int, Hidden], which: range) -> Hidden:
    """`which` blocks over the sequences that are not in `reused`, and what `reused` says of the others behind them."""
    if not reused:
        return blocks.run(hidden, which)
    parts = blocks.pack.sequences(hidden)
    others = [i for i in range(len(parts)) if i not in reused]
    outputs = dict(reused)
    if others:
        some = blocks.select(others)
        computed = some.run(Hidden.packed([parts[i] for i in others]), which)
        outputs |= zip(others, some.pack.sequences(computed))
    return Hidden.packed([outputs[i] for i in range(len(parts))])


def relative_changes(pairs: Sequence[tuple[Tensor, Tensor | None]], rank_group: Group) -> list[float]:
    """mean|now - before| / mean|before| of each (now, before), over the parts of all ranks of the group.

    Infinite where `before` is None on any rank. One exchange and one read from the device for all pairs together.
    """
    if not pairs:
        return []
    present, missing = torch.tensor([0.0, 1.0], device=pairs[0][0].device)
    # Where nothing is known from before, the sums are of no interest.
    nows, befores = [now for now, _ in pairs], [now if before is None else before for now, before in pairs]
    sums = [
        *torch._foreach_norm(differences(nows, befores), 1, dtype=torch.float32),
        *torch._foreach_norm(befores, 1, dtype=torch.float32),
        *(missing if before is None else present for _, before in pairs),
    ]
    change, size, num_missing = rank_group.all_reduce(torch.stack(sums).view(3, -1))
    return torch.where(num_missing > 0, torch.inf, change / size).tolist()


def differences(now: Sequence[Tensor], before: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """now - before of each; every one owns its memory, so that dropping it frees that."""
    return tuple(torch._foreach_sub(list(now), list(before))) if now else ()
