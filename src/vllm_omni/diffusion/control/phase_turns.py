"""Turns of phases on the device, where components displace each other: when encodes and decodes interrupt steps.

An encode needs the text encoder, a step the transformer, a decode the VAE. A phase whose components have room beside
the transformer joins any plan. One that displaces it gets plans of its own: when there is nothing else to do, or when
the copies that it costs are small beside the work since its last turn. So copies take about `COPY_SHARE` of the work
for each of these phases, and nothing waits much longer than `1 / COPY_SHARE` times the copies of its turn.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Protocol

from vllm_omni.diffusion.control.queue.entries import Item, Phase

COPY_SHARE = 0.2
"""Most seconds of copies that a turn may cost, as a share of the work since the phase had its last turn."""
ALL = frozenset(Phase)


class TurnCosts(Protocol):
    """Seconds of copies, as `WorkerReady` has them."""

    encode_turn_seconds: float
    decode_turn_seconds: float


class PhaseTurns:
    """Order in which phases get the device."""

    def __init__(self, costs: TurnCosts) -> None:
        seconds = {Phase.ENCODE: costs.encode_turn_seconds, Phase.DECODE: costs.decode_turn_seconds}
        self._seconds = {phase: cost for phase, cost in seconds.items() if cost > 0}
        """Seconds of copies that a turn costs, there and back, of the phases that have turns of their own."""
        self._main = ALL - self._seconds.keys()
        """Phases that share plans with denoising steps."""
        self._now = Phase.DENOISE
        """Phase that has the device, DENOISE for all of `_main`."""
        self._work = 0.0
        """Units of all items so far, without copies."""
        self._left_at = dict.fromkeys(Phase, 0.0)
        """Units at which each phase had its last turn."""
        self.num_turns = 0
        """Turns of encodes and of decodes so far."""

    @property
    def is_on(self) -> bool:
        """Whether a phase has turns of its own; otherwise every plan may contain all phases."""
        return bool(self._seconds)

    def groups(self, ready: Collection[Phase], seconds_per_unit: float) -> list[frozenset[Phase]]:
        """Phases that the next plan may contain, best first; the next group counts if no item of a group can run.

        ready: phases of the items that wait.
        """
        waiting = {phase if phase in self._seconds else Phase.DENOISE for phase in ready}

        def is_worth_it(phase: Phase) -> bool:
            cost = self._seconds[phase if phase in self._seconds else self._now]
            return cost <= COPY_SHARE * (self._work - self._left_at[phase]) * seconds_per_unit

        # Decodes first, for they end requests. Encodes go before steps: the transformer comes back for both.
        others = [phase for phase in (Phase.DECODE, Phase.ENCODE, Phase.DENOISE) if phase in waiting - {self._now}]
        due = [phase for phase in others if is_worth_it(phase)]
        order = [*due, *({self._now} & waiting), *(phase for phase in others if phase not in due)]
        return [frozenset({phase}) if phase in self._seconds else self._main for phase in order]

    def note(self, items: Sequence[Item]) -> float:
        """Note the items of a plan, all of one group. Returns the seconds of the copies that it costs."""
        if not (items and self.is_on):
            return 0.0
        self._work += sum(item.work for item in items)
        phase = items[0].phase if items[0].phase in self._seconds else Phase.DENOISE
        seconds = 0.0
        if phase != self._now:
            self._left_at[self._now] = self._work
            if phase in self._seconds:
                seconds += self._turn(phase)
        self._now = phase
        if phase is Phase.ENCODE and not any(item.is_encode_piece and not _ends_encode(item) for item in items):
            self._now = Phase.DENOISE  # the transformer is the last component that an encode uses
        if Phase.DECODE in self._seconds and any(item.preview for item in items):
            seconds += self._turn(Phase.DECODE)
        return seconds

    def _turn(self, phase: Phase) -> float:
        self.num_turns += 1
        self._left_at[phase] = self._work
        return self._seconds[phase]

    def seconds(self, num_encodes: int, num_decodes: int, at_a_time: int) -> float:
        """Estimated seconds of copies for so many encodes and decodes, of which `at_a_time` share a turn."""
        counts = {Phase.ENCODE: num_encodes, Phase.DECODE: num_decodes}
        return sum(math.ceil(counts[phase] / at_a_time) * cost for phase, cost in self._seconds.items())


def _ends_encode(item: Item) -> bool:
    return item.frames.stop == item.entry.request.num_encoded_frames
