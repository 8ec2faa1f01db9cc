"""Dual Block Cache, as the cache-dit library has it (its DBCache): the first blocks decide, the last refine.

The first Fn blocks always run. Where their residual on the image differs little from that of the last step at which all
blocks ran, the blocks between are replaced by what they added then, carried on by TaylorSeer's forecast if that is
asked for; the last Bn blocks run on the outcome.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

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
from vllm_omni.diffusion.compute.cache.step_masks import steps_mask
from vllm_omni.diffusion.compute.cache.taylor import Forecast
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.packing import Hidden, Pack
from vllm_omni.diffusion.data import CacheDiTConfig


@dataclass(frozen=True)
class DualBlockKept(Kept):
    first: Tensor | None = None
    """What the first blocks added to the image tokens at the last step that computed; None: there was no room."""
    image: Forecast | None = None
    """What the blocks between added to the image tokens."""
    text: Forecast | None = None
    """And to the text tokens, if blocks behind them want it."""
    num_reused: int = 0
    num_reused_in_a_row: int = 0
    accumulated_change: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        forecasts = [forecast.terms for forecast in (self.image, self.text) if forecast is not None]
        return (*(() if self.first is None else (self.first,)), *(term for terms in forecasts for term in terms))


class DualBlockCache(StepCache):
    def __init__(self, config: CacheDiTConfig, rank_group: Group) -> None:
        super().__init__(rank_group)
        self._config = config
        self._order = config.taylorseer_order if config.enable_taylorseer else 0
        self._refines = config.Bn_compute_blocks > 0

    def run(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        first = self._config.Fn_compute_blocks
        last = blocks.num_blocks - self._config.Bn_compute_blocks
        lengths = blocks.pack.image.lengths
        taking_part = [i for i, sequence in enumerate(sequences) if sequence.slot is not None]
        entered = blocks.run(hidden, range(first))
        before, inside = hidden.image.split(lengths), entered.image.split(lengths)
        added = differences([inside[i] for i in taking_part], [before[i] for i in taking_part])
        first_added = dict(zip(taking_part, added))
        changes = self._changes(sequences, first_added)
        small = {i: change for i, change in changes.items() if self._is_small(change, sequences[i])}
        parts = blocks.pack.sequences(entered) if small else []
        reused = {i: self._reuse(sequences[i], parts[i], change) for i, change in small.items()}
        left = run_others(blocks, entered, reused, range(first, last))
        self._keep_computed(
            [(i, sequences[i], first_added[i], changes.get(i, 0.0)) for i in taking_part if i not in reused],
            entered,
            left,
            blocks.pack,
        )
        return blocks.run(left, range(last, blocks.num_blocks))

    def _keep_computed(
        self, computed: Sequence[tuple[int, SequenceStep, Tensor, float]], before: Hidden, after: Hidden, pack: Pack
    ) -> None:
        """What the blocks between did. computed: place in the pack, sequence, first blocks' residual, its change."""
        texts_before = before.text.split(pack.text.lengths)
        spare = self.budget.max_bytes - self.budget.num_bytes
        with_room = []
        for i, sequence, first, change in computed:
            text_bytes = texts_before[i].nbytes if self._refines else 0
            if (num_bytes := first.nbytes + (1 + self._order) * (first.nbytes + text_bytes)) > spare:
                self._keep(sequence, self._counters(sequence, change), skipped=False)
                continue
            spare -= num_bytes
            with_room.append((i, sequence, first, change))
        places = [i for i, *_ in with_room]
        images = _differences_at(places, after.image, before.image, pack.image.lengths)
        texts = _differences_at(places, after.text, before.text, pack.text.lengths) if self._refines else ()
        for (_, sequence, first, change), image, text in zip_longest(with_room, images, texts):
            was = sequence.kept if isinstance(sequence.kept, DualBlockKept) else DualBlockKept()
            kept = replace(
                self._counters(sequence, change),
                first=first,
                image=self._carried_on(was.image, image, sequence.step),
                text=None if text is None else self._carried_on(was.text, text, sequence.step),
            )
            self._keep(sequence, kept, skipped=False)

    def _changes(self, sequences: Sequence[SequenceStep], added: Mapping[int, Tensor]) -> dict[int, float]:
        """Of the sequences that may reuse their blocks at this step: how much the first blocks' residual changed."""
        pairs = {}
        for i, now in added.items():
            kept = sequences[i].kept
            if isinstance(kept, DualBlockKept) and self._may_reuse(sequences[i], kept):
                pairs[i] = (now, kept.first)
        return dict(zip(pairs, relative_changes(list(pairs.values()), self._rank_group)))

    def _may_reuse(self, sequence: SequenceStep, kept: DualBlockKept) -> bool:
        """Of what all ranks know alike, without a look at any tensor."""
        config, mask = self._config, self._mask(sequence.num_steps)
        if mask is None and sequence.step in self._warm_up():
            return False
        if mask is not None and sequence.step < len(mask) and mask[sequence.step] == 1:
            return False
        if mask is not None and self._is_static(mask):
            return sequence.step < len(mask)  # the mask says nothing of later steps: they are computed
        if 0 <= config.max_cached_steps <= kept.num_reused:
            return False
        if 0 <= config.max_continuous_cached_steps <= kept.num_reused_in_a_row:
            return False
        most = config.max_accumulated_residual_diff_threshold
        if most is not None and kept.accumulated_change >= most:
            return False
        return config.residual_diff_threshold > 0

    def _is_small(self, change: float, sequence: SequenceStep) -> bool:
        if change == float("inf"):
            return False  # some rank has lost what was before
        threshold = self._config.residual_diff_threshold
        return self._is_static(self._mask(sequence.num_steps)) or threshold >= 1 or change < threshold

    def _reuse(self, sequence: SequenceStep, inside: Hidden, change: float) -> Hidden:
        kept = sequence.kept
        assert isinstance(kept, DualBlockKept)
        assert kept.image is not None
        image = inside.image + kept.image.at(sequence.step)
        text = inside.text if kept.text is None else inside.text + kept.text.at(sequence.step)
        again = replace(
            kept,
            num_reused=kept.num_reused + 1,
            num_reused_in_a_row=kept.num_reused_in_a_row + 1,
            accumulated_change=kept.accumulated_change + self._counted(change, sequence),
        )
        self._keep(sequence, again, skipped=True)
        return Hidden(text, image)

    def _counters(self, sequence: SequenceStep, change: float) -> DualBlockKept:
        """The counters behind a step that computes."""
        kept = sequence.kept
        if not isinstance(kept, DualBlockKept):
            return DualBlockKept()
        return DualBlockKept(
            num_reused=kept.num_reused,
            accumulated_change=kept.accumulated_change + self._counted(change, sequence),
        )

    def _counted(self, change: float, sequence: SequenceStep) -> float:
        """What of a change is accumulated: nothing where the decision did not depend on it."""
        if self._is_static(self._mask(sequence.num_steps)) or self._config.residual_diff_threshold >= 1:
            return 0.0
        return change if 0 < change < float("inf") else 0.0

    def _carried_on(self, forecast: Forecast | None, value: Tensor, step: int) -> Forecast:
        return Forecast.begin(value, step) if forecast is None else forecast.updated(value, step, self._order)

    def _mask(self, num_steps: int) -> tuple[int, ...] | None:
        if self._config.scm_steps_mask_policy is not None:
            return steps_mask(self._config.scm_steps_mask_policy, num_steps)
        return self._config.steps_computation_mask

    def _warm_up(self) -> range:
        """Steps that compute in any case where no mask says it."""
        return range(0, self._config.max_warmup_steps, self._config.warmup_interval)

    def _is_static(self, mask: tuple[int, ...] | None) -> bool:
        return mask is not None and self._config.steps_computation_policy == "static"


def _differences_at(places: Sequence[int], now: Tensor, before: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    nows, befores = now.split(list(lengths)), before.split(list(lengths))
    return differences([nows[i] for i in places], [befores[i] for i in places])


def create(config: CacheDiTConfig, info: PackedModelInfo, rank_group: Group) -> DualBlockCache:
    return DualBlockCache(config, rank_group)
