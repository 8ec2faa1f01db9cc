"""Adapters of a model folder whose recipes a server's flags forbid."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from testbed.fakes import FakeExecutor
from vllm_omni import AsyncOmni
from vllm_omni.diffusion.catalog.model_info import ModelInfo
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.control.default_checks import with_fitting_adapters
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.errors import ConfigError

FEW: dict[str, Any] = {"max_inference_steps": 3, "default_sampling_params": {"num_inference_steps": 3}}
LEFT_OUT = (
    "the model's own adapters.json: defaults of the LoRA adapter 'fast': num_inference_steps takes 1 to 3 "
    "(--max-inference-steps), got 4: the adapter is not served"
)


def bringing(folder: Path, **recipe: Any) -> ModelInfo:
    """The demo model with one adapter, `ink`, and its recipe."""
    (folder / "ink.safetensors").touch()
    (folder / "adapters.json").write_text(json.dumps({"ink": {"path": "ink.safetensors", "defaults": recipe}}))
    return replace(load_model_info("demo"), path=folder)


def test_a_recipe_beyond_a_limit_leaves_its_adapter_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with patch("vllm_omni.omni.make_executor", return_value=FakeExecutor()):
        omni = AsyncOmni("demo", **FEW)
    assert omni.adapters.names() == ("night", "lighthouse")
    assert omni.config.lora_defaults == {}
    assert [record.getMessage() for record in caplog.records] == [LEFT_OUT]


def test_the_same_recipe_of_the_operator_ends_the_start(tmp_path: Path) -> None:
    (file := tmp_path / "ink.safetensors").touch()
    own = FEW | {"lora_modules": {"fast": file}, "lora_defaults": {"fast": {"num_inference_steps": 4}}}
    with pytest.raises(ConfigError, match=r"^--lora-modules: defaults of the LoRA adapter 'fast': num_inference_steps"):
        AsyncOmni("demo", **own)
    with pytest.raises(ConfigError, match="there is no LoRA adapter 'fast'; served: night, lighthouse"):
        AsyncOmni(
            "demo", **FEW | {"default_sampling_params": {"num_inference_steps": 3, "lora_request": {"name": "fast"}}}
        )


@pytest.mark.parametrize(
    ("recipe", "settings", "words"),
    [
        ({"height": 128, "width": 128}, {"max_pixels": 96 * 96}, "--max-pixels"),
        ({"cache": True}, {}, "--cache-backend"),
    ],
)
def test_other_flags_leave_adapters_out(
    tmp_path: Path, recipe: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    config = OmniDiffusionConfig("demo", **settings)
    served, lines = with_fitting_adapters(config, bringing(tmp_path, **recipe))
    assert served == config
    (line,) = lines
    assert line.startswith("the model's own adapters.json: defaults of the LoRA adapter 'ink': ")
    assert words in line


def test_values_that_no_server_takes_are_an_error_of_the_folder(tmp_path: Path) -> None:
    info = bringing(tmp_path, num_inference_steps=4, true_cfg_scale=-1.0)
    with pytest.raises(
        ConfigError, match=re.escape("the model's own adapters.json: defaults of the LoRA adapter 'ink'")
    ):
        with_fitting_adapters(OmniDiffusionConfig("demo"), info)
