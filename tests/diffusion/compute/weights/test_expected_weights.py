"""Weights that a config promises are those of the modules built from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLTextModel, Qwen3Config, Qwen3Model
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from vllm_omni.diffusion.catalog.expected_weights import ExpectedWeights
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.qwen_image import config as qwen_image
from vllm_omni.diffusion.compute.families.qwen_image import transformer as qwen_image_model
from vllm_omni.diffusion.compute.families.z_image import config as z_image
from vllm_omni.diffusion.compute.families.z_image import transformer as z_image_model
from vllm_omni.diffusion.compute.text.language_config import LanguageModelConfig
from vllm_omni.diffusion.compute.weights.loading import weight_targets


def flat(expected: ExpectedWeights) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all weights, with those of every layer."""
    shapes = dict(expected.shapes)
    for path, layers in expected.layers.items():
        shapes |= {f"{path}.{i}.{name}": shape for i in range(layers.count) for name, shape in layers.shapes.items()}
    return shapes


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


# Sizes of the published models, of which two layers show all weights.
CASES: list[tuple[Any, type[nn.Module], Any]] = [
    (qwen_image.QwenImageConfig(num_layers=2), qwen_image_model.QwenImageTransformer, qwen_image_model),
    (z_image.ZImageConfig(n_layers=2), z_image_model.ZImageTransformer, z_image_model),
]


@pytest.mark.parametrize(("config", "cls", "module"), CASES, ids=["qwen_image", "z_image"])
def test_expected_weights_of_transformers(config: Any, cls: type[nn.Module], module: Any) -> None:
    with torch.device("meta"):
        targets = weight_targets(cls(config, Group.alone()), module.CHECKPOINT_NAMES)
    expected = config.expected_weights()
    assert expected.is_complete
    assert flat(expected) == {name: target.whole_shape for name, target in targets.items()}


SIZES = LanguageModelConfig(
    vocab_size=1000,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)


def test_expected_weights_of_language_models() -> None:
    values = {name: getattr(SIZES, name) for name in SIZES.__dataclass_fields__}
    with torch.device("meta"):
        qwen3 = shapes_of(Qwen3Model(Qwen3Config(**values)))
        qwen2 = shapes_of(Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**{**values, "head_dim": 16})))
    for shapes in (qwen3, qwen2):
        del shapes["norm.weight"]  # not read of all
    assert flat(SIZES.expected_weights(has_biases=False, has_head_norms=True)) == qwen3
    without_head_dim = replace(SIZES, head_dim=None)
    assert flat(without_head_dim.expected_weights(has_biases=True, has_head_norms=False)) == qwen2


def test_expected_weights_of_the_vision_tower() -> None:
    values = {"depth": 2, "hidden_size": 96, "intermediate_size": 160, "num_heads": 6, "out_hidden_size": 64}
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**values))
    assert flat(qwen_image.QwenImageVisionConfig.from_dict({"vision_config": values}).expected_weights()) == shapes_of(
        tower
    )
