"""Adapters that a model folder brings itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_omni.diffusion.catalog.model_adapters import with_model_adapters
from vllm_omni.diffusion.catalog.packed_info import PackedModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError

RECIPE = {"num_inference_steps": 4, "true_cfg_scale": 1.0}


@pytest.fixture
def info(tmp_path: Path) -> PackedModelInfo:
    demo = load_model_info("demo")
    assert isinstance(demo, PackedModelInfo)
    (tmp_path / "adapters").mkdir()
    for name in ("ink", "fast"):
        (tmp_path / f"adapters/{name}.safetensors").touch()
    return replace(demo, path=tmp_path)


def write(info: PackedModelInfo, content: Any) -> None:
    (info.path / "adapters.json").write_text(json.dumps(content))


def test_a_folder_brings_adapters_with_their_recipes(info: PackedModelInfo) -> None:
    config = OmniDiffusionConfig(model="demo")
    assert with_model_adapters(config, info) == config
    write(
        info,
        {
            "ink": {"path": "adapters/ink.safetensors"},
            "fast": {"path": "adapters/fast.safetensors", "defaults": RECIPE},
        },
    )
    served = with_model_adapters(config, info)
    folder = info.path.resolve() / "adapters"
    assert served.lora_modules == {name: str(folder / f"{name}.safetensors") for name in ("ink", "fast")}
    assert served.lora_defaults == {"fast": RECIPE}
    assert with_model_adapters(served, info) == served


def test_an_adapter_of_the_caller_replaces_one_of_its_name(info: PackedModelInfo) -> None:
    write(info, {"fast": {"path": "adapters/fast.safetensors", "defaults": RECIPE}})
    own = OmniDiffusionConfig(model="demo", lora_modules={"fast": "/mine"})
    assert with_model_adapters(own, info) == own


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it must hold a JSON object"),
        ({"ink": "adapters/ink.safetensors"}, "adapters.json takes {NAME: "),
        ({"ink": {}}, "adapters.json takes {NAME: "),
        ({"ink": {"path": 1}}, "adapters.json takes {NAME: "),
        ({"ink": {"path": "adapters/ink.safetensors", "scale": 1}}, "adapters.json takes {NAME: "),
        ({"ink": {"path": "adapters/ink.safetensors", "defaults": []}}, "adapters.json takes {NAME: "),
        ({" ink": {"path": "adapters/ink.safetensors"}}, "adapters.json takes a name without spaces around it"),
        ({"ink": {"path": "adapters/none"}}, "ink: the model folder has no file adapters/none"),
        ({"ink": {"path": "adapters"}}, "cannot read adapters: it is a folder"),
        ({"ink": {"path": "../ink"}}, "outside of the model's folder"),
        ({"ink": {"path": "/etc/hostname"}}, "outside of the model's folder"),
        ({"ink": {"path": "adapters/ink.safetensors", "defaults": {"steps": 4}}}, "'ink': unknown keys ['steps']"),
    ],
)
def test_a_wrong_file_is_refused(info: PackedModelInfo, content: Any, message: str) -> None:
    write(info, content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        with_model_adapters(OmniDiffusionConfig(model="demo"), info)
