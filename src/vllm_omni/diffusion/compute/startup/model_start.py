"""Start of the model on one rank: resolve the config, load the weights, warm up, and report to the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import torch

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import PIPELINES, pipeline_module
from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo
from vllm_omni.diffusion.compute.coordination.ranks import Ranks
from vllm_omni.diffusion.compute.device.device import Device
from vllm_omni.diffusion.compute.layers.kernels import create_kernels
from vllm_omni.diffusion.compute.startup.attention_choice import choose_attention
from vllm_omni.diffusion.compute.startup.rank_timer import RankTimer
from vllm_omni.diffusion.compute.startup.rates import Rates
from vllm_omni.diffusion.compute.startup.streaming import reserved_bytes, start_offload
from vllm_omni.diffusion.compute.startup.turn_costs import TurnSeconds, begin_turns, bytes_to_come, measure_turns
from vllm_omni.diffusion.compute.startup.warmup import (
    RunVariants,
    StepBudget,
    compile_variants,
    run_variants,
    warm_up,
)
from vllm_omni.diffusion.compute.startup.whole_warmup import warm_up_whole
from vllm_omni.diffusion.compute.step.pipeline import PackedPipeline, Pipeline
from vllm_omni.diffusion.data import AttentionBackendName, KernelsName, OmniDiffusionConfig
from vllm_omni.diffusion.messages.plan import WorkerReady
from vllm_omni.errors import ConfigError
from vllm_omni.logs.bars import progress_bar

logger = logging.getLogger(__name__)

ADAPTER_SHARE = 0.05
"""Share of the memory free after the warm-up, on the rank with least, that adapters beyond the slots may take."""
CACHE_SHARE = 0.25
"""Share of the memory free after the warm-up, on the rank with least, that step caches may keep on each rank; beyond it
a sequence misses the cache."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartOptions:
    """Options of a start that no flag sets: for tests, benchmarks and calibration."""

    compile_blocks: bool | None = None
    """Whether the transformer's blocks run compiled; None: if it pays on the device and the config allows it."""
    budget: StepBudget = field(default_factory=StepBudget)
    turns_bytes: int | None = None
    """Most bytes of components that stay on the device together, with CPU offload; None: by its memory."""


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
    cls = pipeline_class(info.family)
    with WeightsBar(info.path, config.transformer_files, shows_progress and config.progress_bar) as bar:
        pipeline = cls.load(config, info, device.torch, dtype, bar.update, ranks.mesh)
    device.end_loading()
    if isinstance(pipeline, PackedPipeline):
        free_bytes = ranks.least(device.free_memory_bytes())
        pipeline.watch_memory(device, None if ranks.size == 1 else int(free_bytes))
    timer, num_threads = RankTimer(device, ranks), None if first is None else first.num_threads
    turn_seconds, missing_bytes = TurnSeconds(), 0
    if isinstance(pipeline, PackedPipeline):
        assert isinstance(info, PackedModelInfo)
        if pipeline.layer_offload is not None:
            start_offload(pipeline.layer_offload, config, info, dtype.itemsize, timer)
        begin_turns(pipeline, timer, reserved_bytes(config, info, dtype.itemsize), options.turns_bytes)
        rates = _warm_up(pipeline, config, info, timer, bar.num_bytes, num_threads, options)
        turn_seconds = measure_turns(pipeline, info, timer)
        missing_bytes = bytes_to_come(pipeline.turns)
    else:
        assert isinstance(info, WholeModelInfo)
        defaults = {**info.default_sampling_params, **config.default_sampling_params}
        info_with_defaults = replace(info, default_sampling_params=defaults)
        rates = warm_up_whole(pipeline, info_with_defaults, timer, bar.num_bytes, num_threads)
    if config.max_batch_tokens is not None:
        rates = replace(rates, max_batch_tokens=config.max_batch_tokens)
    # Ranks of a tensor group hold tensors of equal sizes. With equal budgets they drop the same ones and stay alike.
    free_bytes = max(0.0, ranks.least(device.free_memory_bytes() - missing_bytes))
    cache_bytes = int(CACHE_SHARE * free_bytes) if first is None else first.cache_bytes
    pipeline.step_cache.budget.max_bytes = cache_bytes
    return pipeline, WorkerReady(
        load_seconds=bar.seconds,
        load_bytes=bar.num_bytes,
        device=device.name,
        dtype=str(dtype).removeprefix("torch."),
        **asdict(rates),
        peak_memory_bytes=device.peak_memory_bytes(),
        attention_backend=config.attention_backend,
        max_num_seqs=info.max_num_seqs,
        max_running=info.max_running,
        num_threads=device.num_threads,
        cache_bytes=cache_bytes,
        adapter_bytes=int(ADAPTER_SHARE * free_bytes),
        loads_adapters_in_steps=not isinstance(pipeline, PackedPipeline),
        encode_turn_seconds=turn_seconds.encode,
        decode_turn_seconds=turn_seconds.decode,
    )


