"""Weights reach their parameters; a folder that does not fit is refused with the name of the weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer

from tests.broken_folders import Breakage, values, weights
from vllm_omni.diffusion.catalog.weight_files import safetensors_files
from vllm_omni.diffusion.compute.layers.norms import AffineNorm
from vllm_omni.diffusion.compute.text.tokenizers import load_tokenizer
from vllm_omni.diffusion.compute.weights.loading import load_autoencoder, load_weights
from vllm_omni.errors import ConfigError

CPU = torch.device("cpu")
VAE = "vae/diffusion_pytorch_model.safetensors"
NAMES = {"both": ("left", "right")}


def build() -> nn.Module:
    with torch.device("meta"):
        inner = nn.ModuleDict({"both": nn.Linear(3, 4), "plain": nn.Linear(4, 2, bias=False)})
        return nn.ModuleDict({"blocks": nn.ModuleList([inner])})


def tensors() -> dict[str, torch.Tensor]:
    shapes = {
        "left.weight": (2, 3),
        "left.bias": (2,),
        "right.weight": (2, 3),
        "right.bias": (2,),
        "plain.weight": (2, 4),
    }
    return {f"blocks.0.{name}": torch.randn(shape) for name, shape in shapes.items()}


def test_a_weight_is_read_from_several_files(tmp_path: Path) -> None:
    weights = tensors()
    shards = {"a.safetensors": ["blocks.0.right.bias", "blocks.0.left.weight"]}
    shards["b.safetensors"] = [name for name in weights if name not in shards["a.safetensors"]]
    # The last shard counts, as in diffusers and transformers, and entries of weights that no shard holds do not.
    surplus = {"a.safetensors": {"blocks.0.plain.weight": torch.zeros(3)}}
    for file, names in shards.items():
        save_file({name: weights[name] for name in names} | surplus.get(file, {}), tmp_path / file)
    weight_map = {name: file for file, names in shards.items() for name in names} | {"gone": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    counted: list[int] = []

    module = build()
    load_weights(module, tmp_path, NAMES, CPU, torch.float64, counted.append)

    got = dict(module.named_parameters())
    both = torch.cat([weights["blocks.0.left.weight"], weights["blocks.0.right.weight"]])
    assert torch.equal(got["blocks.0.both.weight"], both.double())
    bias = torch.cat([weights["blocks.0.left.bias"], weights["blocks.0.right.bias"]])
    assert torch.equal(got["blocks.0.both.bias"], bias.double())
    assert torch.equal(got["blocks.0.plain.weight"], weights["blocks.0.plain.weight"].double())
    assert sum(counted) == sum(t.nbytes for t in weights.values())
    assert not any(p.requires_grad for p in module.parameters())


def refusal(folder: Path, weights: dict[str, torch.Tensor]) -> str:
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        load_weights(build(), folder, NAMES, CPU, torch.float32)
    return str(caught.value)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weights = tensors()
    missing = {name: t for name, t in weights.items() if "left" not in name}
    assert "lacks 2 weights of the model, among them blocks.0.left.weight" in refusal(tmp_path, missing)
    assert "does not take: surplus" in refusal(tmp_path, weights | {"surplus": torch.zeros(1)})
    wrong = weights | {"blocks.0.plain.weight": torch.zeros(4, 2)}
    assert "blocks.0.plain.weight has shape (4, 2), expected (2, 4)" in refusal(tmp_path, wrong)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"no \.safetensors file"):
        safetensors_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ConfigError, match=r"lacks gone\.safetensors"):
        safetensors_files(tmp_path)


def test_parameters_that_keep_float32_are_not_rounded(tmp_path: Path) -> None:
    weights = {"norm.weight": torch.rand(4), "norm.bias": torch.rand(4), "plain.weight": torch.rand(2, 4)}
    save_file(weights, tmp_path / "model.safetensors")
    with torch.device("meta"):
        module = nn.ModuleDict({"norm": AffineNorm(4), "plain": nn.Linear(4, 2, bias=False)})
    load_weights(module, tmp_path, {}, CPU, torch.bfloat16)
    loaded = dict(module.named_parameters())
    for name in ("norm.weight", "norm.bias"):
        torch.testing.assert_close(loaded[name].data, weights[name], rtol=0, atol=0)
    torch.testing.assert_close(loaded["plain.weight"].data, weights["plain.weight"].bfloat16(), rtol=0, atol=0)


def test_weights_outside_the_prefix_are_not_read(tmp_path: Path) -> None:
    weights = tensors()
    surroundings = {"head.weight": torch.zeros(5), "models.x": torch.zeros(5)}
    save_file({f"model.{name}": t for name, t in weights.items()} | surroundings, tmp_path / "model.safetensors")
    counted: list[int] = []
    module = build()
    load_weights(module, tmp_path, NAMES, CPU, torch.float32, counted.append, prefix="model.")
    assert torch.equal(dict(module.named_parameters())["blocks.0.plain.weight"], weights["blocks.0.plain.weight"])
    assert sum(counted) == sum(t.nbytes for t in weights.values())


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (
            weights(VAE, lambda w: w.pop("decoder.conv_out.bias")),
            "vae/ lacks 1 weights of the model, among them decoder.",
        ),
        (
            weights(VAE, lambda w: w.update(surplus=np.zeros(1, np.float32))),
            "vae/ has a weight that the model does not",
        ),
        (
            weights(VAE, lambda w: w.update({"decoder.conv_out.bias": np.zeros(9, np.float32)})),
            f"{VAE}: decoder.conv_out.bias has shape (9,), by config.json it is (3,)",
        ),
        (values("vae/config.json", dim_mult=[1, 4, 2, 4]), f"{VAE}: "),
        (values("vae/config.json", attn_scales=5), "vae/: diffusers cannot load the AutoencoderKLQwenImage: "),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(
    breakage: Breakage, words: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    breakage(folder)
    with pytest.raises(ConfigError) as caught:
        load_autoencoder(AutoencoderKLQwenImage, folder / "vae", CPU, torch.float32, lambda count: None, "auto")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_of_a_library_becomes_one_line_with_its_class(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Mock(side_effect=TypeError("first\n  second"))
    monkeypatch.setattr(AutoencoderKLQwenImage, "from_pretrained", failing)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", failing)
    with pytest.raises(ConfigError, match=r"the AutoencoderKLQwenImage: TypeError: first second$"):
        load_autoencoder(AutoencoderKLQwenImage, tiny_model / "vae", CPU, torch.float32, lambda count: None, "auto")
    with pytest.raises(ConfigError, match=r"the tokenizer: TypeError: first second$"):
        load_tokenizer(tiny_model / "tokenizer")
