"""Begin of the components' turns on the device, and what a turn costs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.compute.offload.turns import TRANSFORMERS, VAE, Turns
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline
from vllm_omni.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TurnSeconds:
    """Seconds of copies that an interruption of denoising costs, there and back."""

    encode: float = 0.0
    decode: float = 0.0


def begin_turns(
    pipeline: PackedPipeline[Any], timer: RankTimer, reserved_bytes: int, max_bytes: int | None = None
) -> None:
    """Let the components take turns, with `--enable-cpu-offload`; all rest in host memory now.

    reserved_bytes: memory that they leave to other uses, where one component alone does not take more. max_bytes: see
    `Residency`; None: what is left on the rank that has least.
    Raises ConfigError for a component that the device cannot hold.
    """
    turns = pipeline.turns
    if not turns.is_on:
        return
    free = int(timer.ranks.least(timer.device.free_memory_bytes()))
    turns.begin(max(0, free - reserved_bytes) if max_bytes is None else max_bytes)
    sizes = turns.residency.sizes
    largest = max(sizes, key=sizes.__getitem__)
    if sizes[largest] > free:
        raise ConfigError(
            f"--enable-cpu-offload takes a device that holds one component: the {largest} takes "
            f"{_gib(sizes[largest])}, {timer.device.name} has {_gib(free)}"
        )


def measure_turns(pipeline: PackedPipeline[Any], info: ModelInfo, timer: RankTimer) -> TurnSeconds:
    """Seconds of the turns of encodes and of decodes, by a copy of the largest component. All ranks call this together.

    Zero where components do not displace each other.
    """
    turns = pipeline.turns
    if not turns.is_on:
        return TurnSeconds()
    residency = turns.residency
    transformers = [name for name in residency.sizes if name in TRANSFORMERS]
    encoders = [name for name in residency.sizes if name not in (*TRANSFORMERS, VAE)]
    if info.image_input is not None:
        encoders.append(VAE)
    work = transformers[:1]
    encode_bytes = residency.bytes_of_interruption(work, [*encoders, *transformers])
    decode_bytes = residency.bytes_of_interruption(work, [VAE])
    seconds = TurnSeconds()
    if encode_bytes or decode_bytes:
        rate = _copied_bytes_per_second(turns, timer)
        seconds = TurnSeconds(encode_bytes / rate, decode_bytes / rate)
    logger.info(
        "components take turns on the device, %s at most at a time: encodes cost %.2f s of copies, decodes %.2f s",
        _gib(residency.peak_bytes),
        seconds.encode,
        seconds.decode,
    )
    return seconds


def _copied_bytes_per_second(turns: Turns, timer: RankTimer) -> float:
    """Rate at which a component comes to an empty device."""
    sizes = turns.residency.sizes
    largest = max(sizes, key=sizes.__getitem__)

    def come() -> None:
        turns.release_memory()
        with turns.use(largest):
            pass

    return sizes[largest] / timer.fastest([come] * 3)


def bytes_to_come(turns: Turns) -> int:
    """Bytes that components will take on the device beyond those that are there."""
    if not turns.is_on:
        return 0
    return turns.residency.peak_bytes - turns.residency.num_bytes


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
