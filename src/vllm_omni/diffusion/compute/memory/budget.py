"""Budget of a device's memory: rows of bytes, the least that the model needs, and the peak of the largest request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.whole_info import WholeModelInfo
from vllm_omni.diffusion.compute.device.gpu_memory import CONTEXT_BYTES
from vllm_omni.diffusion.compute.memory.planned_model import PlannedModel, plan_packed, plan_whole
from vllm_omni.diffusion.compute.memory.planned_requests import (
    PlannedRequest,
    default_planned_request,
    largest_planned_request,
)
from vllm_omni.diffusion.compute.startup.model_start import ADAPTER_SHARE, CACHE_SHARE
from vllm_omni.diffusion.compute.startup.warmup import MAX_TOKENS
from vllm_omni.diffusion.compute.step.cuda_graphs import MAX_TOKENS as MAX_CAPTURED_TOKENS
from vllm_omni.diffusion.data import OmniDiffusionConfig

NCCL_BYTES = 2**30
"""Buffers of the exchanges between ranks."""
FRAGMENTATION = 0.05
"""Share of the activations that is lost between the blocks of PyTorch's allocator."""
ENCODER_WIDTHS = 4
"""Peak of the text encoder for each token, in its most features: gate, up product, their product, and the rest."""


@dataclass(frozen=True)
class DeviceLimits:
    """Memory of the device that a budget is made for."""

    total_bytes: int
    given_bytes: int
    """Bytes that the server may take."""
    others_bytes: int = 0
    """Bytes that others use."""
    is_gpu: bool = True
    device_count: int = 1
    """Devices of this machine."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    num_bytes: int | None
    """None: not predicted."""
    note: str = ""
    is_optional: bool = False
    """Whether the memory is taken only where it is free."""


@dataclass(frozen=True)
class MemoryBudget:
    """Predicted memory of one rank: of rank 0, which holds as much as any other and blends the pictures."""

    rows: tuple[Row, ...]
    weight_bytes: int
    """Weights on the device, at the stage that has most of them there."""
    needed_bytes: int
    """Least memory with which a request of the default size is served."""
    peak_bytes: int
    """Most bytes that PyTorch allocates for the largest accepted request; without what is kept for further requests."""
    largest_bytes: int
    """Memory with which the largest accepted request is served."""
    limits: DeviceLimits
    model: PlannedModel

    @property
    def fits(self) -> bool:
        """Whether the model can be served. On a CPU only weights count: its memory is that which is free by chance."""
        needed = self.needed_bytes if self.limits.is_gpu else self.weight_bytes
        return needed <= self.limits.given_bytes

    @property
    def serves_largest(self) -> bool:
        return self.largest_bytes <= self.limits.given_bytes


@dataclass(frozen=True)
class _StagePeaks:
    """Peaks of the stages of one request above the weights, in bytes."""

    encode: int
    step: int
    decode: int

    @classmethod
    def of(
        cls,
        config: OmniDiffusionConfig,
        info: PackedModelInfo,
        model: PlannedModel,
        request: PlannedRequest,
        dtype_bytes: int,
        tile: bool,
    ) -> _StagePeaks:
        encode = request.encoded_tokens * ENCODER_WIDTHS * model.encoder_width * dtype_bytes
        step = _step_bytes(config, info, request.rank_tokens(config.parallel), dtype_bytes)
        decode = info.decode_bytes(request.height, request.width, request.num_frames, tile, dtype_bytes)
        return cls(encode, step, decode)

    def peak(self, config: OmniDiffusionConfig, model: PlannedModel) -> int:
        """Peak with the weights on the device. Stages follow each other, unless decodes run beside steps."""
        if not config.enable_cpu_offload:
            together = self.step + self.decode if config.overlap_decode else max(self.step, self.decode)
            return _device_weights(config, model) + max(self.encode, together)
        sizes = model.component_bytes
        encoders = sizes.get("text_encoder", 0) + sizes.get("image_encoder", 0)
        stages = (
            encoders + self.encode,
            sizes.get("transformer", 0) + self.step,
            sizes.get("vae", 0) + self.decode,
        )
        return max(stages)


def _step_bytes(config: OmniDiffusionConfig, info: PackedModelInfo, num_tokens: int, dtype_bytes: int) -> int:
    input_bytes = 1 if config.quantization == "fp8" else None
    return info.step_activation_bytes(num_tokens, dtype_bytes, config.parallel.tensor_parallel_size, input_bytes)


def _device_weights(config: OmniDiffusionConfig, model: PlannedModel) -> int:
    """Most weights on the device at once."""
    sizes = model.component_bytes
    if config.enable_cpu_offload:
        encoders = sizes.get("text_encoder", 0) + sizes.get("image_encoder", 0)
        return max(encoders, *(size for name, size in sizes.items() if not name.endswith("encoder")))
    return model.weight_bytes - model.host_bytes + model.slot_bytes


def memory_budget(
    config: OmniDiffusionConfig, info: ModelInfo, limits: DeviceLimits, dtype: torch.dtype
) -> MemoryBudget:
    """Budget of one rank. Builds the model without memory. Raises ConfigError as the loading of the model does."""
    if not isinstance(info, PackedModelInfo):
        assert isinstance(info, WholeModelInfo)
        return _whole_budget(config, plan_whole(config, info, dtype), limits)
    model = plan_packed(config, info, dtype)
    default, largest = default_planned_request(info), largest_planned_request(config, info)
    size, tiled = dtype.itemsize, config.vae_use_tiling
    # A decode that would not fit is made in tiles.
    least = _StagePeaks.of(config, info, model, default, size, tile=True)
    common, most = (_StagePeaks.of(config, info, model, each, size, tiled) for each in (default, largest))
    reserve = _reserve(config, limits, max(least.step, least.decode))
    kept = model.kept_bytes
    needed = least.peak(config, model) + kept + reserve
    largest_bytes = _StagePeaks.of(config, info, model, largest, size, tile=True).peak(config, model) + kept + reserve
    step_tokens = config.max_batch_tokens or MAX_TOKENS
    note = "" if config.max_batch_tokens else ", the most that the start measures"
    place = "on other ranks" if config.weight_sharding else "in host memory"
    offload = "" if not model.host_bytes else f"{gib(model.host_bytes)} {place}"
    turns = "in turns" if config.enable_cpu_offload else ""
    rows = [
        *(Row(f"weights: {_title(name)}", num, turns) for name, num in model.component_bytes.items()),
        *([Row("of these on the device", _device_weights(config, model), offload)] if model.host_bytes else ()),
        Row("kept rows of modulation and embeddings", kept, "at most"),
        Row("encode of a prompt", common.encode, f"{default.encoded_tokens} tokens"),
        Row("step, default request", common.step, default.written_out),
        Row("step, largest request", most.step, largest.written_out),
        Row("step, token budget", _step_bytes(config, info, step_tokens, size), f"{step_tokens} tokens{note}", True),
        Row("VAE decode, default request", common.decode, default.written_out),
        Row("VAE decode, largest request", most.decode, largest.written_out),
        Row("reserve", reserve, "CUDA context and fragmentation" if limits.is_gpu else "fragmentation"),
        *_optional_rows(config, info, limits, needed, size),
    ]
    return MemoryBudget(
        tuple(rows),
        _device_weights(config, model),
        needed,
        most.peak(config, model),
        largest_bytes,
        limits,
        model,
    )


def request_peak_bytes(
    config: OmniDiffusionConfig, info: PackedModelInfo, request: PlannedRequest, dtype: torch.dtype
) -> int:
    """Most bytes that PyTorch allocates on a rank for one request, with weights. Raises ConfigError as loading does."""
    model = plan_packed(config, info, dtype)
    return _StagePeaks.of(config, info, model, request, dtype.itemsize, config.vae_use_tiling).peak(config, model)


def _reserve(config: OmniDiffusionConfig, limits: DeviceLimits, activations: int) -> int:
    context = CONTEXT_BYTES + (NCCL_BYTES if config.parallel.replica_size > 1 else 0) if limits.is_gpu else 0
    return context + int(FRAGMENTATION * activations)


def _optional_rows(
    config: OmniDiffusionConfig, info: PackedModelInfo, limits: DeviceLimits, needed: int, dtype_bytes: int
) -> list[Row]:
    """Memory that is taken only where it is free: a part of what is left."""
    left, rows = max(0, limits.given_bytes - needed), []
    streams = config.enable_cpu_offload or config.enable_layerwise_offload or config.weight_sharding
    if limits.is_gpu and not (config.enforce_eager or streams):
        graphs = min(left, _step_bytes(config, info, MAX_CAPTURED_TOKENS, dtype_bytes))
        rows.append(Row("CUDA graphs", graphs, f"steps of up to {MAX_CAPTURED_TOKENS} tokens", True))
        left -= graphs
    if config.cache_backend != "none":
        rows.append(Row("step cache", int(CACHE_SHARE * left), f"at most {CACHE_SHARE:.0%} of what is left", True))
    if config.lora_modules or config.lora_dirs or config.enable_lora_loading:
        files = sorted(Path(path).stat().st_size for path in config.lora_modules.values() if Path(path).is_file())
        largest = sum(files[-config.num_device_loras :])
        share = 0 if config.max_loras is not None else int(ADAPTER_SHARE * left)
        note = f"{config.num_device_loras} slots, and more within {ADAPTER_SHARE:.0%} of what is left"
        rows.append(Row("adapters", max(largest, share), note, True))
    return rows


def _whole_budget(config: OmniDiffusionConfig, model: PlannedModel, limits: DeviceLimits) -> MemoryBudget:
    """Budget of a model that diffusers runs: of its weights alone."""
    sizes = model.component_bytes
    on_device = model.weight_bytes
    if config.enable_cpu_offload:
        on_device = max(sizes.values(), default=0)
    elif config.enable_layerwise_offload:
        on_device = 0
    rows = [
        *(Row(f"weights: {_title(name)}", num) for name, num in sizes.items()),
        Row("activations", None, "not predicted for a pipeline of diffusers"),
    ]
    return MemoryBudget(tuple(rows), on_device, on_device, on_device, on_device, limits, model)


def _title(component: str) -> str:
    return "VAE" if component == "vae" else component.replace("_", " ")


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
