"""Flags of LoRA adapters: their forms, their defaults, and what they need."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from tests.entrypoints.cli.test_args import parse
from vllm_omni.entrypoints.cli import adapter_flags
from vllm_omni.errors import ConfigError

RECIPE = {"num_inference_steps": 8, "true_cfg_scale": 1.0, "sigmas": [1.0, 0.5]}


def test_adapters_are_given_in_each_of_vllms_ways(tmp_path: Path) -> None:
    fast = {"name": "fast", "path": "/fast", "defaults": RECIPE, "base_model_name": "demo", "is_3d_lora_weight": False}
    several = json.dumps([{"name": "ink", "path": "/ink"}, fast])
    words = ["--lora-modules", "style=/a=b", several, "--lora-modules", '{"name": "oil", "path": "/oil"}']
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"lora-modules": ["style=/a=b", several, '{"name": "oil", "path": "/oil"}']}))
    for config in (parse(*words).config, parse("--config", str(file)).config):
        assert config.lora_modules == {"style": "/a=b", "ink": "/ink", "fast": "/fast", "oil": "/oil"}
        assert config.lora_defaults == {"fast": {**RECIPE, "sigmas": (1.0, 0.5)}}


@pytest.mark.parametrize(
    "value",
    [
        *(
            "style",
            "=/a",
            "style=",
            "{}",
            '{"name": "a", "path": 3}',
            '{"name": "a"',
            "[3]",
            "[",
            "sty\nle=/a",
            " a=/a",
        ),
        *(f"{'a' * 129}=/a", '{"name": "a", "path": "/a", "other": 1}', '{"name": "a", "path": "/a", "defaults": 3}'),
        '{"name": "a", "path": "/a", "is_3d_lora_weight": true}',
    ],
)
def test_a_wrong_adapter_is_told(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^--lora-modules takes .*, got '") as caught:
        parse("--lora-modules", value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("defaults", "words"),
    [
        ('{"steps": 8}', r"--lora-modules: defaults of the LoRA adapter 'a': unknown keys \['steps'\], accepted are "),
        ('{"num_inference_steps": "8"}', r".*'a': num_inference_steps takes an integer, got '8'"),
        ('{"lora_scale": 1.0}', r".*'a': unknown keys \['lora_scale'\]"),
        ('{"seed": 1, "seed": 2}', "--lora-modules takes each key once, got 'seed' twice"),
    ],
)
def test_wrong_defaults_of_an_adapter_are_told(defaults: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        parse("--lora-modules", f'{{"name": "a", "path": "/a", "defaults": {defaults}}}')


def test_adapters_have_names_of_their_own() -> None:
    for words in (["--lora-modules", "a=/a", "a=/b"], ["--served-model-name", "a", "--lora-modules", "a=/a"]):
        with pytest.raises(ConfigError, match=r"^--lora-modules takes a name once, and none of the model's, got 'a'"):
            parse(*words)
    other = '{"name": "a", "path": "/a", "base_model_name": "other"}'
    with pytest.raises(ConfigError, match=r"^--lora-modules a: base_model_name takes .* \(tiny, demo\), got 'other'"):
        parse("--served-model-name", "tiny", "demo", "--lora-modules", other)


def test_loading_over_http_needs_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse("--lora-dir", "/a", "/b", "--lora-dir", "/c", "--max-loras", "2", "--max-cpu-loras", "4").config
    assert (config.lora_dirs, config.max_loras, config.max_cpu_loras) == (("/a", "/b", "/c"), 2, 4)
    assert not config.enable_lora_loading
    assert parse("--lora-dir", "/a", "--enable-lora-loading").config.enable_lora_loading
    with pytest.raises(ConfigError, match=r"^--enable-lora-loading needs --lora-dir"):
        parse("--enable-lora-loading")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    assert parse("--lora-dir", "/a").config.enable_lora_loading
    assert not parse("--lora-dir", "/a", "--no-enable-lora-loading").config.enable_lora_loading
    with patch.object(adapter_flags.logger, "warning") as warned:
        assert not parse().config.enable_lora_loading
    warned.assert_called_once()
