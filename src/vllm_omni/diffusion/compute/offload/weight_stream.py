"""Weights of modules that run one after another, copied to the device one ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.offload.copies import Copies, Copy

NUM_SLOTS = 2
"""Units of a stream that are on the device at once: one computes while the next one is copied. With more, a copy still
waits either for the link or for a slot, so nothing would be faster."""


@dataclass(frozen=True)
class Unit:
    """A module whose weights come and go at once."""

    module: nn.Module
    """Only its `forward` reads the weights."""
    weights: FlatWeights
    run: Tensor
    """The weights in host memory: uint8 [weights.num_bytes]."""


class WeightStream:
    """Units that take turns in a few slots on the device.

    A unit always uses the same slot, so its parameters have fixed addresses. A unit is copied when it runs, unless it
    is there: usually it was copied while the unit before it ran. Which unit comes next is foreseen from the last time:
    where blocks were skipped, or a step ended, the same is expected again. A wrong guess costs time and no correctness.
    """

    def __init__(self, units: Sequence[Unit], copies: Copies) -> None:
        """Attach the parameters of the units to slots, and copy by hooks on the modules from now on."""
        self._units = units
        self._copies = copies
        self._generation = copies.generation
        self._num_slots = min(NUM_SLOTS, len(units))
        self._slots: list[Tensor] = []
        self._held: list[int | None]
        """Number of the unit that each slot holds, or will hold when its copy is done."""
        self._started: list[Copy]
        """Last copy into each slot."""
        self._followers: list[int]
        """Number of the unit that ran after each unit the last time."""
        self._last: int | None
        self._is_paused = False
        self.reserve()
        self.come_back()
        for number, unit in enumerate(units):
            unit.module.register_forward_pre_hook(lambda *_, number=number: self._enter(number))
            # Also after an error: whatever was launched has the slot until then, and the next step may follow.
            unit.module.register_forward_hook(lambda *_, number=number: self._leave(number), always_call=True)

    def leave(self) -> None:
        """Free the slots; nothing runs until `come_back`. The device has done all copies."""
        for unit in self._units:
            unit.weights.attach(unit.run)
        self._slots = []

    def reserve(self) -> None:
        """Allocate the slots. Raises torch.OutOfMemoryError."""
        self._slots = [self._copies.slot(_largest(self._units)) for _ in range(self._num_slots)]

    def cancel(self) -> None:
        """Free what `reserve` has allocated."""
        self._slots = []

    def come_back(self) -> None:
        """Attach the parameters of the units to the slots that `reserve` has allocated."""
        for number, unit in enumerate(self._units):
            unit.weights.attach(self._slots[self._slot_of(number)])
        self._forget()

    def _forget(self) -> None:
        """Take all slots for empty."""
        self._held = [None] * self._num_slots
        self._started = [None] * self._num_slots
        self._followers = [*range(1, len(self._units)), 0]
        self._last = None

    def copy_all(self) -> None:
        """Copy every unit once, as a step does that computes nothing."""
        for number in range(len(self._units)):
            self._enter(number)
            self._leave(number)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let units run with whatever weights their slots hold: to time a step without its copies."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _slot_of(self, number: int) -> int:
        return number % self._num_slots

    def _enter(self, number: int) -> None:
        if self._is_paused:
            return
        if (generation := self._copies.generation) is not self._generation:
            self._generation = generation
            self._forget()
        if self._last is not None:
            self._followers[self._last] = number
        self._last = number
        self._load(number)
        self._copies.wait(self._started[self._slot_of(number)])
        self._load_ahead(number, {self._slot_of(number)})

    def _leave(self, number: int) -> None:
        if self._is_paused:
            return
        self._copies.released(self._slots[self._slot_of(number)])
        self._load_ahead(number, set())

    def _load_ahead(self, number: int, busy: set[int]) -> None:
        """Start the copies of the units expected after this one, each into the slot of no unit expected before it.

        busy: slots that no copy may take.
        """
        while len(busy) < self._num_slots:
            number = self._followers[number]
            if (slot := self._slot_of(number)) in busy:
                return
            busy.add(slot)
            self._load(number)

    def _load(self, number: int) -> None:
        """Start the copy of a unit, unless its slot holds it."""
        slot, unit = self._slot_of(number), self._units[number]
        if self._held[slot] == number:
            return
        self._held[slot] = None  # whatever happens in the copy
        self._started[slot] = self._copies.copy(unit.run, self._slots[slot])
        self._held[slot] = number


def bytes_of_units(units: Sequence[Unit]) -> int:
    """Bytes of the weights of these units."""
    return sum(unit.weights.num_bytes for unit in units)


def bytes_of_slots(units: Sequence[Unit]) -> int:
    """Bytes of the slots through which a stream of these units goes."""
    return min(NUM_SLOTS, len(units)) * _largest(units)


def _largest(units: Sequence[Unit]) -> int:
    return max((unit.weights.num_bytes for unit in units), default=0)
