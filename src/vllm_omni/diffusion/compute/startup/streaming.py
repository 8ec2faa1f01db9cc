"""Start of layer-wise offload: the memory that blocks may stay in, and the rates of steps that wait for copies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.offload.layer_offload import LayerOffload
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer
from vllm_omni.diffusion.compute.startup.rates import Sample
from vllm_omni.diffusion.data import OmniDiffusionConfig

logger = logging.getLogger(__name__)

STEP_TOKENS = 2**15
"""Tokens of the largest step that has room beside the blocks, if no request has more: larger ones gain nothing."""
OTHER_BYTES = 3 * 2**29
"""Rows of modulation, encoded prompts and workspaces of libraries."""


def start_offload(
    offload: LayerOffload, config: OmniDiffusionConfig, info: PackedModelInfo, dtype_bytes: int, timer: RankTimer
) -> None:
    """Keep as many blocks on the device as its memory has room for, and let the others stream. All ranks call this."""
    spare = timer.device.free_memory_bytes() - reserved_bytes(config, info, dtype_bytes)
    offload.start(int(timer.ranks.least(max(0, spare))))


def reserved_bytes(config: OmniDiffusionConfig, info: PackedModelInfo, dtype_bytes: int) -> int:
    """Memory of the largest step, of a decode, and of what the pipeline keeps, beside the weights.

    A larger request than the model's own size runs as well, but its decode may need tiles.
    """
    defaults = info.default_sampling_params
    height, width, num_frames = (int(defaults.get(name, 1)) for name in ("height", "width", "num_frames"))
    budget = config.max_batch_tokens or STEP_TOKENS
    num_tokens = max(budget, 2 * info.num_image_tokens(height, width, num_frames))
    step = info.step_activation_bytes(num_tokens, dtype_bytes, config.parallel.tensor_parallel_size)
    decode = info.decode_bytes(height, width, num_frames, config.vae_use_tiling, dtype_bytes)
    return (step + decode if config.overlap_decode else max(step, decode)) + OTHER_BYTES


def seconds_of_copies(offload: LayerOffload, timer: RankTimer) -> float:
    """Seconds that the copies of all blocks take, without a step."""
    if not offload.streams_blocks:
        return 0.0
    seconds = timer.fastest([offload.copy_all] * 3)
    logger.info("offload: a step copies its blocks in %.1f ms", 1000 * seconds)
    return seconds


def beside_copies(samples: Sequence[Sample], copy_seconds: float) -> list[Sample]:
    """Steps as they take with their copies, from those without: computing and copying go on at the same time."""
    return [replace(sample, seconds=max(sample.seconds, copy_seconds)) for sample in samples]
