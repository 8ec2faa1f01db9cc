"""Start of layer-wise offload: the memory that blocks may stay in, and the rates of steps that wait for copies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.offload.layer_offload import LayerOffload
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer
from vllm_omni.diffusion.compute.startup.rates import Sample

logger = logging.getLogger(__name__)

STEP_TOKENS = 2**15
"""Tokens of the largest step that has room beside the blocks, if no request has more: larger ones gain nothing."""
WIDTHS_PER_TOKEN = 16
"""Activations of a token in a block, in widths of the model: the MLP's inner values before and after their
nonlinearity (8), queries, keys and values (3), the token before and after its norm, the output of attention, and
copies of these."""
DECODE_BYTES_PER_PIXEL = 3072
"""Activations of a decoder at its last stages: four tensors of 96 to 192 channels, in 4 bytes at most."""
PIECE_FRAMES = 4
"""Frames of the piece of a video that is decoded at once."""
OTHER_BYTES = 3 * 2**29
"""Rows of modulation, encoded prompts and workspaces of libraries."""


def start_offload(offload: LayerOffload, info: PackedModelInfo, dtype_bytes: int, timer: RankTimer) -> None:
    """Keep as many blocks on the device as its memory has room for, and let the others stream. All ranks call this."""
    spare = timer.device.free_memory_bytes() - reserved_bytes(info, dtype_bytes)
    offload.start(int(timer.ranks.least(max(0, spare))))


def reserved_bytes(info: PackedModelInfo, dtype_bytes: int) -> int:
    """Memory of the largest step, of a decode, and of what the pipeline keeps, beside the weights."""
    defaults = info.default_sampling_params
    height, width, num_frames = (int(defaults.get(name, 1)) for name in ("height", "width", "num_frames"))
    num_tokens = max(STEP_TOKENS, 2 * info.num_image_tokens(height, width, num_frames))
    step = num_tokens * WIDTHS_PER_TOKEN * info.num_heads * info.head_dim * dtype_bytes
    decode = height * width * min(num_frames, PIECE_FRAMES) * DECODE_BYTES_PER_PIXEL
    return max(step, decode) + OTHER_BYTES


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
