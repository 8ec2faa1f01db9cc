"""Copies of weights from host memory into memory of the device, beside the device's other work."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vllm_omni.diffusion.compute.device.transfers import is_host

Copy = Any
"""A copy that was started: what `Copies.wait` takes."""


class Copies(ABC):
    """Copies into slots, runs of memory on the device that are used again and again.

    A slot is read by the device's work between `wait` and `released`. All three calls return at once.
    """

    @property
    def generation(self) -> object:
        """Object that is another one once slots must be taken for empty: None, as long as copies need no other rank."""
        return None

    @abstractmethod
    def slot(self, num_bytes: int) -> Tensor:
        """New slot: uint8 [num_bytes]. It may be copied into."""

    @abstractmethod
    def copy(self, source: Tensor, slot: Tensor) -> Copy:
        """Start a copy into the first bytes of a slot, after all work that was launched before its last `released`.

        source: uint8 [bytes] in host memory, unchanged until the copy is done.
        """

    @abstractmethod
    def wait(self, copy: Copy) -> None:
        """Let the work launched from now on wait until the copy is done."""

    @abstractmethod
    def released(self, slot: Tensor) -> None:
        """Say that only work launched so far reads what the slot holds."""


class DirectCopies(Copies):
    """Copies on a CPU, which are done when `copy` returns."""

    def slot(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, source: Tensor, slot: Tensor) -> Copy:
        slot[: len(source)].copy_(source)

    def wait(self, copy: Copy) -> None:
        pass

    def released(self, slot: Tensor) -> None:
        pass


class CudaCopies(Copies):
    """Copies on a CUDA stream of their own; events order them and the work on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._released: dict[int, torch.cuda.Event] = {}
        """Last release of each slot, by its address."""

    def slot(self, num_bytes: int) -> Tensor:
        made = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        made.record_stream(self._stream)  # when the slot is freed, its memory is reused after the last copy
        self.released(made)  # by the work that used this memory before
        return made

    def copy(self, source: Tensor, slot: Tensor) -> Copy:
        with self.after_release(slot):
            slot[: len(source)].copy_(source, non_blocking=True)
            return self._recorded()

    @contextmanager
    def after_release(self, slot: Tensor) -> Iterator[None]:
        """Launch work on the stream of the copies, after all work before the slot's last release."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._released[slot.data_ptr()])
            yield

    def wait(self, copy: Copy) -> None:
        torch.cuda.current_stream(self._device).wait_event(copy)

    def released(self, slot: Tensor) -> None:
        self._released[slot.data_ptr()] = self._recorded()

    def _recorded(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event


def copies_for(device: torch.device) -> Copies:
    """Copies from host memory to this device."""
    return DirectCopies() if is_host(device) else CudaCopies(device)
