"""GGUF files of transformers: layers compute with the expanded weights, and memory holds the blocks."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    GGUFQuantizationConfig,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from testbed.gguf_files import mixed_types, save_gguf
from testbed.live_bytes import LiveBytes
from testbed.runner_driver import QUICK, Drive, make_request, psnr
from testbed.single_files import folder_weights, save, with_own_names, with_prefix
from testbed.tiny_adapters import random_pairs, save_peft, transformer_of
from testbed.tiny_models import build_tiny_qwen_image, photo, tiny_transformer
from testbed.tiny_wan import tiny_wan_transformer
from testbed.tiny_z_image import tiny_z_image_transformer
from tests.diffusion.compute.distributed.ranks import run_places
from tests.diffusion.compute.families.qwen_image import test_transformer as qwen_image
from tests.diffusion.compute.families.test_float8 import velocities as first_steps
from tests.diffusion.compute.families.wan import packing as wan
from tests.diffusion.compute.families.z_image import test_transformer as z_image
from tests.diffusion.compute.weights.test_transformer_file import EXPANDS, PARTS, assert_equal, from_file
from tests.diffusion.compute.worker.replica import started
from vllm_omni.diffusion.catalog.registry import load_model_info
from vllm_omni.diffusion.compute.device.flat_weights import FlatWeights
from vllm_omni.diffusion.compute.device.host_runs import host_run
from vllm_omni.diffusion.compute.distributed.groups import Group
from vllm_omni.diffusion.compute.layers.compressed import CompressedColumnLinear, GgufRows
from vllm_omni.diffusion.compute.step.sampling import pack_latents
from vllm_omni.diffusion.compute.step.transformer import PackedTransformer
from vllm_omni.diffusion.compute.weights.adapter_layers import layer_targets
from vllm_omni.diffusion.compute.worker.runner import ModelRunner
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.messages.request import DiffusionRequest, LoRA
from vllm_omni.diffusion.messages.worker import RankInfo
from vllm_omni.errors import ConfigError
from vllm_omni.inputs.images import prepare_image

GRIDS = [(4, 4), (3, 5)]
LENGTHS = [9, 40]
TIMESTEPS = [0.9, 0.1]
CLASSES = {
    "qwen_image": QwenImageTransformer2DModel,
    "z_image": ZImageTransformer2DModel,
    "wan": WanTransformer3DModel,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family with a transformer, whose widths are multiples of the blocks' lengths."""
    torch.manual_seed(0)
    transformers = {
        "qwen_image": tiny_transformer(heads=16, layers=2),
        "z_image": tiny_z_image_transformer(heads=12, layers=1),
        "wan": tiny_wan_transformer(heads=16, layers=1, ffn_dim=512),
    }
    folder = tmp_path_factory.mktemp("transformers")
    for family, transformer in transformers.items():
        transformer.save_pretrained(folder / family / "transformer")
    return {family: folder / family for family in transformers}


