"""Choice of the items of the next plan: the first requests in order, up to a budget of tokens."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

from vllm_omni.diffusion.control.decode_groups import DecodeGroups
from vllm_omni.diffusion.control.phase_turns import ALL, PhaseTurns
from vllm_omni.diffusion.control.queue.entries import Entry, Item, Phase
from vllm_omni.diffusion.control.queue.order import EntryOrder
from vllm_omni.diffusion.control.resident_adapters import ResidentAdapters
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady

_SMALL_SHARE = 0.25
"""Share of the token budget that may join any step; see `Selection._tokens_left`."""
_STEPS_BEGUN = 8
"""Where encodes have turns of their own: requests of so many budgets of tokens may be under way at a time. More of them
share a turn, but each holds memory."""


class Selection:
    """Limits of a plan, and the requests that it chooses from."""

    def __init__(
        self,
        config: OmniDiffusionConfig,
        ready: WorkerReady,
        order: EntryOrder,
        begun: Mapping[str, Entry],
        asked: Mapping[str, Entry],
        adapters: ResidentAdapters,
    ) -> None:
        """begun: requests whose first item was planned. asked: those that wait for a plan with their checkpoint."""
        self.max_batch_tokens = config.max_batch_tokens or ready.max_batch_tokens
        self.max_num_seqs = min(config.max_num_seqs, ready.max_num_seqs or config.max_num_seqs)
        self._max_running = ready.max_running
        self.decode_groups = DecodeGroups(config.parallel.replica_size // config.parallel.vae_patch_parallel_size)
        self.turns = PhaseTurns(ready)
        self._order = order
        self._begun = begun
        self._asked = asked
        self._adapters = adapters

    def choose(self, seconds_per_unit: float) -> list[Item]:
        """Items of the next plan."""
        if not self.turns.is_on:
            return self._choose_of(ALL)
        for phases in self.turns.groups(self._ready_phases(), seconds_per_unit):
            if items := self._choose_of(phases):
                return items
        return []

    def _ready_phases(self) -> set[Phase]:
        """Phases of the items that wait; some of them may have to wait on."""
        phases = {entry.phase for entry in self._begun.values() if not entry.decoded}
        return phases | {Phase.ENCODE} if self._order.num_waiting else phases

    def _choose_of(self, phases: frozenset[Phase]) -> list[Item]:
        """Choose items of these phases, of the first requests in order: always the first, then those that fit."""
        is_full = self._max_running is not None and self._order.num_begun >= self._max_running
        encodes_alone = phases == {Phase.ENCODE}
        candidates = self._order.candidates(begun_only=is_full or Phase.ENCODE not in phases)
        room = self._room_to_begin() if encodes_alone else math.inf
        chosen: list[Item] = []
        busy: set[int] = set()
        lacks_slots = False
        num_tokens, lead, limit = 0.0, Phase.ENCODE, math.inf
        while len(chosen) < self.max_num_seqs and (entry := candidates.next(lead, limit)):
            if entry.runs_alone and not entry.begun and self._begun:
                candidates = self._order.candidates(begun_only=True)  # it begins when these have freed their memory
                continue
            if entry.request.request_id in self._asked or entry.phase not in phases:
                continue
            item = entry.next_item()
            if item.is_decode_piece and not self.decode_groups.take(entry.request.request_id, busy):
                continue
            if encodes_alone and not entry.begun and (self._begun or chosen):
                room -= entry.request.cost.tokens_per_step
                if room < 0:
                    break
            can_begin = entry.begun or self._adapters.is_ready(entry.request.request_id)
            if item.is_encode_piece and can_begin and not _may_encode(item, chosen):
                continue
            if item.phase is Phase.ENCODE and not entry.begun and entry.request.request.loras:
                # A request without slots is not overtaken by others with adapters, which would keep the slots in use.
                if (begins := self._with_adapters(item, lacks_slots)) is None:
                    lacks_slots = True
                    continue
                item = begins
            chosen.append(item)
            num_tokens += item.tokens
            lead, limit = chosen[0].lead, self._tokens_left(num_tokens)
            if encodes_alone:  # one turn for as many as may begin
                lead, limit = Phase.ENCODE, sys.float_info.max
            if entry.runs_alone:
                return chosen
        self._fill_decode_groups(chosen, busy)
        return chosen

    def _room_to_begin(self) -> float:
        """Tokens of the steps of requests that may begin beside those under way."""
        tokens = sum(entry.request.cost.tokens_per_step for entry in self._begun.values())
        return _STEPS_BEGUN * self.max_batch_tokens - tokens

    def _with_adapters(self, item: Item, lacks_slots: bool) -> Item | None:
        """The encode of a request with adapters, or one ahead of it if they are not read. None: it needs slots first.

        lacks_slots: whether a request ahead of it needs slots.
        """
        entry, request_id = item.entry, item.entry.request.request_id
        if not self._adapters.is_ready(request_id):
            return entry.early_encode()
        if entry.runs_alone:
            self._adapters.drop_idle()
        return None if lacks_slots or not self._adapters.take_slots(request_id) else item

    def _fill_decode_groups(self, chosen: list[Item], busy: set[int]) -> None:
        """Add pieces of videos for groups of ranks that would idle during a piece of the plan: they take no time."""
        longest = max((item.tokens for item in chosen if item.is_decode_piece), default=0.0)
        candidates = self._order.candidates(begun_only=True)
        while (
            0 < len(busy) < self.decode_groups.num_groups
            and len(chosen) < self.max_num_seqs
            and (entry := candidates.next(Phase.DECODE, longest))
        ):
            if entry.request.request_id in self._asked:
                continue
            item = entry.next_item()
            if item.is_decode_piece and self.decode_groups.take(entry.request.request_id, busy):
                chosen.append(item)

    def _tokens_left(self, num_tokens: float) -> float:
        """Largest number of tokens that may join a step of `num_tokens`.

        A joiner may at most triple the step for those ahead of it, except in small steps. A long request does not share
        a step with a short one; it waits.
        """
        return min(
            self.max_batch_tokens - num_tokens,
            max(2 * num_tokens, _SMALL_SHARE * self.max_batch_tokens),
        )


def _may_encode(piece: Item, chosen: Sequence[Item]) -> bool:
    """Whether a plan with the items `chosen` may encode this piece: a plan encodes pieces of one video.

    Encodes gain nothing from company, and each begun one holds memory. Requests with the same video share its encode.
    """
    video = piece.entry.request.conditioning_video
    return all(video == item.entry.request.conditioning_video for item in chosen if item.is_encode_piece)
