"""TeaCache (arXiv 2411.19108): the change of the first block's modulated input predicts the change of the output.

A polynomial, measured for each model, maps the relative change of the input from step to step to an estimate of the
output's change. While blocks are skipped the estimates add up. When their sum reaches the threshold, all blocks run and
the sum starts again from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_omni.diffusion.compute.cache.base import (
    Blocks,
    SequenceStep,
    SlotContent,
    StepCache,
    differences,
    relative_changes,
    run_others,
)
from vllm_omni.diffusion.compute.cache.config import StepCacheConfig
from vllm_omni.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
    from vllm_omni.diffusion.compute.distributed.groups import Group
    from vllm_omni.diffusion.compute.packing import Hidden


@dataclass(frozen=True)
class TeaCacheConfig(StepCacheConfig):
    """TeaCache: skip a step while the accumulated change of the modulated input stays small."""

    rel_l1_thresh: float = 0.2
    """Largest accumulated change at which a step is skipped; at 0 every step is computed."""
    coefficients: tuple[float, ...] | None = None
    """Polynomial, highest power first; None: the model's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(0, "rel_l1_thresh")
        terms = self.coefficients
        good = terms is None or (len(terms) > 0 and all(map(math.isfinite, terms)))
        self._require(good, "coefficients", "a list of at least one finite number, or none for the model's own")
        if terms is not None and self.rel_l1_thresh == 0:
            self._refuse_useless("coefficients", "beside rel_l1_thresh 0, at which every step is computed")

    def check_model(self, info: PackedModelInfo) -> None:
        if self.coefficients is None and info.tea_cache_coefficients is None:
            raise ConfigError(
                "--cache-backend tea_cache needs --cache-config coefficients for this model: nobody has measured them; "
                "vllm-omni calibrate-teacache MODEL does, and the model folder may keep them as teacache.json"
            )

    def create(self, info: PackedModelInfo, rank_group: Group) -> TeaCache:
        coefficients = info.tea_cache_coefficients if self.coefficients is None else self.coefficients
        assert coefficients is not None, "check_model comes first"
        return TeaCache(self.rel_l1_thresh, coefficients, rank_group)


CONFIG_CLASS = TeaCacheConfig


@dataclass(frozen=True)
class TeaCacheContent(SlotContent):
    signal: Tensor
    """Modulated input of the last step."""
    added: Tensor
    """Change of the image tokens over all blocks at the last computed step."""
    accumulated_change: float = 0.0
    """Sum of the estimates since the last computed step."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.signal, self.added


class TeaCache(StepCache):
    def __init__(self, threshold: float, coefficients: Sequence[float], rank_group: Group) -> None:
        """coefficients: the model's polynomial, highest power first."""
        super().__init__(rank_group)
        self._threshold = threshold
        self._coefficients = coefficients

    def _run_blocks(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        lengths = blocks.pack.image.lengths
        # Each copy owns its memory, so dropping one frees its bytes.
        signals = [x.clone() for x in blocks.signal(hidden).split(lengths)]
        accumulated = self._accumulated(sequences, signals)
        small = {i: total for i, total in accumulated.items() if total < self._threshold}
        parts = blocks.pack.sequences(hidden) if small else []
        reused = {i: self._reuse(sequences[i], parts[i], signals[i], total) for i, total in small.items()}
        output = run_others(blocks, hidden, reused, range(blocks.num_blocks))
        computed = [i for i, sequence in enumerate(sequences) if sequence.slot is not None and i not in reused]
        before, after = hidden.image.split(lengths), output.image.split(lengths)
        for i, added in zip(computed, differences([after[i] for i in computed], [before[i] for i in computed])):
            self._store(sequences[i], TeaCacheContent(signals[i], added), skipped=False)
        return output

    def _reuse(self, sequence: SequenceStep, before: Hidden, signal: Tensor, total: float) -> Hidden:
        """Add the last computed change of the image again."""
        content = sequence.content
        assert isinstance(content, TeaCacheContent)
        self._store(sequence, TeaCacheContent(signal, content.added, total), skipped=True)
        return replace(before, image=before.image + content.added)

    def _accumulated(self, sequences: Sequence[SequenceStep], signals: Sequence[Tensor]) -> dict[int, float]:
        """Estimated change of the output since the last computed step, for each sequence that may skip this step."""
        pairs: dict[int, tuple[Tensor, Tensor | None]] = {}
        totals = []
        for i, (sequence, now) in enumerate(zip(sequences, signals)):
            # The published code always computes the first and the last step.
            if sequence.slot is not None and 0 < sequence.step < sequence.num_steps - 1:
                last = sequence.content if isinstance(sequence.content, TeaCacheContent) else None
                pairs[i] = (now, last.signal if last else None)
                totals.append(last.accumulated_change if last else 0.0)
        changes = relative_changes(list(pairs.values()), self._rank_group)
        return {
            i: total + float(np.polyval(self._coefficients, change))
            for i, total, change in zip(pairs, totals, changes)
            if change != math.inf  # infinite: a rank has not stored the last step's signal
        }
