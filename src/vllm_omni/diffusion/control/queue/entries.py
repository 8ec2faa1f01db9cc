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
    """Latent frames of a video that one item decodes, or encodes: both are priced alike."""
    checkpoint: Checkpoint | None = None
    """Newest checkpoint, from which it begins and begins again."""
    unsaved_seconds: float = 0.0
    """Estimated seconds of the denoising steps that are planned and not in a checkpoint."""
    awaits_checkpoint: bool = False
    """Whether a checkpoint was asked for and not delivered."""
    steps: int = field(init=False)
    """Denoising steps done or planned, those before its checkpoint included."""
    encoded_frames: int = 0
    """Latent frames whose encode is planned; an encode that is not cut counts as one."""
    encoded_early: bool = False
    """Whether its prompts and pictures were encoded while it waited for an adapter."""
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
    def begun(self) -> bool:
        """Whether its first item is planned."""
        return self.encoded_frames > 0

    @property
    def encoded(self) -> bool:
        """Whether its encode is planned to the end."""
        return self.encoded_frames == self.request.num_encoded_frames

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
        encode = self._encode_work(self.request.num_encoded_frames)
        return encode + steps * (cost.step + self.step_overhead) + num_frames * self.request.frame_cost

    @property
    def _text_work(self) -> float:
        """Units of the encode that come with its first item: those of prompts and pictures, without a cut video."""
        cost = self.request.cost
        return 0.0 if self.begun or self.encoded_early else cost.encode - cost.encode_video

    def _encode_work(self, end: int) -> float:
        """Units to encode what is not planned up to the latent frame `end`."""
        return self._text_work + (end - self.encoded_frames) * self.request.encoded_frame_cost

    def early_encode(self) -> Item:
        """Item that encodes prompts and pictures while the request waits for an adapter; its encode follows."""
        return Item(self, Phase.ENCODE, self._text_work, self._text_work, is_early=True)

    def next_item(self) -> Item:
        cost = self.request.cost
        if self.phase is Phase.ENCODE:
            end = min(self.encoded_frames + self.frames_per_piece, self.request.num_encoded_frames)
            work = self._encode_work(end)
            return Item(self, Phase.ENCODE, work, work, frames=range(self.encoded_frames, end))
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
        begin now. A long encode then exceeds the budget and is the last to join. A piece of an encode must fit as well:
        one piece after the other would lengthen every step.
        """
        if self.runs_alone or (lead is not Phase.DENOISE and self.phase is not lead):
            return math.inf
        item, later = self.next_item(), self.request.cost.tokens_per_step
        if lead is not Phase.DENOISE or self.phase is not Phase.ENCODE:
            return item.tokens
        return max(later, item.tokens) if item.is_encode_piece else later

    def advance(self, item: Item) -> None:
        """Count `item` as planned."""
        self.planned_work += item.work
        if item.is_early:
            self.encoded_early = True
        elif item.phase is Phase.ENCODE:
            self.encoded_frames = item.frames.stop
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
        self.steps, self.planned_work, self.encoded_frames, self.decoded_frames = self._first_step, 0.0, 0, 0
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
    """Latent frames of an encode or a decode."""

    @property
    def is_encode_piece(self) -> bool:
        """Whether it encodes a piece of a conditioning video."""
        if self.phase is not Phase.ENCODE or self.is_early:
            return False
        return len(self.frames) < self.entry.request.num_encoded_frames

    @property
    def is_decode_piece(self) -> bool:
        """Whether it decodes a piece of a video."""
        return self.phase is Phase.DECODE and self.entry.request.num_latent_frames > 1

    @property
    def is_last(self) -> bool:
        """Whether the request is done after it."""
        return self.phase is Phase.DECODE and self.frames.stop == self.entry.request.num_latent_frames

    @property
    def lead(self) -> Phase:
        """Phase of the item as the first of a step, for `Entry.tokens_to_join`.

        A piece of a video that is not the last one of its encode or decode delays no result, so others may join as they
        join a denoising step.
        """
        num_encoded = self.entry.request.num_encoded_frames
        is_encode_end = self.phase is Phase.ENCODE and (self.is_early or self.frames.stop == num_encoded)
        return self.phase if is_encode_end or self.is_last else Phase.DENOISE


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
