"""Dual Block Cache (DBCache), as in the cache-dit library: the first blocks decide, the last blocks refine.

The first Fn blocks always run. If the change that they make to the image tokens differs little from the one at the last
computed step, the blocks between are replaced by the change that they made then, or by TaylorSeer's forecast of it. The
last Bn blocks run on the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

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
from vllm_omni.diffusion.compute.cache.step_masks import steps_mask
from vllm_omni.diffusion.compute.cache.taylor import Forecast
from vllm_omni.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
    from vllm_omni.diffusion.compute.distributed.groups import Group
    from vllm_omni.diffusion.compute.packing import Hidden, Pack

StepsMaskPolicy = Literal["slow", "medium", "fast", "ultra"]
StepsComputationPolicy = Literal["dynamic", "static"]
MAX_TAYLORSEER_ORDER = 8
"""Each order stores one more tensor of each guidance branch."""


@dataclass(frozen=True)
class CacheDiTConfig(StepCacheConfig):
    """cache-dit's Dual Block Cache, step for step: the first blocks decide, the middle is reused, the last refine."""

    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    residual_diff_threshold: float = 0.24
    """Largest relative change at which a step is skipped. 0 computes every step; from 1 on no change is too large."""
    max_warmup_steps: int = 4
    """Without a mask: steps that are computed at the start. A mask replaces this and the interval."""
    warmup_interval: int = 1
    """During the warm-up only every n-th step must be computed, from the first step on."""
    max_cached_steps: int = -1
    """Most skipped steps of a request; -1: no limit; 0: every step is computed."""
    max_continuous_cached_steps: int = 3
    """Most skipped steps in a row; -1: no limit; 0: every step is computed."""
    max_accumulated_residual_diff_threshold: float | None = None
    """Largest sum of the changes of skipped steps, above 0; None: no limit."""
    enable_taylorseer: bool = False
    taylorseer_order: int = 1
    scm_steps_mask_policy: StepsMaskPolicy | None = None
    steps_computation_mask: tuple[int, ...] | None = None
    """One entry a step: 1 is computed, 0 may be reused. Entries beyond a request's steps are ignored."""
    steps_computation_policy: StepsComputationPolicy = "dynamic"
    """Treatment of the steps with a 0 in the mask. `dynamic`: a step is skipped if the other settings allow it, also
    beyond the mask's end; `static`: all are skipped, and every step beyond the mask's end is computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("Fn_compute_blocks", 1),
            ("Bn_compute_blocks", 0),
            ("residual_diff_threshold", 0),
            ("max_warmup_steps", 0),
            ("warmup_interval", 1),
            ("max_cached_steps", -1),
            ("max_continuous_cached_steps", -1),
        ):
            self._require_at_least(least, name)
        good = 1 <= self.taylorseer_order <= MAX_TAYLORSEER_ORDER
        self._require(good, "taylorseer_order", f"1 to {MAX_TAYLORSEER_ORDER}")
        most, mask = self.max_accumulated_residual_diff_threshold, self.steps_computation_mask
        good = most is None or 0 < most < math.inf
        self._require(good, "max_accumulated_residual_diff_threshold", "a finite number above 0, or none")
        good = mask is None or (len(mask) > 0 and set(mask) <= {0, 1})
        self._require(good, "steps_computation_mask", "a list of 0 and 1, one a step")
        if mask is not None and self.scm_steps_mask_policy is not None:
            raise ConfigError(
                "--cache-config takes scm_steps_mask_policy or steps_computation_mask, got both: "
                f"{self.scm_steps_mask_policy!r} and {list(mask)}"
            )
        for name, is_useless, reason in self._useless():
            if is_useless and self._is_changed(name):
                self._refuse_useless(name, reason)

    def _useless(self) -> list[tuple[str, bool, str]]:
        """Settings that may change nothing beside the others: name, whether that is so, reason."""
        has_mask = self.scm_steps_mask_policy is not None or self.steps_computation_mask is not None
        is_capped = 0 <= self.max_cached_steps <= self.max_continuous_cached_steps
        always = self.residual_diff_threshold >= 1
        warm_up = "beside a mask, whose ones at its head are the warm-up"
        rules = [
            ("max_warmup_steps", has_mask, warm_up),
            ("warmup_interval", has_mask, warm_up),
            ("max_continuous_cached_steps", is_capped, f"beside max_cached_steps {self.max_cached_steps}"),
            ("taylorseer_order", not self.enable_taylorseer, "without enable_taylorseer"),
            ("max_accumulated_residual_diff_threshold", always, "beside residual_diff_threshold from 1 on"),
            ("warmup_interval", self.max_warmup_steps < 2, "with max_warmup_steps below 2"),
        ]
        if self.steps_computation_policy == "static":
            no_zeros = self.steps_computation_mask is not None and 0 not in self.steps_computation_mask
            beside = "beside steps_computation_policy 'static', which skips"
            steps = f"{beside} all steps with a 0 in the mask"
            rules += [
                ("steps_computation_policy", not has_mask, "without scm_steps_mask_policy or steps_computation_mask"),
                ("steps_computation_mask", no_zeros, f"{beside} its zeros: it has none"),
                ("residual_diff_threshold", not always, steps),
                ("max_cached_steps", True, steps),
                ("max_continuous_cached_steps", self.max_continuous_cached_steps >= 0, steps),
                ("max_accumulated_residual_diff_threshold", True, steps),
            ]
            return rules
        zeros = ("residual_diff_threshold", "max_cached_steps", "max_continuous_cached_steps")
        if cause := next((name for name in zeros if getattr(self, name) == 0), None):
            computed = f"beside {cause} 0, at which every step is computed"
            rules += [(f.name, f.name != cause, computed) for f in fields(self)]
        return rules

    @classmethod
    def key_aliases(cls) -> Mapping[str, str]:
        return {"scm_steps_policy": "steps_computation_policy"}  # the spelling of the public vllm-omni package

    def check_model(self, info: PackedModelInfo) -> None:
        first, last = self.Fn_compute_blocks, self.Bn_compute_blocks
        if first + last >= info.num_blocks:
            raise ConfigError(
                f"--cache-config: Fn_compute_blocks and Bn_compute_blocks take less than the model's "
                f"{info.num_blocks} blocks together, got {first} and {last}"
            )

    def create(self, info: PackedModelInfo, rank_group: Group) -> DualBlockCache:
        return DualBlockCache(self, rank_group)


CONFIG_CLASS = CacheDiTConfig


@dataclass(frozen=True)
class DualBlockContent(SlotContent):
    first: Tensor | None = None
    """Change of the image tokens over the first blocks at the last computed step; None: no memory to store it."""
    image: Forecast | None = None
    """Change of the image tokens over the blocks between."""
    text: Forecast | None = None
    """Change of the text tokens over the blocks between; None if no blocks behind them read it."""
    num_reused: int = 0
    num_reused_in_a_row: int = 0
    accumulated_change: float = 0.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        forecasts = [forecast.terms for forecast in (self.image, self.text) if forecast is not None]
        return (*(() if self.first is None else (self.first,)), *(term for terms in forecasts for term in terms))

    def without_tensors(self) -> DualBlockContent:
        return replace(self, first=None, image=None, text=None)


class DualBlockCache(StepCache):
    def __init__(self, config: CacheDiTConfig, rank_group: Group) -> None:
        super().__init__(rank_group)
        self._config = config
        self._order = config.taylorseer_order if config.enable_taylorseer else 0
        self._refines = config.Bn_compute_blocks > 0

    def _run_blocks(self, hidden: Hidden, blocks: Blocks, sequences: Sequence[SequenceStep]) -> Hidden:
        first = self._config.Fn_compute_blocks
        last = blocks.num_blocks - self._config.Bn_compute_blocks
        lengths = blocks.pack.image.lengths
        caching = [i for i, sequence in enumerate(sequences) if sequence.slot is not None]
        entered = blocks.run(hidden, range(first))
        before, inside = hidden.image.split(lengths), entered.image.split(lengths)
        added = differences([inside[i] for i in caching], [before[i] for i in caching])
        first_added = dict(zip(caching, added))
        changes = self._changes(sequences, first_added)
        small = {i: change for i, change in changes.items() if self._is_small(change, sequences[i])}
        parts = blocks.pack.sequences(entered) if small else []
        reused = {i: self._reuse(sequences[i], parts[i], change) for i, change in small.items()}
        output = run_others(blocks, entered, reused, range(first, last))
        self._store_computed(
            [(i, sequences[i], first_added[i], changes.get(i, 0.0)) for i in caching if i not in reused],
            entered,
            output,
            blocks.pack,
        )
        return blocks.run(output, range(last, blocks.num_blocks))

    def _store_computed(
        self, computed: Sequence[tuple[int, SequenceStep, Tensor, float]], before: Hidden, after: Hidden, pack: Pack
    ) -> None:
        """Store the changes over the blocks between. computed: number, sequence, first change, its size."""
        members = [i for i, *_ in computed]
        images = _differences_of(members, after.image, before.image, pack.image.lengths)
        texts = _differences_of(members, after.text, before.text, pack.text.lengths) if self._refines else ()
        for (_, sequence, first, change), image, text in zip_longest(computed, images, texts):
            last = sequence.content if isinstance(sequence.content, DualBlockContent) else DualBlockContent()
            content = DualBlockContent(
                first,
                image=Forecast.after(last.image, image, sequence.step, self._order),
                text=None if text is None else Forecast.after(last.text, text, sequence.step, self._order),
                num_reused=last.num_reused,
                accumulated_change=last.accumulated_change + self._counted(change, sequence),
            )
            self._store(sequence, content, skipped=False)

    def _changes(self, sequences: Sequence[SequenceStep], added: Mapping[int, Tensor]) -> dict[int, float]:
        """Relative change of the first blocks' residual, for each sequence that may reuse blocks at this step."""
        pairs = {}
        for i, now in added.items():
            content = sequences[i].content
            if isinstance(content, DualBlockContent) and self._may_reuse(sequences[i], content):
                pairs[i] = (now, content.first)
        return dict(zip(pairs, relative_changes(list(pairs.values()), self._rank_group)))

    def _may_reuse(self, sequence: SequenceStep, content: DualBlockContent) -> bool:
        """Whether mask and counters allow reuse. Host state only, identical on all ranks."""
        config, mask = self._config, self._mask(sequence.num_steps)
        if mask is None and sequence.step in range(0, config.max_warmup_steps, config.warmup_interval):
            return False
        if mask is not None and sequence.step < len(mask) and mask[sequence.step] == 1:
            return False
        if mask is not None and self._is_static(mask):
            return sequence.step < len(mask)  # steps beyond the mask are computed
        if 0 <= config.max_cached_steps <= content.num_reused:
            return False
        if 0 <= config.max_continuous_cached_steps <= content.num_reused_in_a_row:
            return False
        most = config.max_accumulated_residual_diff_threshold
        if most is not None and content.accumulated_change >= most:
            return False
        return config.residual_diff_threshold > 0

    def _is_small(self, change: float, sequence: SequenceStep) -> bool:
        if change == math.inf:
            return False  # a rank had no memory to store the last change
        threshold = self._config.residual_diff_threshold
        return self._is_static(self._mask(sequence.num_steps)) or threshold >= 1 or change < threshold

    def _reuse(self, sequence: SequenceStep, inside: Hidden, change: float) -> Hidden:
        """Output of the blocks between from the stored changes. inside: output of the first blocks."""
        content = sequence.content
        assert isinstance(content, DualBlockContent)
        assert content.image is not None
        image = inside.image + content.image.at(sequence.step)
        text = inside.text if content.text is None else inside.text + content.text.at(sequence.step)
        again = replace(
            content,
            num_reused=content.num_reused + 1,
            num_reused_in_a_row=content.num_reused_in_a_row + 1,
            accumulated_change=content.accumulated_change + self._counted(change, sequence),
        )
        self._store(sequence, again, skipped=True)
        return replace(inside, text=text, image=image)

    def _counted(self, change: float, sequence: SequenceStep) -> float:
        """Share of a change that is accumulated: 0 if the decision did not depend on the change."""
        if self._is_static(self._mask(sequence.num_steps)) or self._config.residual_diff_threshold >= 1:
            return 0.0
        return change if 0 < change < math.inf else 0.0

    def _mask(self, num_steps: int) -> tuple[int, ...] | None:
        """Mask for a request with this many steps; None: the settings have none."""
        if self._config.scm_steps_mask_policy is not None:
            return steps_mask(self._config.scm_steps_mask_policy, num_steps)
        return self._config.steps_computation_mask

    def _is_static(self, mask: tuple[int, ...] | None) -> bool:
        return mask is not None and self._config.steps_computation_policy == "static"


def _differences_of(members: Sequence[int], now: Tensor, before: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """now - before of some sequences. now, before: [tokens, D]; lengths: tokens of each sequence."""
    nows, befores = now.split(list(lengths)), before.split(list(lengths))
    return differences([nows[i] for i in members], [befores[i] for i in members])
