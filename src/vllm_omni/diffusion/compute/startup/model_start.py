"""Start of the model on one rank: load the weights, warm up, measure, and report the result to the engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.registry import pipeline_class
from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.startup.compiling import compile_variants, run_variants
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer
from vllm_omni.diffusion.compute.startup.rates import Rates
from vllm_omni.diffusion.compute.startup.resolved_config import resolve
from vllm_omni.diffusion.compute.startup.warmup import RunVariants, StepBudget, warm_up
from vllm_omni.diffusion.compute.startup.whole_warmup import warm_up_whole
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline, Pipeline
from vllm_omni.diffusion.compute.weights.progress import WeightsBar
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.errors import ConfigError

CACHE_SHARE = 0.25
"""Share of the memory free after the warm-up that step caches may keep; beyond it a sequence misses the cache."""


@dataclass(frozen=True)
class StartOptions:
    """Options of a start that no flag sets: for tests, benchmarks and calibration."""

    compile_blocks: bool | None = None
    """Whether the transformer's blocks run compiled; None: if it pays on the device and the config allows it."""
    budget: StepBudget = field(default_factory=StepBudget)


@torch.inference_mode()
def start_model(
    config: OmniDiffusionConfig,
    info: ModelInfo,
    device: Device,
    ranks: Ranks,
    first: WorkerReady | None,
    options: StartOptions,
    shows_progress: bool,
) -> tuple[Pipeline[Any], WorkerReady]:
    """Load and warm up the model. All ranks of the replica call this together.

    first: report of the first start. A restart keeps its choices that change pixels: the attention backend, the CPU
    threads (they change the order of sums) and the memory of step caches (it decides which steps are skipped).
    Raises ConfigError for a folder or settings that cannot be served.
    """
    config = resolve(config, info, device, ranks, None if first is None else first.attention_backend)
    dtype = device.dtype(config.dtype)
    cls: type[Pipeline[Any]] = pipeline_class(info.family)
    with WeightsBar(info.path, shows_progress and config.progress_bar) as bar:
        pipeline = cls.load(config, info, device.torch, dtype, bar.update, ranks.mesh)
    device.end_loading()
    timer, num_threads = RankTimer(device, ranks), None if first is None else first.num_threads
    if isinstance(pipeline, PackedPipeline):
        rates = _warm_up(pipeline, config, info, timer, bar.num_bytes, num_threads, options)
    else:
        assert isinstance(info, WholeModelInfo)
        defaults = {**info.default_sampling_params, **config.default_sampling_params}
        info_with_defaults = replace(info, default_sampling_params=defaults)
        rates = warm_up_whole(pipeline, info_with_defaults, timer, bar.num_bytes, num_threads)
    cache_bytes = int(CACHE_SHARE * device.free_memory_bytes()) if first is None else first.cache_bytes
    pipeline.step_cache.budget.max_bytes = cache_bytes
    return pipeline, WorkerReady(
        load_seconds=bar.seconds,
        load_bytes=bar.num_bytes,
        device=device.name,
        dtype=str(dtype).removeprefix("torch."),
        max_batch_tokens=config.max_batch_tokens or rates.max_batch_tokens,
        seconds_per_unit=rates.seconds_per_unit,
        step_overhead_seconds=rates.step_overhead_seconds,
        encode_units_per_token=rates.encode_units_per_token,
        decode_units_per_token=rates.decode_units_per_token,
        peak_memory_bytes=device.peak_memory_bytes(),
        attention_backend=config.attention_backend,
        max_num_seqs=info.max_num_seqs,
        max_running=info.max_running,
        num_threads=device.num_threads,
        cache_bytes=cache_bytes,
    )


def _warm_up(
    pipeline: PackedPipeline[Any],
    config: OmniDiffusionConfig,
    info: ModelInfo,
    timer: RankTimer,
    model_bytes: int,
    num_threads: int | None,
    options: StartOptions,
) -> Rates:
    """Warm up a packed family. Raises ConfigError when its steps cannot be compiled or captured."""
    if not config.enforce_eager:
        pipeline.capturer = timer.ranks.capturer(timer.device)
    compiles = options.compile_blocks
    if compiles is None:
        is_worth_it = timer.device.is_worth_compiling_for and pipeline.gains_from_compiling(config)
        compiles = is_worth_it and not config.enforce_eager
    variants: RunVariants | None = None
    if compiles:
        variants = compile_variants
    elif config.kernels == "triton":  # Triton compiles a kernel at its first run
        variants = run_variants
    rates = warm_up(pipeline, info, timer, model_bytes, variants, num_threads, options.budget)
    if (capturer := pipeline.capturer) is not None and capturer.failure is not None:
        raise ConfigError(
            f"steps cannot be captured as CUDA graphs here: {capturer.failure}; --enforce-eager serves without"
        )
    return rates
