"""Single files of transformers: every naming gives the folder's weights; float8 values stay as they are stored."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from testbed.single_files import (
    expanded,
    folder_weights,
    save,
    scaled_float8,
    with_own_names,
    with_prefix,
)
from testbed.tiny_models import tiny_transformer
from testbed.tiny_wan import tiny_wan_transformer
from testbed.tiny_z_image import tiny_z_image_transformer
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.families.qwen_image import transformer as qwen_image
from vllm_omni.diffusion.compute.families.qwen_image.config import QwenImageConfig
from vllm_omni.diffusion.compute.families.wan import transformer as wan
from vllm_omni.diffusion.compute.families.wan.config import WanConfig
from vllm_omni.diffusion.compute.families.z_image import transformer as z_image
from vllm_omni.diffusion.compute.families.z_image.config import ZImageConfig
from vllm_omni.diffusion.compute.layers.fp8 import Fp8ColumnLinear
from vllm_omni.diffusion.compute.weights.loading import load_weights
from vllm_omni.diffusion.compute.weights.transformer_file import (
    Float8Choice,
    TransformerSource,
    load_transformer_file,
)

CPU = torch.device("cpu")
FLAG = "--transformer-file"
PARTS: dict[str, tuple[Any, Any, Any, str]] = {
    "qwen_image": (
        qwen_image,
        QwenImageConfig,
        qwen_image.QwenImageTransformer,
        "QwenImageTransformer2DModel",
    ),
    "z_image": (z_image, ZImageConfig, z_image.ZImageTransformer, "ZImageTransformer2DModel"),
    "wan": (wan, WanConfig, wan.WanTransformer, "WanTransformer3DModel"),
}
"""Family -> its module, config, class, and diffusers' class."""
EXPANDS = (False, False)
KEEPS = (False, True)
ROUNDS = (True, True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family with a transformer and nothing else."""
    torch.manual_seed(0)
    transformers = {
        "qwen_image": tiny_transformer(heads=4, layers=2),
        "z_image": tiny_z_image_transformer(heads=4, layers=2),
        "wan": tiny_wan_transformer(heads=4, layers=2, num_images=1),
    }
    folder = tmp_path_factory.mktemp("transformers")
    for family, transformer in transformers.items():
        transformer.save_pretrained(folder / family / "transformer")
    return {family: folder / family for family in transformers}


def module_of(family: str, folder: Path, group: Group) -> tuple[nn.Module, Any]:
    _, config_class, cls, _ = PARTS[family]
    config = config_class.from_dict(json.loads((folder / "transformer" / "config.json").read_text()))
    with torch.device("meta"):
        return cls(config, group), config


def opened(family: str, folder: Path, file: Path) -> TransformerSource:
    config = module_of(family, folder, Group.alone())[1]
    return TransformerSource.open(str(file), FLAG, "transformer", PARTS[family][3], config.expected_weights())


def from_file(
    family: str,
    folder: Path,
    file: Path,
    choice: tuple[bool, bool] = EXPANDS,
    group: Group | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    module, _ = module_of(family, folder, group or Group.alone())
    source = opened(family, folder, file)
    float8 = Float8Choice(PARTS[family][0].FLOAT8_LAYERS, *choice)
    counted: list[int] = []
    names = PARTS[family][0].CHECKPOINT_NAMES
    load_transformer_file(module, source, names, CPU, dtype, counted.append, float8)
    assert sum(counted) > 0
    return module


def from_folder(family: str, folder: Path, group: Group | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    module, _ = module_of(family, folder, group or Group.alone())
    load_weights(module, folder / "transformer", PARTS[family][0].CHECKPOINT_NAMES, CPU, dtype)
    return module


def assert_equal(got: nn.Module, want: nn.Module) -> None:
    ours, theirs = got.state_dict(), want.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
@pytest.mark.parametrize("own_names", [False, True], ids=["diffusers", "own"])
@pytest.mark.parametrize("family", PARTS)
def test_every_naming_gives_the_weights_of_the_folder(
    family: str, own_names: bool, prefix: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    weights = folder_weights(folders[family])
    named = with_own_names(family, weights) if own_names else weights
    assert (named.keys() == weights.keys()) == (not own_names or family == "qwen_image")
    file = save(with_prefix(named, prefix), tmp_path / "x.safetensors")
    assert_equal(from_file(family, folders[family], file), from_folder(family, folders[family]))


def test_of_a_whole_checkpoint_the_transformer_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = with_prefix(with_own_names("z_image", folder_weights(folders["z_image"])), "model.diffusion_model.")
    others = {
        "first_stage_model.decoder.conv_in.weight": torch.zeros(3),
        "text_encoders.qwen3.transformer.model.embed_tokens.weight": torch.zeros(3),
        "model.diffusion_model.__index_timestep_zero__": torch.zeros(1),
        "model.diffusion_model.norm_final.weight": torch.zeros(2),
    }
    file = save(weights | others, tmp_path / "all-in-one.safetensors")
    assert_equal(from_file("z_image", folders["z_image"], file), from_folder("z_image", folders["z_image"]))


def float8_file(family: str, folder: Path, file: Path, end: str = ".scale_weight") -> dict[str, Tensor]:
    """Write a file with all matrices in float8 with scales; returns its weights by diffusers' names."""
    named = with_own_names(family, folder_weights(folder))
    stored = scaled_float8(named, lambda name: True, end)
    save(with_prefix(stored, "diffusion_model."), file)
    return stored


def values_and_scales(module: nn.Module) -> dict[str, Tensor]:
    return {
        path: layer.weight.float() * layer.scale
        for path, layer in module.named_modules()
        if isinstance(layer, Fp8ColumnLinear)
    }


@pytest.mark.parametrize("end", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("family", PARTS)
def test_float8_values_are_kept_with_their_scales(
    family: str, end: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    stored = float8_file(family, folders[family], tmp_path / "fp8.safetensors", end)
    plain = save(expanded(stored), tmp_path / "plain.safetensors")
    want = from_file(family, folders[family], plain)
    for choice in (KEEPS, ROUNDS):
        got = from_file(family, folders[family], tmp_path / "fp8.safetensors", choice)
        kept = values_and_scales(got)
        layers = PARTS[family][0].FLOAT8_LAYERS
        assert {path.rpartition(".")[2] for path in kept} == set(layers)
        wanted = want.state_dict()
        for path, weight in kept.items():
            assert torch.equal(weight, wanted[f"{path}.weight"]), path
        others = {name: tensor for name, tensor in got.state_dict().items() if name.rpartition(".")[0] not in kept}
        assert others
        for name, tensor in others.items():
            assert torch.equal(tensor, wanted[name]), name
    assert_equal(from_file(family, folders[family], tmp_path / "fp8.safetensors", EXPANDS), want)


def test_float8_without_scales_has_a_scale_of_one(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = folder_weights(folders["z_image"])
    weights = {name: weight.to(torch.float8_e4m3fn) for name, weight in weights.items()}
    file = save(weights, tmp_path / "x.safetensors")
    plain = save({name: weight.float() for name, weight in weights.items()}, tmp_path / "plain.safetensors")
    want = from_file("z_image", folders["z_image"], plain)
    assert_equal(from_file("z_image", folders["z_image"], file), want)
    kept = values_and_scales(from_file("z_image", folders["z_image"], file, KEEPS))
    for path, weight in kept.items():
        assert torch.equal(weight, want.state_dict()[f"{path}.weight"])


def test_a_layer_is_in_float8_where_all_of_its_weights_are(folders: dict[str, Path], tmp_path: Path) -> None:
    """A file may keep some layers in a wider type; e5m2 is expanded."""
    weights = folder_weights(folders["qwen_image"])
    first, second = (f"transformer_blocks.{number}.attn." for number in range(2))
    stored = scaled_float8(weights, lambda name: name.startswith((first, second)) and name != f"{first}to_k.weight")
    stored[f"{second}to_out.0.weight"] = weights[f"{second}to_out.0.weight"].to(torch.float8_e5m2)
    stored.pop(f"{second}to_out.0.scale_weight")
    file = save(stored, tmp_path / "x.safetensors")
    module = from_file("qwen_image", folders["qwen_image"], file, KEEPS)
    assert values_and_scales(module).keys() == {
        "transformer_blocks.0.image.out",
        "transformer_blocks.0.text.qkv",
        "transformer_blocks.0.text.out",
        "transformer_blocks.1.image.qkv",
        "transformer_blocks.1.text.qkv",
        "transformer_blocks.1.text.out",
    }
    out = module.get_parameter("transformer_blocks.1.image.out.weight")
    assert torch.equal(out, stored[f"{second}to_out.0.weight"].float())
    plain = save(expanded(stored), tmp_path / "plain.safetensors")
    assert_equal(
        from_file("qwen_image", folders["qwen_image"], file), from_file("qwen_image", folders["qwen_image"], plain)
    )
    rounded = from_file("qwen_image", folders["qwen_image"], file, ROUNDS)
    assert len(values_and_scales(rounded)) == 2 * 8


@pytest.mark.parametrize("choice", [EXPANDS, KEEPS], ids=["expands", "keeps"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_scale_for_each_row_of_a_fused_weight(
    rank: int, choice: tuple[bool, bool], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Each part, and each rank's share of it, has the scales of its own rows."""
    weights = with_own_names("z_image", folder_weights(folders["z_image"]))
    name = "layers.1.attention.qkv"
    values, scales = weights[f"{name}.weight"].to(torch.float8_e4m3fn), torch.rand(3 * 64, 1)
    stored = {**weights, f"{name}.weight": values, f"{name}.weight_scale": scales}
    file = save(stored, tmp_path / "x.safetensors")
    module = from_file("z_image", folders["z_image"], file, choice, Group((0, 1), rank, Counter()))
    wanted = torch.cat([part.chunk(2)[rank] for part in (values.float() * scales).chunk(3)])
    kept = values_and_scales(module)
    assert kept.keys() == ({"layers.1.qkv"} if choice == KEEPS else set())
    got = kept["layers.1.qkv"] if kept else module.get_parameter("layers.1.qkv.weight")
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("family", PARTS)
def test_each_rank_reads_its_shard(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders[family]
    stored = float8_file(family, folder, tmp_path / "fp8.safetensors")
    plain = save(expanded(stored), tmp_path / "plain.safetensors")
    for rank in range(2):
        group = Group((0, 1), rank, Counter())
        want = from_file(family, folder, plain, group=group)
        assert_equal(from_file(family, folder, tmp_path / "fp8.safetensors", group=group), want)
        keeps = from_file(family, folder, tmp_path / "fp8.safetensors", KEEPS, group)
        for path, weight in values_and_scales(keeps).items():
            assert torch.equal(weight, want.state_dict()[f"{path}.weight"]), path


def test_weights_that_nobody_reads_may_be_there(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = folder_weights(folders["wan"])
    unread = {"blocks.0.attn2.norm_added_q.weight": torch.zeros(64)}
    file = save(weights | unread, tmp_path / "x.safetensors")
    assert_equal(from_file("wan", folders["wan"], file), from_folder("wan", folders["wan"]))