def pipeline_class(family: str) -> type[Pipeline[Any]]:
    """Class that loads and runs the models of a family."""
    cls: type[Pipeline[Any]] = getattr(import_module(pipeline_module(family)), PIPELINES[family])
    return cls


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
    if pipeline.layer_offload is not None or config.enable_cpu_offload:
        logger.info("offload: steps run without CUDA graphs, which would hold weights at fixed places")
    elif not config.enforce_eager:
        pipeline.capturer = timer.ranks.capturer(timer.device)
    compiles = options.compile_blocks
    if compiles is None:
        is_worth_it = timer.device.is_worth_compiling_for and pipeline.gains_from_compiling(config)
        compiles = is_worth_it and not config.enforce_eager
    if compiles and config.has_gguf:
        logger.info("blocks are not compiled: each type of a GGUF file's layers would be compiled on its own")
        compiles = False
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


def check_device(config: OmniDiffusionConfig, device: Device) -> None:
    """Raise ConfigError for settings that `device` does not support. Measures nothing and asks no other rank."""
    if config.quantization == "fp8":
        device.check_float8(device.dtype(config.dtype))
    if config.overlap_decode and not device.is_asynchronous:
        raise ConfigError(f"--overlap-decode takes a GPU, got {device.name}, which decodes between steps")
    device.choose_kernels(config.kernels)


def resolve(
    config: OmniDiffusionConfig,
    info: ModelInfo,
    device: Device,
    ranks: Ranks,
    first_backend: AttentionBackendName | None,
) -> OmniDiffusionConfig:
    """The config with the kernels and the attention backend that the model runs with. All ranks call this together.

    A whole pipeline uses diffusers' attention: its backend stays None. first_backend: see `choose_attention`.
    Raises ConfigError for kernels or a backend that do not run here.
    """
    kernels = device.choose_kernels(config.kernels)
    if not isinstance(info, PackedModelInfo):
        return replace(config, kernels=kernels)
    dtype = device.dtype(config.dtype)
    check_kernels(kernels, device, dtype)
    backend = choose_attention(config, info, device, dtype, ranks, first_backend)
    return replace(config, kernels=kernels, attention_backend=backend)


def check_kernels(name: KernelsName, device: Device, dtype: torch.dtype) -> None:
    """Raise ConfigError when Triton cannot compile a kernel: without a C compiler, for example."""
    if name != "triton":
        return
    x = torch.ones((2, 16), dtype=dtype, device=device.torch)
    try:
        create_kernels(name).gated_add(x, x, x[:1], None)
        device.synchronize()
    except Exception as error:  # an import, a compiler or a driver may raise anything
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ConfigError(f"--kernels triton does not run here: {reason}; --kernels torch does") from error


class WeightsBar:
    """Progress bar that also counts the bytes and seconds of loading a model folder."""

    def __init__(self, path: Path, files: Mapping[str, str], shown: bool) -> None:
        """files: files outside of the folder `path` that take the place of a component's, by component."""
        self.num_bytes = 0
        self.seconds = 0.0
        self._start = time.perf_counter()
        # An upper bound: unused weights, and shards of other ranks, are not read.
        in_folder = [file for file in path.glob("*/*.safetensors") if file.parent.name not in files]
        total = sum(file.stat().st_size for file in [*in_folder, *map(Path, files.values())])
        self._bar = progress_bar(total, "loading weights", shown=shown, unit="B", unit_scale=True)

    def update(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._bar.update(num_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._bar.total = self.num_bytes
        self._bar.close()
