"""Polynomials of TeaCache in model folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.catalog.tea_cache_file import read_tea_cache_coefficients
from vllm_omni.diffusion.compute.cache.tea_cache import TeaCacheConfig
from vllm_omni.errors import ConfigError


def packed_info(model: str | Path) -> PackedModelInfo:
    info = load_model_info(str(model))
    assert isinstance(info, PackedModelInfo)
    return info


def test_a_folder_comes_before_its_family(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    of_family = packed_info(folder).tea_cache_coefficients
    assert of_family is not None
    (folder / "teacache.json").write_text(json.dumps({"coefficients": [1, 0.5], "num_prompts": 8}))
    assert packed_info(folder).tea_cache_coefficients == (1.0, 0.5) != of_family
    assert read_tea_cache_coefficients(tmp_path, (2.0,)) == (2.0,)
    assert read_tea_cache_coefficients(tmp_path) is None


def test_the_embedded_video_model_brings_its_own() -> None:
    TeaCacheConfig().check_model(packed_info("demo-video"))


@pytest.mark.parametrize("value", ["null", "[]", "1.0", '["1"]', "[1.0, NaN]", "[true]"])
def test_other_values_are_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "teacache.json").write_text(f'{{"coefficients": {value}}}')
    with pytest.raises(ConfigError, match=r"^teacache\.json: coefficients takes a list of finite numbers, got "):
        read_tea_cache_coefficients(tmp_path)


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "teacache.json").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"teacache\.json"):
        read_tea_cache_coefficients(tmp_path)
