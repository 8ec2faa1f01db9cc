"""TeaCache (arXiv 2411.19108): the change of the first block's modulated input foretells that of the output.

A polynomial, measured for each model, turns the relative change from step to step into an estimate of the output's; the
estimates add up while blocks are skipped, and once the sum reaches a threshold all blocks run and it starts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from torch import Tensor

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.cache.base import (
    Blocks,
    Kept,
    SequenceStep,
    StepCache,
    differences,
    relative_changes,
    run_others,
)
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.packing import Hidden
from vllm_omni.diffusion.data import TeaCacheConfig


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
        lengths = blocks.pack.image.lengths
        # Each owns its memory, so that dropping one frees it.
        signals = [x.clone() for x in blocks.signal(hidden).split(lengths)]
        accumulated = self._accumulated(sequences, signals)
        small = {i: total for i, total in accumulated.items() if total < self._threshold}
        parts = blocks.pack.sequences(hidden) if small else []
        spare = self.budget.max_bytes - self.budget.num_bytes
        reused = {}
        for i, total in small.items():
            # Until the step is done the last step's signal is held as well, for the step may be repeated.
            has_room = signals[i].nbytes <= spare
            spare -= signals[i].nbytes if has_room else 0
            reused[i] = self._reuse(sequences[i], parts[i], signals[i] if has_room else None, total)
        left = run_others(blocks, hidden, reused, range(blocks.num_blocks))
        computed = [i for i, sequence in enumerate(sequences) if sequence.slot is not None and i not in reused]
        before, after = hidden.image.split(lengths), left.image.split(lengths)
        with_room = []
        for i in computed:
            if (num_bytes := 2 * signals[i].nbytes) > spare:
                self._keep(sequences[i], TeaKept(), skipped=False)
                continue
            spare -= num_bytes
            with_room.append(i)
        for i, added in zip(with_room, differences([after[i] for i in with_room], [before[i] for i in with_room])):
            self._keep(sequences[i], TeaKept(signals[i], added), skipped=False)
        return left

    def _reuse(self, sequence: SequenceStep, before: Hidden, signal: Tensor | None, total: float) -> Hidden:
        """The last change of the image once more. signal: None where it finds no room, a miss at the next step."""
        kept = sequence.kept
        assert isinstance(kept, TeaKept)
        assert kept.added is not None
        coming = TeaKept() if signal is None else TeaKept(signal, kept.added, total)
        self._keep(sequence, coming, skipped=True)
        return Hidden(before.text, before.image + kept.added)

    def _accumulated(self, sequences: Sequence[SequenceStep], signals: Sequence[Tensor]) -> dict[int, float]:
        """The estimated change of the output since it was computed, of sequences that may skip this step."""
        pairs, totals = {}, []
        for i, (sequence, now) in enumerate(zip(sequences, signals)):
            kept = sequence.kept
            # Published code computes the first and the last step in any case.
            if isinstance(kept, TeaKept) and 0 < sequence.step < sequence.num_steps - 1:
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


def create(config: TeaCacheConfig, info: PackedModelInfo, rank_group: Group) -> TeaCache:
    coefficients = info.tea_cache_coefficients if config.coefficients is None else config.coefficients
    assert coefficients is not None, "ModelInfo.check_cache comes first"
    return TeaCache(config.rel_l1_thresh, coefficients, rank_group)
