"""The text encoder against transformers' own, alone and shared by ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from testbed.tiny_models import build_tiny_qwen_image
from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.families.qwen_image.info import NUM_TEMPLATE_TOKENS, PROMPT_TEMPLATE, describe
from vllm_omni.diffusion.compute.families.qwen_image.text import QwenImageTextEncoder
from vllm_omni.diffusion.compute.text.language_config import LanguageModelConfig
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError

CPU = torch.device("cpu")
PROMPTS = ("a red apple", "", "日本語 and a blue car, " * 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With 8 heads and 4 key-value heads in its text encoder."""
    path = tmp_path_factory.mktemp("models") / "shareable"
    return build_tiny_qwen_image(path, text_dim=128, text_heads=8, text_kv_heads=4)


def wanted(path: Path, dtype: torch.dtype) -> list[Tensor]:
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(path / "text_encoder", dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    states = []
    for prompt in PROMPTS:
        ids = tokenizer(PROMPT_TEMPLATE.format(prompt), return_tensors="pt").input_ids
        with torch.inference_mode():
            out = whole(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        states.append(out.hidden_states[-1][0, NUM_TEMPLATE_TOKENS:])
    return states


def language_model_bytes(path: Path) -> dict[str, int]:
    with safe_open(path / "text_encoder" / "model.safetensors", framework="pt") as weights:
        return {name: weights.get_tensor(name).nbytes for name in weights.keys() if name.startswith("model.")}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_it_gives_the_states_of_transformers_exactly(model: Path, dtype: torch.dtype) -> None:
    read: list[int] = []
    encoder = QwenImageTextEncoder(model, WeightReader(CPU, dtype, read.append), Group.alone())
    for prompt, states in zip(PROMPTS, wanted(model, dtype), strict=True):
        assert torch.equal(encoder(prompt), states)
        assert states.dtype == dtype
    assert sum(read) == sum(language_model_bytes(model).values())


def encode(world: World, path: Path) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """The states before and after the last rank broke all connections while the others encoded; the bytes read."""
    read: list[int] = []
    encoder = QwenImageTextEncoder(path, WeightReader(CPU, torch.float32, read.append), world.mesh.text_encoder)
    before = [encoder(prompt).numpy() for prompt in PROMPTS]
    group = world.mesh.text_encoder
    if world.rank == world.size - 1:
        world.leave()
    elif world.size - 1 in group.ranks:
        with pytest.raises(RuntimeError):
            encoder(PROMPTS[0])
    world.rebuild()
    return before, [encoder(prompt).numpy() for prompt in PROMPTS], sum(read)


@pytest.mark.parametrize(("size", "num_groups"), [(2, 2), (4, 1)])
def test_ranks_that_share_it_give_the_same_states_also_over_new_process_groups(
    model: Path, size: int, num_groups: int
) -> None:
    whole, bytes_of = wanted(model, torch.float32), language_model_bytes(model)
    shared = sum(n for name, n in bytes_of.items() if "norm" not in name)
    parallel = DiffusionParallelConfig(ulysses_degree=size * num_groups, text_encoder_tp_size=size)
    for before, after, read in run_ranks(encode, parallel, model):
        for states, again, expected in zip(before, after, whole, strict=True):
            assert (torch.from_numpy(states) - expected).abs().max() <= 1e-5
            assert (again == states).all()
        assert read == sum(bytes_of.values()) - shared + shared // size


def test_checkpoints_that_name_the_language_model_are_read_too(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    weights = {
        name.replace("model.", "model.language_model.").replace("visual.", "model.visual."): tensor
        for name, tensor in load_file(file).items()
    }
    assert "model.visual.patch_embed.proj.weight" in weights
    save_file(weights, file, metadata={"format": "pt"})
    encoder, same = (
        QwenImageTextEncoder(path, WeightReader(CPU, torch.float32), Group.alone()) for path in (folder, model)
    )
    assert torch.equal(encoder("a red apple"), same("a red apple"))


def test_sizes_are_those_that_divide_heads_and_features() -> None:
    real = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
    }
    assert LanguageModelConfig.from_dict(real).shares.sizes == (1, 2, 4)
    narrow = {"text_config": real | {"intermediate_size": 6}, **real}
    assert LanguageModelConfig.from_dict(narrow).shares.sizes == (1, 2)


def test_what_ranks_cannot_share_is_refused_by_flag(model: Path) -> None:
    info = describe(model)
    parallel = {"ulysses_degree": 2, "cfg_parallel_size": 4}
    info.check_parallel(DiffusionParallelConfig(text_encoder_tp_size=4, **parallel))
    message = "takes 1, 2, 4 with this model's text encoder, whose 4 key and value heads cannot be divided by 8, got 8"
    with pytest.raises(ConfigError, match=message):
        info.check_parallel(DiffusionParallelConfig(text_encoder_tp_size=8, **parallel))
    with pytest.raises(ConfigError, match=r"does not say its sizes: .* 'num_key_value_heads'"):
        LanguageModelConfig.from_dict({"num_attention_heads": 8})
