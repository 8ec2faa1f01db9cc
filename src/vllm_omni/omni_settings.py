"""Keywords of `Omni` and `AsyncOmni`, and the `OmniDiffusionConfig` that they make."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

from vllm_omni.diffusion.data import (
    AttentionBackendName,
    CacheBackend,
    DeviceChoice,
    DiffusionParallelConfig,
    DType,
    ExecutorBackend,
    KernelsName,
    LoadFormat,
    OmniDiffusionConfig,
    Quantization,
    SchedulingPolicy,
    TextEncoderQuantization,
)
from vllm_omni.errors import ConfigError
from vllm_omni.foreign.class_decorators import without_none
from vllm_omni.foreign.keywords import ignore_keywords

if TYPE_CHECKING:
    import torch


class OmniSettings(TypedDict, total=False):
    """Fields of `OmniDiffusionConfig` and `DiffusionParallelConfig` as keywords; those classes explain them.

    `parallel_config` sets the field `parallel`; its degrees may be given one by one instead. None stands for a
    field's default.
    """

    model: str | os.PathLike[str]
    parallel_config: DiffusionParallelConfig | None
    ulysses_degree: int
    ring_degree: int
    cfg_parallel_size: int
    tensor_parallel_size: int
    data_parallel_size: int
    vae_patch_parallel_size: int
    text_encoder_tp_size: int
    cache_backend: CacheBackend | None
    cache_config: Mapping[str, Any] | None
    enable_cpu_offload: bool
    enable_layerwise_offload: bool
    weight_sharding: bool
    resident_layers: int | None
    gpu_memory_utilization: float
    transformer_file: str | os.PathLike[str] | None
    transformer_file_2: str | os.PathLike[str] | None
    text_encoder_quantization: TextEncoderQuantization | None
    enable_sleep_mode: bool
    lora_modules: Mapping[str, str | os.PathLike[str]]
    lora_defaults: Mapping[str, Mapping[str, Any]]
    lora_dirs: Sequence[str | os.PathLike[str]]
    max_loras: int | None
    max_cpu_loras: int | None
    enable_lora_loading: bool
    vae_use_slicing: bool
    vae_use_tiling: bool
    overlap_decode: bool
    device: DeviceChoice
    dtype: DType | torch.dtype
    load_format: LoadFormat
    quantization: Quantization | None
    attention_backend: AttentionBackendName | None
    enforce_eager: bool
    kernels: KernelsName
    distributed_executor_backend: ExecutorBackend
    scheduling_policy: SchedulingPolicy
    max_num_seqs: int
    max_batch_tokens: int | None
    max_num_queued_reqs: int
    max_queue_seconds: float
    max_pixels: int | None
    max_inference_steps: int
    max_num_frames: int | None
    default_sampling_params: Mapping[str, Any]
    max_worker_restarts: int
    variant: str | None
    revision: str | None
    download_dir: str | os.PathLike[str] | None
    hf_token: str | bool | None
    progress_bar: bool


ACCEPTED = tuple(OmniSettings.__annotations__)
_NONE = OmniSettings()
_DEGREES = tuple(f.name for f in fields(DiffusionParallelConfig))


def make_config(
    config: OmniDiffusionConfig | str | os.PathLike[str] | None, settings: OmniSettings, defaults: OmniSettings = _NONE
) -> OmniDiffusionConfig:
    """Config from a constructor's arguments: either a config, or a model and keywords.

    `defaults`: values of keywords that are not given. Raises ConfigError.
    """
    given = without_none(DiffusionParallelConfig, without_none(OmniDiffusionConfig, settings))
    if isinstance(config, str | os.PathLike):
        if "model" in given:
            raise ConfigError(f"give the model once: got {os.fspath(config)!r} and model={given['model']!r}")
        return _from_keywords({**defaults, **given, "model": config})
    if config is None:
        return _from_keywords({**defaults, **given})
    if not isinstance(config, OmniDiffusionConfig):
        raise ConfigError(f"the first argument is an OmniDiffusionConfig or a model, got {config!r}")
    if others := sorted(given.keys() - {"progress_bar"}):
        raise ConfigError(f"give a config or keywords, not both: got a config and {others}")
    return replace(config, progress_bar=given["progress_bar"]) if given else config


def _from_keywords(given: dict[str, Any]) -> OmniDiffusionConfig:
    """Config from keywords; those of the public vllm-omni package without effect here are logged and ignored."""
    others = {name: given.pop(name) for name in list(given) if name not in ACCEPTED}
    degrees = {name: given.pop(name) for name in _DEGREES if name in given}
    parallel = given.pop("parallel_config", None)
    if parallel is not None and degrees:
        raise ConfigError(f"give parallel_config or its fields as keywords, not both: got both and {sorted(degrees)}")
    if parallel is None:
        parallel = DiffusionParallelConfig(**degrees)
    ignore_keywords(others, parallel, ACCEPTED)
    given.setdefault("model", "")
    return OmniDiffusionConfig(**given, parallel=parallel)
