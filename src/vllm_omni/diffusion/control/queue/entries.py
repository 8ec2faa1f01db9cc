"""Progress of a request, its next item, and the policies that order requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from vllm_omni.diffusion.control.scheduled_request import ScheduledRequest
from vllm_omni.diffusion.data import SchedulingPolicy
from vllm_omni.diffusion.messages.checkpoint import Checkpoint

AGEING = 0.1
"""Units by which a waiting request moves forward for each unit of work done for others."""


class Phase(IntEnum):
    """Kind of an item: encode, denoising step or decode."""

    ENCODE = 0
    DENOISE = 1
    DECODE = 2


@dataclass(eq=False)
class Entry:
    """A request and its planned progress, which may be ahead of the device."""

    request: ScheduledRequest
    number: int
    """Position in the order of arrival."""
    arrival_work: float
    """Units that had been planned for all requests when this one arrived."""
    step_overhead: float
    """Units that take as long as the fixed overhead of a step."""
    first_step_id: int = 0
    """Plan in which the current run began: results of older plans belong to an earlier run."""
    previews: set[int] = field(default_factory=set)
    """Steps (1-based) whose preview was not delivered yet."""
    planned_work: float = 0.0
    """Units planned for this request."""
    frames_per_piece: int = 1
    """Latent frames of a video that one item decodes."""
    checkpoint: Checkpoint | None = None
    """Newest checkpoint, from which it begins and begins again."""
    unsaved_seconds: float = 0.0
    """Estimated seconds of the denoising steps that are planned and not in a checkpoint."""
    awaits_checkpoint: bool = False
    """Whether a checkpoint was asked for and not delivered."""
    steps: int = field(init=False)
    """Denoising steps done or planned, those before its checkpoint included."""
    encoded_early: bool = False
    """Whether its prompts and pictures were encoded while it waited for an adapter."""
    encoded: bool = False
    decoded_frames: int = 0
    """Latent frames whose decode is planned."""
    runs_alone: bool = False
    """Whether it begins when no other request is under way, and shares no step: it ran out of memory beside others, or
    may have killed workers."""
    num_deaths: int = 0
    """Number of workers that died while they ran it."""
    groups: Sequence[int] = ()
    """Rank group of each branch in the last step."""

    def __post_init__(self) -> None:
        self.steps = self._first_step

    @property
    def _first_step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def phase(self) -> Phase:
        if not self.encoded:
            return Phase.ENCODE
        return Phase.DENOISE if self.steps < self.request.num_steps else Phase.DECODE

    @property
    def has_made_steps(self) -> bool:
        """Whether a denoising step is planned since its newest checkpoint."""
        return self.encoded and self.steps > self._first_step

    @property
    def decoded(self) -> bool:
        """Whether all items are planned."""
        return self.decoded_frames == self.request.num_latent_frames

    @property
    def remaining(self) -> float:
        """Units still to be planned."""
        cost, steps = self.request.cost, self.request.num_steps - self.steps
        num_previews = sum(step > self.steps for step in self.previews)  # each is the decode of one latent frame
        num_frames = self.request.num_latent_frames - self.decoded_frames + num_previews
        encode = 0.0 if self.encoded else self._encode_cost
        return encode + steps * (cost.step + self.step_overhead) + num_frames * self.request.frame_cost

    @property
    def _encode_cost(self) -> float:
        return 0.0 if self.encoded_early else self.request.cost.encode

    def early_encode(self) -> Item:
        """Item that encodes prompts and pictures while the request waits for an adapter; its encode follows."""
        return Item(self, Phase.ENCODE, self._encode_cost, self._encode_cost, is_early=True)

    def next_item(self) -> Item:
        cost = self.request.cost
        if self.phase is Phase.ENCODE:
            return Item(self, Phase.ENCODE, self._encode_cost, self._encode_cost)
        if self.phase is Phase.DECODE:
            end = min(self.decoded_frames + self.frames_per_piece, self.request.num_latent_frames)
            frames = range(self.decoded_frames, end)
            work = len(frames) * self.request.frame_cost
            return Item(self, Phase.DECODE, work, work, frames=frames)
        preview = self.steps + 1 in self.previews
        extra = self.request.frame_cost if preview else 0.0
        return Item(
            self, Phase.DENOISE, cost.tokens_per_step + extra, cost.step + self.step_overhead + extra, preview=preview
        )

    def tokens_to_join(self, lead: Phase) -> float:
        """Tokens to compare with the budget left in a step whose first item is of phase `lead`; infinity: may not join.

        Denoising gets cheaper per token in larger steps, encodes and decodes do not. So a step led by an encode or a
        decode contains no other phase, which would delay its result.

        An encode in a denoising step counts with the tokens of its later steps: where these fit, the request should
        begin now. A long encode then exceeds the budget and is the last to join.
        """
        if self.runs_alone or (lead is not Phase.DENOISE and self.phase is not lead):
            return math.inf
        joins_later = lead is Phase.DENOISE and self.phase is Phase.ENCODE
        return self.request.cost.tokens_per_step if joins_later else self.next_item().tokens

    def advance(self, item: Item) -> None:
        """Count `item` as planned."""
        self.planned_work += item.work
        if item.is_early:
            self.encoded_early = True
        elif item.phase is Phase.ENCODE:
            self.encoded = True
        elif item.phase is Phase.DENOISE:
            self.steps += 1
        else:
            self.decoded_frames = item.frames.stop

    def plan_checkpoint(self, seconds: float, seconds_per_unit: float) -> bool:
        """Count the denoising step that was planned last, of about `seconds`; return whether a checkpoint follows it.

        After the last step the decode counts as well: no later checkpoint spares it, and it should not be the reason to
        repeat steps.
        """
        interval = self.request.checkpoint_seconds
        if interval is None:
            return False
        self.unsaved_seconds += seconds
        at_risk = self.unsaved_seconds
        if self.phase is Phase.DECODE:
            at_risk += self.remaining * seconds_per_unit
        if at_risk < interval:
            return False
        self.unsaved_seconds = 0.0
        return True

    def rewind(self) -> None:
        """Return to the newest checkpoint, or to the start.

        Delivered previews stay delivered; lost work does not count as planned.
        """
        self.steps, self.planned_work, self.encoded, self.decoded_frames = self._first_step, 0.0, False, 0
        self.unsaved_seconds, self.encoded_early = 0.0, False


@dataclass(frozen=True)
class Item:
    """Next piece of work of one request."""

    entry: Entry
    phase: Phase
    tokens: float
    """Tokens of the plan's budget that this item uses."""
    work: float
    """Work in units of `RequestCost`."""
    preview: bool = False
    is_early: bool = False
    """Whether it encodes ahead of the request's encode."""
    frames: range = range(0)
    """Latent frames of a decode."""

    @property
    def is_piece(self) -> bool:
        """Whether it decodes a piece of a video."""
        return self.phase is Phase.DECODE and self.entry.request.num_latent_frames > 1

    @property
    def is_last(self) -> bool:
        """Whether the request is done after it."""
        return self.phase is Phase.DECODE and self.frames.stop == self.entry.request.num_latent_frames

    @property
    def lead(self) -> Phase:
        """Phase of the item as the first of a step, for `Entry.tokens_to_join`.

        A decode that is not the last piece of a video delays no result, so others may join as they join a denoising
        step.
        """
        return Phase.DENOISE if self.phase is Phase.DECODE and not self.is_last else self.phase


Order = tuple[float, ...]
"""Sort key of an entry."""


def fair_order(entry: Entry) -> Order:
    """Least remaining work first, with ageing.

    The key is `remaining - AGEING * (work done for others since arrival)`. The device's work since arrival is
    `done - arrival_work`, of which `planned_work` was this request's own; `done` is equal for all and is left out.
    A request of R units is not overtaken by one that arrives more than R / AGEING units of device work later.
    """
    return (entry.remaining + AGEING * (entry.arrival_work + entry.planned_work),)


def fcfs_order(entry: Entry) -> Order:
    """First come, first served; but a request that only needs its decode goes first."""
    return (entry.phase is not Phase.DECODE, entry.number)


ORDERS: dict[SchedulingPolicy, Callable[[Entry], Order]] = {"fair": fair_order, "fcfs": fcfs_order}