def written(
    family: str, folder: Path, path: Path, kind_of: Callable[[str, Tensor], str] = mixed_types, prefix: str = ""
) -> tuple[Path, Path]:
    """A GGUF file by the model's own names, and a safetensors file with the same weights expanded."""
    weights = with_prefix(with_own_names(family, folder_weights(folder)), prefix)
    expanded = save_gguf(weights, path / "x.gguf", kind_of)
    return path / "x.gguf", save(expanded, path / "expanded.safetensors")


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Both files of each family, of mixed types."""
    return {family: written(family, folder, tmp_path_factory.mktemp(family)) for family, folder in folders.items()}


def whole(module: nn.Module) -> nn.Module:
    """The module with plain layers in place of the compressed ones."""
    for path, layer in list(module.named_modules()):
        if isinstance(layer, CompressedColumnLinear):
            plain = nn.Linear(1, 1, bias=layer.bias is not None)
            plain.weight = nn.Parameter(layer.expanded(torch.empty(0)), requires_grad=False)
            plain.bias = layer.bias
            module.set_submodule(path, plain)
    return module


@pytest.mark.parametrize("family", PARTS)
def test_layers_expand_to_the_weights_of_the_file(
    family: str, folders: dict[str, Path], files: dict[str, tuple[Path, Path]]
) -> None:
    file, expanded = files[family]
    module = from_file(family, folders[family], file)
    kinds = {rows.kind.name for rows in module.modules() if isinstance(rows, GgufRows)}
    assert len(kinds) > 4
    assert_equal(whole(module), from_file(family, folders[family], expanded))


@pytest.mark.parametrize("family", PARTS)
def test_each_rank_keeps_its_share_of_the_blocks(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file, expanded = written(family, folders[family], tmp_path, small_blocks)
    held = sum(buffer.nbytes for buffer in from_file(family, folders[family], file).buffers())
    for rank in range(2):
        group = Group((0, 1), rank, Counter())
        module = from_file(family, folders[family], file, group=group)
        assert sum(buffer.nbytes for buffer in module.buffers()) == held // 2
        assert_equal(whole(module), from_file(family, folders[family], expanded, EXPANDS, group))


def small_blocks(name: str, weight: Tensor) -> str:
    kind = mixed_types(name, weight)
    return "Q8_0" if kind.endswith("_K") and weight.shape[-1] < 512 else kind


def test_blocks_that_ranks_cannot_share_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    file, _ = written("wan", folders["wan"], tmp_path, lambda name, weight: "Q6_K" if ".o.w" in name else "F32")
    with pytest.raises(
        ConfigError,
        match=r"--tensor-parallel-size takes at most 1 with this GGUF file, got 2: blocks\.0\.attn1\.to_out\.0\.weight "
        r"is stored in Q6_K, in blocks of 256 numbers, and 2 ranks would have 128 of its 256 inputs each",
    ):
        from_file("wan", folders["wan"], file, group=Group((0, 1), 0, Counter()))


def velocities(family: str, ours: Any, theirs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Velocities of our transformer and of diffusers' for the same inputs."""
    torch.manual_seed(1)
    texts = [torch.randn(n, 32) for n in LENGTHS]
    if family == "wan":
        videos = wan.make_videos(16, [900.0, 500.0, 100.0, 10.0])
        return wan.packed(ours, videos), [wan.of_diffusers(theirs, video) for video in videos]
    if family == "z_image":
        latents = [torch.randn(16, 1, 2 * h, 2 * w) for h, w in GRIDS]
        tokens = [pack_latents(x[:, 0], channels_last=True) for x in latents]
        oracle = [
            theirs([x], torch.tensor([t]), [text], return_dict=False)[0][0][:, 0]
            for x, text, t in zip(latents, texts, TIMESTEPS)
        ]
        return z_image.packed(ours, tokens, texts, TIMESTEPS, GRIDS), [
            pack_latents(x, channels_last=True) for x in oracle
        ]
    tokens = [torch.randn(h * w, 64) for h, w in GRIDS]
    return qwen_image.packed(ours, tokens, texts, TIMESTEPS, [[grid] for grid in GRIDS]), [
        theirs(
            hidden_states=x[None],
            encoder_hidden_states=text[None],
            timestep=torch.tensor([timestep]),
            img_shapes=[[(1, *grid)]],
            return_dict=False,
        )[0][0]
        for x, text, timestep, grid in zip(tokens, texts, TIMESTEPS, GRIDS)
    ]


