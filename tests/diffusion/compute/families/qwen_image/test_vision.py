"""The editing text encoder against transformers' whole model, alone and shared by ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from testbed.tiny_edit_models import EDIT, PLUS, build, build_processor
from testbed.tiny_models import photo
from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.families.qwen_image.edit import EDIT_TEMPLATE, NUM_EDIT_TEMPLATE_TOKENS, EditInput
from vllm_omni.diffusion.compute.families.qwen_image.vision import QwenImageEditEncoder
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.inputs.images import InputImage, prepare_image

CPU = torch.device("cpu")
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module", params=[EDIT, PLUS])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "edit"
    return build(path, request.param, text_dim=64, text_heads=4, text_kv_heads=2)


def edit_of(path: Path) -> EditInput:
    edit = load_model_info(str(path)).image_input
    assert isinstance(edit, EditInput)
    return edit


def inputs_of(path: Path) -> list[tuple[str, str, tuple[InputImage, ...]]]:
    """Prompts with the text that diffusers makes of each, and pictures of many proportions."""
    edit = edit_of(path)
    wide, square, tall = (
        prepare_image(photo(*size, seed), edit.sizes) for seed, size in enumerate([(90, 40), (64, 64), (8, 300)])
    )
    if not edit.is_plus:
        return [(prompt, PICTURE + prompt, (image,)) for prompt, image in (("a red apple", wide), ("", tall))]
    return [
        ("a red apple", f"Picture 1: {PICTURE}a red apple", (wide,)),
        ("日本語 {}", f"Picture 1: {PICTURE}Picture 2: {PICTURE}Picture 3: {PICTURE}日本語 {{}}", (tall, wide, square)),
    ]


@torch.inference_mode()
def wanted(path: Path) -> list[Tensor]:
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(path / "text_encoder", dtype=torch.float32).eval()
    images = Qwen2VLImageProcessorPil.from_pretrained(path / "processor")
    processor = build_processor(images, AutoTokenizer.from_pretrained(path / "tokenizer"))
    states = []
    for _, text, pictures in inputs_of(path):
        conditions = [image.condition for image in pictures]
        inputs = processor(text=[EDIT_TEMPLATE.format(text)], images=conditions, padding=True, return_tensors="pt")
        output = whole(**inputs, output_hidden_states=True)
        states.append(output.hidden_states[-1][0, NUM_EDIT_TEMPLATE_TOKENS:])
    return states


def encode(world: World, path: Path) -> list[np.ndarray]:
    encoder = QwenImageEditEncoder(path, edit_of(path), WeightReader(CPU, torch.float32), world.mesh.text_encoder)
    return [encoder(prompt, images).numpy() for prompt, _, images in inputs_of(path)]


def test_states_are_those_of_transformers(model: Path) -> None:
    encoder = QwenImageEditEncoder(model, edit_of(model), WeightReader(CPU, torch.float32), Group.alone())
    info = load_model_info(str(model))
    for (prompt, _, images), states in zip(inputs_of(model), wanted(model), strict=True):
        torch.testing.assert_close(encoder(prompt, images), states, atol=1e-5, rtol=1e-5)
        assert info.count_prompt_tokens(prompt) + info.count_image_prompt_tokens(images) == len(states)


def test_ranks_that_share_it_give_the_same_states(model: Path) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=2, text_encoder_tp_size=2)
    for states in run_ranks(encode, parallel, model):
        for got, expected in zip(states, wanted(model), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_that_spells_the_picture_token_is_a_prompt(model: Path) -> None:
    edit = edit_of(model)
    encoder = QwenImageEditEncoder(model, edit, WeightReader(CPU, torch.float32), Group.alone())
    image = prepare_image(photo(40, 30, 1), edit.sizes)
    prompt = "an apple <|image_pad|><|image_pad|> <|vision_start|>"
    info = load_model_info(str(model))
    num_tokens = info.count_prompt_tokens(prompt) + info.count_image_prompt_tokens([image])
    assert len(encoder(prompt, (image,))) == num_tokens


def test_another_picture_of_the_same_pixels_is_not_looked_at_again(model: Path) -> None:
    edit = edit_of(model)
    encoder = QwenImageEditEncoder(model, edit, WeightReader(CPU, torch.float32), Group.alone())
    first, same, other = (prepare_image(photo(40, 30, seed), edit.sizes) for seed in (1, 1, 2))
    assert first == same != other
    states = [encoder("x", (image,)) for image in (first, same, other)]
    assert len(encoder.features) == 2
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
