"""Adapters of the demo models, each given to the other one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.tiny_adapters import save_peft
from vllm_omni.diffusion.catalog.find_folder import EMBEDDED_MODELS
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageConfig
from vllm_omni.diffusion.compute.families.qwen_image.transformer import QwenImageTransformer
from vllm_omni.diffusion.compute.families.wan.config import WanConfig
from vllm_omni.diffusion.compute.families.wan.transformer import WanTransformer
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer
from vllm_omni.diffusion.compute.weights.adapter_file import AdapterFileError
from vllm_omni.diffusion.compute.weights.adapter_layers import AdapterReader, layer_targets
from vllm_omni.inputs.adapter_files import AdapterPaths

CPU = torch.device("cpu")
CLASSES: dict[str, tuple[type[PackedTransformer], Any]] = {
    "demo": (QwenImageTransformer, QwenImageConfig),
    "demo-video": (WanTransformer, WanConfig),
}


def transformer_of(name: str) -> PackedTransformer:
    """Transformer of a demo model, without its weights."""
    cls, config = CLASSES[name]
    values = json.loads((EMBEDDED_MODELS[name] / "transformer/config.json").read_text())
    build: Any = cls
    with torch.device("meta"):
        built: PackedTransformer = build(config.from_dict(values), Group((0,), 0, Counter()))
    return built


def read(name: str, file: Path) -> None:
    AdapterReader([transformer_of(name)], None, torch.float32, CPU).read(AdapterPaths.at(file))


@pytest.mark.parametrize("adapter", ["night", "lighthouse", "fast"])
def test_those_of_pictures_are_refused_by_videos(adapter: str) -> None:
    file = EMBEDDED_MODELS["demo"] / "adapters" / adapter / "pytorch_lora_weights.safetensors"
    read("demo", file)
    with pytest.raises(AdapterFileError, match=r"it has \S+_blocks\.0\..*, the model transformer\.blocks\.0"):
        read("demo-video", file)


def test_those_of_videos_are_refused_by_pictures(tmp_path: Path) -> None:
    targets = layer_targets([transformer_of("demo-video")])
    pairs = {name: (torch.ones(1, its.inputs), torch.ones(its.outputs, 1)) for name, its in targets.items()}
    file = save_peft(pairs, tmp_path / "a.safetensors", prefix="")
    read("demo-video", file)
    with pytest.raises(AdapterFileError, match=r"^the model has none of its layers inside .* both have \S*proj_out$"):
        read("demo", file)
