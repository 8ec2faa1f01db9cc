"""The text encoder against transformers' whole model, alone and shared by ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from testbed.tiny_z_image import build_tiny_z_image
from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.families.z_image.info import ChatTokenizer
from vllm_omni.diffusion.compute.families.z_image.text import ZImageTextEncoder
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.diffusion.data import DiffusionParallelConfig

CPU = torch.device("cpu")
PROMPTS = ("a red apple", "", "日本語 and a blue car, " * 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 8 heads and 4 key-value heads in its text encoder."""
    path = tmp_path_factory.mktemp("models") / "shareable"
    return build_tiny_z_image(path, text_dim=128, text_heads=8, text_kv_heads=4)


def wanted(path: Path, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    pipeline = ZImagePipeline.from_pretrained(path, dtype=dtype)
    with torch.inference_mode():
        return [pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0][0] for prompt in PROMPTS]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_alone_it_gives_the_states_of_diffusers(model: Path, dtype: torch.dtype, tolerance: float) -> None:
    read: list[int] = []
    encoder = ZImageTextEncoder(model, WeightReader(CPU, dtype, read.append), Group.alone())
    count = ChatTokenizer(model / "tokenizer")
    for prompt, states in zip(PROMPTS, wanted(model, dtype), strict=True):
        assert encoder(prompt).dtype == dtype
        assert len(states) == count(prompt)
        torch.testing.assert_close(encoder(prompt), states, atol=tolerance, rtol=0)
    stored = load_file(model / "text_encoder" / "model.safetensors")
    last = {name for name in stored if name.startswith("layers.2.") or name == "norm.weight"}
    assert len(last) == 12
    assert sum(read) == sum(tensor.nbytes for name, tensor in stored.items() if name not in last)


def encode(world: World, path: Path) -> list[np.ndarray]:
    encoder = ZImageTextEncoder(path, WeightReader(CPU, torch.float32), world.mesh.text_encoder)
    return [encoder(prompt).numpy() for prompt in PROMPTS]


def test_ranks_that_share_it_give_the_same_states(model: Path) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=4, text_encoder_tp_size=4)
    for states in run_ranks(encode, parallel, model):
        for ours, expected in zip(states, wanted(model), strict=True):
            assert np.abs(ours - expected.numpy()).max() <= 1e-5


def test_checkpoints_of_the_whole_causal_model_are_read_too(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(weights | {"lm_head.weight": torch.zeros(3, 128)}, file, metadata={"format": "pt"})
    encoder, same = (
        ZImageTextEncoder(path, WeightReader(CPU, torch.float32), Group.alone()) for path in (folder, model)
    )
    assert torch.equal(encoder("a red apple"), same("a red apple"))
