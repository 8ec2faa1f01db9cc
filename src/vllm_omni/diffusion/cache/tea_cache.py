"""TeaCache (arXiv 2411.19108): the change of the first block's modulated input foretells that of the output.

A polynomial, measured for each model, turns the relative change from step to step into an estimate of the output's; the
estimates add up while blocks are skipped, and once the sum reaches a threshold all blocks run and it starts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from torch import Tensor

from vllm_omni.diffusion.cache.base import (
    Blocks,
    Kept,
    SequenceStep,
    StepCache,
    relative_changes,
    run_others,
)
from vllm_omni.diffusion.data import TeaCacheConfig
from vllm_omni.diffusion.distributed.groups import Group
from vllm_omni.diffusion.packing import Hidden
from vllm_omni.diffusion.registry import ModelInfo


@dataclass(frozen=True)
class TeaKept(Kept):
    signal: Tensor | None = None
    """The modulated input of the last step; None: there was no room."""
    added: Tensor | None = None
    """What all blocks added to the image tokens at the last step that computed."""
    accumulated_change: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.signal, self.added) if x is not None)


class TeaCache(StepCache):
    def __init__(self, threshold: float, coefficients: Sequence[float], rank_group: Group) -> None:
        """coefficients: of the model's polynomial, highest power first."""
        super().__init__(rank_group)
        self._threshold = threshold
        self._coefficients = coefficients

    def run(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        before = blocks.pack.sequences(hidden)
        by_sequence = blocks.signal(hidden).split(blocks.pack.image.lengths)
        # Each owns its memory, so that dropping one frees it.
        signals = [None if s.slot is None else x.clone() for s, x in zip(sequences, by_sequence)]
        accumulated = self._accumulated(sequences, signals)
        reused = {}
        for i, total in accumulated.items():
            kept, now = sequences[i].kept, signals[i]
            if total < self._threshold and isinstance(kept, TeaKept) and kept.added is not None:
                reused[i] = Hidden(before[i].text, before[i].image + kept.added)
                self._keep(sequences[i], TeaKept(now, kept.added, total), skipped=True)
        left = run_others(blocks, hidden, reused, range(blocks.num_blocks))
        after = blocks.pack.sequences(left)
        spare = self.budget.max_bytes - self.budget.num_bytes
        for i, (sequence, now) in enumerate(zip(sequences, signals)):
            if i in reused or now is None:
                continue
            kept, num_bytes = TeaKept(), 2 * before[i].image.nbytes
            if num_bytes <= spare:
                spare -= num_bytes
                kept = TeaKept(now, after[i].image - before[i].image)
            self._keep(sequence, kept, skipped=False)
        return left

    def _accumulated(self, sequences: Sequence[SequenceStep], signals: Sequence[Tensor | None]) -> dict[int, float]:
        """The estimated change of the output since it was computed, of sequences that may skip this step."""
        pairs, totals = {}, []
        for i, (sequence, now) in enumerate(zip(sequences, signals)):
            kept = sequence.kept
            # Published code computes the first and the last step in any case.
            if now is not None and isinstance(kept, TeaKept) and 0 < sequence.step < sequence.num_steps - 1:
                pairs[i] = (now, kept.signal)
                totals.append(kept.accumulated_change)
        changes = relative_changes(list(pairs.values()), self._rank_group)
        return {
            i: total + evaluate(self._coefficients, change)
            for i, total, change in zip(pairs, totals, changes)
            if change != float("inf")  # some rank has lost what was before
        }


def evaluate(coefficients: Sequence[float], x: float) -> float:
    """The polynomial at x, highest power first (Horner)."""
    return reduce(lambda value, coefficient: value * x + coefficient, coefficients, 0.0)


def create(config: TeaCacheConfig, info: ModelInfo, rank_group: Group) -> TeaCache:
    coefficients = config.coefficients or info.tea_cache_coefficients
    assert coefficients is not None, "ModelInfo.check_cache comes first"
    return TeaCache(config.rel_l1_thresh, coefficients, rank_group)
