"""A request on its way, its next item, and the policies that order requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.data import SchedulingPolicy

AGEING = 0.1
"""Units by which a waiting request moves forward for each unit done for others."""


class Phase(IntEnum):
    ENCODE = 0
    DENOISE = 1
    DECODE = 2


@dataclass(eq=False)
class Entry:
    """A request on its way, as far as plans have taken it (which may be ahead of the device)."""

    request: ScheduledRequest
    number: int
    """Order of arrival."""
    arrival_work: float
    """Units planned for the device when it arrived."""
    step_overhead: float
    """Units that the fixed overhead of a step is worth."""
    first_step_id: int = 0
    """Plan in which this run began: outcomes of older plans speak of an earlier run."""
    previews: set[int] = field(default_factory=set)
    """Steps whose preview is still to be delivered."""
    planned_work: float = 0.0
    """Units planned for it."""
    steps: int = 0
    encoded: bool = False
    decoded: bool = False
    runs_alone: bool = False
    """Shares no step with others: it ran out of memory in company, or may have killed workers."""
    num_deaths: int = 0
    """Workers that died while they ran it."""
    groups: Sequence[int] = ()
    """Numbers of the rank groups that computed its guidance branches last, one for each branch."""

    @property
    def phase(self) -> Phase:
        if not self.encoded:
            return Phase.ENCODE
        return Phase.DENOISE if self.steps < self.request.num_steps else Phase.DECODE

    @property
    def remaining(self) -> float:
        """Units still to be planned."""
        cost, steps = self.request.cost, self.request.num_steps - self.steps
        num_decodes = sum(step > self.steps for step in self.previews) + (not self.decoded)
        return (not self.encoded) * cost.encode + steps * (cost.step + self.step_overhead) + num_decodes * cost.decode

    def next_item(self) -> Item:
        cost = self.request.cost
        if self.phase is Phase.ENCODE:
            return Item(self, Phase.ENCODE, cost.encode, cost.encode)
        if self.phase is Phase.DECODE:
            return Item(self, Phase.DECODE, cost.decode, cost.decode)
        preview = self.steps + 1 in self.previews
        extra = cost.decode if preview else 0.0
        return Item(
            self, Phase.DENOISE, cost.tokens_per_step + extra, cost.step + self.step_overhead + extra, preview=preview
        )

    def tokens_to_join(self, lead: Phase) -> float:
        """Tokens that decide whether it may join a step that an item of `lead` leads; infinity where it may not.

        Denoising steps gain from company, encodes and decodes do not: a step that one of these leads takes
        no other kind, so that its outcome is not held up.

        An encode beside denoising counts as the steps that it leads to: where these would fit, waiting for
        the encode would keep the pack half empty. If it is long it exceeds the budget, and is the last to join.
        """
        if self.runs_alone or (lead is not Phase.DENOISE and self.phase is not lead):
            return math.inf
        joins_later = lead is Phase.DENOISE and self.phase is Phase.ENCODE
        return self.request.cost.tokens_per_step if joins_later else self.next_item().tokens

    def advance(self, item: Item) -> None:
        self.planned_work += item.work
        if item.phase is Phase.ENCODE:
            self.encoded = True
        elif item.phase is Phase.DENOISE:
            self.steps += 1
        else:
            self.decoded = True

    def rewind(self) -> None:
        """Back to the start; previews that were delivered stay delivered, work that was lost counts as waiting."""
        self.steps, self.planned_work, self.encoded, self.decoded = 0, 0.0, False, False


@dataclass(frozen=True)
class Item:
    """The next piece of work of one request."""

    entry: Entry
    phase: Phase
    tokens: float
    """Part of the plan's token budget that this piece uses."""
    work: float
    preview: bool = False


Order = tuple[float, ...]


def fair_order(entry: Entry) -> Order:
    """Least remaining work first, with ageing.

    Effective work is `remaining - AGEING * (work done for others since it arrived)`. The device's work since
    then is `done - arrival_work`, of which `served` was its own; `done` is the same for all and drops out.
    A request of R units is overtaken by none that arrives more than R / AGEING units of device work after it.
    """
    return (entry.remaining + AGEING * (entry.arrival_work + entry.planned_work),)


def fcfs_order(entry: Entry) -> Order:
    """First come, first served, but a picture that only needs its decode does not wait for longer ones."""
    return (entry.phase is not Phase.DECODE, entry.number)


ORDERS: dict[SchedulingPolicy, Callable[[Entry], Order]] = {"fair": fair_order, "fcfs": fcfs_order}
