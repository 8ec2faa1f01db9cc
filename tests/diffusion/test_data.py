"""Configuration: every wrong value ends with one line that names it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import msgspec
import pytest

from vllm_omni.diffusion.data import (
    CacheDiTConfig,
    DiffusionParallelConfig,
    OmniDiffusionConfig,
    TeaCacheConfig,
    parse_cache_config,
)
from vllm_omni.errors import ConfigError, NotAvailableError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int8"}, ["--dtype", "'int8'", "bfloat16"]),
        ({"scheduling_policy": "random"}, ["--scheduling-policy", "fair", "fcfs"]),
        ({"max_num_seqs": 0}, ["--max-num-seqs", "at least 1", "0"]),
        ({"max_batch_tokens": -1}, ["--max-batch-tokens", "-1"]),
        ({"max_queue_seconds": 0.0}, ["--max-queue-seconds"]),
        ({"default_sampling_params": {"steps": 3}}, ["--default-sampling-params", "steps", "num_inference_steps"]),
        ({"cache_backend": "tea_cache", "cache_config": {"x": 1}}, ["'x'", "rel_l1_thresh", "coefficients"]),
        ({"cache_backend": "magic"}, ["--cache-backend", "'magic'", "tea_cache", "cache_dit"]),
        ({"cache_config": {"rel_l1_thresh": 1}}, ["--cache-config", "needs --cache-backend"]),
        ({"model": ""}, ["model"]),
    ],
)
def test_a_wrong_value_is_named(settings: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        OmniDiffusionConfig(**{"model": "demo", **settings})
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"cache_backend": "cache_dit"}, "--cache-backend cache_dit"),
        ({"enable_cpu_offload": True}, "--enable-cpu-offload"),
        ({"quantization": "fp8"}, "--quantization fp8"),
        ({"attention_backend": "cudnn"}, "--attention-backend cudnn"),
        ({"distributed_executor_backend": "ray"}, "--distributed-executor-backend ray"),
    ],
)
def test_what_is_not_built_is_refused_by_flag(settings: dict, flag: str) -> None:
    with pytest.raises(NotAvailableError, match="not available yet") as caught:
        OmniDiffusionConfig(model="demo", **settings)
    assert str(caught.value).startswith(flag)


def test_cache_configs_are_tagged_and_checked() -> None:
    assert parse_cache_config("none", {}) is None
    assert parse_cache_config("tea_cache", {"rel_l1_thresh": 0.3}) == TeaCacheConfig(rel_l1_thresh=0.3)
    config = parse_cache_config("cache_dit", {"Fn_compute_blocks": 8, "steps_computation_mask": [1, 0, 1]})
    assert config == CacheDiTConfig(Fn_compute_blocks=8, steps_computation_mask=(1, 0, 1))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("Fn_compute_blocks", "8", "an integer"),
        ("Fn_compute_blocks", True, "an integer"),
        ("Fn_compute_blocks", 0, "at least 1"),
        ("residual_diff_threshold", -0.1, "at least 0"),
        ("residual_diff_threshold", float("nan"), "a number"),
        ("enable_taylorseer", 1, "true or false"),
        ("steps_computation_mask", "101", "a list of numbers"),
    ],
)
def test_cache_values_of_the_wrong_kind_are_named(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        parse_cache_config("cache_dit", {key: value})
    assert f"cache_config.{key}" in str(caught.value)


def test_world_size_is_the_product_of_the_axes() -> None:
    parallel = DiffusionParallelConfig(2, 3, 2, 1, 2, vae_patch_parallel_size=4, text_encoder_tp_size=2)
    assert parallel.world_size == 24
    with pytest.raises(ConfigError, match="ring_degree must be an integer of at least 1, got 0"):
        DiffusionParallelConfig(ring_degree=0)


def test_config_is_frozen_and_travels_as_msgpack() -> None:
    config = OmniDiffusionConfig("demo", vae_use_tiling=True, default_sampling_params={"seed": 3})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=OmniDiffusionConfig) == config
    with pytest.raises(FrozenInstanceError):
        config.model = "other"  # type: ignore[misc]
