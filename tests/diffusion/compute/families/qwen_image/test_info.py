"""Model info read from a folder, and folders that are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import QwenImagePipeline
from transformers import AutoTokenizer

from vllm_omni.diffusion.catalog.find_folder import DEMO_MODEL_PATH
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.cache.cache_dit import CacheDiTConfig
from vllm_omni.diffusion.compute.cache.tea_cache import TeaCacheConfig
from vllm_omni.diffusion.compute.families.qwen_image.info import describe
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError


def test_the_demo_model() -> None:
    info = load_model_info("demo")
    assert (info.family, info.size_multiple, info.pixels_per_token, info.max_prompt_tokens) == (
        "qwen_image",
        16,
        16,
        1024,
    )
    assert info.attention_tokens == 6 * 3 * 64
    assert info.default_sampling_params["height"] == 64
    assert info.default_sampling_params["max_sequence_length"] == 512


def test_defaults_are_those_of_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("default_sampling*"))
    assert describe(folder).default_sampling_params == {
        "height": 1024,
        "width": 1024,
        "num_inference_steps": 50,
        "true_cfg_scale": 4.0,
        "max_sequence_length": 512,
    }
    (folder / "default_sampling_params.json").write_text('{"num_inference_steps": 8, "negative_prompt": "ugly"}')
    defaults = describe(folder).default_sampling_params
    assert (defaults["num_inference_steps"], defaults["negative_prompt"], defaults["width"]) == (8, "ugly", 1024)


@pytest.mark.parametrize("prompt", ["", "a red apple", "two {braces} and 12 %s", "日本語 🍎", "long " * 300])
def test_tokens_are_counted_as_diffusers_keeps_them(prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_PATH / "tokenizer")
    pipeline = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=tokenizer, transformer=None)
    text = pipeline.prompt_template_encode.format(prompt)
    wanted = len(tokenizer(text).input_ids) - pipeline.prompt_template_encode_start_idx
    assert load_model_info("demo").count_prompt_tokens(prompt) == wanted


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_layer3d_rope", True), ("use_additional_t_cond", True), ("guidance_embeds", True)],
)
def test_variants_that_need_more_are_refused(tiny_model: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=f"transformer/config.json has {key}={value}: not available yet"):
        describe(folder)


@pytest.mark.parametrize("changed", [{"stochastic_sampling": True}, {"_class_name": "UniPCMultistepScheduler"}])
def test_schedules_that_we_do_not_follow_are_refused(tiny_model: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ConfigError, match=r"scheduler_config\.json has .*: not available yet"):
        describe(folder)


def test_a_folder_without_a_config_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*vae/config\.json"):
        describe(folder)


def test_describing_imports_no_torch() -> None:
    code = (
        "import sys; from vllm_omni.diffusion.catalog.registry import load_model_info; load_model_info('demo');"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (
            {"tensor_parallel_size": 3},
            "--tensor-parallel-size takes 1, 2, 4 with this model's transformer, whose 4 attention heads cannot be "
            "divided by 3, got 3",
        ),
        ({"ulysses_degree": 5}, "--usp takes 1 to 4, the model's 4 heads over --tensor-parallel-size 1, got 5"),
        (
            {"ulysses_degree": 4, "tensor_parallel_size": 2},
            "--usp takes 1 to 2, the model's 4 heads over --tensor-parallel-size 2, got 4",
        ),
    ],
)
def test_degrees_that_the_heads_do_not_allow_are_refused(degrees: dict[str, int], message: str) -> None:
    info = load_model_info("demo")
    assert isinstance(info, PackedModelInfo)
    assert (info.num_heads, info.head_dim) == (4, 48)
    with pytest.raises(ConfigError) as caught:
        info.check_parallel(DiffusionParallelConfig(**degrees))
    assert str(caught.value) == message


def test_uneven_heads_are_allowed() -> None:
    load_model_info("demo").check_parallel(DiffusionParallelConfig(ulysses_degree=3, ring_degree=5))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"Fn_compute_blocks": 2}, "less than the model's 2 blocks together, got 2 and 0"),
        ({"Bn_compute_blocks": 1}, "less than the model's 2 blocks together, got 1 and 1"),
    ],
)
def test_a_cache_must_leave_something_to_skip(tiny_model: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CacheDiTConfig(**values).check_model(describe(tiny_model))


def test_a_polynomial_that_nobody_has_measured_must_be_given(tiny_model: Path) -> None:
    info = dataclasses.replace(describe(tiny_model), tea_cache_coefficients=None)
    TeaCacheConfig(coefficients=(1.0, 0.0)).check_model(info)
    with pytest.raises(ConfigError, match="vllm-omni calibrate-teacache"):
        TeaCacheConfig().check_model(info)
