"""Flags with which a model fits that does not fit without: their memory, and an estimate of their speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.compute.memory.budget import DeviceLimits, MemoryBudget, memory_budget
from vllm_omni.diffusion.compute.memory.planned_requests import default_planned_request
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError

LINK_BYTES_PER_SECOND = 25e9
"""Assumed rate of copies from pinned host memory: PCIe 4.0 with 16 lanes."""
OPERATIONS_PER_SECOND = 200e12
"""Assumed rate of the transformer's products: that of a GPU of 2023 in 16 bits, at the half of its peak."""
ASSUMED = (
    f"estimated from copies at {LINK_BYTES_PER_SECOND / 1e9:.0f} GB/s and products at "
    f"{OPERATIONS_PER_SECOND / 1e12:.0f} TFLOP/s"
)
MOST_REMEDIES = 6
"""Most remedies that are reported."""
TENSOR_SIZES = (2, 4, 8)
FASTER = 0.9
"""Part of the time of a remedy in which one with further flags makes a request, at most."""


@dataclass(frozen=True)
class Remedy:
    """Flags that make the model fit."""

    flags: str
    config: OmniDiffusionConfig
    budget: MemoryBudget
    slowdown: float
    """Seconds of a default request, in those without the flags."""

    @property
    def is_shared(self) -> bool:
        """Whether ranks share each weight."""
        return self.config.parallel.tensor_parallel_size > 1

    @property
    def speed(self) -> str:
        if self.slowdown < 0.95:
            return f"{1 / self.slowdown:.1f} times as fast"
        return "about as fast" if self.slowdown < 1.05 else f"{self.slowdown:.1f} times as long"


def find_remedies(
    config: OmniDiffusionConfig, info: ModelInfo, budget: MemoryBudget, dtype: torch.dtype, float8: bool = True
) -> list[Remedy]:
    """Remedies of a budget that does not fit: those with the fewest devices first, and of these the fastest.

    Further flags beside those of another remedy must make it faster. float8: whether the device multiplies in float8.
    """
    limits = budget.limits
    before = request_seconds(config, info, budget)
    found: dict[frozenset[str], Remedy] = {}
    for changes in sorted(_choices(config, limits, float8), key=len):
        names = frozenset(changes)
        ranks = changes.get("tensor_parallel_size", 1)
        if any(remedy.config.parallel.tensor_parallel_size < ranks for remedy in found.values() if remedy.is_shared):
            continue  # fewer ranks will do
        if names in found or (changed := _changed(config, info, changes)) is None:
            continue
        tried = memory_budget(changed, info, limits, dtype)
        slowdown = request_seconds(changed, info, tried) / before
        fewer = [remedy.slowdown for less, remedy in found.items() if less < names]
        if tried.fits and slowdown < FASTER * min(fewer, default=float("inf")):
            found[names] = Remedy(" ".join(map(_flag, changes.items())), changed, tried, slowdown)
    order = sorted(found.values(), key=lambda remedy: (remedy.config.parallel.world_size, remedy.slowdown))
    return order[:MOST_REMEDIES]


def _choices(config: OmniDiffusionConfig, limits: DeviceLimits, float8: bool) -> Iterator[Mapping[str, Any]]:
    """Fields of the config to change, each alone and together."""
    encoders = [{}] if config.text_encoder_quantization else [{}, {"text_encoder_quantization": "fp8"}]
    quantizations = [{}, {"quantization": "fp8"}] if float8 and config.quantization is None else [{}]
    offloads: list[dict[str, Any]] = [{}]
    if not (config.enable_cpu_offload or config.enable_layerwise_offload):
        offloads += [{"enable_cpu_offload": True}, {"enable_layerwise_offload": True}]
    tensors: list[dict[str, Any]] = [{}]
    if config.parallel.world_size == 1 and limits.is_gpu:
        tensors += [{"tensor_parallel_size": size} for size in TENSOR_SIZES if size <= limits.device_count]
    for parts in product(encoders, quantizations, offloads, tensors):
        if changes := {name: value for part in parts for name, value in part.items()}:
            yield changes


def _changed(config: OmniDiffusionConfig, info: ModelInfo, changes: Mapping[str, Any]) -> OmniDiffusionConfig | None:
    """The config with these changes; None where the model does not take them."""
    fields = dict(changes)
    try:
        if (size := fields.pop("tensor_parallel_size", None)) is not None:
            # The ranks share the text encoder too, where its sizes allow it.
            shares = isinstance(info, PackedModelInfo) and size in info.text_encoder_shares.sizes
            encoders = size if shares else 1
            fields["parallel"] = replace(config.parallel, tensor_parallel_size=size, text_encoder_tp_size=encoders)
        changed = replace(config, **fields)
        info.check_settings(changed)
        info.check_parallel(changed.parallel)
    except ConfigError:
        return None
    return changed


def _flag(change: tuple[str, Any]) -> str:
    name, value = change
    flag = "--" + name.replace("_", "-")
    if name == "tensor_parallel_size":
        return f"{flag} {value}"
    return flag if value is True else f"{flag} {value}"


def request_seconds(config: OmniDiffusionConfig, info: ModelInfo, budget: MemoryBudget) -> float:
    """Seconds of a default request that runs alone, on the assumed device: its steps, and copies from the host.

    A step takes as long as its products, or as the copies of its blocks if these take longer. With
    `--enable-cpu-offload` each component is copied once.
    """
    model = budget.model
    if not isinstance(info, PackedModelInfo):
        return model.weight_bytes / LINK_BYTES_PER_SECOND if config.enable_cpu_offload else 1.0
    request = default_planned_request(info)
    parallel = config.parallel
    rate = OPERATIONS_PER_SECOND * (2 if config.quantization == "fp8" else 1)
    branches = -(-len(request.branch_tokens) // parallel.cfg_parallel_size)
    cost = sum(map(info.sequence_cost, request.branch_tokens[:branches]))
    products = 2 * model.step_weights * cost / (parallel.ulysses_degree * parallel.ring_degree) / rate
    streamed = 0.0
    if config.enable_layerwise_offload:
        streamed = min(model.step_weight_bytes, model.host_bytes) / LINK_BYTES_PER_SECOND
    copied = model.weight_bytes / LINK_BYTES_PER_SECOND if config.enable_cpu_offload else 0.0
    return request.num_steps * max(products, streamed) + copied