def nearness(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """PSNR in dB, with the largest magnitude as the peak."""
    a, b = torch.cat([x.flatten() for x in got]), torch.cat([x.flatten() for x in want])
    return float(10 * torch.log10(b.abs().max() ** 2 / (a - b).square().mean()))


def test_names_may_have_a_prefix(folders: dict[str, Path], tmp_path: Path) -> None:
    file, expanded = written("wan", folders["wan"], tmp_path, prefix="model.diffusion_model.")
    assert_equal(whole(from_file("wan", folders["wan"], file)), from_file("wan", folders["wan"], expanded))


@pytest.mark.parametrize("family", PARTS)
@torch.inference_mode()
def test_velocities_are_those_of_diffusers(
    family: str, folders: dict[str, Path], files: dict[str, tuple[Path, Path]]
) -> None:
    """diffusers computes with the same file; it expands in float16. With the expanded weights it is nearer."""
    file, expanded = files[family]
    ours = from_file(family, folders[family], file)
    assert any(isinstance(layer, GgufRows) for layer in ours.modules())
    found = []
    for path, settings in (
        (file, {"quantization_config": GGUFQuantizationConfig(compute_dtype=torch.float32)}),
        (expanded, {}),
    ):
        theirs = CLASSES[family].from_single_file(
            str(path), config=str(folders[family]), subfolder="transformer", dtype=torch.float32, **settings
        )
        found.append(nearness(*velocities(family, ours, theirs)))
    assert found[0] > 60
    assert found[1] > 90


def test_memory_holds_the_blocks_and_one_expanded_layer(
    folders: dict[str, Path], files: dict[str, tuple[Path, Path]]
) -> None:
    file, expanded = files["qwen_image"]
    module = from_file("qwen_image", folders["qwen_image"], file, dtype=torch.bfloat16)
    tensors = [*module.parameters(), *module.buffers()]
    held = sum(tensor.nbytes for tensor in tensors)
    assert held < 0.6 * sum(p.nbytes for p in from_file("qwen_image", folders["qwen_image"], expanded).parameters()) / 2
    layer = module.get_submodule("transformer_blocks.0.image.up")
    assert isinstance(layer, CompressedColumnLinear)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    with torch.inference_mode(), LiveBytes() as live:
        layer(x)
    # The blocks of one layer, its numbers in float32 with intermediate results, and in bfloat16.
    assert live.peak < 14 * layer.weight.numel()
    flat = FlatWeights([module])
    assert held <= flat.num_bytes < held + 256 * len(tensors)
    want, run = layer(x), host_run(flat.num_bytes, torch.device("cpu"))
    flat.save(run)
    flat.attach(run)
    assert torch.equal(layer(x), want)


DEFAULTS: dict[str, object] = {"height": 64, "width": 64, "num_inference_steps": 3}


def test_pictures_are_those_of_the_expanded_weights(tmp_path: Path) -> None:
    """Requests in a batch, one of them guided, one with an adapter; the file has diffusers' names."""
    path = build_tiny_qwen_image(tmp_path / "model", heads=16, default_sampling_params=DEFAULTS)
    pairs = random_pairs(transformer_of(path), 0, 4, 0.3)
    adapter = LoRA("style", str(save_peft(pairs, tmp_path / "style.safetensors")), 1.0)
    requests = [
        make_request("guided", negative_prompt="a blue car"),
        make_request("plain", height=32),
        make_request("adapted", height=32, loras=(adapter,)),
    ]
    pictures = check_pictures(path, tmp_path, requests)
    assert psnr(pictures["adapted"], pictures["plain"]) < 40


@pytest.mark.thorough
@pytest.mark.parametrize("layout", [{"tensor_parallel_size": 2}, {"ulysses_degree": 2}], ids=["tensor", "ulysses"])
def test_ranks_say_what_one_says_with_the_expanded_weights(tmp_path: Path, layout: dict[str, int]) -> None:
    path = build_tiny_qwen_image(tmp_path / "model", heads=8)
    file = tmp_path / "x.gguf"
    expanded = save(save_gguf(folder_weights(path), file, mixed_types), tmp_path / "expanded.safetensors")
    alone, parallel = DiffusionParallelConfig(), DiffusionParallelConfig(**layout)
    wanted: dict[str, np.ndarray]
    (wanted,) = run_places(first_steps, alone, alone, path, {"transformer_file": str(expanded)})
    for rank in run_places(first_steps, parallel, parallel, path, {"transformer_file": str(file)}):
        for name, want in wanted.items():
            assert nearness([torch.from_numpy(rank[name])], [torch.from_numpy(want)]) > 60


@pytest.mark.thorough
def test_blocks_are_not_compiled_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, file = build_tiny_qwen_image(tmp_path / "model", heads=2), tmp_path / "x.gguf"
    save_gguf(folder_weights(path), file, mixed_types)
    runner = ModelRunner(
        OmniDiffusionConfig(model=str(path), transformer_file=str(file)),
        load_model_info(str(path)),
        options=replace(QUICK, compile_blocks=True),
    )
    with caplog.at_level(logging.INFO):
        runner.start()
    assert "blocks are not compiled: each type of a GGUF file's layers would be compiled on its own" in caplog.text
    assert re.search(r"x\.gguf \(.*Q8_0.*\): \d+ weights stay compressed, 0\.00 GB; \d+ are expanded", caplog.text)
    assert "compiled variant" not in caplog.text


@pytest.mark.thorough
def test_edits_are_those_of_the_expanded_weights(tmp_path: Path) -> None:
    path = build_tiny_qwen_image(
        tmp_path / "model",
        heads=16,
        edit="QwenImageEditPlusPipeline",
        zero_cond_t=True,
        default_sampling_params=DEFAULTS,
    )
    image_input = load_model_info(str(path)).image_input
    assert image_input is not None
    images = (prepare_image(photo(64, 48, seed=0), image_input.sizes),)
    check_pictures(path, tmp_path, [make_request("a", images=images)])


def check_pictures(path: Path, tmp_path: Path, requests: Sequence[DiffusionRequest]) -> dict[str, np.ndarray]:
    """Check that a model draws the same with a GGUF file as with the same weights expanded. Returns the pictures."""
    file = tmp_path / "x.gguf"
    expanded = save(save_gguf(folder_weights(path), file, mixed_types), tmp_path / "expanded.safetensors")
    images = []
    for each in (file, expanded):
        runner = started(RankInfo(), DiffusionParallelConfig(), path, transformer_file=str(each))
        drive = Drive(runner).run({0: requests})
        assert not drive.errors
        images.append(drive.images)
    assert len(images[0]) == len(requests)
    for name, image in images[0].items():
        assert psnr(image, images[1][name]) >= 60
        assert image.std() > 10
    return images[0]


def refusal(family: str, folder: Path, file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        from_file(family, folder, file)
    return str(caught.value)


def test_files_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, file = folders["qwen_image"], tmp_path / "x.gguf"
    weights = folder_weights(folder)

    def without(name: str) -> dict[str, Tensor]:
        return {key: weight for key, weight in weights.items() if key != name}

    name = "transformer_blocks.1.attn.to_k.weight"
    save_gguf(without(name), file, mixed_types)
    assert f"x.gguf lacks 1 weights of the transformer, among them {name}" in refusal("qwen_image", folder, file)
    save_gguf(weights | {"surplus": torch.zeros(3)}, file, mixed_types)
    assert "has 1 weights that the transformer does not take, among them surplus" in refusal("qwen_image", folder, file)
    save_gguf(weights | {name: torch.ones(256, 512)}, file, mixed_types)
    assert f"{name} has shape (256, 512), by transformer/config.json it is (256, 256)" in refusal(
        "qwen_image", folder, file
    )
    save_gguf({"blk.0.attn_q.weight": torch.ones(256, 256)}, file, mixed_types)
    assert "has none of them, but blk.0.attn_q.weight" in refusal("qwen_image", folder, file)
    file.write_bytes(file.read_bytes()[:-100])
    assert "x.gguf is truncated or damaged" in refusal("qwen_image", folder, file)


def test_dims_of_one_may_be_missing_or_additional(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = folder_weights(folders["z_image"])
    want = from_file("z_image", folders["z_image"], save(weights, tmp_path / "x.safetensors"))
    squeezed = {name: weight.squeeze() for name, weight in weights.items()}
    assert squeezed["x_pad_token"].dim() < weights["x_pad_token"].dim()
    save_gguf(squeezed, tmp_path / "x.gguf", lambda *_: "F32")
    assert_equal(from_file("z_image", folders["z_image"], tmp_path / "x.gguf"), want)


def test_gguf_and_float8_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"^--quantization fp8 or a GGUF file, .*, got both$"):
        OmniDiffusionConfig(model="demo", quantization="fp8", transformer_file="x.GGUF")


def test_adapters_find_the_layers(folders: dict[str, Path], files: dict[str, tuple[Path, Path]]) -> None:
    for family, folder in folders.items():
        found = []
        for each in files[family]:
            module = from_file(family, folder, each)
            assert isinstance(module, PackedTransformer)
            found.append({name: (t.inputs, t.outputs, t.num_parts) for name, t in layer_targets([module]).items()})
        assert found[0] == found[1]
