"""Configuration: every wrong value ends with one line that names it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
import pytest
import torch

from vllm_omni.diffusion.compute.cache.cache_dit import CacheDiTConfig, StepsMaskPolicy
from vllm_omni.diffusion.compute.cache.tea_cache import TeaCacheConfig
from vllm_omni.diffusion.data import (
    STEP_CACHES,
    DiffusionParallelConfig,
    OmniDiffusionConfig,
    parse_cache_config,
    step_cache_config_class,
)
from vllm_omni.errors import ConfigError, NotAvailableError
from vllm_omni.inputs.data import LoRARequest, OmniDiffusionSamplingParams

CONFIGS: list[Any] = [OmniDiffusionConfig, DiffusionParallelConfig, *map(step_cache_config_class, STEP_CACHES)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int8"}, ["--dtype", "'int8'", "bfloat16"]),
        ({"scheduling_policy": "random"}, ["--scheduling-policy", "fair", "fcfs"]),
        ({"max_num_seqs": 0}, ["--max-num-seqs", "at least 1", "0"]),
        ({"max_batch_tokens": -1}, ["--max-batch-tokens", "-1"]),
        ({"max_queue_seconds": 0.0}, ["--max-queue-seconds"]),
        ({"default_sampling_params": {"steps": 3}}, ["--default-sampling-params", "steps", "num_inference_steps"]),
        ({"default_sampling_params": {"lora_request": {"nam": "ink"}}}, ["lora_request takes an adapter", '"name"']),
        ({"default_sampling_params": {"lora_request": "ink"}}, ["lora_request takes a LoRARequest", "'ink'"]),
        ({"cache_backend": "tea_cache", "cache_config": {"x": 1}}, ["'x'", "rel_l1_thresh", "coefficients"]),
        ({"cache_backend": "magic"}, ["--cache-backend", "'magic'", "tea_cache", "cache_dit"]),
        ({"cache_config": {"rel_l1_thresh": 1}}, ["--cache-config", "needs --cache-backend"]),
        ({"model": ""}, ["model"]),
        ({"model": 5}, ["model", "a string", "5"]),
        ({"max_num_seqs": 1.5}, ["--max-num-seqs", "an integer", "1.5"]),
        ({"max_num_seqs": True}, ["--max-num-seqs", "an integer", "True"]),
        ({"max_num_seqs": "a"}, ["--max-num-seqs", "an integer", "'a'"]),
        ({"vae_use_slicing": "x"}, ["--vae-use-slicing", "true or false", "'x'"]),
        ({"max_worker_restarts": "x"}, ["--max-worker-restarts", "an integer", "'x'"]),
        ({"max_worker_restarts": -1}, ["--max-worker-restarts", "at least 0", "-1"]),
        ({"max_queue_seconds": "x"}, ["--max-queue-seconds", "a number", "'x'"]),
        ({"max_queue_seconds": float("nan")}, ["--max-queue-seconds", "a number", "nan"]),
        ({"parallel": {"ring_degree": 2}}, ["parallel_config", "a DiffusionParallelConfig", "{'ring_degree': 2}"]),
        ({"cache_config": [1]}, ["--cache-config", "a mapping", "[1]"]),
        ({"default_sampling_params": {"shift": 3, "flow_shift": 5}}, ["shift and flow_shift differ: got 3 and 5"]),
        ({"default_sampling_params": 3}, ["--default-sampling-params", "a mapping", "3"]),
        ({"default_sampling_params": {1: 2}}, ["--default-sampling-params", "['1']"]),
        ({"dtype": ["float32"]}, ["--dtype", "bfloat16", "['float32']"]),
        ({"load_format": "npcache"}, ["--load-format", "'npcache'", "dummy"]),
        ({"variant": "../x"}, ["--variant", "letters"]),
        ({"variant": "fp16", "load_format": "dummy"}, ["--variant fp16 has no effect with --load-format dummy"]),
        ({"revision": ""}, ["--revision", "not empty"]),
        ({"download_dir": ""}, ["--download-dir", "not empty"]),
        ({"hf_token": 5}, ["--hf-token", "a string", "got int"]),
        ({"quantization": "int3"}, ["--quantization", "fp8", "'int3'"]),
        ({"device": "tpu"}, ["--device", "'tpu'", "cuda"]),
        ({"overlap_decode": 1}, ["--overlap-decode", "true or false"]),
        (
            {
                "overlap_decode": True,
                "parallel": DiffusionParallelConfig(ulysses_degree=2, vae_patch_parallel_size=2),
            },
            ["--overlap-decode", "--vae-patch-parallel-size 2"],
        ),
        ({"attention_backend": "flash"}, ["--attention-backend", "sdpa, torch_varlen, cudnn", "'flash'"]),
    ],
)
def test_a_wrong_value_is_named(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        OmniDiffusionConfig(**{"model": "demo", **settings})
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"distributed_executor_backend": "ray"}, "--distributed-executor-backend ray"),
    ],
)
def test_what_is_not_built_is_refused_by_flag(settings: dict[str, Any], flag: str) -> None:
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
        ("residual_diff_threshold", float("inf"), "a finite number of at least 0, got inf"),
        ("residual_diff_threshold", 10**400, r"a number of at most 1\.79769e\+308, got 10+$"),
        pytest.param("residual_diff_threshold", 10**5000, "a number of at most .*, got a huge int$", id="huge"),
        ("max_accumulated_residual_diff_threshold", 0.0, "above 0, or none"),
        ("max_accumulated_residual_diff_threshold", -0.0, "above 0, or none"),
        ("max_accumulated_residual_diff_threshold", float("inf"), "a finite number above 0"),
        ("max_warmup_steps", float("inf"), "an integer, got inf"),
        ("max_warmup_steps", 10**30, "an integer of up to 63 bits, got 1000"),
        ("max_cached_steps", -2, "an integer of at least -1, got -2"),
        ("taylorseer_order", 0, "1 to 8, got 0"),
        ("taylorseer_order", 9, "1 to 8, got 9"),
        ("max_accumulated_residual_diff_threshold", "x", "a number"),
        ("enable_taylorseer", 1, "true or false"),
        ("steps_computation_mask", "101", "a list of integers"),
        ("steps_computation_mask", [1, True], "a list of integers"),
        ("steps_computation_mask", [1, 2], "a list of 0 and 1"),
        ("steps_computation_mask", [], "a list of 0 and 1"),
        ("steps_computation_policy", "lazy", "one of dynamic, static"),
        ("steps_computation_policy", None, "one of dynamic, static"),
        ("scm_steps_mask_policy", "quick", "one of slow, medium, fast, ultra"),
    ],
)
def test_wrong_cache_values_are_named(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        parse_cache_config("cache_dit", {key: value})
    assert str(caught.value).startswith(f"--cache-config: {key} takes ")


def test_cache_policies_are_the_librarys_own() -> None:
    spec = importlib.util.find_spec("cache_dit")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("caching") / "cache_interface.py"
    known = re.search(r"predefined_policies = \{.*?\n  \}", source.read_text(), re.DOTALL)
    assert known
    assert re.findall(r'"(\w+)": \[', known[0]) == list(get_args(StepsMaskPolicy))
    for policy in get_args(StepsMaskPolicy):
        config = parse_cache_config("cache_dit", {"scm_steps_mask_policy": policy})
        assert config == CacheDiTConfig(scm_steps_mask_policy=policy)
    none = {"scm_steps_mask_policy": None, "max_accumulated_residual_diff_threshold": None}
    assert parse_cache_config("cache_dit", none) == CacheDiTConfig()


@pytest.mark.parametrize("coefficients", [[], [1.0, float("inf")], [-float("inf")]])
def test_a_polynomial_has_a_finite_coefficient_at_least(coefficients: list[float]) -> None:
    with pytest.raises(ConfigError, match="coefficients takes a list of at least one finite number, or none for the m"):
        parse_cache_config("tea_cache", {"coefficients": coefficients})
    assert parse_cache_config("tea_cache", {"coefficients": None}) == TeaCacheConfig()


MASK = {"steps_computation_mask": [1, 1, 0, 1]}
STATIC = {**MASK, "steps_computation_policy": "static"}


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        ({"steps_computation_policy": "static"}, "steps_computation_policy 'static' has no effect without scm_steps_"),
        ({"taylorseer_order": 2}, "taylorseer_order 2 has no effect without enable_taylorseer"),
        ({**STATIC, "residual_diff_threshold": 0.12}, "residual_diff_threshold 0.12 has no effect beside steps_comput"),
        ({**STATIC, "max_cached_steps": 5}, "max_cached_steps 5 has no effect beside steps_computation_policy"),
        ({**STATIC, "max_continuous_cached_steps": 2}, "max_continuous_cached_steps 2 has no effect beside steps_"),
        (
            {**STATIC, "max_accumulated_residual_diff_threshold": 0.3},
            "max_accumulated_residual_diff_threshold 0.3 has no effect beside steps_computation_policy",
        ),
        (
            {"residual_diff_threshold": 1.0, "max_accumulated_residual_diff_threshold": 0.3},
            "max_accumulated_residual_diff_threshold 0.3 has no effect beside residual_diff_threshold from 1 on",
        ),
        ({"warmup_interval": 2, "max_warmup_steps": 1}, "warmup_interval 2 has no effect with max_warmup_steps below"),
        ({**MASK, "max_warmup_steps": 8}, "max_warmup_steps 8 has no effect beside a mask, whose ones at its head are"),
        ({**STATIC, "max_warmup_steps": 0}, "max_warmup_steps 0 has no effect beside a mask"),
        ({"scm_steps_mask_policy": "fast", "warmup_interval": 2}, "warmup_interval 2 has no effect beside a mask"),
        (
            {"max_cached_steps": 5, "max_continuous_cached_steps": 6},
            "max_continuous_cached_steps 6 has no effect beside max_cached_steps 5",
        ),
        (
            {"max_cached_steps": 5, "max_continuous_cached_steps": 5},
            "max_continuous_cached_steps 5 has no effect beside max_cached_steps 5",
        ),
        (
            {"residual_diff_threshold": 0, "enable_taylorseer": True},
            "enable_taylorseer True has no effect beside residual_diff_threshold 0, at which every step is computed",
        ),
        (
            {"max_cached_steps": 0, "Bn_compute_blocks": 1},
            "Bn_compute_blocks 1 has no effect beside max_cached_steps 0",
        ),
        (
            {"max_continuous_cached_steps": 0, "max_cached_steps": 4},
            "max_cached_steps 4 has no effect beside max_continuous_cached_steps 0",
        ),
        (
            {**MASK, "residual_diff_threshold": 0.0},
            "steps_computation_mask [1, 1, 0, 1] has no effect beside residual_d",
        ),
        (
            {"steps_computation_mask": [1, 1], "steps_computation_policy": "static"},
            "steps_computation_mask [1, 1] has no effect beside steps_computation_policy 'static', which skips its",
        ),
    ],
)
def test_cache_settings_that_change_nothing_are_refused(settings: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cache_config("cache_dit", settings)
    assert str(caught.value).startswith(f"--cache-config: {refusal}")


def test_cache_settings_that_repeat_a_default_or_ask_for_what_is_done_anyway_are_taken() -> None:
    defaults = {f.name: getattr(CacheDiTConfig, f.name) for f in fields(CacheDiTConfig)}
    assert parse_cache_config("cache_dit", defaults) == CacheDiTConfig()
    unlimited = {"max_continuous_cached_steps": -1, "residual_diff_threshold": 1.0}
    zeros: list[dict[str, Any]] = [
        {"residual_diff_threshold": 0.0},
        {"max_cached_steps": 0},
        {"max_continuous_cached_steps": 0},
    ]
    fewer: dict[str, Any] = {"max_cached_steps": 2}  # than the default's 3 in a row
    for settings in ({**defaults, **STATIC}, {**STATIC, **unlimited}, {**defaults, **MASK}, fewer, *zeros):
        parse_cache_config("cache_dit", settings)


def test_a_polynomial_for_a_threshold_of_zero_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"coefficients \[1\.0\] has no effect beside rel_l1_thresh 0, at which every"
    ):
        parse_cache_config("tea_cache", {"coefficients": [1.0], "rel_l1_thresh": 0})
    assert parse_cache_config("tea_cache", {"rel_l1_thresh": 0}) == TeaCacheConfig(rel_l1_thresh=0.0)


@pytest.mark.parametrize("name", CacheDiTConfig.key_aliases())
@pytest.mark.parametrize("values", [("static", "dynamic"), ("dynamic", "dynamic")])
def test_one_setting_under_two_names_is_refused(name: str, values: tuple[str, str]) -> None:
    both = dict(zip((name, CacheDiTConfig.key_aliases()[name]), values))
    for settings in (both, dict(reversed(both.items()))):
        with pytest.raises(ConfigError) as caught:
            parse_cache_config("cache_dit", settings)
        assert (
            str(caught.value)
            == f"--cache-config: give {name} or {CacheDiTConfig.key_aliases()[name]}, which mean the same: got both"
        )


def test_a_cache_has_one_mask() -> None:
    with pytest.raises(ConfigError, match=r"or steps_computation_mask, got both: 'fast' and \[1, 1, 0, 1\]$"):
        parse_cache_config("cache_dit", {**MASK, "scm_steps_mask_policy": "fast"})


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, name)
        for cls in CONFIGS
        for name, kind in get_type_hints(cls).items()
        if kind is int or int in get_args(kind)
    ],
)
def test_an_integer_is_one_that_can_be_sent_to_a_worker(cls: type, name: str) -> None:
    own = {"model": "demo"} if cls is OmniDiffusionConfig else {}
    for wrong in (2**63, 10**30, 10**5000):
        with pytest.raises(ConfigError, match=f"{name.replace('_', '.')} takes an integer of up to 63 bits, got "):
            cls(**own, **{name: wrong})


NAN, INFINITY = float("nan"), float("inf")
ODD_VALUES: list[Any] = [
    *(NAN, INFINITY, -INFINITY, -0.0, -1, 0, 2**63, 10**400, 10**5000, 1j, True, "", "\n", b"x"),
    *([], [NAN], [INFINITY], [[]], {}, {1: 2}, {"": ""}, {"lora_request": {"name": NAN}}),
    *(np.zeros(()), np.float32(NAN), np.ones((2, 2)), object()),
]


def refusal_or_sent(cls: Any, values: dict[str, Any]) -> None:
    """A wrong value is a ConfigError of one line; whatever is taken arrives at a worker as it was."""
    try:
        config = cls(**values)
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=cls) == config
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_field_refuses_an_odd_value_or_a_worker_gets_it(cls: Any) -> None:
    own = {"model": "demo"} if cls is OmniDiffusionConfig else {}
    for name in get_type_hints(cls):
        for value in ODD_VALUES:
            refusal_or_sent(cls, {**own, name: value})


def test_a_default_parameter_refuses_an_odd_value_or_a_worker_gets_it() -> None:
    for name in (*get_type_hints(OmniDiffusionSamplingParams), "negative_prompt"):
        for value in ODD_VALUES:
            refusal_or_sent(OmniDiffusionConfig, {"model": "demo", "default_sampling_params": {name: value}})


def test_world_size_is_the_product_of_the_axes() -> None:
    parallel = DiffusionParallelConfig(2, 3, 2, 1, 2, vae_patch_parallel_size=4, text_encoder_tp_size=2)
    assert parallel.world_size == 24
    with pytest.raises(ConfigError, match=r"^ring_degree takes an integer of at least 1, got 0$"):
        DiffusionParallelConfig(ring_degree=0)
    for wrong in (True, "2", 1.5):
        with pytest.raises(ConfigError, match="ring_degree takes an integer, got"):
            DiffusionParallelConfig(ring_degree=wrong)  # type: ignore[arg-type]


def test_config_is_frozen_and_travels_as_msgpack() -> None:
    defaults = {"seed": 3, "lora_request": {"name": "ink", "scale": 0.5}}
    config = OmniDiffusionConfig("demo", vae_use_tiling=True, default_sampling_params=defaults)
    assert config.default_sampling_params["lora_request"] == LoRARequest("ink", scale=0.5)
    assert OmniDiffusionConfig("demo", default_sampling_params={"shift": 3}).default_sampling_params == {
        "flow_shift": 3.0
    }
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=OmniDiffusionConfig) == config
    with pytest.raises(FrozenInstanceError):
        config.model = "other"  # type: ignore[misc]


def test_numbers_of_other_libraries_are_settings_too() -> None:
    config = OmniDiffusionConfig(
        "demo",
        DiffusionParallelConfig(ring_degree=np.int64(2)),  # type: ignore[arg-type]
        max_num_seqs=np.int64(3),  # type: ignore[arg-type]
        max_queue_seconds=5,
        default_sampling_params={"true_cfg_scale": np.float64(2.0)},
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=OmniDiffusionConfig) == config


def test_paths_and_types_of_pytorch_are_settings_too() -> None:
    settings = {"download_dir": Path("/models"), "lora_modules": {"ink": Path("/adapters/ink")}, "dtype": torch.float16}
    defaults = {"lora_request": LoRARequest("ink", Path("/adapters/ink"))}
    config = OmniDiffusionConfig(Path("/models/painter"), default_sampling_params=defaults, **settings)  # type: ignore[arg-type]
    assert (config.model, config.download_dir, config.dtype) == ("/models/painter", "/models", "float16")
    assert config.lora_modules == {"ink": "/adapters/ink"}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=OmniDiffusionConfig) == config
    for wrong in (torch.float64, torch.Tensor, np.float32):
        with pytest.raises(ConfigError, match=r"^--dtype takes one of auto, float32, bfloat16, float16, got "):
            OmniDiffusionConfig("demo", dtype=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", ["hf_a b", "hf_a\n", "hf_é", b"hf_bytes", ""])
def test_a_token_is_in_no_error_and_in_no_repr(token: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--hf-token takes a ") as caught:
        OmniDiffusionConfig("demo", hf_token=token)
    assert "hf_" not in str(caught.value)
    assert "hf_secret" not in repr(OmniDiffusionConfig("demo", hf_token="hf_secret"))


def test_vllms_names_of_values_mean_ours() -> None:
    named = OmniDiffusionConfig("demo", dtype="half", load_format="safetensors")  # type: ignore[arg-type]
    assert named == OmniDiffusionConfig("demo", dtype="float16", load_format="auto")
    assert OmniDiffusionConfig("demo", dtype="float").dtype == "float32"  # type: ignore[arg-type]


def test_files_of_transformers_have_absolute_paths_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/painter")
    config = OmniDiffusionConfig(model="some/model", transformer_file=Path("x.safetensors"), transformer_file_2="~/y")  # type: ignore[arg-type]
    files = {"transformer": str(tmp_path / "x.safetensors"), "transformer_2": "/home/painter/y"}
    assert config.transformer_files == files
    monkeypatch.chdir("/")
    worker = OmniDiffusionConfig(model="some/model", transformer_file_2="y").for_worker("/models/here")
    assert (worker.transformer_file, worker.transformer_file_2) == (None, "/y")
    for name in ("transformer_file", "transformer_file_2"):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} takes a path, got ''"):
            OmniDiffusionConfig(model="some/model", **{name: ""})  # type: ignore[arg-type]
