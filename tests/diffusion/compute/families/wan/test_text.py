"""Text states against those of diffusers' pipeline, on one rank and two; checkpoints with other names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from tests.diffusion.compute.distributed.ranks import run_ranks
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.distributed.mesh import World
from vllm_omni.diffusion.compute.families.wan.prompts import WanTokenizer, clean_prompt
from vllm_omni.diffusion.compute.families.wan.text import WanTextEncoder
from vllm_omni.diffusion.compute.weights.reader import WeightReader
from vllm_omni.diffusion.data import DiffusionParallelConfig
from vllm_omni.errors import ConfigError

CPU = torch.device("cpu")
PROMPTS = [
    ("a red apple on a wooden table, in the style of an old master", 512),
    ("", 64),
    ("  a &amp;lt;b&amp;gt;\tred\n\n apple &quot;and&quot; a caf\u00c3\u00a9  ", 64),  # encoded twice
    ("a red apple and a blue car " * 9, 16),
]


def encoder_of(path: Path, group: Group | None = None) -> WanTextEncoder:
    return WanTextEncoder(path, WeightReader(CPU, torch.float32), group or Group.alone())


@pytest.fixture(scope="module")
def wanted(wan_model: Callable[[str], Path]) -> list[torch.Tensor]:
    path = wan_model("t2v-2.1")
    text_encoder = UMT5EncoderModel.from_pretrained(path / "text_encoder", dtype=torch.float32)
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(path / "tokenizer"),
        text_encoder=text_encoder,
        vae=None,
        scheduler=None,
    )
    with torch.inference_mode():
        return [
            pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=n)[0][0]
            for prompt, n in PROMPTS
        ]


def assert_wanted(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for (_, length), states, want in zip(PROMPTS, got, wanted, strict=True):
        assert states.shape[0] <= length
        assert want.abs().max() > 0.5
        torch.testing.assert_close(states, want[: len(states)], atol=1e-5, rtol=1e-5)
        assert not want[len(states) :].any(), "the rest is padding"


@torch.inference_mode()
def test_states_without_padding_are_those_of_diffusers(
    wan_model: Callable[[str], Path], wanted: list[torch.Tensor]
) -> None:
    encoder = encoder_of(wan_model("t2v-2.1"))
    assert_wanted([encoder(*prompt) for prompt in PROMPTS], wanted)


@torch.inference_mode()
def states_on_rank(world: World, path: Path) -> list[np.ndarray]:
    encoder = encoder_of(path, world.mesh.text_encoder)
    return [encoder(*prompt).numpy() for prompt in PROMPTS]


def test_two_ranks_share_the_encoder(wan_model: Callable[[str], Path], wanted: list[torch.Tensor]) -> None:
    parallel = DiffusionParallelConfig(ulysses_degree=2, text_encoder_tp_size=2)
    for states in run_ranks(states_on_rank, parallel, wan_model("t2v-2.1")):
        assert_wanted([torch.from_numpy(x) for x in states], wanted)


@pytest.mark.parametrize("names", [("encoder.embed_tokens",), ("encoder.embed_tokens", "shared")])
@torch.inference_mode()
def test_the_embedding_is_read_under_either_name(
    wan_model: Callable[[str], Path], tmp_path: Path, wanted: list[torch.Tensor], names: tuple[str, ...]
) -> None:
    path = shutil.copytree(wan_model("t2v-2.1"), tmp_path / "model")
    file = path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    embedding = weights.pop("shared.weight")
    save_file(weights | {f"{name}.weight": embedding.clone() for name in names}, file, {"format": "pt"})
    encoder = encoder_of(path)
    assert_wanted([encoder(*prompt) for prompt in PROMPTS], wanted)


def test_a_checkpoint_without_an_embedding_is_refused(wan_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = shutil.copytree(wan_model("t2v-2.1"), tmp_path / "model")
    file = path / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    del weights["shared.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"text_encoder/ lacks 1 weights of the model, among them shared\.weight"):
        encoder_of(path)


def test_loading_counts_bytes_and_takes_random_weights(wan_model: Callable[[str], Path]) -> None:
    counted: list[int] = []
    path = wan_model("t2v-2.1")
    encoder = WanTextEncoder(
        path, WeightReader(CPU, torch.bfloat16, counted.append, load_format="dummy"), Group.alone()
    )
    with torch.inference_mode():
        states = encoder("a red apple", 8)
    assert sum(counted) > 0
    assert states.dtype == torch.bfloat16
    assert states.isfinite().all()


def test_prompts_are_counted_as_the_encoder_reads_them(wan_model: Callable[[str], Path]) -> None:
    tokenizer = WanTokenizer(wan_model("t2v-2.1") / "tokenizer")
    assert clean_prompt(PROMPTS[2][0]) == 'a <b> red apple "and" a café'
    assert [tokenizer(prompt) for prompt in ("", "a red apple", " a\nred \tapple ")] == [1, 4, 4]
    long = PROMPTS[3][0]
    assert len(tokenizer.ids(long, 16)) == 16 < tokenizer(long)
    assert tokenizer.ids(long, 16)[-1] == tokenizer.ids("", 16)[0]
