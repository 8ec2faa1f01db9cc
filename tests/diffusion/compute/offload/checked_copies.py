"""Copies of a fake device: late as they may be, over memory that is no number until then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.offload.copies import Copies

NO_NUMBER = 255
"""Byte whose repetition is a NaN in every floating-point type."""


@dataclass(eq=False)
class LateCopy:
    source: Tensor
    slot: Tensor
    is_done: bool = False


class CheckedCopies(Copies):
    """Copies that are done when they are waited for. Until then their slot holds NaN.

    A copy into a slot that is read at the time is an AssertionError.
    """

    def __init__(self) -> None:
        self.slot_bytes = 0
        self.copied_bytes: list[int] = []
        """Bytes of each copy that was started."""
        self._last: dict[int, LateCopy] = {}
        self._in_use: set[int] = set()

    def slot(self, num_bytes: int) -> Tensor:
        self.slot_bytes += num_bytes
        return torch.full((num_bytes,), NO_NUMBER, dtype=torch.uint8)

    def copy(self, source: Tensor, slot: Tensor) -> LateCopy:
        assert slot.data_ptr() not in self._in_use, "a copy into weights that may still be read"
        slot.fill_(NO_NUMBER)
        self.copied_bytes.append(len(source))
        self._last[slot.data_ptr()] = started = LateCopy(source, slot)
        return started

    def wait(self, copy: LateCopy) -> None:
        assert self._last[copy.slot.data_ptr()] is copy, "the slot holds another unit"
        if not copy.is_done:
            copy.slot[: len(copy.source)].copy_(copy.source)
            copy.is_done = True
        self._in_use.add(copy.slot.data_ptr())

    def released(self, slot: Tensor) -> None:
        self._in_use.discard(slot.data_ptr())


class CopiesWithoutWaiting(CheckedCopies):
    """Copies whose consumer does not wait."""

    def wait(self, copy: LateCopy) -> None:
        self._in_use.add(copy.slot.data_ptr())
